"""Small real parts for the RL and reward-model tests: a tokenizer, Llamas with random weights, a stage, gradients.

In: a seed or a folder. Out: objects of transformers and posttrain; nothing here is a stand-in for the code under test.
"""

import json
import signal
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch

from posttrain import stage
from posttrain.rl.config import LossConfig, RLConfig
from posttrain.rl.models import Networks, Reference
from posttrain.rl.rollout import HFEngine
from posttrain.rl.trainer import RLTrainer
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ROOT = Path(__file__).parents[1]
NETWORKS = ("reference", "critic")


@cache
def tiny_tokenizer():
    """261 tokens: bytes, end of text, pad and the three chat tokens; the turn's end token is eos, pad is another."""
    from posttrain.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["abc"], vocab_size=261)
    tokenizer.chat_template = (ROOT / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def llama_config(*, tied: bool = True, **changes):
    """Weights are drawn ten times wider than usual: outputs are peaked, so that greedy choices are no ties."""
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.2,
    }  # fmt: skip
    ids = {"eos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return LlamaConfig(**{**shape, **ids, "tie_word_embeddings": tied, **changes})


def tiny_llama(seed: int = 0, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def tiny_scorer(seed: int = 0, **changes):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1, **changes)).eval()


def perturb(model, scale: float, seed: int = 0) -> None:
    """Add noise to every weight; what an optimizer step does, only larger."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def plain_logps(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(T,) log-probabilities of a completion from transformers' own forward of that one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    logps = torch.log_softmax(logits / temperature, dim=-1)
    start = len(prompt) - 1
    return torch.stack([logps[start + t, token] for t, token in enumerate(completion)])


@contextmanager
def signals_restored():
    """A stage takes SIGINT and SIGTERM over; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_stage(folder, *configs, name: str = "grpo", **stage_keys):
    config = StageConfig(output_dir=str(folder), logging_steps=1, **stage_keys)
    return stage.start(name, (config, *configs), parents={}, data=[])


def settings(**keys) -> tuple[RLConfig, LossConfig]:
    """Both configs of the loop from one set of keys."""
    known = {field.name for field in fields(RLConfig)}
    parts = [{key: value for key, value in keys.items() if (key in known) == mine} for mine in (True, False)]
    return RLConfig(**parts[0]), LossConfig(**parts[1])


def frozen(policy) -> Reference:
    """The policy as it is now, to measure a KL against."""
    return Reference(deepcopy(policy))


def make_trainer(folder, policy, rewards, config, *, optim=None, engine=None, stage_keys=None, **parts):
    """An `RLTrainer` over chat prompts `a`, `b`, ... that samples by `generate` from its own policy; `config` is an
    RLConfig, or what `settings` gives."""
    from posttrain.chat import encode_chat

    tokenizer = tiny_tokenizer()
    optim = optim or OptimConfig(learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
    config, loss = config if isinstance(config, tuple) else (config, LossConfig())
    run = start_stage(folder, config, loss, optim, **(stage_keys or {}))
    rows = [{"prompt": [{"role": "user", "content": "abcdefgh"[: i + 1]}], "row": i, "answer": "a"} for i in range(8)]
    prompts = [
        {**row, "prompt_ids": encode_chat(tokenizer, row["prompt"], add_generation_prompt=True).input_ids}
        for row in rows
    ]
    accelerator = stage.accelerator(bf16=False)
    networks = Networks(policy.to(accelerator.device), tokenizer, policy, *(parts.pop(k, None) for k in NETWORKS))
    engine = engine or HFEngine(policy, tokenizer.pad_token_id)
    return RLTrainer(run, accelerator, config, loss, optim, networks, engine, prompts, rewards, **parts)


@contextmanager
def gradients_of(model):
    """A dict that holds, after an optimizer step, the gradients that it was given (before clipping)."""
    grads: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(parameter):
            grads[name] = parameter.grad.detach().clone()

        return hook

    handles = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in model.named_parameters()]
    try:
        yield grads
    finally:
        for handle in handles:
            handle.remove()


def assert_same_gradients(found: dict, expected: dict, rtol: float = 1e-4) -> None:
    """Equal within `rtol` of each tensor's largest entry (single entries may cancel to nothing)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert (found[name] - value).abs().max().item() <= rtol * scale + 1e-9, name


# ---- a bandit: `a` in each of four places is what pays --------------------------------------------------------------

BANDIT = {"num_prompts": 4, "num_generations": 8, "max_completion_length": 4}


def likes_a(prompts, completions, completion_ids, **columns) -> list[float]:
    """Share of the four places that hold `a`."""
    return [completion.count("a") / 4 for completion in completions]


def flat_llama(seed: int = 0, **changes):
    """Near-uniform over its 261 tokens, as an untrained policy is: the bandit has everything to find."""
    return tiny_llama(seed, initializer_range=0.02, **changes)


def logged(trainer) -> list[dict]:
    """Lines of log.jsonl."""
    return [json.loads(line) for line in (trainer.stage.output_dir / "log.jsonl").read_text().splitlines()]
