"""Two models on the same prompts: win rate, win rate at equal length, and what the judge's habits are worth.

In: for each prompt the outcome of A against B (1 win, 0.5 tie, 0 loss) and the lengths of both replies; or a judge's
words in both orders. Out: figures with 95 % intervals by bootstrap over prompts. Launched by `posttrain eval A
--against B --suite chat` (posttrain/suite_against.py).

The win rate at equal length follows length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475, equations 1
and 2): outcomes are fitted by a logistic regression

    P(A wins on x) = logistic(theta + phi tanh(d_x / std(d))),    d_x = length of A's reply less that of B's,

and the figure is what it says at d = 0: logistic(theta). A tie counts half a win, as their preferences between 0 and 1
do. Their third term, the instruction's difficulty, is fitted over many models and needs them: with two it is left out.
theta and phi have a normal prior of mean 0 and deviation 10, which keeps them finite where one side always wins and
moves no figure of some tens of prompts that matters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.bootstrap import RESAMPLES, bootstrapped

PRIOR_DEVIATION = 10.0
STEPS = 60  # of Newton's method at most; it is through after some ten


def win_rates(outcomes: Sequence[float], lengths: Sequence[tuple[int, int]], against: str) -> dict[str, dict]:
    """Figures of A against the model named `against`, a prompt an observation.

    outcomes: 1.0 win of A, 0.5 tie, 0.0 loss. lengths: (A's, B's) of the replies, in any one unit.
    """
    y = torch.tensor(outcomes, dtype=torch.float64)
    gaps = torch.tensor([a - b for a, b in lengths], dtype=torch.float64)
    names = {"wins": y == 1, "ties": y == 0.5, "losses": y == 0}
    shares = {f"{name} against {against}": _mean(found.double(), "%") for name, found in names.items()}
    return {
        f"win rate against {against}": _mean(y, "%"),
        f"win rate against {against}, length-controlled": length_controlled(y, gaps),
        **shares,
        f"length beyond {against}": _mean(gaps, "characters"),
    }


def length_controlled(outcomes: Tensor, gaps: Tensor) -> dict:
    """The win rate at equal length, from (N,) outcomes and (N,) length differences A - B: a figure with its 95 %
    percentile interval over resampled prompts. The scale of the lengths is that of all prompts in every resample."""
    features = length_feature(gaps)
    size = len(outcomes)
    drawn = torch.randint(size, (RESAMPLES, size), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    every = torch.cat([torch.ones(1, size, dtype=torch.float64), counts])
    rates = fit(outcomes, features, every)[:, 0].sigmoid()
    low, high = rates[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"value": rates[0].item(), "low": low, "high": high, "n": size, "unit": "%"}


def length_feature(gaps: Tensor) -> Tensor:
    """tanh(d / std(d)), (N,); 0 where all lengths are equal."""
    deviation = gaps.std() if len(gaps) > 1 else torch.tensor(0.0)
    return torch.tanh(gaps / deviation) if deviation > 0 else torch.zeros_like(gaps)


def fit(outcomes: Tensor, features: Tensor, counts: Tensor) -> Tensor:
    """(theta, phi) of each row of `counts` (R, N), how often each prompt stands in it: the maximum of the posterior,
    by Newton's method on the concave log-likelihood. (R, 2)."""
    x = torch.stack([torch.ones_like(features), features], dim=1)  # (N, 2)
    prior = torch.eye(2, dtype=torch.float64) / PRIOR_DEVIATION**2
    weights = torch.zeros(len(counts), 2, dtype=torch.float64)
    for _ in range(STEPS):
        p = (weights @ x.T).sigmoid()  # (R, N)
        slope = (counts * (outcomes - p)) @ x - weights @ prior  # (R, 2)
        curvature = torch.einsum("rn,ni,nj->rij", counts * p * (1 - p), x, x) + prior
        step = torch.linalg.solve(curvature, slope)
        # Far from the maximum Newton's step overshoots where the curve is flat: at most 2 at a time.
        weights = weights + step * (2 / step.abs().amax(1, keepdim=True)).clamp(max=1)
        if step.abs().max() < 1e-10:
            break
    return weights


def both_orders(said: Sequence[tuple[str | None, str | None]]) -> tuple[list[float | None], dict[str, dict]]:
    """A judge's picks of each prompt, A's reply read first and then B's, as "a" (the first), "b" or "tie"; None where
    its words could not be read -> (outcome of A or None, what the judge's order is worth).

    A win counts only where both orders agree; else it is a tie. "prefers what it reads first" is, among picks that
    are no ties, the share of the first place: 50 % is a judge without position bias.
    """
    outcomes: list[float | None] = []
    for first, second in said:
        if first is None or second is None:
            outcomes.append(None)
        else:
            outcomes.append({("a", "b"): 1.0, ("b", "a"): 0.0}.get((first, second), 0.5))
    known = [pair for pair in said if None not in pair]
    facts = {"answers unreadable": _share([float(None in pair) for pair in said])}
    if known:
        clashing = [float(first == second and first != "tie") for first, second in known]
        facts["orders that contradict each other"] = _share(clashing)
    picked = [(pair.count("a"), 2 - pair.count("tie")) for pair in known]
    if any(total for _, total in picked):
        parts = torch.tensor(picked, dtype=torch.float64)
        facts["prefers what it reads first"] = bootstrapped(parts, lambda sums: sums[..., 0] / sums[..., 1], "%")
    return outcomes, {f"judge: {name}": figure for name, figure in facts.items()}


def _share(values: list[float]) -> dict:
    return _mean(torch.tensor(values, dtype=torch.float64), "%")


def _mean(values: Tensor, unit: str) -> dict:
    parts = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1)
    return bootstrapped(parts, lambda sums: sums[..., 0] / sums[..., 1], unit)
