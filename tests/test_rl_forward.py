"""Laid-out forwards of RL: a prompt once a group, tools' tokens left out, against one sequence by itself."""

import pytest
import torch
from rl_helpers import perturb, plain_logps, tiny_llama, tiny_scorer

from posttrain.layouts import LAYOUTS, Layout
from posttrain.rl.forward import CriticForward, PolicyForward, each_token, lay_out, rollout_logps, split
from posttrain.rl.types import Completion, Rollouts

EVERY = pytest.mark.parametrize("layout", LAYOUTS)


def draw(length: int, seed: int) -> list[int]:
    return torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def some_rollouts() -> Rollouts:
    """Three prompts with four completions each: equal first tokens, equal completions, one token, many."""
    prompts = [draw(n, n) for n in (9, 1, 40)]
    ids = [draw(n, 50 + n) for n in (1, 30, 7, 2, 5, 5, 90, 1, 12, 13, 14, 15)]
    ids[1][:3] = ids[2][:3] = [7, 8, 9]
    ids[4] = ids[5]
    completions = [Completion(x, [0.0] * len(x), "length") for x in ids]
    return Rollouts([{}] * 12, [prompts[i // 4] for i in range(12)], completions, 4)


@EVERY
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("cost", [0.0, 1.0], ids=["wide", "narrow"])
def test_every_layout_gives_the_log_probabilities_of_each_sequence_alone(layout, max_tokens, cost):
    model, rollouts = tiny_llama(), some_rollouts()
    laid_out = Layout(layout, 0.0 if layout == "padded" else cost)
    found = rollout_logps(model, rollouts, laid_out, 0.7, max_tokens)
    for prompt, completion, logps in zip(rollouts.prompt_ids, rollouts.completions, found, strict=True):
        torch.testing.assert_close(logps, plain_logps(model, prompt, completion.ids, 0.7), atol=2e-5, rtol=1e-5)


@EVERY
def test_a_tools_tokens_are_context_and_no_targets(layout):
    """Masked tokens are read by what follows, but none of them is predicted."""
    model, rollouts = tiny_llama(), some_rollouts()
    for index in (1, 6, 8):
        mask = [1] * len(rollouts.completions[index].ids)
        mask[3:6] = [0, 0, 0]
        rollouts.completions[index].mask = mask
    found = rollout_logps(model, rollouts, Layout(layout), 1.0, 10_000)
    assert [len(x) for x in found] == rollouts.sampled_lengths
    for prompt, completion, logps in zip(rollouts.prompt_ids, rollouts.completions, found, strict=True):
        whole = plain_logps(model, prompt, completion.ids)
        kept = [i for i, bit in enumerate(completion.mask or [1] * len(completion.ids)) if bit]
        torch.testing.assert_close(logps, whole[kept], atol=2e-5, rtol=1e-5)


@EVERY
def test_gradients_are_those_of_each_sequence_alone(layout):
    rollouts, gradients = some_rollouts(), []
    weights = torch.linspace(-1, 1, sum(rollouts.lengths))
    for plain in (False, True):
        model, offset = tiny_llama(), 0
        if plain:
            for prompt, completion in zip(rollouts.prompt_ids, rollouts.completions, strict=True):
                logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
                logps = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
                (logps * weights[offset : offset + len(logps)]).sum().backward()
                offset += len(logps)
        else:
            groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
            batch, select, targets, sizes = lay_out(rollouts, groups, Layout(layout))
            assert sizes == rollouts.lengths
            logps, entropy, values = PolicyForward(model)(batch, select, targets, 1.0)
            assert values is None and (entropy > 0).all()
            (logps * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-7, name


@EVERY
def test_values_stand_before_each_token(layout):
    """The critic reads what came before a token, the prompt's end first, and never the token itself."""
    critic, rollouts = tiny_scorer(), some_rollouts()
    forward = CriticForward(critic)
    found = each_token(rollouts, Layout(layout), 10_000, "cpu", lambda batch, select, _: forward(batch, select))
    for prompt, completion, values in zip(rollouts.prompt_ids, rollouts.completions, found, strict=True):
        with torch.no_grad():
            hidden = critic.model(torch.tensor([prompt + completion.ids])).last_hidden_state[0]
        expected = critic.score(hidden)[len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(values, expected.detach(), atol=2e-5, rtol=1e-5)


def test_a_value_head_on_the_trunk_reads_the_same_places():
    model, rollouts = tiny_llama(), some_rollouts()
    head = torch.nn.Linear(64, 1, bias=False)
    perturb(head, 1.0)
    forward = PolicyForward(model, head)
    found = each_token(rollouts, Layout("prefix"), 10_000, "cpu", lambda b, s, t: forward(b, s, t, 1.0)[2])
    for prompt, completion, values in zip(rollouts.prompt_ids, rollouts.completions, found, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + completion.ids])).last_hidden_state[0]
            torch.testing.assert_close(values, head(hidden)[len(prompt) - 1 : -1, 0], atol=2e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("max_tokens", [1, 50, 100, 10_000])
def test_micro_batches_hold_every_completion_once_and_keep_their_bound(layout, max_tokens):
    rollouts = some_rollouts()
    chosen = [0, 2, 3, 5, 6, 8, 9, 10, 11]
    batches = split(rollouts, chosen, Layout(layout), max_tokens)
    assert sorted(i for batch in batches for group in batch for i in group) == chosen
    for batch in batches:
        ids, *_ = lay_out(rollouts, batch, Layout(layout))
        alone = len(batch) == 1 and len(batch[0]) == 1
        used = sum(len(rollouts.prompt_ids[i]) + len(rollouts.completions[i].ids) for g in batch for i in g)
        assert alone or layout == "prefix" or used <= max_tokens
        assert all(len({i // 4 for i in group}) == 1 for group in batch)
    if layout == "prefix" and max_tokens == 10_000:
        ids, *_ = lay_out(rollouts, batches[0], Layout(layout))
        packed, *_ = lay_out(rollouts, batches[0], Layout("packed"))
        assert (ids.input_ids != 0).sum() < (packed.input_ids != 0).sum() - 2 * 40  # prompts stand once
