"""Intervals of figures that are no means: draw the observations anew (Efron's bootstrap, 1979).

In: sums per independent observation and a function of their totals. Out: a figure as manifests store it. The draws
have a seed of their own, so that the same observations give the same interval.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 1000


def bootstrapped(parts: Tensor, statistic: Callable[[Tensor], Tensor], unit: str = "") -> dict:
    """`statistic` of the summed `parts` (R, M), a row an observation, with its 95 % percentile interval.

    statistic: (..., M) sums -> (...) values. Values that are not finite (a resample without spread) are left out.
    """
    generator = torch.Generator().manual_seed(0)
    size, parts = len(parts), parts.double()
    value = statistic(parts.sum(0)).item()
    drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
    counts = torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    values = statistic(counts @ parts)
    values = values[values.isfinite()]
    low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist() if len(values) else (None, None)
    return {"value": value if value == value else None, "low": low, "high": high, "n": size, "unit": unit}
