"""Win rates of two models: against scikit-learn's logistic regression, planted length preferences, and by hand.

Run: pytest tests/test_pairwise.py
"""

import asyncio
import math

import numpy
import pytest
import torch
from judge_server import judge_server

from posttrain import pairwise
from posttrain.errors import UserError
from posttrain.rewards.judge import compare


def planted(theta: float, phi: float, longer: float, size: int = 4000):
    """Outcomes drawn from the paper's formula: A is better by `theta`, length is worth `phi`, and A's replies are
    longer by `longer` deviations on average; a tenth of the prompts tie by chance."""
    rng = numpy.random.default_rng(1)
    gaps = rng.normal(longer * 100, 100, size).round()
    p = 1 / (1 + numpy.exp(-(theta + phi * numpy.tanh(gaps / gaps.std(ddof=1)))))
    outcomes = (rng.random(size) < p).astype(float)
    outcomes[rng.random(size) < 0.1] = 0.5
    return torch.tensor(outcomes), torch.tensor(gaps)


def sklearn_weights(outcomes, features):
    """A tie is half a win and half a loss; C is the prior's variance."""
    linear = pytest.importorskip("sklearn.linear_model")
    x = numpy.stack([numpy.ones(len(features)), features.numpy()], axis=1)
    y = outcomes.numpy()
    twice = linear.LogisticRegression(C=pairwise.PRIOR_DEVIATION**2, fit_intercept=False, tol=1e-12, max_iter=1000)
    twice.fit(numpy.concatenate([x, x]), [1] * len(x) + [0] * len(x), sample_weight=numpy.concatenate([y, 1 - y]))
    return twice.coef_[0]


@pytest.mark.parametrize("size", [12, 300])
def test_the_fit_is_scikit_learn_s(size):
    outcomes, gaps = planted(0.4, 1.5, 0.7, size)
    features, once = pairwise.length_feature(gaps), torch.ones(1, size, dtype=torch.float64)
    assert pairwise.fit(outcomes, features, once)[0].tolist() == pytest.approx(
        sklearn_weights(outcomes, features), abs=1e-4
    )


def test_length_bought_wins_are_taken_away_and_real_ones_are_not():
    """Two models of equal worth, one of which writes longer for a judge that likes length; then a better one."""
    outcomes, gaps = planted(0.0, 2.0, 1.0)
    assert outcomes.mean() > 0.65  # what the plain win rate says
    figure = pairwise.length_controlled(outcomes, gaps)
    assert figure["low"] < 0.5 < figure["high"] and figure["high"] - figure["low"] < 0.12
    outcomes, gaps = planted(0.8, 2.0, -1.0)
    assert outcomes.mean() < 0.5  # shorter, so it loses
    figure = pairwise.length_controlled(outcomes, gaps)
    # Ties by chance pull the planted logit towards 0: the rate that was planted is 0.9 logistic(0.8) + 0.1 / 2.
    expected = 0.9 / (1 + math.exp(-0.8)) + 0.05
    assert figure["low"] < expected < figure["high"]


def test_the_interval_is_that_of_draws_anew():
    """Its width over many data sets of one world is about how far the figure itself moves between them."""
    drawn = []
    for seed in range(60):
        rng = numpy.random.default_rng(seed)
        gaps = torch.tensor(rng.normal(50, 100, 200))
        p = torch.sigmoid(0.5 + 1.0 * torch.tanh(gaps / 100))
        drawn.append(pairwise.length_controlled((torch.tensor(rng.random(200)) < p).double(), gaps))
    spread = 2 * 1.96 * numpy.std([figure["value"] for figure in drawn])
    width = numpy.mean([figure["high"] - figure["low"] for figure in drawn])
    assert 0.75 < width / spread < 1.3
    covered = [figure["low"] < 1 / (1 + math.exp(-0.5)) < figure["high"] for figure in drawn]
    assert sum(covered) >= 52  # 57 of 60 expected


def test_one_side_that_always_wins_has_a_finite_figure():
    found = pairwise.win_rates([1.0] * 20, [(10, 10)] * 20, "sft")
    assert found["win rate against sft"]["value"] == 1.0 and found["losses against sft"]["value"] == 0.0
    assert 0.95 < found["win rate against sft, length-controlled"]["value"] <= 1.0
    tied = pairwise.win_rates([0.5] * 20, [(30, 10)] * 20, "sft")
    assert tied["win rate against sft, length-controlled"]["value"] == pytest.approx(0.5)
    assert tied["ties against sft"]["value"] == 1.0 and tied["length beyond sft"]["value"] == 20.0


def test_orders_that_contradict_each_other_are_ties_and_the_bias_is_told():
    said = [("a", "b"), ("b", "a"), ("a", "a"), ("a", "a"), ("tie", "a"), ("tie", "tie"), (None, "a"), ("b", "b")]
    outcomes, facts = pairwise.both_orders(said)
    assert outcomes == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5, None, 0.5]
    assert facts["judge: orders that contradict each other"]["value"] == pytest.approx(3 / 7)
    assert facts["judge: prefers what it reads first"]["value"] == pytest.approx(7 / 11)
    assert facts["judge: answers unreadable"]["value"] == pytest.approx(1 / 8)


def replies_of(text: str) -> tuple[str, str]:
    """What stands between the markers of a comparison."""
    parts = text.split("[ANSWER A ")[1].split("]\n", 1)[1].split("\n[END OF")[0]
    other = text.split("[ANSWER B ")[1].split("]\n", 1)[1].split("\n[END OF")[0]
    return parts, other


def test_a_real_server_is_asked_in_both_orders():
    """One judge prefers "good", another always what it reads first."""

    def honest(messages, _):
        first, second = replies_of(messages[1]["content"])
        return "Thought.\nBetter: " + ("A" if first == "good" else "B" if second == "good" else "tie")

    prompts, first, second = ["p", "q", "r"], ["good", "bad", "same"], ["bad", "good", "same"]
    with judge_server(honest) as server:
        said = asyncio.run(compare(prompts, first, second, base_url=server.url, model="m"))
        assert len(server.bodies) == 4  # equal replies are not asked about
    assert said == [("a", "b"), ("b", "a"), ("tie", "tie")]
    with judge_server(lambda *_: "Better: A") as server:
        said = asyncio.run(compare(prompts, first, second, base_url=server.url, model="m"))
    outcomes, facts = pairwise.both_orders(said)
    assert outcomes == [0.5, 0.5, 0.5]
    assert facts["judge: prefers what it reads first"]["value"] == 1.0
    with judge_server(lambda *_: "I like both") as server, pytest.raises(UserError, match="none of 4 answers of m"):
        asyncio.run(compare(prompts, first, second, base_url=server.url, model="m"))
