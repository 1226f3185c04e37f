"""Reward against the square root of the KL it was bought with: whether a proxy is still worth climbing.

In: a stage of RL as read (its log, its held-out figures before and after) and the curves of `posttrain bestof` in the
folder of its reward model. Out: a picture for the report and a sentence. Gao et al. (2210.10760) write reward as a
function of d = sqrt(KL): the proxy goes on rising where the judge has turned.

The proxy is what the policy was trained on; a judge is what it was not: another of `eval_reward_funcs`, measured on
held-out prompts before and after.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup

from posttrain.curves import rewards_of
from posttrain.figures import measure
from posttrain.plots import Line, plot
from posttrain.report_read import Stage

CLOUD = 300  # steps that are drawn as dots, at most
BINS = 24  # points of the line through the steps, each the mean of as many neighbours
AXIS = "√KL to the start (KL in nats a reply)"


@dataclass(frozen=True)
class Judged:
    """One judge's figure at the start and at the end of a stage, both with intervals; `kl` in nats at the end."""

    name: str
    before: dict
    after: dict

    @property
    def direction(self) -> int:
        """1: higher, -1: lower, 0: the change is within its 95 % interval (both figures taken as independent, which
        is cautious where they are of the same prompts)."""
        change = self.after["value"] - self.before["value"]
        width = math.hypot(*((entry["high"] - entry["low"]) / 2 for entry in (self.before, self.after)))
        return 0 if abs(change) <= width else int(math.copysign(1, change))

    @property
    def said(self) -> str:
        unit = self.after.get("unit") or ""
        before, after = (measure(entry, unit)[0] for entry in (self.before, self.after))
        return f"{self.name} {('does not change clearly', 'rises', 'falls')[self.direction]}, {before} to {after}"


@dataclass(frozen=True)
class Study:
    """`warns`: the proxy rises while a judge falls."""

    picture: Markup
    said: str
    warns: bool = False
    caption: str = ""


def study(stage: Stage, reward: Stage | None = None) -> Study | None:
    """The picture and the sentence of a stage of RL; None where its log has no KL or no reward."""
    points = [
        (math.sqrt(max(0.0, row["kl"])), row)
        for row in stage.log
        if all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in ("kl", "reward"))
    ]
    if len({d for d, _ in points}) < 2:
        return None
    rewards = rewards_of(stage.log)
    proxy = rewards[0] if len(rewards) == 1 else "reward"
    key = f"reward/{proxy}" if len(rewards) == 1 else "reward"
    metrics = stage.manifest.get("metrics") or {}
    held_out = _judged(_metric(proxy), metrics)
    judges = [
        _judged(_metric(name), metrics) for name in stage.config.get("eval_reward_funcs") or [] if name not in rewards
    ]
    judges = [each for each in judges if each is not None]
    steps = [(d, row[key]) for d, row in points if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    shown = steps[:: math.ceil(len(steps) / CLOUD)]
    lines = [Line(f"{proxy}, each step", [(*point, None, None) for point in shown], 0, kind="cloud")]
    lines.append(Line(f"{proxy}, over the steps", [(*point, None, None) for point in binned(steps)], 0, kind="bare"))
    end = (metrics.get("KL to the start") or {}).get("value") or points[-1][1]["kl"]
    for colour, each in enumerate(filter(None, [held_out, *judges])):
        ends = [(d, *(entry[k] for k in ("value", "low", "high"))) for d, entry in _ends(each, end)]
        colour = 0 if each is held_out else colour + (held_out is None)
        lines.append(Line(f"{each.name}, held-out", ends, colour, kind="ends"))
    for name, curve in (reward.best_of if reward else {}).items():
        lines += _best_of_lines(curve, name, known=[each.name for each in judges])
    picture = plot("reward against the root of KL", lines, x=AXIS, y="mean of the replies")
    said, warns = sentence(proxy, held_out, judges, [value for _, value in steps], end)
    if not stage.manifest:
        said = f"{said.partition('. ')[0]}. A judge is measured when the stage has finished."
    return Study(picture, said, warns, "what the policy climbs, and what it is worth, by how far it has moved")


def best_of_study(stage: Stage) -> list[Study]:
    """The curves of best-of-n that stand in a reward model's folder, each with its sentence."""
    found = []
    for name, curve in stage.best_of.items():
        judges = [key for key in curve[0] if key not in ("n", "kl")]
        if len(curve) < 2 or not judges:
            continue
        picture = plot("best of n", _best_of_lines(curve, "", known=judges[1:]), x=AXIS, y="mean of the pick")
        proxy, said, warns = judges[0], [], False
        for judge in judges[1:]:
            best = max(curve, key=lambda point: point[judge]["value"])
            peak, last = Judged(judge, best[judge], curve[-1][judge]), curve[-1]
            if peak.direction < 0:
                warns = True
                said.append(
                    f"{judge} is highest at n = {best['n']} and falls after it while {proxy} rises: over-optimization"
                )
            else:
                said.append(f"{judge} does not clearly fall up to n = {last['n']}, {proxy} goes on rising")
        caption = f"{name}: the pick of n replies by {proxy}"
        found.append(Study(picture, "; ".join(said) + "." if said else "", warns, caption))
    return found


def sentence(
    proxy: str, held_out: Judged | None, judges: list[Judged], steps: list[float], kl: float
) -> tuple[str, bool]:
    """What the figures say together, and whether that is a warning. `steps`: the proxy's value at each step, which
    tells where no held-out figure does."""
    risen = held_out.direction if held_out is not None else _trend(steps)
    change = ("does not change clearly", "rises", "falls")[risen]
    told = held_out.said if held_out is not None else f"{proxy} {change} in training"
    at = f"at a KL of {kl:.3g} nats a reply"
    if not judges:
        return (
            f"{told} {at}. No judge was measured beside it, so this alone does not show that replies got better: "
            "name one in eval_reward_funcs.",
            False,
        )
    falling = [each for each in judges if each.direction < 0]
    if risen > 0 and falling:
        worse = "; ".join(each.said for each in falling)
        return f"Over-optimization: {told}, while {worse}, {at}. Raise beta or stop earlier.", True
    others = "; ".join(each.said for each in judges)
    if risen > 0 and all(each.direction > 0 for each in judges):
        return f"{told}; {others}, {at}: they rise together, no sign of over-optimization.", False
    return f"{told}; {others}, {at}.", False


def binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most BINS means of neighbours in the order of the steps."""
    size = math.ceil(len(points) / BINS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(math.fsum(values) / len(values) for values in zip(*group, strict=True)) for group in groups]


def _metric(reward: str) -> str:
    return "pass@1" if reward == "correct" else reward  # as posttrain/evals.py names it


def _judged(name: str, metrics: dict) -> Judged | None:
    before, after = metrics.get(f"{name}, before"), metrics.get(name)
    for entry in (before, after):
        numbers = [(entry or {}).get(key) for key in ("value", "low", "high")]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            return None
    return Judged(name, before, after)


def _ends(each: Judged, kl: float) -> list[tuple[float, dict]]:
    return [(0.0, each.before), (math.sqrt(max(0.0, kl)), each.after)]


def _best_of_lines(curve: list[dict], name: str, known: list[str]) -> list[Line]:
    """A line a judge of a best-of-n curve: the reward model's in the first colour, the others' as elsewhere."""
    lines = []
    for index, judge in enumerate(key for key in curve[0] if key not in ("n", "kl")):
        points = [(math.sqrt(p["kl"]), *(p[judge].get(k) for k in ("value", "low", "high"))) for p in curve]
        label = f"{judge}, best of n" + (f" ({name})" if name not in ("", "bestof") else "")
        lines.append(Line(label, points, 1 + known.index(judge) if judge in known else index, kind="thin"))
    return lines


def _trend(values: list[float]) -> int:
    """1 or -1 where the mean of the last third lies more than two standard errors beside that of the first."""
    third = len(values) // 3
    if third < 3:
        return 0
    parts = values[:third], values[-third:]
    means = [math.fsum(part) / third for part in parts]
    spread = [
        math.fsum((v - m) ** 2 for v in part) / (third - 1) / third for part, m in zip(parts, means, strict=True)
    ]
    change = means[1] - means[0]
    return 0 if abs(change) <= 2 * math.sqrt(math.fsum(spread)) else int(math.copysign(1, change))
