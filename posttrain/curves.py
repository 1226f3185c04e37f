"""The curves of a stage: which series of its log belong together, and each group as a small picture.

In: the lines of log.jsonl and, for what was measured on held-out rows, the metrics of stage.json. Out: panels, those
that matter most first, and `Markup` holding one `<svg>` each in the report's colours. Nothing is read or written.

Below a panel stand its steps and, where there is room, the tokens and the time they took: two runs that differ in
batch size or machine are compared by those.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from markupsafe import Markup, escape

from posttrain.figures import Points, compact, ticks
from posttrain.identity_names import SERIES

MAX_POINTS = 300  # a curve of more is thinned to its lows and highs, so that no spike is lost
SMOOTH_FROM = 20  # a curve of fewer points gets no running mean
ROUGH = 4  # nor does one that goes up and down less than this many times its range: a schedule, a count
LOG_RATIO = 100  # a loss that spans more than this is drawn on a log axis
LOG_NAMES = ("loss", "grad_norm", "perplexity")
MAIN = ("loss", "bits_per_byte", "reward", "kl", "completion_length", "entropy")  # drawn large, in this order
ORDER = ("loss", "reward", "utility", "score", "kl", "accuracy", "pass", "correct", "length", "entropy", "bits", "std")
LAST = ("share/", "clip", "grad_norm", "learning_rate", "throughput", "per_second", "epoch", "tokens", "time")
DRAWN_APART = ("step", *SERIES)  # the latter by report_identity.py
PREFIXES = ("eval_", "eval/", "held_out_", "train_", "train/")
# By series, or by stage and series. KL and entropy: rl/metrics.py; loss: the mean over supervised tokens.
UNITS = {
    ("pretrain", "loss"): "nats a token", ("sft", "loss"): "nats a token", "bits_per_byte": "bits a byte",
    "kl": "nats a reply", "entropy": "nats a token", "completion_length": "tokens", "completion_length_max": "tokens",
    "tokens_per_second": "tokens/s", "memory_gb": "GB", "time": "s", "tokens": "tokens",
}  # fmt: skip
# What a stage measures on held-out rows before and after, by the series of its log that tells of the same thing.
MEASURED = {
    "bits_per_byte": "bits per byte", "loss": "held-out loss", "completion_length": "reply length",
    "kl": "KL to the start", "reward/correct": "pass@1", "reward/reward model": "reward model",
}  # fmt: skip


@dataclass
class Panel:
    """Series that share an axis. `held_out` has (step, value, low, high) of what was measured with its interval."""

    name: str
    unit: str = ""
    lines: dict[str, Points] = field(default_factory=dict)
    skipped: int = 0  # values that are not finite
    held_out: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def main(self) -> bool:
        return self.name in MAIN


def panels(log: list[dict], stage: str = "", metrics: dict | None = None) -> tuple[list[Panel], dict[str, float]]:
    """Numeric series of a log -> panels, most important first, and the series that have one value only.

    `eval_loss`, `held_out_loss` and `loss` share a panel. A step logged twice (a stage that was resumed) counts once,
    with the later value. `metrics` of the manifest put held-out figures with intervals beside the curve of the same.
    """
    series: dict[str, dict[float, float]] = {}
    for index, row in enumerate(log, 1):
        for name, value in row.items():
            if name not in DRAWN_APART and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, {})[row.get("step", index)] = value
    grouped: dict[str, Panel] = {}
    single = {}
    for name, values in series.items():
        points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
        if len({value for _, value in points}) < 2:
            single[name] = points[-1][1] if points else math.nan
            continue
        if name.startswith("reward/") and _same(values, series.get("reward", {})):
            continue  # the one reward function there is: drawn as the reward
        base = name
        for prefix in PREFIXES:
            base = base.removeprefix(prefix)
        panel = grouped.setdefault(base, Panel(base, UNITS.get((stage, base)) or UNITS.get(base, "")))
        panel.lines[name] = points
        panel.skipped += len(values) - len(points)
    for panel in grouped.values():
        panel.held_out = _held_out(panel, rewards_of(log), metrics or {})
    return sorted(grouped.values(), key=lambda panel: _rank(panel.name)), single


def _same(left: dict[float, float], right: dict[float, float]) -> bool:
    """Equal but for rounding, at the same steps."""
    return left.keys() == right.keys() and all(math.isclose(left[k], right[k], rel_tol=1e-5) for k in left)


def rewards_of(log: list[dict]) -> list[str]:
    """Names of the reward functions a log of the RL loop tells of, in its order."""
    names = dict.fromkeys(key for row in log for key in row if key.startswith("reward/"))
    return [name.removeprefix("reward/") for name in names if not name.endswith(("/std", "/none"))]


def _held_out(panel: Panel, rewards: list[str], metrics: dict) -> list[tuple[float, float, float, float]]:
    """The figures before the stage and after it, where they measure what the panel shows and have intervals."""
    series = panel.name
    if series == "reward" and len(rewards) == 1:  # then it is that function's mean, but for a penalty
        series = f"reward/{rewards[0]}"
    name = MEASURED.get(series, series.removeprefix("reward/") if series.startswith("reward/") else None)
    steps = [step for points in panel.lines.values() for step, _ in points]
    found = []
    for step, entry in (
        (0.0, metrics.get(f"{name}, before") or metrics.get(f"{name}, base")),
        (max(steps), metrics.get(name)),
    ):
        numbers = [(entry or {}).get(key) for key in ("value", "low", "high")]
        if all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            found.append((step, *numbers))
    return found


def _rank(name: str) -> tuple:
    if name in MAIN:
        return (-1, False, MAIN.index(name), name)
    late = next((len(ORDER) + 1 + place for place, part in enumerate(LAST) if part in name), None)
    early = next((place for place, part in enumerate(ORDER) if part in name), len(ORDER))
    return (early if late is None else late, name not in ORDER, 0, name)


# ---- points ---------------------------------------------------------------------------------------------------------


def thin(points: Points) -> Points:
    """At most about MAX_POINTS points: each bucket of neighbours keeps its lowest and its highest."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def running_mean(points: Points, width: int) -> Points:
    """Centred mean over `width` neighbours; the window shrinks evenly towards both ends."""
    half, means = width // 2, []
    sums = [0.0, *accumulate(value for _, value in points)]  # a log may have 100,000 lines
    for index, (step, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        means.append((step, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return means


def clock(log: list[dict]) -> list[tuple[str, Callable[[float], str]]]:
    """[("tokens", f), ("time", f)]: what had been spent at a step as a short text, between logged steps on a line;
    only those that the log has."""
    found = []
    for key, text in (("tokens", compact), ("time", _time_text)):
        points = sorted({row["step"]: row[key] for row in log if _number(row, "step") and _number(row, key)}.items())
        if len(points) > 1:
            found.append((key, lambda step, points=points, text=text: text(_between(points, step))))
    return found


def _number(row: dict, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def _between(points: Points, step: float) -> float:
    """On the line through the two points around `step`, or through the nearest two; not below 0."""
    index = next((i for i in range(1, len(points) - 1) if points[i][0] >= step), len(points) - 1)
    (a, before), (b, after) = points[index - 1], points[index]
    return max(0.0, before + (after - before) * (step - a) / (b - a))


def _time_text(seconds: float) -> str:
    """9s, 2m05, 3h20: short enough to stand below a tick."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    return f"{minutes}m{rest:02d}" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}"


# ---- the picture ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """From steps and values to places in the picture."""

    width: int
    height: int
    steps: tuple[float, float]
    values: tuple[float, float]  # their logarithms (base 10) on a log axis
    log: bool
    bottom: int
    left: int = 46
    right: int = 10
    top: int = 8

    def x(self, step: float) -> float:
        first, last = self.steps
        return self.left + (self.width - self.left - self.right) * (step - first) / (last - first)

    def y(self, value: float) -> float:
        low, high = self.values
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.height - self.bottom - (self.height - self.top - self.bottom) * share


def wants_log(name: str, values: Sequence[float]) -> bool:
    """Whether a panel of this name and these values gets a log axis: losses and norms over a wide range."""
    wide = min(values) > 0 and max(values) / min(values) >= LOG_RATIO
    return wide and any(part in name for part in LOG_NAMES)


def curves(panel: Panel, spent: list[tuple[str, Callable[[float], str]]] = ()) -> Markup:
    """One panel: every line (finite values, at least one of two points) over the step, held-out figures with their
    intervals; below the steps a row for each of `spent` (see `clock`)."""
    axes = _axes(panel, 24 + 13 * len(spent))
    name = escape(panel.name + (f", {panel.unit}" if panel.unit else ""))
    out = [f'<svg class="curve" viewBox="0 0 {axes.width} {axes.height}" role="img"><title>{name}</title>']
    out += [*_value_ticks(axes), *_step_ticks(axes, spent)]
    for index, points in enumerate(panel.lines.values()):
        out.append(_line(points, index, axes))
    for step, value, low, high in panel.held_out:
        at = axes.x(step)
        out.append(f'<path class="whisker c2" d="M{at:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}"/>')
        out.append(f'<circle class="dot c2" cx="{at:.1f}" cy="{axes.y(value):.1f}" r="3.2"/>')
    return Markup("".join(out) + "</svg>")


def _axes(panel: Panel, bottom: int) -> _Axes:
    steps = [step for points in panel.lines.values() for step, _ in points] + [each[0] for each in panel.held_out]
    values = [value for points in panel.lines.values() for _, value in points]
    values += [value for each in panel.held_out for value in each[1:]]
    log = wants_log(panel.name, values)
    low, high = (math.log10(f(values)) if log else f(values) for f in (min, max))
    if not log and 0 <= low < 0.4 * high:
        low = 0.0  # a curve that comes near zero is read against zero
    pad = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = (low if low == 0 and not log else low - pad), high + pad
    last = max(steps) if max(steps) > min(steps) else min(steps) + 1
    return _Axes(340, 136 + bottom, (min(steps), last), (low, high), log, bottom)


def _tick_text(value: float) -> str:
    return compact(value) if abs(value) >= 10_000 else f"{value:.3g}"


def _value_ticks(axes: _Axes) -> list[str]:
    low, high = axes.values
    if axes.log:
        marks = [10.0**t for t in ticks(low, high, 3) if t == int(t)] or [10.0**low, 10.0**high]
    else:
        marks = ticks(low, high, 5)
    out = []
    for mark in marks:
        out.append(f'<path class="grid" d="M{axes.left} {axes.y(mark):.1f}H{axes.width - axes.right}"/>')
        out.append(
            f'<text class="tick end" x="{axes.left - 6}" y="{axes.y(mark) + 3.5:.1f}">{_tick_text(mark)}</text>'
        )
    return out


def _step_ticks(axes: _Axes, spent: list[tuple[str, Callable[[float], str]]]) -> list[str]:
    """Round steps below the axis, and below those what had been spent by then; each row says what it counts."""
    floor, out = axes.height - axes.bottom, []
    marks = [mark for mark in ticks(*axes.steps, 5) if mark == int(mark)]
    for row, (name, text) in enumerate([("step", _tick_text), *spent]):
        at, kind = floor + 14 + 13 * row, "tick" if row == 0 else "tick spent"
        out.append(f'<text class="{kind} end" x="{axes.left - 15}" y="{at}">{name}</text>')
        for mark in marks:
            anchor = "end" if axes.x(mark) > axes.width - 22 else "mid"
            place = min(axes.x(mark), axes.width - 1)
            out.append(f'<text class="{kind} {anchor}" x="{place:.1f}" y="{at}">{text(mark)}</text>')
    out += [f'<path class="grid" d="M{axes.x(mark):.1f} {floor}v4"/>' for mark in marks]
    return out


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(points: Points, index: int, axes: _Axes) -> str:
    """One line of a panel: faint for what was logged and full for its running mean, or points where they are few."""
    logged = _path((axes.x(step), axes.y(value)) for step, value in thin(points))
    colour, values = f"c{index % 2}", [value for _, value in points]
    rough = sum(abs(b - a) for a, b in pairwise(values)) > ROUGH * (max(values) - min(values))
    if rough and len(points) >= SMOOTH_FROM:
        smooth = thin(running_mean(points, max(5, len(points) // 12)))
        mean = _path((axes.x(step), axes.y(value)) for step, value in smooth)
        return f'<path class="line raw {colour}" d="{logged}"/><path class="line {colour}" d="{mean}"/>'
    dots = "".join(
        f'<circle class="dot {colour}" cx="{axes.x(s):.1f}" cy="{axes.y(v):.1f}" r="2"/>' for s, v in points
    )
    return f'<path class="line {colour}" d="{logged}"/>' + (dots if len(points) <= 12 else "")
