"""What a run took: time, tokens, device-hours and dollars, and what the time of each stage went into.

In: stages as read. Out: a `Cost` a stage and one for all, for the report. Dollars appear where a price is given:
`posttrain report runs/tiny --price 2.50`, of one hour of one device; a device is one process (one GPU, or all cores
that one process uses).
"""

import math
from dataclasses import dataclass, field

from posttrain.report_read import Stage

# The parts of a step as the RL loop logs them, and their names in the table. "other" is what it does not time.
PARTS = {
    "generate": "generate", "reward": "reward functions", "score": "log-probabilities, values", "update": "update",
    "sync": "weight sync", "data": "data", "watch": "measuring", "other": "rest of the steps",
}  # fmt: skip


@dataclass
class Cost:
    """Of one stage, or of all; None where it is not known. `parts`: (key of a colour, name, share of the time)."""

    name: str
    seconds: float | None = None
    tokens: int | None = None
    rate: float | None = None  # tokens a second while it trains
    devices: int = 1
    device: str = ""
    price: float | None = None
    hours: float | None = None  # device-hours
    parts: list[tuple[str, str, float]] = field(default_factory=list)

    @property
    def dollars(self) -> float | None:
        return None if self.price is None or self.hours is None else self.hours * self.price


def costs(stages: list[Stage], price: float | None = None) -> tuple[list[Cost], Cost]:
    """One `Cost` a stage, and their sum; stages that are not finished count with what they have logged."""
    each = [_cost(stage, price) for stage in stages]
    total = Cost("total", price=price)
    total.seconds, total.hours = (math.fsum(getattr(one, key) or 0.0 for one in each) for key in ("seconds", "hours"))
    total.tokens = sum(one.tokens or 0 for one in each)
    return each, total


def _cost(stage: Stage, price: float | None) -> Cost:
    manifest, machine = stage.manifest, stage.manifest.get("machine") or {}
    times = [row["time"] for row in stage.log if _is_number(row.get("time"))]
    seconds = manifest.get("wall_time_s") if manifest else (times[-1] if times else None)
    tokens = manifest.get("tokens") if manifest else max(_series(stage.log, "tokens"), default=None)
    cost = Cost(stage.name, seconds, tokens, _rate(stage.log), price=price)
    cost.devices, cost.device = machine.get("world_size") or 1, machine.get("device") or ""
    cost.hours = None if seconds is None else seconds * cost.devices / 3600
    cost.parts = _parts(stage.log, seconds) if seconds else []
    return cost


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _series(log: list[dict], key: str) -> list[float]:
    return [row[key] for row in log if _is_number(row.get(key))]


def _rate(log: list[dict]) -> float | None:
    """Median of the logged tokens a second, else tokens over time between the first line of the log and the last."""
    logged = sorted(_series(log, "tokens_per_second"))
    if logged:
        return logged[len(logged) // 2]
    pairs = [
        (row["time"], row["tokens"]) for row in log if _is_number(row.get("time")) and _is_number(row.get("tokens"))
    ]
    if len(pairs) < 2 or pairs[-1][0] <= pairs[0][0]:
        return None
    return (pairs[-1][1] - pairs[0][1]) / (pairs[-1][0] - pairs[0][0])


def _parts(log: list[dict], seconds: float) -> list[tuple[str, str, float]]:
    """Shares of a stage's time: before the first step (loading, measuring what was there), the steps, after the last
    one (measuring what was gained, saving); the steps divided as the log has it. [] for a log without time.

    When the first step began is not logged: it is taken to have lasted as long as the mean of the others.
    """
    lines = [row for row in log if _is_number(row.get("time")) and _is_number(row.get("step"))]
    if len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return []
    first, last = lines[0], lines[-1]
    step = (last["time"] - first["time"]) / (last["step"] - first["step"])
    before = max(0.0, first["time"] - step * first["step"])
    after = max(0.0, seconds - last["time"])
    steps = max(0.0, seconds - before - after)
    means = {}
    for part in PARTS:
        values = _series(log, f"share/{part}")
        means[part] = math.fsum(values) / len(values) if values else 0.0
    means["other"] = max(0.0, 1 - math.fsum(means.values()))
    if means["other"] > 0.95:  # nothing worth telling apart
        inner = [("update", "training steps", steps / seconds)]
    else:
        inner = [(part, PARTS[part], share * steps / seconds) for part, share in means.items()]
    ends = [
        ("before", "start and measuring before", before / seconds),
        ("after", "measuring after, saving", after / seconds),
    ]
    return [part for part in (ends[0], *inner, ends[1]) if part[2] >= 0.002]
