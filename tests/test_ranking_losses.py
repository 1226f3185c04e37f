"""Ranking losses against closed forms: Bradley-Terry at K = 2, ln K!, all orders counted out, finite differences.

Run: pytest tests/test_ranking_losses.py
"""

import itertools
import math

import pytest
import torch

from posttrain.ranking_losses import (
    LOSS_FUNCTIONS,
    MOST_TIED,
    RankingLoss,
    bradley_terry_loss,
    plackett_luce_loss,
    top1_loss,
)

ALL = pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
SCORES = [0.3, -1.2, 2.0, 0.9, -0.1]


def exact(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def ordered(scores: list[float]) -> float:
    """-log likelihood of an order without ties, by the definition: probability by probability."""
    weights = [math.exp(score) for score in scores]
    return -sum(math.log(weight / sum(weights[place:])) for place, weight in enumerate(weights))


@ALL
@pytest.mark.parametrize("gap", [-30.0, -1.5, 0.0, 0.7, 30.0])
def test_two_replies_are_the_bradley_terry_loss(loss, gap):
    found = loss(exact(0.4 + gap, 0.4), [0, 1]).item()
    assert found == pytest.approx(math.log1p(math.exp(-gap)))
    assert gap != 0 or found == pytest.approx(math.log(2))


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_equal_scores_cost_the_log_of_the_number_of_orders(k):
    equal, order = torch.full((k,), 2.5), list(range(k))
    assert plackett_luce_loss(equal, order).item() == pytest.approx(math.log(math.factorial(k)))
    assert bradley_terry_loss(equal, order).item() == pytest.approx(math.log(2))
    assert top1_loss(equal, order).item() == pytest.approx(math.log(k))


def test_plackett_luce_by_hand():
    # weights 3, 2, 1: the order has probability 3/6 * 2/3 * 1
    scores = torch.tensor([3.0, 2.0, 1.0]).log()
    assert plackett_luce_loss(scores, [0, 1, 2]).item() == pytest.approx(-math.log(1 / 3), abs=1e-6)
    assert top1_loss(scores, [0, 1, 2]).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9])
    orders = [list(order) for order in itertools.permutations(range(4))]
    assert sum(math.exp(-plackett_luce_loss(scores[o], [0, 1, 2, 3]).item()) for o in orders) == pytest.approx(1.0)


@ALL
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 1, 1], [0, 0, 2, 2]])
def test_only_differences_of_scores_count(loss, ranks, smoothing):
    scores = exact(0.3, -1.2, 2.0, 0.9)
    shifted = loss(scores + 17, ranks, label_smoothing=smoothing).item()
    assert shifted == pytest.approx(loss(scores, ranks, label_smoothing=smoothing).item(), abs=1e-9)


@ALL
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_order_of_tied_replies_does_not_matter(loss, smoothing):
    scores, ranks = [0.3, -1.2, 2.0, 0.9, -0.4], [0, 1, 1, 1, 2]
    losses = [
        loss(exact(scores[0], *middle, scores[4]), ranks, label_smoothing=smoothing).item()
        for middle in itertools.permutations(scores[1:4])
    ]
    assert losses == pytest.approx([losses[0]] * 6)


@pytest.mark.parametrize("ranks", [[0, 0], [0, 0, 1, 2, 3], [0, 1, 1, 2, 2], [0, 1, 1, 1, 1], [0] * 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_tie_is_the_mean_over_its_orders(ranks, smoothing):
    """Counted out: every order of the tied ones, each without ties."""
    scores = SCORES[: len(ranks)]
    runs = [list(group) for _, group in itertools.groupby(range(len(ranks)), key=ranks.__getitem__)]
    orders = [sum(map(list, each), []) for each in itertools.product(*(itertools.permutations(run) for run in runs))]
    plain = [
        plackett_luce_loss(exact(*(scores[i] for i in order)), list(range(len(ranks))), label_smoothing=smoothing)
        for order in orders
    ]
    found = plackett_luce_loss(exact(*scores), ranks, label_smoothing=smoothing).item()
    assert found == pytest.approx(torch.stack(plain).mean().item(), abs=1e-12)
    if smoothing == 0:
        assert found == pytest.approx(sum(ordered([scores[i] for i in o]) for o in orders) / len(orders), abs=1e-9)


def test_a_tie_of_two_draws_their_scores_together():
    """-log sigmoid of the difference either way, averaged: least where they are equal, and then ln 2."""
    assert plackett_luce_loss(exact(0.7, -0.4), [0, 0]).item() == pytest.approx((softplus(1.1) + softplus(-1.1)) / 2)
    scores = exact(0.7, -0.4).requires_grad_(True)
    plackett_luce_loss(scores, [0, 0]).backward()
    assert scores.grad[0] > 0 > scores.grad[1]
    assert plackett_luce_loss(exact(0.2, 0.2), [0, 0]).item() == pytest.approx(math.log(2))


def test_breslow_by_hand():
    # both firsts against all three, the last alone; pairs: each first against the last
    a, b, c = 0.5, -0.3, 1.1
    everyone = math.log(sum(map(math.exp, (a, b, c))))
    found = plackett_luce_loss(exact(a, b, c), [0, 0, 1], ties="breslow").item()
    assert found == pytest.approx(2 * everyone - a - b)
    assert bradley_terry_loss(exact(a, b, c), [0, 0, 1]).item() == pytest.approx(
        (softplus(c - a) + softplus(c - b)) / 2
    )
    assert top1_loss(exact(a, b, c), [0, 0, 1]).item() == pytest.approx(everyone - (a + b) / 2)


def test_a_large_tie_is_refused_or_taken_by_breslow():
    scores, ranks = torch.zeros(MOST_TIED + 1), [0] * (MOST_TIED + 1)
    with pytest.raises(ValueError, match="13 replies share a rank, expected at most 12"):
        plackett_luce_loss(scores, ranks)
    assert plackett_luce_loss(scores, ranks, ties="breslow").item() == pytest.approx(13 * math.log(13), rel=1e-6)
    assert plackett_luce_loss(scores[1:], ranks[1:]).item() == pytest.approx(math.log(math.factorial(12)), rel=1e-5)


def test_a_ranking_of_ties_alone_has_no_pairs_to_learn_from():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(scores, [0, 0])
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0.0, 0.0]


@ALL
def test_smoothing_is_the_chance_of_the_other_choice(loss):
    """K = 2: (1 - e) of the loss and e of the reversed order's, as in conservative DPO."""
    straight, reverse = softplus(-1.3), softplus(1.3)
    found = loss(exact(0.9, -0.4), [0, 1], label_smoothing=0.1).item()
    assert found == pytest.approx(0.9 * straight + 0.1 * reverse)


def test_smoothing_spreads_over_the_race():
    # three in the race: the chosen one at 0.7, the two others at 0.15 each; then two: 0.7 and 0.3
    a, b, c = 0.5, -0.3, 1.1
    first, second = (math.log(sum(map(math.exp, race))) for race in ((a, b, c), (b, c)))
    expected = first - 0.7 * a - 0.15 * (b + c)
    assert top1_loss(exact(a, b, c), [0, 1, 2], label_smoothing=0.3).item() == pytest.approx(expected)
    expected += second - 0.7 * b - 0.3 * c
    assert plackett_luce_loss(exact(a, b, c), [0, 1, 2], label_smoothing=0.3).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", LOSS_FUNCTIONS)
def test_a_margin_is_how_much_better_a_reply_must_be(loss_type):
    loss = RankingLoss(loss_type)
    found = loss(exact(1.0, 0.2), [0, 1], [0.0, 0.5]).item()
    assert found == pytest.approx(softplus(-(1.0 - 0.2 - 0.5)))  # Llama 2: -log sigmoid(chosen - rejected - margin)
    if loss_type == "bradley_terry":  # two ranks down: twice the margin
        gaps = (0.4 - 0.5, 1.3 - 1.0, 0.9 - 0.5)
        pairs = sum(softplus(-gap) for gap in gaps) / 3
        assert loss(exact(1.0, 0.6, -0.3), [0, 1, 2], [0.0, 0.5, 1.0]).item() == pytest.approx(pairs)


@pytest.mark.parametrize("loss_type", LOSS_FUNCTIONS)
def test_centering_adds_the_squared_sum_at_two(loss_type):
    """TRL: coefficient * (chosen + rejected)^2; it alone sees a shift of all scores."""
    loss, plain = RankingLoss(loss_type, center_rewards_coefficient=0.01), RankingLoss(loss_type)
    scores = exact(1.5, -0.4)
    assert (loss(scores, [0, 1]) - plain(scores, [0, 1])).item() == pytest.approx(0.01 * 1.1**2)
    more = exact(1.0, 2.0, 6.0)
    assert (loss(more, [0, 1, 2]) - plain(more, [0, 1, 2])).item() == pytest.approx(0.01 * 36)


@ALL
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
def test_gradient_equals_finite_differences(loss, ranks, smoothing):
    scores = exact(*SCORES).requires_grad_(True)
    loss(scores, ranks, label_smoothing=smoothing).backward()
    for k in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[k] = 1e-6
        with torch.no_grad():
            up, down = (loss(scores + sign * step, ranks, label_smoothing=smoothing) for sign in (1, -1))
        assert scores.grad[k].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-7)


def fit(loss, true: torch.Tensor, num: int) -> torch.Tensor:
    """Scores learned from `num` orders drawn by adding Gumbel noise to utilities (Plackett-Luce), centred."""
    generator = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(num, len(true), generator=generator)))
    orders, counts = (true + noise).argsort(1, descending=True).unique(dim=0, return_counts=True)
    ranks = list(range(len(true)))
    scores = torch.zeros(len(true), requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=30)

    def closure():
        optimizer.zero_grad()
        mean = (torch.stack([loss(scores[order], ranks) for order in orders]) * counts).sum() / counts.sum()
        mean.backward()
        return mean

    optimizer.step(closure)
    return scores.detach() - scores.detach().mean()


@ALL
def test_known_utilities_are_recovered_from_sampled_rankings(loss):
    """20000 orders of five: the likelihood's standard error is below 0.015, top-1's, which reads less, below 0.03."""
    true = torch.tensor([1.0, 0.4, 0.0, -0.5, -0.9])
    torch.testing.assert_close(fit(loss, true, 20_000), true - true.mean(), atol=0.05, rtol=0)


def test_the_error_of_recovered_utilities_is_the_expected_one():
    """At equal utilities a choice from m carries a trace of 1 - 1/m of Fisher information; an order of K has one for
    each m = 2 ... K, evenly over the K - 1 contrasts: c = sum (1 - 1/m) / (K - 1), here 7/12. n orders give a centred
    score the variance (1 - 1/K) / (n c)."""
    num, fits, information = 400, 150, 7 / 12
    generator = torch.Generator().manual_seed(3)
    errors = []
    for _ in range(fits):
        orders, counts = torch.rand(num, 3, generator=generator).argsort(1).unique(dim=0, return_counts=True)
        scores = torch.zeros(3, requires_grad=True)
        for _ in range(6):  # Fisher scoring: one step of gradient / information is nearly there already
            losses = torch.stack([plackett_luce_loss(scores[order], [0, 1, 2]) for order in orders])
            [gradient] = torch.autograd.grad((losses * counts).sum(), scores)
            with torch.no_grad():
                scores -= gradient / (num * information)
        errors.append(scores.detach() - scores.detach().mean())
    found = torch.stack(errors).square().mean().item()
    # two free errors a fit: the mean square has a standard error of sqrt(2 / 300) = 8 %
    assert found == pytest.approx((1 - 1 / 3) / (num * information), rel=0.25)
