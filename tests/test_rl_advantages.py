"""Advantages, against hand-computed episodes, the published definition of GAE, TRL 1.16's GRPO and TRL 1.12's PPO."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.trl_1_16_grpo import trl_advantages

from posttrain.rl.advantages import (
    gae,
    group_advantages,
    overlong_penalty,
    rloo_advantages,
    shaped_rewards,
    to_go,
    whiten,
)
from posttrain.rl.losses import clipped_value_loss, policy_loss, sequence_weights

PPO = json.loads((Path(__file__).parent / "oracles" / "trl_1_12_ppo.json").read_text())["cases"]


def test_gae_of_a_three_step_episode_by_hand():
    # gamma 0.9, lambda 0.5: deltas 1 + .9 * 2 - 1 = 1.8, 0 + .9 * 3 - 2 = .7, 4 - 3 = 1; then backwards by .45
    advantages, returns = gae(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([2.3175, 1.15, 1.0]))
    torch.testing.assert_close(returns, torch.tensor([3.3175, 3.15, 4.0]))


def test_gae_with_gamma_and_lambda_one_is_returns_minus_values():
    rewards, values = torch.tensor([0.5, -1.0, 2.0, 0.25]), torch.tensor([3.0, -2.0, 1.0, 0.5])
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    to_go = torch.tensor([1.75, 1.25, 2.25, 0.25])
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)


def test_gae_with_lambda_zero_is_the_one_step_error():
    rewards, values = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3.0, -2.0, 1.0])
    advantages, _ = gae(rewards, values, 0.5, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([0.5 - 1.0 - 3.0, -1.0 + 0.5 + 2.0, 2.0 - 1.0]))


@pytest.mark.parametrize("length", [1, 2, 17])
def test_gae_is_the_discounted_sum_of_errors(length):
    """Equation 16 of 1506.02438: A_t = sum over l of (gamma lambda)^l delta_{t+l}; the value past the end is 0."""
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, length, generator=generator)
    gamma, lam = 0.97, 0.9
    following = [*values.tolist()[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards.tolist(), following, values.tolist(), strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
    torch.testing.assert_close(gae(rewards, values, gamma, lam)[0], torch.tensor(expected))


def test_whitening_of_nine_values():
    """1.2, 1.3, ... 2.0 with the mean put back: the figures that biased and unbiased variance give."""
    values = torch.tensor([1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0])
    mean = values.mean()
    biased = whiten(values, mean, values.var(unbiased=False), shift_mean=False)
    unbiased = whiten(values, mean, values.var(unbiased=True), shift_mean=False)
    torch.testing.assert_close(
        biased[[0, 1, 2, -1]], torch.tensor([0.0508, 0.4381, 0.8254, 3.1492]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(unbiased[[0, -1]], torch.tensor([0.1394, 3.0606]), atol=1e-4, rtol=0)


def test_whitening_shifts_the_mean_to_zero_unless_told_otherwise():
    values = torch.tensor([1.0, 5.0, 3.0])
    assert whiten(values, values.mean(), values.var()).tolist() == pytest.approx([-1.0, 1.0, 0.0])
    assert whiten(values, values.mean(), values.var(), shift_mean=False).tolist() == pytest.approx([2.0, 4.0, 3.0])


def test_whitening_of_equal_values_is_zero():
    assert whiten(torch.full((4,), 3.0), torch.tensor(3.0), torch.tensor(0.0)).tolist() == [0.0] * 4


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_group_advantages_equal_trl(scale, n):
    rewards = torch.randn(6 * n, generator=torch.Generator().manual_seed(n)) * 3 + 1
    torch.testing.assert_close(group_advantages(rewards, n, scale), trl_advantages(rewards, n, scale))


def test_group_advantages_of_one_right_answer_in_four():
    # mean 1/4, unbiased std 1/2
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "group")
    torch.testing.assert_close(found, torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.3])
def test_equal_rewards_have_an_advantage_of_exactly_zero(scale, reward):
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0] * 3 + [1.0])  # the second group has a signal
    found = group_advantages(rewards, 7, scale)
    assert found[:7].tolist() == [0.0] * 7
    assert found[7:].abs().min() > 0
    assert torch.isfinite(group_advantages(torch.full((14,), reward), 7, scale)).all()


def test_shaped_rewards_put_the_score_on_the_last_token():
    logps, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    found = shaped_rewards(torch.tensor(3.0), logps, ref, beta=0.1)
    torch.testing.assert_close(found, torch.tensor([-0.05, 0.1, 3.0]))
    assert logps.tolist() == [-1.0, -2.0, -0.5]


@pytest.mark.parametrize(
    ("kind", "kl"),
    [("k2", [0.125, 0.5, 0.0]), ("k3", [0.106531, 0.718282, 0.0])],  # e^-.5 - .5, e - 2
)
def test_shaped_rewards_by_the_other_estimators(kind, kl):
    logps, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    found = shaped_rewards(torch.tensor(3.0), logps, ref, 0.1, kind)
    torch.testing.assert_close(found, torch.tensor([-0.1 * kl[0], -0.1 * kl[1], 3.0]), atol=1e-6, rtol=0)


def test_rloo_of_three_by_hand():
    # means of the others: 5.5, 4.5, 2; the second group has no signal
    found = rloo_advantages(torch.tensor([1.0, 3.0, 8.0, 0.1, 0.1, 0.1]), 3)
    torch.testing.assert_close(found[:3], torch.tensor([1.0 - 5.5, 3.0 - 4.5, 8.0 - 2.0]))
    assert found[3:].tolist() == [0.0] * 3


def test_rloo_of_one_generation_is_refused():
    with pytest.raises(ValueError, match="num_generations: found 1"):
        rloo_advantages(torch.zeros(4), 1)


groups = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-20, 20), min_size=n, max_size=n), min_size=1, max_size=4)
)


@settings(deadline=None)
@given(groups, st.integers(-50, 50), st.sampled_from(["rloo", "group", "batch", "none"]), st.randoms())
def test_advantages_of_groups_know_neither_shift_nor_order(rewards, shift, kind, random):
    n = len(rewards[0])

    def advantages(rows):
        flat = torch.tensor(rows, dtype=torch.float64).flatten()
        return (rloo_advantages(flat, n) if kind == "rloo" else group_advantages(flat, n, kind)).view(-1, n)

    found = advantages(rewards)
    torch.testing.assert_close(advantages([[r + shift for r in row] for row in rewards]), found)
    torch.testing.assert_close(found.sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-8, rtol=0)
    order = random.sample(range(n), n)
    torch.testing.assert_close(advantages([[row[k] for k in order] for row in rewards]), found[:, order])
    for row, values in zip(rewards, found, strict=True):
        assert (values == 0).all() == (len(set(row)) == 1)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards: found 'std'"):
        group_advantages(torch.zeros(4), 2, "std")


def test_to_go_by_hand():
    # 4; 2 + .5 * 4; 1 + .5 * 4
    assert to_go(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert to_go(torch.tensor([0.0, 0.0, 4.0]), 1.0).tolist() == [4.0] * 3


def test_nothing_leaks_past_the_end_of_a_completion():
    """What stands after the end in a longer tensor changes nothing, because it is not passed; the last one's next
    value is 0: r - v, whatever gamma."""
    advantages, returns = gae(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 7.0]), 0.9, 0.8)
    assert advantages[-1].item() == 2.0 - 7.0 and returns[-1].item() == 2.0
    assert advantages[0].item() == pytest.approx(0.9 * 7.0 - 5.0 + 0.72 * -5.0)


def test_overlong_penalty_is_equation_13_of_dapo():
    """2503.14476 with 20,480 tokens, 4,096 of them cache: free to 16,384, then down to -1."""
    lengths = torch.tensor([1, 16384, 16385, 18432, 20480, 30000])
    found = overlong_penalty(lengths, 20480, 4096)
    assert found.tolist() == pytest.approx([0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0])


@pytest.mark.parametrize("cache", [0, -1, 65])
def test_a_cache_that_does_not_fit_is_refused(cache):
    with pytest.raises(ValueError, match=f"cache: found {cache}, expected 1 to max_length, 64"):
        overlong_penalty(torch.tensor([1]), 64, cache)


def rows_of(case: dict, key: str, extra: int = 0) -> list[torch.Tensor]:
    """The real part of each row of a (B, T) array; TRL's rows go one token on after an end, where its score sits."""
    array = {**case["inputs"], **case["outputs"]}[key]
    lengths = [min(n + extra, len(array[0])) for n in case["lengths"]]
    return [torch.tensor(row[:n], dtype=torch.float64) for row, n in zip(array, lengths, strict=True)]


@pytest.mark.parametrize("case", PPO, ids=["k1", "k3", "whitened"])
def test_ppo_rewards_and_gae_equal_trl(case):
    """oracles/trl_1_12_ppo.json: TRL puts the score one step after the end token, and trains a value there as well."""
    args, shaped = case["settings"], []
    kind, beta = args["kl_estimator"], args["kl_coef"]
    scores = torch.tensor(case["inputs"]["scores"], dtype=torch.float64)
    scores[0] -= args["missing_eos_penalty"]  # the one that never ended
    torch.testing.assert_close(scores, torch.tensor(case["outputs"]["penalised_scores"], dtype=torch.float64))
    for score, old, ref in zip(scores, rows_of(case, "logps"), rows_of(case, "ref_logps"), strict=True):
        room = torch.zeros(0 if len(old) == 9 else 1, dtype=torch.float64)
        shaped.append(shaped_rewards(score, torch.cat([old, room]), torch.cat([ref, room]), beta, kind))
    if args["whiten_rewards"]:
        flat = torch.cat(shaped)
        shaped = [whiten(r, flat.mean(), flat.var(), shift_mean=False) for r in shaped]
    values = rows_of(case, "values", 1)
    for key, found in {
        "rewards": shaped,
        "gae_advantages": [gae(r, v, args["gamma"], args["lam"])[0] for r, v in zip(shaped, values, strict=True)],
        "returns": [gae(r, v, args["gamma"], args["lam"])[1] for r, v in zip(shaped, values, strict=True)],
    }.items():
        torch.testing.assert_close(torch.cat(found), torch.cat(rows_of(case, key, 1)), rtol=1e-6, atol=1e-9)
    flat = torch.cat(rows_of(case, "gae_advantages"))
    expected = torch.cat(rows_of(case, "advantages"))
    torch.testing.assert_close(whiten(flat, flat.mean(), flat.var()), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", PPO, ids=["k1", "k3", "whitened"])
def test_ppo_loss_and_gradients_equal_trl(case):
    args, tokens, out = case["settings"], sum(case["lengths"]), case["outputs"]
    logps, old, advantages = (torch.cat(rows_of(case, key)) for key in ("new_logps", "logps", "advantages"))
    values, before, returns = (torch.cat(rows_of(case, key, 1)) for key in ("new_values", "values", "returns"))
    logps.requires_grad_()
    values.requires_grad_()
    clip = args["cliprange"]
    terms = policy_loss(logps, old, advantages, case["lengths"], low=clip, high=clip, loss_type="bnpo")
    weights = sequence_weights("bnpo", torch.tensor(case["lengths"]).double(), tokens, 5, 9)
    policy = (terms.loss * weights.double().repeat_interleave(torch.tensor(case["lengths"]))).sum()
    value = clipped_value_loss(values, before, returns, args["cliprange_value"]).mean()
    (policy + args["vf_coef"] * value).backward()
    assert policy.item() == pytest.approx(out["pg_loss"], rel=1e-6)
    assert value.item() == pytest.approx(out["vf_loss"], rel=1e-6)
    assert (policy + args["vf_coef"] * value).item() == pytest.approx(out["loss"], rel=1e-6)
    assert terms.clipped.mean().item() == pytest.approx(out["pg_clipfrac"], rel=1e-6)
    of_policy, of_value = torch.cat(rows_of(case, "gradient_new_logps")), rows_of(case, "gradient_new_values", 1)
    torch.testing.assert_close(logps.grad, of_policy, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(values.grad, torch.cat(of_value), rtol=1e-6, atol=1e-9)
