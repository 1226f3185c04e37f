"""From experience to forward passes: a `MicroBatch` holds packed rows and, flat over tokens, what a loss needs.

In: an `Experience` and indices into it. Out: micro-batches of bounded size, whatever the lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain import gate
from posttrain.evals import fit_prompts, prompt_ids, prompt_size
from posttrain.packing import Packed, by_tokens, pack
from posttrain.rl.config import RLConfig
from posttrain.rl.logprobs import completion_positions
from posttrain.rl.types import Experience, Rollouts


@dataclass
class MicroBatch:
    """M = all completion tokens of its sequences; tensors (M,) unless said otherwise."""

    packed: Packed
    select: Tensor  # flat position that predicts each token
    targets: Tensor
    sizes: list[int]  # completion tokens of each sequence
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor  # of each token in the step's loss
    ref_logps: Tensor | None
    values: Tensor | None
    returns: Tensor | None


def encode_prompts(run, model, tokenizer, rows: list[dict], test: list[dict], config: RLConfig, replies):
    """(rows with `prompt_ids` and `row`, held-out rows, the longest prompt with reply that the engine must have room
    for). Prompts longer than max_prompt_length or than the model's context has room for are left out of both."""
    prompts = []
    for index, row in enumerate(rows):
        prompts.append({**row, "prompt_ids": prompt_ids(tokenizer, row), "row": index})
    most, sizes = config.max_prompt_length, [len(row["prompt_ids"]) for row in prompts]
    prompts, longest = fit_prompts(run, model, prompts, sizes, config.max_completion_length + 1, most)
    sizes = [prompt_size(tokenizer, row) for row in test]
    test, longest_test = fit_prompts(run, model, test, sizes, replies.eval_max_tokens + 1, most)
    return prompts, test, max(longest, longest_test)


def gated_prompts(run, model, tokenizer, rows: list[dict], test: list[dict], config: RLConfig, replies):
    """`encode_prompts` of what a stage is about to train on, once the gate has let it pass."""
    prompts, test, longest = encode_prompts(run, model, tokenizer, rows, test, config, replies)
    gate.require(run, gate.rl_checks(tokenizer, model, rows, prompts, run.parents))
    return prompts, test, longest


def token_lengths(rollouts: Rollouts) -> list[int]:
    return [len(p) + len(c.ids) for p, c in zip(rollouts.prompt_ids, rollouts.completions, strict=True)]


def pack_rollouts(rollouts: Rollouts, indices: list[int], device) -> tuple[Packed, Tensor, Tensor, list[int]]:
    """(packed rows, select (M,), targets (M,), completion sizes) of these completions with their prompts."""
    prompts = [rollouts.prompt_ids[i] for i in indices]
    completions = [rollouts.completions[i].ids for i in indices]
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    packed = pack(sequences, capacity=max(256, *map(len, sequences)))
    sizes = [len(c) for c in completions]
    select = completion_positions(packed.starts, [len(p) for p in prompts], sizes).to(device)
    packed = packed.to(device)
    return packed, select, packed.input_ids.flatten()[select + 1], sizes


def micro_batches(experience: Experience, indices: list[int], weights: Tensor, max_tokens: int, device):
    """Micro-batches over `indices`; `weights` (N,) is the weight of each token of each sequence."""
    lengths = token_lengths(experience.rollouts)
    batches = []
    for group in by_tokens([lengths[i] for i in indices], max_tokens):
        members = [indices[g] for g in group]
        packed, select, targets, sizes = pack_rollouts(experience.rollouts, members, device)

        def flat(pieces, members=members):
            return None if pieces is None else torch.cat([pieces[i] for i in members]).to(device)

        batches.append(
            MicroBatch(
                packed,
                select,
                targets,
                sizes,
                flat(experience.old_logps),
                flat(experience.advantages),
                torch.repeat_interleave(weights[members], torch.tensor(sizes)).to(device),
                flat(experience.ref_logps),
                flat(experience.values),
                flat(experience.returns),
            )
        )
    return batches
