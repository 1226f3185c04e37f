"""From experience to forward passes: a `MicroBatch` holds laid-out rows and, flat over tokens, what a loss needs.

In: an `Experience` and indices into it. Out: micro-batches of bounded size, whatever the lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain import gate
from posttrain.evals import fit_prompts, prompt_ids, prompt_size
from posttrain.identity_eval import longest_prompt
from posttrain.layouts import Batch, Group, Layout
from posttrain.models import require_positions
from posttrain.rl.config import RLConfig
from posttrain.rl.forward import lay_out, sequences_of, split
from posttrain.rl.types import Experience
from posttrain.tools import with_tools


@dataclass
class MicroBatch:
    """M = all sampled tokens of its completions; tensors (M,) unless said otherwise."""

    batch: Batch
    select: Tensor  # flat place that predicts each token
    targets: Tensor
    sizes: list[int]  # sampled tokens of each completion
    tokens: int  # of the forward, prompts included, pads not
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor  # of each token in the step's loss
    behaviour_logps: Tensor | None
    ref_logps: Tensor | None
    values: Tensor | None
    returns: Tensor | None


def encode_prompts(run, model, tokenizer, rows: list[dict], test: list[dict], config: RLConfig, replies):
    """(rows with `prompt_ids` and `row`, held-out rows, the longest prompt with reply that the engine must have room
    for). Prompts longer than max_prompt_length or than the model's context has room for are left out of both."""
    prompts, rows = [], with_tools(rows, config.tools, config.tool_options)
    test = with_tools(test, config.tools, config.tool_options) if replies.eval_tools is None else replies.told(test)
    for index, row in enumerate(rows):
        prompts.append({**row, "prompt_ids": prompt_ids(tokenizer, row), "row": index})
    most, sizes = config.max_prompt_length, [len(row["prompt_ids"]) for row in prompts]
    prompts, longest = fit_prompts(run, model, prompts, sizes, config.max_completion_length + 1, most)
    sizes = [prompt_size(tokenizer, row) for row in test]
    test, longest_test = fit_prompts(run, model, test, sizes, replies.eval_max_tokens + 1, most)
    return prompts, test, max(longest, longest_test)


def gated_prompts(
    run, model, tokenizer, rows: list[dict], test: list[dict], config: RLConfig, replies, identity: str | None = None
):
    """`encode_prompts` of what a stage is about to train on, once the gate has let it pass; with room for replies to
    the questions of an `identity` file, too."""
    prompts, test, longest = encode_prompts(run, model, tokenizer, rows, test, config, replies)
    if identity is not None:
        longest = max(longest, longest_prompt(tokenizer, identity) + replies.eval_max_tokens + 1)
        require_positions(model, "eval_max_tokens", longest)
    rows = with_tools(rows, config.tools, config.tool_options)
    gate.require(run, gate.rl_checks(tokenizer, model, rows, prompts, run.parents))
    return prompts, test, longest


def micro_batches(
    experience: Experience, indices: list[int], weights: Tensor, layout: Layout, max_tokens: int, device
) -> list[MicroBatch]:
    """Micro-batches over `indices`; `weights` (N,) is the weight of each token of each completion."""
    batches = []
    for groups in split(experience.rollouts, indices, layout, max_tokens):
        members = [i for group in groups for i in group]
        batch, select, targets, sizes = lay_out(experience.rollouts, groups, layout)
        tokens = sum(layout.tokens(Group(sequences_of(experience.rollouts, group))) for group in groups)

        def flat(pieces, members=members):
            return None if pieces is None else torch.cat([pieces[i] for i in members]).to(device)

        batches.append(
            MicroBatch(
                batch.to(device), select.to(device), targets.to(device), sizes, tokens,
                flat(experience.old_logps),
                flat(experience.advantages),
                torch.repeat_interleave(weights[members], torch.tensor(sizes)).to(device),
                flat(experience.behaviour_logps), flat(experience.ref_logps), flat(experience.values),
                flat(experience.returns),
            )
        )  # fmt: skip
    return batches
