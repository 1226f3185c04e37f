"""Are a reward model's probabilities right? The reliability curve, and what the length of a reply does to a score.

In: scores of each ranking's completions (best first), their ranks and lengths. Out: metrics and curves as manifests
store them. A ranking is one observation: intervals come from drawing rankings anew (Efron's bootstrap, 1979), with a
seed of its own, so that the same scores give the same figures.
"""

import math

import torch
from torch import Tensor

from posttrain.bootstrap import bootstrapped
from posttrain.intervals import measured_ratio

BINS = 10  # of the reliability curve, from a coin's 50 % to certainty


def pairs_of(scores: list[float], ranks: list[int]) -> list[tuple[int, int, float]]:
    """(better, worse, score of the better - of the worse) of every pair of different ranks."""
    size = len(ranks)
    return [(i, j, scores[i] - scores[j]) for i in range(size) for j in range(i + 1, size) if ranks[i] < ranks[j]]


def bin_sums(scores: list[list[float]], ranks: list[list[int]]) -> Tensor:
    """(R, 3, BINS): of each ranking's pairs by confidence, their number, confidences and how many are right.

    The model says sigmoid(|difference|) for the reply it scores higher, 50 % ... 100 %; equal scores are half right.
    """
    sums = torch.zeros(len(scores), 3, BINS, dtype=torch.float64)
    for index, (values, order) in enumerate(zip(scores, ranks, strict=True)):
        for _, _, gap in pairs_of(values, order):
            confidence = torch.sigmoid(torch.tensor(abs(gap), dtype=torch.float64)).item()
            place = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
            right = 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
            sums[index, :, place] += torch.tensor([1.0, confidence, right], dtype=torch.float64)
    return sums


def calibration_error(scores: list[list[float]], ranks: list[list[int]]) -> dict:
    """Expected calibration error (Naeini et al. 2015): mean over pairs of |accuracy - confidence| of their bin. It is
    never negative, so few pairs make it larger than it is."""
    sums = bin_sums(scores, ranks).flatten(1)

    def error(flat: Tensor) -> Tensor:
        count, confidence, right = flat.unflatten(-1, (3, BINS)).unbind(-2)
        return (right - confidence).abs().sum(-1) / count.sum(-1)

    return bootstrapped(sums, error, "%")


def reliability(scores: list[list[float]], ranks: list[list[int]]) -> list[dict]:
    """The curve's points, bins without pairs left out: mean confidence, accuracy with its interval, pairs."""
    points = []
    for count, confidence, right in bin_sums(scores, ranks).permute(2, 1, 0):
        rows = count > 0
        if rows.any():
            accuracy = measured_ratio(right[rows].tolist(), count[rows].tolist(), "%")
            points.append(
                {
                    "confidence": (confidence.sum() / count.sum()).item(),
                    "pairs": int(count.sum()),
                    "accuracy": accuracy,
                }
            )
    return points


def by_length(scores: list[list[float]], ranks: list[list[int]], lengths: list[list[int]]) -> list[dict]:
    """Accuracy by how many tokens the better reply is longer than the worse: four groups of pairs, cut at 0 and at
    the median of the differences' sizes. A model that goes by length is good on one side and bad on the other."""
    cases = [
        (index, sizes[i] - sizes[j], 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
        for index, (values, order, sizes) in enumerate(zip(scores, ranks, lengths, strict=True))
        for i, j, gap in pairs_of(values, order)
        if sizes[i] != sizes[j]
    ]
    if not cases:
        return []
    sizes = sorted(abs(difference) for _, difference, _ in cases)
    cut = sizes[len(sizes) // 2]
    groups = []
    for low, high in ((-math.inf, -cut), (-cut, 0), (0, cut), (cut, math.inf)):
        above, below = {}, {}
        for index, difference, right in cases:
            if low <= difference < high:
                above[index] = above.get(index, 0.0) + right
                below[index] = below.get(index, 0.0) + 1
        if below:
            accuracy = measured_ratio(list(above.values()), list(below.values()), "%")
            edges = {name: edge if math.isfinite(edge) else None for name, edge in (("low", low), ("high", high))}
            groups.append({**edges, "pairs": int(sum(below.values())), "accuracy": accuracy})
    return groups


def length_correlation(scores: list[list[float]], lengths: list[list[int]]) -> dict:
    """Pearson's correlation of score and length within rankings: both less their ranking's mean, so that prompts that
    get long answers do not count. None where either never varies."""
    parts = []
    for values, sizes in zip(scores, lengths, strict=True):
        x, y = torch.tensor(values).double(), torch.tensor(sizes).double()
        x, y = x - x.mean(), y - y.mean()
        parts.append(torch.stack([x @ y, x @ x, y @ y]))
    return bootstrapped(torch.stack(parts), lambda sums: sums[..., 0] / (sums[..., 1] * sums[..., 2]).sqrt())
