"""Ratings against closed forms, published figures, scikit-learn's logistic regression and a plain likelihood.

Run: pytest tests/test_ratings.py
"""

import math
import random

import numpy as np
import pytest

from posttrain.board import rating_view
from posttrain.board.ratings import MEAN, POINTS, fit, rate
from posttrain.board.votes import Item, Votes
from posttrain.cli import command

# Seven teams of the American League's Eastern Division, 1987: games that the row won against the column, and the
# strengths that Agresti's Categorical Data Analysis (section 10.6) prints for them, Baltimore's at 0.
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
BASEBALL = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0],
    ], dtype=float,
)  # fmt: skip
PRINTED = (1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0)


def vote(prompt: str, *replies: tuple[str, int, str]) -> dict:
    """replies: (model, place, text)."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "shown": [{"model": model, "text": text} for model, _, text in replies],
        "places": [place for _, place, _ in replies],
    }


def games(a: str, b: str, won: int, lost: int, tied: int = 0, prompt="p{}") -> list[dict]:
    places = [(0, 1)] * won + [(1, 0)] * lost + [(0, 0)] * tied
    return [vote(prompt.format(i), (a, x, "reply"), (b, y, "reply")) for i, (x, y) in enumerate(places)]


def test_two_players_have_a_closed_form():
    theta, nu = fit(np.array([[0, 30], [10, 0.0]]), np.array([[0, 12], [12, 0.0]]), math.inf)
    assert theta[0] - theta[1] == pytest.approx(math.log(30 / 10)) and theta.sum() == pytest.approx(0)
    assert nu == pytest.approx(12 / math.sqrt(30 * 10))


def test_published_strengths_of_baseball_teams():
    theta, nu = fit(BASEBALL, np.zeros_like(BASEBALL), math.inf)
    assert np.round(theta - theta[-1], 2).tolist() == list(PRINTED) and nu == 0
    pulled, _ = fit(BASEBALL, np.zeros_like(BASEBALL))
    assert np.abs(pulled - theta).max() < 0.03  # the default prior hardly shows


def test_as_logistic_regression_with_the_same_prior():
    from sklearn.linear_model import LogisticRegression

    rows, outcomes = [], []
    for i in range(7):
        for j in range(7):
            for _ in range(int(BASEBALL[i, j])):
                sign = 1 if len(rows) % 2 else -1
                rows.append(sign * (np.eye(7)[i] - np.eye(7)[j]))
                outcomes.append(sign > 0)
    for prior in (3.0, 0.3):
        model = LogisticRegression(C=prior**2, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(rows, outcomes)
        assert fit(BASEBALL, np.zeros_like(BASEBALL), prior)[0] == pytest.approx(model.coef_[0], abs=1e-5)


def test_ties_as_a_plain_likelihood_maximized_by_scipy():
    from scipy.optimize import minimize

    rng = np.random.default_rng(1)
    wins = rng.integers(1, 9, (4, 4)) * (1 - np.eye(4))
    ties = np.triu(rng.integers(0, 6, (4, 4)), 1)
    ties = (ties + ties.T).astype(float)

    def cost(given):
        strength, nu, total = np.exp(np.append(given[:3], 0.0)), np.exp(given[3]), 0.0
        for i in range(4):
            for j in range(i + 1, 4):
                draw = nu * math.sqrt(strength[i] * strength[j])
                whole = strength[i] + strength[j] + draw
                total -= wins[i, j] * math.log(strength[i] / whole) + wins[j, i] * math.log(strength[j] / whole)
                total -= ties[i, j] * math.log(draw / whole)
        return total

    found = minimize(cost, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    theta, nu = fit(wins, ties, math.inf)
    assert theta - theta[3] == pytest.approx(np.append(found.x[:3], 0.0), abs=1e-5)
    assert nu == pytest.approx(math.exp(found.x[3]), abs=1e-5)
    many = fit(np.stack([wins, wins.T, 3 * wins]), np.stack([ties] * 3), math.inf)  # a batch is its members
    assert (
        many[0][0] == pytest.approx(theta) and many[0][1] == pytest.approx(-theta) and many[1][0] == pytest.approx(nu)
    )


def test_rankings_drawn_from_plackett_luce_give_their_strengths_back():
    """Gumbel noise added to strengths and sorted draws from Plackett-Luce (Yellott 1977)."""
    rng, true = random.Random(0), {"a": 0.0, "b": 0.7, "c": 1.4, "d": 2.5}
    votes = []
    for number in range(1500):
        keys = {name: value - math.log(-math.log(rng.random())) for name, value in true.items()}
        order = sorted(rng.sample(sorted(keys), 3), key=keys.get, reverse=True)
        votes.append(vote(f"p{number}", *((name, place, "x") for place, name in enumerate(order))))
    found = {row["model"]: row["rating"] for row in rate(votes)["models"]}
    assert list(found) == ["d", "c", "b", "a"]
    mean = sum(true.values()) / 4
    for name, rating in found.items():
        assert rating["low"] < MEAN + POINTS * (true[name] - mean) < rating["high"] < rating["low"] + 60


def test_the_interval_is_that_of_a_proportion_and_knows_repeated_prompts():
    votes = games("a", "b", 300, 100)
    rating = rate(votes)["models"][0]["rating"]
    assert rating["value"] == pytest.approx(MEAN + POINTS * math.log(3) / 2, abs=1)
    error = 1 / math.sqrt(400 * 0.75 * 0.25)  # of log odds; each of two ratings moves by half of it
    assert rating["high"] - rating["low"] == pytest.approx(2 * 1.96 * POINTS * error / 2, rel=0.1)
    thrice = rate(votes * 3)["models"][0]["rating"]  # three labellers who always agree tell no more
    assert thrice["high"] - thrice["low"] == pytest.approx(rating["high"] - rating["low"], rel=0.02)
    assert rate(games("a", "b", 3, 1, prompt="the same"))["models"][0]["rating"]["low"] is None


def test_a_stage_that_never_lost_stays_finite_and_groups_without_a_link_are_told():
    found = rate(games("a", "b", 20, 0) + games("c", "d", 5, 5))
    best = found["models"][0]
    assert best["model"] == "a" and MEAN + 300 < best["rating"]["value"] < MEAN + 1200
    assert math.isfinite(best["rating"]["low"]) and best["wins"] == 20 and best["losses"] == 0
    assert found["groups"] == [["a", "b"], ["c", "d"]]
    assert "were never compared" in rating_view.table(found)


def test_win_rates_and_what_length_and_position_did():
    votes = [vote(f"{i}", ("a", 0, "a long reply"), ("b", 1, "short"), ("b", 1, "b too")) for i in range(3)]
    votes += [vote("4", ("b", 0, "tiny"), ("a", 1, "by far the longest"))]
    found = rate(votes)
    assert (
        found["matrix"]["a"]["b"] == 6 / 7 and found["matrix"]["b"]["a"] == 1 / 7 and found["matrix"]["a"]["a"] is None
    )
    assert (found["longer"]["value"], found["longer"]["n"]) == (6 / 7, 7)
    assert (found["first"]["value"], found["pairs"], found["votes"], found["prompts"]) == (1.0, 7, 4, 4)
    alone = rate([vote("p", ("a", 0, "one"), ("a", 1, "other!"))])  # two samples of one stage: nothing to rate
    assert alone["models"] == [] and alone["longer"]["value"] == 0.0


def test_a_stage_trained_anew_under_its_name_is_another_player():
    votes = games("ppo", "sft", 3, 1) + games("ppo", "sft", 1, 3, prompt="q{}")
    for number, one in enumerate(votes):
        one["settings"] = {"models": {"ppo": {"sha256": {"model.safetensors": "ab12cd34" if number < 4 else "ff00"}}}}
    found = rate(votes)
    assert [row["model"] for row in found["models"]] == ["ppo (ab12cd)", "sft", "ppo (ff00)"]
    assert found["matrix"]["ppo (ab12cd)"]["sft"] == 0.75


def test_no_votes():
    assert rate([])["models"] == [] and "no votes" in rating_view.table(rate([]))


def test_names_cannot_enter_the_page():
    hostile = '<img src=x onerror="alert(1)">'
    page = rating_view.page(rate(games(hostile, "b", 3, 2)))
    assert "<img" not in page and "&lt;img" in page
    assert "<svg" in page and page.count("<svg") == page.count("</svg>")


def test_the_verb_prints_the_table(tmp_path, capsys):
    votes = Votes(tmp_path / "run" / "votes")
    for number in range(4):
        item = Item([{"role": "user", "content": f"{number}?"}], [("grpo", "yes"), ("sft", "no")])
        last = votes.vote(item, [0, 1] if number else [1, 1])
    votes.cancel(last)
    assert command(["ratings", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.index("grpo") < said.index("sft") and "3 votes, 3 prompts, 3 pairs" in said
    assert command(["ratings", str(tmp_path / "run" / "votes")]) == 0 and capsys.readouterr().out == said


def test_the_verb_names_what_is_missing(tmp_path):
    from posttrain.errors import UserError

    with pytest.raises(UserError, match="no votes.log"):
        command(["ratings", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
