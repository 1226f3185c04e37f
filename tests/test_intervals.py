"""Intervals and pass@k, against published figures, enumeration and simulation.

Run: pytest tests/test_intervals.py
"""

import itertools
import random

import numpy
import pytest

from posttrain.intervals import clearly_higher, gain, measured, measured_ratio, pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mean_and_its_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    half = 1.96 * numpy.std(values, ddof=1) / 2
    expected = {"value": 3.5, "low": 3.5 - half, "high": 3.5 + half, "n": 4, "unit": "x"}
    assert measured(values, "x") == pytest.approx({**expected, "unit": "x"})


def test_all_right_or_all_wrong_still_has_a_width():
    assert measured([0.0] * 20) == pytest.approx({"value": 0, "low": 0, "high": 0.1611, "n": 20, "unit": ""}, abs=5e-5)
    assert measured([1.0] * 20) == pytest.approx({"value": 1, "low": 0.8389, "high": 1, "n": 20, "unit": ""}, abs=5e-5)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    """Texts of very different sizes, bits in proportion to bytes with noise: true ratio 1.5."""
    random_ = numpy.random.default_rng(0)
    covered = []
    for _ in range(1500):
        sizes = random_.gamma(2.0, 40.0, 60)
        bits = sizes * random_.normal(1.5, 0.4, 60)
        found = measured_ratio(bits.tolist(), sizes.tolist(), "bits/byte")
        assert found["value"] == pytest.approx(bits.sum() / sizes.sum())
        covered.append(found["low"] <= 1.5 <= found["high"])
    assert 0.92 <= numpy.mean(covered) <= 0.97  # 0.95 less a little for 60 texts; +- 3 standard errors are 0.017


def test_equal_denominators_make_a_ratio_a_mean():
    above = [1.0, 0.0, 3.0, 2.0]
    assert measured_ratio(above, [2.0] * 4, "%") == pytest.approx(measured([a / 2 for a in above], "%"))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("correct", [0, 1, 3, 6])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(correct, k):
    samples = [True] * correct + [False] * (6 - correct)
    chosen = [any(choice) for choice in itertools.combinations(samples, k)]
    assert pass_at_k(correct, 6, k) == pytest.approx(sum(chosen) / len(chosen))


def test_pass_at_k_is_unbiased():
    """Problems of a known chance p of being solved: the mean of the estimate is 1 - (1 - p)^k."""
    random_, p, n, k = random.Random(0), 0.2, 10, 4
    estimates = [pass_at_k(sum(random_.random() < p for _ in range(n)), n, k) for _ in range(20_000)]
    assert numpy.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.007)


def test_a_gain_is_clear_where_the_intervals_do_not_touch():
    before, after = measured([0.0, 1.0] * 50, "%"), measured([1.0] * 90 + [0.0] * 10, "%")
    assert clearly_higher(before, after) and not clearly_higher(after, before)
    assert not clearly_higher(before, before)
    row = gain("sums", before, after, labels=("SFT", "GRPO"), goal="higher", passed=True)
    assert row["before"] == {"label": "SFT", **{key: before[key] for key in ("value", "low", "high")}}
    assert (row["unit"], row["better"], row["passed"]) == ("%", "higher", True)
