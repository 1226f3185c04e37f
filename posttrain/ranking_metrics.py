"""How well scores agree with held-out rankings: pair accuracy, top-1, Kendall's tau, likelihood, calibration, length.

In: scores of each ranking's completions (best first) and their ranks. Out: metrics as manifests store them.
A ranking is one observation: intervals are over rankings, since pairs of one ranking are not independent.
"""

import statistics

import torch

from posttrain.calibration import calibration_error, length_correlation, pairs_of
from posttrain.evals import prompt_text
from posttrain.intervals import clearly_higher, gain, measured, measured_ratio
from posttrain.ranking_losses import RankingLoss
from posttrain.ranking_rows import replies_of


def pairs_right(scores: list[float], ranks: list[int]) -> tuple[float, int]:
    """(pairs in the right order, pairs with different ranks); equal scores count half."""
    pairs = pairs_of(scores, ranks)
    return sum((1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for *_, gap in pairs), 0.0), len(pairs)


def pair_accuracy(scores: list[list[float]], ranks: list[list[int]]) -> dict:
    """Share of pairs in the right order, over the pairs of all rankings."""
    counted = [pairs_right(s, r) for s, r in zip(scores, ranks, strict=True)]
    return measured_ratio([right for right, _ in counted], [total for _, total in counted], "%")


def kendall_tau(scores: list[float], ranks: list[int]) -> float:
    """(pairs right - pairs wrong) / pairs with different ranks, in -1 ... 1 (Kendall 1938)."""
    right, total = pairs_right(scores, ranks)
    return (2 * right - total) / total if total else 0.0


def top_right(scores: list[float], ranks: list[int]) -> float:
    """Chance that the reply of the highest score, drawn among equals, is of the best rank."""
    chosen = [rank for score, rank in zip(scores, ranks, strict=True) if score == max(scores)]
    return chosen.count(min(ranks)) / len(chosen)


def measure_rankings(
    scores: list[list[float]], ranks: list[list[int]], lengths: list[list[int]] | None = None, ties: str = "average"
) -> dict[str, dict]:
    """Metrics of scores against rankings, and the scores' own mean and spread, by which RL normalises.

    The log-likelihood is Plackett-Luce's; its gain is over equal scores, which say nothing: -ln K! without ties.
    With `lengths` (tokens of each completion) also what the length has to do with the score.
    """
    loss, pairs = RankingLoss(ties=ties), list(zip(scores, ranks, strict=True))
    likelihoods = [-loss(torch.tensor(s, dtype=torch.float64), r).item() for s, r in pairs]
    guesses = [-loss(torch.zeros(len(r), dtype=torch.float64), r).item() for r in ranks]
    flat = [score for group in scores for score in group]
    metrics = {
        "pair accuracy": pair_accuracy(scores, ranks),
        "top-1": measured([top_right(s, r) for s, r in pairs], "%"),
        "kendall tau": measured([kendall_tau(s, r) for s, r in pairs]),
        "log-likelihood per ranking": measured(likelihoods, "nats"),
        "log-likelihood, gain over a guess": measured(
            [a - b for a, b in zip(likelihoods, guesses, strict=True)], "nats"
        ),
        "calibration error": calibration_error(scores, ranks),
        "score mean": measured(flat),
        "score std": {"value": statistics.stdev(flat), "low": None, "high": None, "n": len(flat), "unit": ""},
    }
    if lengths is not None:
        order = [[-float(rank) for rank in each] for each in ranks]
        metrics["correlation of score and length"] = length_correlation(scores, lengths)
        metrics["correlation of people's order and length"] = length_correlation(order, lengths)
    return metrics


def labeller_agreement(scores: list[list[float]], rows: list[dict]) -> dict[str, dict]:
    """Where rows have `labeller_ranks`, several people's ranks of the row's completions: how often two of them order
    a pair alike, and how often the scores order it like one of them. Pairs that either side ties count half.

    The first figure is what the second can be compared with: a score that agrees with a person as often as people do
    with each other has little left to learn from them. {} where no row has two labellers.
    """
    people, model, total = [], [], []
    for values, row in zip(scores, rows, strict=True):
        labels = row.get("labeller_ranks") or []
        if len(labels) < 2:
            continue
        others = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
        people.append(statistics.fmean(agreement(a, b) for a, b in others))
        model.append(statistics.fmean(agreement([-value for value in values], a) for a in labels))
        total.append(1)
    if not total:
        return {}
    return {
        "agreement of labellers with each other": measured(people, "%"),
        "agreement of the score with a labeller": measured(model, "%"),
    }


def agreement(a: list[float], b: list[float]) -> float:
    """Share of pairs that two lists of ranks order alike; a pair that one of them ties counts half."""
    pairs = [(a[i] - a[j]) * (b[i] - b[j]) for i in range(len(a)) for j in range(i + 1, len(a))]
    return statistics.fmean(1.0 if product > 0 else 0.5 if product == 0 else 0.0 for product in pairs)


def reward_gains(metrics: dict, ranks: list[list[int]], utilities: list, goal: float) -> tuple[list[dict], dict]:
    """(gains, the ceiling's metric where utilities are known): the score against chance and against the ceiling."""
    accuracy = metrics["pair accuracy"]
    chance = {"value": 0.5, "low": 0.5, "high": 0.5, "n": accuracy["n"], "unit": "%"}
    gains = [
        gain(
            "pairs ranked right", chance, accuracy, labels=("chance", "reward model"),
            goal="higher by more than the interval", passed=clearly_higher(chance, accuracy),
        )
    ]  # fmt: skip
    if any(u is None for u in utilities):
        return gains, {}
    ceiling = pair_accuracy(utilities, ranks)
    passed = accuracy["value"] >= ceiling["value"] - goal
    text = f"within {goal * 100:.0f} points of the noise's limit"
    labels = ("true utility", "reward model")
    gains.append(gain("pairs right, against the limit", ceiling, accuracy, labels=labels, goal=text, passed=passed))
    return gains, {"pair accuracy of the true utility": ceiling}


def sample_rankings(scores: list[list[float]], rows: list[dict], num: int = 6) -> list[dict]:
    """The first held-out rankings with their scores, for the report."""
    samples = []
    for row, values in list(zip(rows, scores, strict=True))[:num]:
        replies = [
            {"by": f"ranked {place + 1}", "text": f"[score {value:+.2f}] {reply[-1]['content']}"}
            for place, (reply, value) in enumerate(zip(replies_of(row), values, strict=True))
        ]
        samples.append({"prompt": "ranking: " + prompt_text(row["prompt"]), "replies": replies})
    return samples
