"""The proof after a sync: engine and trainer give a few fresh tokens the same probabilities.

In: an engine that was just synced, the trainer's model, some prompts. Out: how far apart they are, or an EngineError.
"""

import math
from collections.abc import Callable

import torch

from posttrain.rl.engine import Engine, EngineError, Sampling
from posttrain.rl.hf_engine import model_logps
from posttrain.rl.types import Completion


def prove_sync(
    engine: Engine,
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    bound: float,
    seed: int,
    num_tokens: int = 4,
    temperature: float = 1.0,
    logps: Callable[..., list[torch.Tensor]] = model_logps,
) -> float:
    """Mean exp |log-prob of the engine - of the trainer| over `num_tokens` fresh tokens of each prompt; 1 = equal.

    model: the bare one, without DDP's wrapper. logps(model, prompts, completions, temperature) gives (T_i,) tensors;
    another one than `model_logps` where the model is sharded. Nothing ends a completion, so that none is empty.
    EngineError where the mean passes `bound` or is no number; it names the first token that does by itself.
    """
    sampling = Sampling(1, num_tokens, (), temperature)
    completions = engine.generate(prompts, sampling, seed)
    return compare(engine.name, completions, logps(model, prompts, [c.ids for c in completions], temperature), bound)


def compare(name: str, completions: list[Completion], expected: list[torch.Tensor], bound: float) -> float:
    """The same of completions that are there already; `expected` are the trainer's (T_i,) log-probabilities of the
    sampled tokens."""
    pairs = zip(completions, expected, strict=True)
    gaps = [(torch.tensor([c.logps[i] for i in c.sampled], dtype=torch.float64) - e.double()).abs() for c, e in pairs]
    mean = torch.cat(gaps).exp().mean().item()
    if mean <= bound:
        return mean
    far = [(row, place) for row, gap in enumerate(gaps) for place, g in enumerate(gap) if not g <= math.log(bound)]
    row, place = far[0]
    at = completions[row].sampled[place]
    raise EngineError(
        f"{name} and the trainer disagree after a sync: mean exp|log-probability difference| of "
        f"{sum(map(len, gaps))} fresh tokens is {mean:.4g}, the bound is {bound:g}; first at prompt {row}, token "
        f"{at} (id {completions[row].ids[at]}): engine {completions[row].logps[at]:.4f}, trainer "
        f"{expected[row][place].item():.4f}; {len(far)} tokens are too far apart, the largest gap is "
        f"{torch.cat(gaps).max().item():.4f}. Likely causes: weights that did not reach the engine (one missing, a "
        "tied head that is stale, an adapter not merged), another dtype than the trainer's (--dtype float32), dropout "
        "on (model.eval()), or a model that the engine computes otherwise"
    )
