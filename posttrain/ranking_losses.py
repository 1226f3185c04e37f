"""Losses of K scores against people's order of K replies. Torch only.

In: scores (K,), best first, and their ranks, which rise (equal = tie). Out: a scalar in nats. Every loss is the
Bradley-Terry pair loss at K = 2, does not change when all scores shift, and takes `label_smoothing`: the chance that
a choice was an error, in which case any other reply still in the race is as likely. At K = 2 that is the smoothing of
conservative DPO. Centering and margins are added around a loss by `ranking_loss`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TIES = ("average", "breslow")
MOST_TIED = 12  # replies of one rank whose orders are averaged exactly: 2^12 subsets


def tie_groups(ranks: list[int]) -> list[tuple[int, int]]:
    """[first, last) of each run of equal ranks, best first."""
    edges = [0, *(i for i in range(1, len(ranks)) if ranks[i] != ranks[i - 1]), len(ranks)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def plackett_luce_loss(
    scores: Tensor, ranks: list[int], *, ties: str = "average", label_smoothing: float = 0.0
) -> Tensor:
    """-log likelihood of an order (Plackett 1975): at each place, logsumexp(scores still in the race) - score.

    The last place, where one is left, adds 0; K equal scores cost ln K!. A tie says that people gave no order, so by
    default (`ties` "average") the loss is its mean over all orders of the tied replies, which is exact, costs
    2^(replies of that rank) and draws their scores together. "breslow" holds each tied reply against all that are not
    better (Breslow 1974): cheap for large ties, but it counts a tie of two twice.
    Raises ValueError where more than MOST_TIED replies share a rank and orders are to be averaged.
    """
    total = scores.new_zeros(())
    for first, last in tie_groups(ranks):
        race = scores[first:]
        if len(race) == 1:
            continue
        if last - first == 1:
            total = total + _choice(race, 0, label_smoothing)
        elif ties == "breslow":
            total = total + torch.stack([_choice(race, i, label_smoothing) for i in range(last - first)]).sum()
        else:
            total = total + _mean_over_orders(race, last - first, label_smoothing)
    return total


def _choice(race: Tensor, chosen: int, label_smoothing: float) -> Tensor:
    """Cost of choosing one of `race` (n,), n >= 2."""
    cost = torch.logsumexp(race, 0) - race[chosen]
    if label_smoothing:
        others = (race.sum() - race[chosen]) / (len(race) - 1)
        cost = cost + label_smoothing * (race[chosen] - others)
    return cost


def _mean_over_orders(race: Tensor, tied: int, label_smoothing: float) -> Tensor:
    """Cost of choosing the first `tied` of `race` before the rest, averaged over their orders.

    With j of them left, every subset of size j is equally likely to be what is left, and so is each choice from it:
    tied! orders come down to 2^tied subsets.
    """
    if tied > MOST_TIED:
        raise ValueError(
            f"{tied} replies share a rank, expected at most {MOST_TIED} where ties are averaged; use breslow"
        )
    subsets, weights, sizes = _subsets(tied, str(race.device), race.dtype)
    head, rest = race[:tied], race[tied:]
    logs = torch.where(subsets, head, -torch.inf).logsumexp(1)
    if len(rest):
        logs = torch.logaddexp(logs, rest.logsumexp(0))
    left = sizes + len(rest)  # replies in the race
    weights = torch.where(left > 1, weights, 0.0)  # choosing the only one costs nothing
    mean = head.mean()
    others = (rest.sum() + (sizes - 1) * mean) / (left - 1).clamp(min=1)
    return (weights * (logs - mean + label_smoothing * (mean - others))).sum()


@lru_cache(maxsize=64)
def _subsets(size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """All subsets but the empty one: members (2^n - 1, n), 1 / how many there are of that size, sizes."""
    numbers = torch.arange(1, 2**size, device=device)
    members = (numbers[:, None] >> torch.arange(size, device=device)) & 1 == 1
    sizes = members.sum(1)
    counts = torch.tensor([float(math.comb(size, n)) for n in range(size + 1)], device=device, dtype=dtype)
    return members, 1 / counts[sizes], sizes


def bradley_terry_loss(scores: Tensor, ranks: list[int], *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over pairs of different ranks of -log sigmoid(better - worse) (InstructGPT, 2203.02155). A ranking counts
    once however many pairs it has; tied pairs say nothing, and a ranking of ties alone has no gradient."""
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
    if not pairs:
        return scores.sum() * 0.0
    better, worse = (torch.tensor(side, device=scores.device) for side in zip(*pairs, strict=True))
    gaps = scores[better] - scores[worse]
    loss = -torch.nn.functional.logsigmoid(gaps).mean()
    return loss + label_smoothing * gaps.mean() if label_smoothing else loss


def top1_loss(scores: Tensor, ranks: list[int], *, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax of the best reply among all K: the first place of the Plackett-Luce likelihood alone, which says
    nothing of the order below it. Several best ones share the target."""
    best = tie_groups(ranks)[0][1]
    mean = scores[:best].mean()
    cost = torch.logsumexp(scores, 0) - mean
    if label_smoothing:
        cost = cost + label_smoothing * (mean - (scores.sum() - mean) / (len(scores) - 1))
    return cost


LOSS_FUNCTIONS = {"plackett_luce": plackett_luce_loss, "bradley_terry": bradley_terry_loss, "top1": top1_loss}


@dataclass(frozen=True)
class RankingLoss:
    """One of LOSS_FUNCTIONS with its settings, as a function of scores and ranks."""

    loss_type: str = "plackett_luce"
    ties: str = "average"
    label_smoothing: float = 0.0
    center_rewards_coefficient: float = 0.0

    def __call__(self, scores: Tensor, ranks: list[int], margins: list[float] | None = None) -> Tensor:
        """The loss of one ranking; scores (K,), best first.

        `margins` (K,) are added to the scores within the loss: 0 for the best, growing with the place. A reply has
        to beat one that is ranked below it by the difference of their margins; at K = 2 that is Llama 2's
        -log sigmoid(chosen - rejected - margin) (2307.09288). Centering adds coefficient * (2 * mean score)^2, at
        K = 2 (chosen + rejected)^2 (Eisenstein et al. 2312.09244), which pins the free constant of the scores.
        """
        shifted = scores + torch.tensor(margins, device=scores.device, dtype=scores.dtype) if margins else scores
        options = {"ties": self.ties} if self.loss_type == "plackett_luce" else {}
        loss = LOSS_FUNCTIONS[self.loss_type](shifted, ranks, label_smoothing=self.label_smoothing, **options)
        if self.center_rewards_coefficient:
            loss = loss + self.center_rewards_coefficient * (2 * scores.mean()) ** 2
        return loss
