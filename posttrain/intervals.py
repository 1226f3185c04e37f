"""Figures with 95 % intervals, and the rows of the gains table made of them.

In: independent observations. Out: `{"value", "low", "high", "n", "unit"}`, as manifests store them.
"""

import math


def measured(values: list[float], unit: str = "") -> dict:
    """Mean of independent values with its 95 % interval: mean +- 1.96 standard errors; for values that are all 0 or
    all 1, where that has no width, Wilson's interval of a proportion (Wilson 1927)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if min(values) == max(values) and mean in (0.0, 1.0):
        low, high = wilson(round(mean * n), n)
    else:
        spread = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
        low, high = mean - 1.96 * math.sqrt(spread / n), mean + 1.96 * math.sqrt(spread / n)
    return _figure(mean, low, high, n, unit)


def _figure(value: float, low: float, high: float, n: int, unit: str) -> dict:
    if unit == "%":  # a share lies between 0 and 1
        low, high = max(0.0, low), min(1.0, high)
    return {"value": value, "low": low, "high": high, "n": n, "unit": unit}


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def measured_ratio(above: list[float], below: list[float], unit: str) -> dict:
    """sum(above) / sum(below) over paired independent observations, with its 95 % interval (delta method)."""
    n, ratio = len(above), math.fsum(above) / math.fsum(below)
    mean_below = math.fsum(below) / n
    errors = [(a - ratio * b) / mean_below for a, b in zip(above, below, strict=True)]
    half = 1.96 * math.sqrt(math.fsum(e * e for e in errors) / max(1, n - 1) / n)
    return _figure(ratio, ratio - half, ratio + half, n, unit)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `correct` of n (Chen et al. 2107.03374)."""
    return 1.0 if n - correct < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def gain(
    name: str, before: dict, after: dict, *, labels: tuple[str, str], goal: str, passed: bool, better="higher"
) -> dict:
    """One row of the gains table."""
    keep = ("value", "low", "high")
    return {
        "name": name,
        "before": {"label": labels[0], **{k: before[k] for k in keep}},
        "after": {"label": labels[1], **{k: after[k] for k in keep}},
        "better": better,
        "unit": after["unit"],
        "passed": passed,
        "goal": goal,
    }


def clearly_higher(before: dict, after: dict) -> bool:
    """Whether the intervals do not touch."""
    return after["low"] > before["high"]
