"""Advantages, against hand-computed episodes, the published definition of GAE and TRL 1.16's formula."""

import pytest
import torch
from trl.trainer.utils import nanstd

from posttrain.rl.advantages import gae, group_advantages, shaped_rewards, whiten


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
    biased = whiten(values, mean, values.var(unbiased=False)) + mean
    unbiased = whiten(values, mean, values.var(unbiased=True)) + mean
    torch.testing.assert_close(
        biased[[0, 1, 2, -1]], torch.tensor([0.0508, 0.4381, 0.8254, 3.1492]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(unbiased[[0, -1]], torch.tensor([0.1394, 3.0606]), atol=1e-4, rtol=0)


def test_whitening_of_equal_values_is_zero():
    assert whiten(torch.full((4,), 3.0), torch.tensor(3.0), torch.tensor(0.0)).tolist() == [0.0] * 4


def trl_advantages(rewards: torch.Tensor, n: int, scale: str) -> torch.Tensor:
    """TRL 1.16's `GRPOTrainer._generate_and_score_completions` (inline there), with its own `nanstd`."""
    centred = rewards - torch.nanmean(rewards.view(-1, n), dim=1).repeat_interleave(n)
    if scale == "none":
        return centred
    std = nanstd(rewards.view(-1, n), dim=1).repeat_interleave(n) if scale == "group" else nanstd(rewards)
    return centred / (std + 1e-4)


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
