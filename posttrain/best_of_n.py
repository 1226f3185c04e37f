"""The arithmetic of best-of-n: what picking the highest score of n gives, its KL, and Gao et al.'s form of the curve.

In: scores and values of N samples for each of P prompts. Out: the pick's expected value for every n <= N from the same
samples, with intervals over prompts. Torch only.
"""

import math
from dataclasses import dataclass

import torch

from posttrain.bootstrap import bootstrapped
from posttrain.intervals import measured


def best_of_n_kl(n: int) -> float:
    """KL in nats of the best of n against one sample (Stiennon et al. 2009.01325)."""
    return math.log(n) - (n - 1) / n


def pick_weights(size: int, n: int) -> torch.Tensor:
    """(size,) chance that the k-th lowest of `size` samples is the best of n drawn from them without replacement:
    C(k - 1, n - 1) / C(size, n), in exact integers."""
    total = math.comb(size, n)
    return torch.tensor([math.comb(k, n - 1) / total for k in range(size)], dtype=torch.float64)


def expected_best(scores: torch.Tensor, values: torch.Tensor, ns: list[int]) -> torch.Tensor:
    """(P, len(ns)) mean value of the pick, over all ways to draw n of a prompt's N samples and take the highest score.

    scores, values (P, N). Unbiased for each n <= N (Nakano et al. 2112.09332, appendix I); equal scores share their
    values, since either may be the pick. For n = 1 it is the mean, for n = N the best one's value.
    """
    order = scores.argsort(1)
    ranked, values = scores.gather(1, order), values.double().gather(1, order)
    for row, (places, line) in enumerate(zip(ranked.tolist(), values, strict=True)):
        start = 0
        for place in range(1, len(places) + 1):
            if place == len(places) or places[place] != places[place - 1]:
                values[row, start:place] = line[start:place].mean()
                start = place
    weights = torch.stack([pick_weights(scores.shape[1], n) for n in ns], 1)  # (N, len(ns))
    return values @ weights


def powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})


def curve(scores: torch.Tensor, judged: dict[str, torch.Tensor], ns: list[int]) -> list[dict]:
    """For each n: {"n", "kl", name: {"value", "low", "high", ...}}, means over prompts with intervals over prompts.

    scores (P, N) decide the pick; judged: name -> (P, N) values, among them the scores themselves.
    """
    table = {name: expected_best(scores, values, ns) for name, values in judged.items()}
    return [
        {"n": n, "kl": best_of_n_kl(n), **{name: measured(picks[:, i].tolist()) for name, picks in table.items()}}
        for i, n in enumerate(ns)
    ]


@dataclass(frozen=True)
class Fit:
    """R(d) = d (alpha - beta d) with d = sqrt(KL): the gain over one sample. Each with its interval; `peak` is the d
    at which R is largest, None where beta is not above 0; `rms` is the root mean square of what is left."""

    alpha: dict
    beta: dict
    peak: float | None
    rms: float

    def at(self, d: float) -> float:
        return d * (self.alpha["value"] - self.beta["value"] * d)


def fit_best_of_n(picks: torch.Tensor, ns: list[int]) -> Fit:
    """Gao et al.'s form for best-of-n, by least squares through the origin; picks (P, len(ns)) from `expected_best`,
    the first column for n = 1. Points are evenly weighted; intervals are over prompts (bootstrap)."""
    if ns[0] != 1 or len(ns) < 3:
        raise ValueError(f"ns: found {ns}, expected 1 and at least two more")
    d = torch.tensor([math.sqrt(best_of_n_kl(n)) for n in ns[1:]], dtype=torch.float64)
    solve = torch.linalg.pinv(torch.stack([d, -(d**2)], 1))  # (2, points)
    gains = picks[:, 1:] - picks[:, :1]
    parts = torch.cat([gains, torch.ones(len(gains), 1).double()], 1)

    def parameter(index: int):
        return lambda sums: (sums[..., :-1] / sums[..., -1:]) @ solve[index]

    alpha, beta = (bootstrapped(parts, parameter(index)) for index in (0, 1))
    peak = alpha["value"] / (2 * beta["value"]) if beta["value"] > 0 else None
    left = gains.mean(0) - d * (alpha["value"] - beta["value"] * d)
    return Fit(alpha, beta, peak, left.square().mean().sqrt().item())
