"""Figures of a reward model by hand: accuracy, tau, likelihood, calibration, length, agreement.

Run: pytest tests/test_ranking_metrics.py
"""

import itertools
import math
import random

import pytest
import torch

from posttrain.calibration import bootstrapped, by_length, calibration_error, length_correlation, reliability
from posttrain.plots import reliability_plot, stage_pictures, standalone
from posttrain.ranking_metrics import (
    agreement,
    kendall_tau,
    labeller_agreement,
    measure_rankings,
    pair_accuracy,
)


def test_pair_accuracy_and_tau_by_hand():
    # pairs 0-1 right, 0-2 right, 1-2 a tie of scores; the second ranking's tied pair does not count
    scores, ranks = [[3.0, 1.0, 1.0], [1.0, 2.0, 0.0]], [[0, 1, 2], [0, 0, 1]]
    assert pair_accuracy(scores, ranks)["value"] == pytest.approx((2.5 + 2) / 5)
    assert kendall_tau(*[x[0] for x in (scores, ranks)]) == pytest.approx(2 / 3)
    assert kendall_tau([1.0, 2.0, 3.0], [0, 1, 2]) == -1
    assert kendall_tau([3.0, 2.0, 1.0], [0, 1, 2]) == 1


def test_kendall_tau_counts_inversions():
    """Without ties: 1 - 4 inversions / (n (n - 1)), here for every order of four."""
    for order in itertools.permutations(range(4)):
        inversions = sum(order[i] < order[j] for i, j in itertools.combinations(range(4), 2))
        assert kendall_tau([float(x) for x in order], [0, 1, 2, 3]) == pytest.approx(1 - inversions / 3)


def test_metrics_of_a_scorer_that_knows_nothing():
    """Equal scores are worth a guess in every figure, not a full mark for the first place."""
    metrics = measure_rankings(
        [[1.0, 1.0, 1.0, 1.0]] * 3 + [[1.0, 2.0, 0.0, 0.0]], [[0, 1, 2, 3]] * 3 + [[0, 0, 1, 2]]
    )
    assert metrics["top-1"]["value"] == pytest.approx((3 * 0.25 + 1) / 4)
    flat = measure_rankings([[1.0, 1.0, 1.0, 1.0], [0.0] * 4], [[0, 1, 2, 3]] * 2)
    assert flat["pair accuracy"]["value"] == 0.5
    assert flat["kendall tau"]["value"] == 0
    assert flat["log-likelihood per ranking"]["value"] == pytest.approx(-math.log(24))
    assert flat["log-likelihood, gain over a guess"]["value"] == pytest.approx(0)
    assert flat["score mean"]["value"] == 0.5


def test_the_gain_over_a_guess_by_hand():
    # weights 3, 2, 1: 1/3 against 1/6 of a guess; a tie at the top is half of either order
    scores = [math.log(w) for w in (3, 2, 1)]
    metrics = measure_rankings([scores, scores], [[0, 1, 2], [0, 1, 2]])
    assert metrics["log-likelihood, gain over a guess"]["value"] == pytest.approx(math.log(2))
    tied = measure_rankings([scores, scores], [[0, 0, 1], [0, 0, 1]])["log-likelihood per ranking"]["value"]
    either = [math.log(3 / 6 * 2 / 3), math.log(2 / 6 * 3 / 4)]
    assert tied == pytest.approx(sum(either) / 2)


def sure(probability: float) -> float:
    """The difference of scores at which a model says `probability`."""
    return math.log(probability / (1 - probability))


def test_reliability_and_its_error_by_hand():
    """Ten pairs at 80 %, of which six are right, and four at 60 %, of which three are."""
    gaps = [sure(0.8)] * 6 + [-sure(0.8)] * 4 + [sure(0.6)] * 3 + [-sure(0.6)]
    scores, ranks = [[gap, 0.0] for gap in gaps], [[0, 1]] * 14
    points = reliability(scores, ranks)
    assert [p["confidence"] for p in points] == pytest.approx([0.6, 0.8])
    assert [p["accuracy"]["value"] for p in points] == pytest.approx([0.75, 0.6])
    assert [p["pairs"] for p in points] == [4, 10]
    found = calibration_error(scores, ranks)
    assert found["value"] == pytest.approx((0.2 * 10 + 0.15 * 4) / 14)
    assert found["low"] < found["value"] < found["high"] and found["n"] == 14
    svg = reliability_plot(points)
    assert svg.count("<circle") == 2 and "pairs right" in svg and "even" in svg
    assert "xmlns" in standalone(svg) and "<style>" in standalone(svg)


def test_a_model_that_knows_its_chances_is_calibrated():
    """6000 pairs whose outcomes are drawn with the model's own probabilities; one twice as sure is not."""
    rng = random.Random(0)
    gaps = [rng.gauss(0, 1.5) for _ in range(6000)]
    right = [rng.random() < 1 / (1 + math.exp(-abs(gap))) for gap in gaps]
    honest = [[abs(g), 0.0] if r else [0.0, abs(g)] for g, r in zip(gaps, right, strict=True)]
    boastful = [[2 * a, 2 * b] for a, b in honest]
    assert calibration_error(honest, [[0, 1]] * 6000)["value"] < 0.02
    assert calibration_error(boastful, [[0, 1]] * 6000)["low"] > 0.05
    for point in reliability(honest, [[0, 1]] * 6000):
        assert abs(point["accuracy"]["value"] - point["confidence"]) < 0.08
    assert reliability([[1.0, 0.0]] * 3, [[0, 0]] * 3) == []


def test_the_bootstrap_gives_the_interval_of_a_mean():
    """Its percentiles are mean +- 1.96 standard errors; rankings count as wholes: doubled rows of one do not help."""
    rng = random.Random(1)
    values = torch.tensor([[rng.gauss(3, 2), 1.0] for _ in range(400)])
    found = bootstrapped(values, lambda sums: sums[..., 0] / sums[..., 1])
    error = values[:, 0].std().item() / 20
    assert found["value"] == pytest.approx(values[:, 0].mean().item(), rel=1e-6)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert bootstrapped(values, lambda sums: sums[..., 0] / sums[..., 1]) == found


def test_accuracy_by_length_finds_a_model_that_goes_by_length():
    """It prefers the longer reply, always: right where the better one is longer, wrong where it is shorter."""
    lengths = [[30, 10], [12, 10], [10, 11], [5, 40], [8, 8], [25, 5]]
    scores = [[float(a), float(b)] for a, b in lengths]
    groups = by_length(scores, [[0, 1]] * 6, lengths)
    # differences 20, 2, -1, -35, (0 is left out), 20: the median size is 20
    assert [(g["low"], g["high"], g["pairs"]) for g in groups] == [
        (None, -20, 1),
        (-20, 0, 1),
        (0, 20, 1),
        (20, None, 2),
    ]
    assert [g["accuracy"]["value"] for g in groups] == [0, 0, 1, 1]
    assert by_length([[1.0, 2.0]], [[0, 1]], [[5, 5]]) == []
    points = reliability(scores, [[0, 1]] * 6)
    captions, pictures = zip(*stage_pictures({"reliability": points, "by_length": groups, "loss": 1}), strict=True)
    assert "length" in captions[1] and "cut at -20, +0, +20" in pictures[1] and pictures[1].count("<circle") == 4
    assert stage_pictures({"reliability": [], "metrics": {}}) == []


def test_length_correlation_is_within_rankings():
    """Across prompts long answers score higher here, within each prompt lower: only the second counts."""
    scores, lengths = [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]], [[120, 110, 100], [20, 10, 0]]
    assert length_correlation(scores, lengths)["value"] == pytest.approx(-1)
    # by hand: centred scores (-1, 0, 1) and lengths (1, -2, 1): no correlation; then (-1, 1) and (-3, 3)
    assert length_correlation([[0.0, 1.0, 2.0]], [[4, 1, 4]])["value"] == pytest.approx(0)
    mixed = length_correlation([[0.0, 1.0, 2.0], [0.0, 2.0]], [[4, 1, 4], [1, 7]])["value"]
    assert mixed == pytest.approx(6 / math.sqrt((2 + 2) * (6 + 18)))
    assert length_correlation([[1.0, 1.0]], [[3, 4]])["value"] is None
    metrics = measure_rankings([[3.0, 1.0], [2.0, 1.0]], [[0, 1]] * 2, [[9, 5], [4, 5]])
    # orders (.5, -.5) against lengths (2, -2) and (-.5, .5): (2 - .5) / sqrt((.5 + .5) (8 + .5))
    by_people = metrics["correlation of people's order and length"]["value"]
    assert by_people == pytest.approx(1.5 / math.sqrt(8.5))


def test_agreement_of_labellers_and_of_the_score_with_them():
    assert agreement([0, 1, 2], [0, 1, 2]) == 1 and agreement([0, 1, 2], [2, 1, 0]) == 0
    assert agreement([0, 1, 2], [0, 0, 1]) == pytest.approx((0.5 + 1 + 1) / 3)
    rows = [
        {"labeller_ranks": [[0, 1, 2], [0, 2, 1], [0, 1, 2]]},  # pairs of people: 2/3, 1, 2/3
        {"labeller_ranks": [[0, 1]]},  # one person agrees with nobody
        {},
    ]
    found = labeller_agreement([[3.0, 2.0, 1.0], [1.0, 2.0], [0.0, 1.0]], rows)
    assert found["agreement of labellers with each other"]["value"] == pytest.approx(7 / 9)
    assert found["agreement of the score with a labeller"]["value"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert labeller_agreement([[0.0, 1.0]], [{}]) == {}
