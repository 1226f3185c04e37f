"""How well scores agree with held-out rankings: pair accuracy, top-1, Kendall's tau, likelihood.

In: scores of each ranking's completions (best first) and their ranks. Out: metrics as manifests store them.
A ranking is one observation: intervals are over rankings, since pairs of one ranking are not independent.
"""

import statistics

import torch

from posttrain.evals import prompt_text
from posttrain.intervals import clearly_higher, gain, measured, measured_ratio
from posttrain.reward_model import plackett_luce_loss


def pairs_right(scores: list[float], ranks: list[int]) -> tuple[float, int]:
    """(pairs in the right order, pairs with different ranks); equal scores count half."""
    right, total = 0.0, 0
    for i in range(len(ranks)):
        for j in range(i + 1, len(ranks)):
            if ranks[i] < ranks[j]:
                total += 1
                right += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return right, total


def pair_accuracy(scores: list[list[float]], ranks: list[list[int]]) -> dict:
    """Share of pairs in the right order, over the pairs of all rankings."""
    counted = [pairs_right(s, r) for s, r in zip(scores, ranks, strict=True)]
    return measured_ratio([right for right, _ in counted], [total for _, total in counted], "%")


def kendall_tau(scores: list[float], ranks: list[int]) -> float:
    """(pairs right - pairs wrong) / pairs with different ranks, in -1 ... 1 (Kendall 1938)."""
    right, total = pairs_right(scores, ranks)
    return (2 * right - total) / total if total else 0.0


def measure_rankings(scores: list[list[float]], ranks: list[list[int]]) -> dict[str, dict]:
    """Metrics of scores against rankings, and the scores' own mean and spread, by which RL normalises."""
    top = [top_right(s, r) for s, r in zip(scores, ranks, strict=True)]
    losses = [plackett_luce_loss(torch.tensor(s), r).item() for s, r in zip(scores, ranks, strict=True)]
    flat = [score for group in scores for score in group]
    return {
        "pair accuracy": pair_accuracy(scores, ranks),
        "top-1": measured(top, "%"),
        "kendall tau": measured([kendall_tau(s, r) for s, r in zip(scores, ranks, strict=True)]),
        "loss per ranking": measured(losses, "nats"),
        "score mean": measured(flat),
        "score std": {"value": statistics.stdev(flat), "low": None, "high": None, "n": len(flat), "unit": ""},
    }


def top_right(scores: list[float], ranks: list[int]) -> float:
    """Chance that the reply of the highest score, drawn among equals, is of the best rank."""
    chosen = [rank for score, rank in zip(scores, ranks, strict=True) if score == max(scores)]
    return chosen.count(min(ranks)) / len(chosen)


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
        completions = row.get("completions") or [row["chosen"], row["rejected"]]
        replies = [
            {"by": f"ranked {place + 1}", "text": f"[score {value:+.2f}] {reply[-1]['content']}"}
            for place, (reply, value) in enumerate(zip(completions, values, strict=True))
        ]
        samples.append({"prompt": "ranking: " + prompt_text(row["prompt"]), "replies": replies})
    return samples
