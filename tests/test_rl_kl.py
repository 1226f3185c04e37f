"""KL estimators and their gradients, controllers of its weight, running moments: against closed forms and numpy."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rl.kl import AdaptiveKL, FixedKL, RunningMoments, kl_estimates, kl_loss
from posttrain.rl.logprobs import gather_logps

LOGITS, REFERENCE, SAMPLING = [0.3, -0.5, 1.0, 0.1], [0.0, 0.4, -0.3, 0.2], [0.9, 0.2, -0.4, 0.0]


@pytest.mark.parametrize(
    ("mu", "kind", "bias", "spread"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.002, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.00),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.70),
    ],
)
def test_bias_and_spread_of_the_kl_estimators(mu, kind, bias, spread):
    """Schulman's table (joschu.net/blog/kl-approx.html): samples of N(0, 1), reference N(mu, 1), in units of the KL.

    The expectation is taken by quadrature, so the figures are exact and not drawn.
    """
    x = torch.linspace(-14, 14, 28_001, dtype=torch.float64)
    logp, ref = -0.5 * x**2, -0.5 * (x - mu) ** 2
    weights = logp.exp() / logp.exp().sum()
    values, true = kl_estimates(logp, ref, kind), 0.5 * mu**2
    mean = (weights * values).sum()
    std = (weights * (values - mean) ** 2).sum().sqrt()
    assert (mean / true - 1).item() == pytest.approx(bias, abs=1e-3)
    assert (std / true).item() == pytest.approx(spread, abs=6e-3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.0, 0.0, 0.0, 0.0]),
        ("k2", [-0.0626, -0.1540, 0.3443, -0.1277]),  # gradient of KL(policy, reference)
        ("k3", [0.0090, -0.2300, 0.3040, -0.0830]),  # gradient of KL(reference, policy)
    ],
)
def test_expected_gradients_of_the_kl_estimators(kind, expected):
    found = expected_gradient(kind, LOGITS, use_bias_correction_kl=False)
    torch.testing.assert_close(found, torch.tensor(expected), atol=6e-5, rtol=0)


def expected_gradient(kind: str, sampling: list[float], **options) -> torch.Tensor:
    """Gradient of the loss's mean over all four tokens, drawn with softmax(sampling)."""
    logits, drawn = torch.tensor(LOGITS, requires_grad=True), torch.log_softmax(torch.tensor(sampling), 0)
    logps, ref = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor(REFERENCE), 0)
    (drawn.exp() * kl_loss(logps, ref, kind, torch.exp(logps - drawn), **options)).sum().backward()
    return logits.grad


@pytest.mark.parametrize("sampling", [LOGITS, SAMPLING], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_with_bias_correction_the_gradient_is_that_of_the_estimators_own_mean(kind, sampling):
    """k1 and k3: grad KL(pi, ref), in numpy p_j (log p_j / q_j - KL); k2: p_j (g_j - mean g) with g = k^2 / 2 + k."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array(LOGITS), np.array(REFERENCE)))
    k = np.log(p / q)
    g = k**2 / 2 + k if kind == "k2" else k
    expected = p * (g - (p * g).sum())
    np.testing.assert_allclose(expected_gradient(kind, sampling), expected, atol=1e-6)  # the default is corrected
    if kind != "k2":
        np.testing.assert_allclose(expected, [-0.0626, -0.1540, 0.3443, -0.1277], atol=6e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_of_equal_policies_are_zero(kind):
    logps = torch.tensor([-0.1, -5.0, -30.0])
    assert kl_estimates(logps, logps, kind).abs().max() == 0


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl_estimator: found 'k4', expected one of k1, k2, k3"):
        kl_estimates(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropys_gradient_is_its_closed_form(temperature):
    """H of softmax(z / T): dH/dz_j = -p_j (log p_j + H) / T; so the bonus -c H pulls towards the uniform."""
    logits = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, entropy = gather_logps(logits, torch.tensor([0, 1, 2]), temperature)
    (-0.01 * entropy).sum().backward()
    p = np.exp(logits.detach().numpy() / temperature)
    p /= p.sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1, keepdims=True)
    np.testing.assert_allclose(entropy.detach(), h[:, 0], atol=1e-6)
    np.testing.assert_allclose(logits.grad, 0.01 * p * (np.log(p) + h) / temperature, atol=1e-8)


def test_the_entropy_of_the_uniform_is_the_log_of_its_size_and_has_no_gradient():
    logits = torch.zeros(1, 8, requires_grad=True)
    _, entropy = gather_logps(logits, torch.tensor([0]))
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(8))
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("kl", "num", "beta"),
    [
        (6.0, 100, 0.2),  # on target
        (6.6, 100, 0.2 * (1 + 0.1 * 100 / 1000)),  # 10 % above
        (5.4, 500, 0.2 * (1 - 0.1 * 500 / 1000)),
        (60.0, 100, 0.2 * (1 + 0.2 * 100 / 1000)),  # the error is cut at 20 %
        (-3.0, 100, 0.2 * (1 - 0.2 * 100 / 1000)),  # a negative estimate, as k1 may give
    ],
)
def test_adaptive_kl_by_hand(kl, num, beta):
    """1909.08593, 2.2, with the horizon of its code: beta (1 + clip(KL / target - 1, +-0.2) num / horizon)."""
    controller = AdaptiveKL(0.2, 6.0, 1000)
    controller.update(kl, num)
    assert controller.beta == pytest.approx(beta, rel=1e-12)


def test_adaptive_kl_brings_a_kl_that_falls_with_beta_to_its_target():
    controller = AdaptiveKL(0.01, 4.0, 1000)
    for _ in range(1000):  # at most 1 % a batch
        controller.update(1.0 / controller.beta, 50)
    assert 1.0 / controller.beta == pytest.approx(4.0, rel=0.01)


def test_controllers_go_on_where_they_were_saved():
    adaptive, fixed = AdaptiveKL(0.2, 6.0, 1000), FixedKL(0.05)
    for controller in (adaptive, fixed):
        controller.update(9.0, 64)
    assert (adaptive.beta > 0.2, fixed.beta) == (True, 0.05)
    for controller, fresh in ((adaptive, AdaptiveKL(0.2, 6.0, 1000)), (fixed, FixedKL(1.0))):
        fresh.load_state(json.loads(json.dumps(controller.state())))
        for each in (controller, fresh):
            each.update(3.0, 64)
        assert fresh.beta == controller.beta


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_kl_refuses_a_kl_that_is_no_number(kl):
    with pytest.raises(ValueError, match="KL: found"):
        AdaptiveKL(0.2, 6.0, 1000).update(kl, 8)


@pytest.mark.parametrize("settings_of", [(0.0, 6.0, 1000), (0.2, 0.0, 1000), (0.2, 6.0, 0)])
def test_adaptive_kl_refuses_what_could_never_adapt(settings_of):
    with pytest.raises(ValueError, match="expected each above 0"):
        AdaptiveKL(*settings_of)


numbers = st.floats(-100, 100, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=6), st.sampled_from([0.0, 1e6]))
def test_running_moments_of_batches_are_those_of_all_values(batches, offset):
    values = np.array([x + offset for batch in batches for x in batch], dtype=np.float64)
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64) + offset)
    assert moments.count == len(values)
    if len(values):
        assert moments.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-9)
    if len(values) > 1:
        assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-6, abs=1e-7)


def test_normalised_rewards_have_mean_0_and_std_1_and_keep_their_dtype():
    rewards = torch.tensor([3.0, 5.0, 10.0, -2.0])
    moments = RunningMoments()
    moments.update(rewards[:1])
    moments.update(rewards[1:])
    found = moments.normalized(rewards)
    assert found.dtype == torch.float32
    assert (found.mean().item(), found.std().item()) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_equal_rewards_normalise_to_zero():
    moments = RunningMoments()
    for _ in range(3):
        moments.update(torch.full((3,), 0.1))
    assert moments.normalized(torch.full((3,), 0.1)).abs().max() < 1e-7
    assert moments.normalized(torch.tensor([1.1])).item() == pytest.approx(1.0)  # no spread yet to divide by


def test_running_moments_go_on_where_they_were_saved():
    first, second = RunningMoments(), RunningMoments()
    first.update(torch.tensor([1.0, 4.0, 9.0]))
    second.load_state(json.loads(json.dumps(first.state())))
    for each in (first, second):
        each.update(torch.tensor([2.0, 3.0]))
    assert second.state() == first.state()
