"""Two runs side by side: what was set, read and installed differently, and which figures differ by more than chance.

In: the stages of two runs as read. Out: a `Difference`, for the page and, as a few lines, for the terminal:

    posttrain report runs/a --against runs/b

Stages are matched by their folder's name, else by their recipe. Figures of both runs are taken as independent: the
95 % interval of a difference is the root of the summed squares of both half-widths. On the same held-out rows that is
cautious, since what makes a row hard makes it hard for both.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from posttrain import figures
from posttrain.report_page import visible
from posttrain.report_read import Stage
from posttrain.stage import FREE_KEYS

SHORT = 12  # characters of a hash that are shown
MOST_LINES = 6  # of a stage, in the terminal


@dataclass(frozen=True)
class Figure:
    """A metric of both runs. `verdict`: equal | differs | not clearly different | no interval."""

    name: str
    unit: str
    a: dict
    b: dict

    @property
    def change(self) -> dict:
        """b - a as {"value", "low", "high"}; the interval is None where one of the two has none."""
        value = self.b["value"] - self.a["value"]
        ends = [entry.get(key) for entry in (self.a, self.b) for key in ("low", "high")]
        if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
            return {"value": value, "low": None, "high": None}
        half = math.hypot((ends[1] - ends[0]) / 2, (ends[3] - ends[2]) / 2)
        return {"value": value, "low": value - half, "high": value + half}

    @property
    def verdict(self) -> str:
        if self.a["value"] == self.b["value"]:
            return "equal"
        change = self.change
        if change["low"] is None:
            return "no interval"
        return "differs" if change["low"] > 0 or change["high"] < 0 else "not clearly different"


@dataclass
class StageDifference:
    """`only`: "" where both runs have the stage, else the one that has it. `rows`: (heading, what, a, b)."""

    name: str
    only: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    lacking: list[tuple[str, str]] = field(default_factory=list)  # (metric, the run that has it)
    weights: bool | None = None  # equal, bit by bit; None where that is not known

    @property
    def told(self) -> list[Figure]:
        """The figures that are not equal, those that differ clearly first."""
        order = ("differs", "no interval", "not clearly different")
        return sorted((f for f in self.figures if f.verdict != "equal"), key=lambda f: order.index(f.verdict))

    @property
    def same(self) -> bool:
        return not (self.only or self.rows or self.told or self.lacking or self.weights is False)


@dataclass
class Difference:
    """`shared`: (heading, what, a, b, stages) of what differs in the same way in several stages: versions, commit."""

    a: str
    b: str
    stages: list[StageDifference]
    shared: list[tuple[str, str, str, str, list[str]]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.shared and all(stage.same for stage in self.stages)

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.equal:
            weights = [stage.weights for stage in self.stages]
            proof = ", and the same weights, bit by bit" if weights and all(weights) else ""
            return f"{self.a} and {self.b} are equal: same settings, data, versions and figures{proof}."
        settings = len(self.shared) + sum(len(stage.rows) for stage in self.stages)
        clear = sum(figure.verdict == "differs" for stage in self.stages for figure in stage.figures)
        every = sum(len(stage.figures) for stage in self.stages)
        return (
            f"{settings} {'setting or input differs' if settings == 1 else 'settings or inputs differ'}; "
            f"{clear} of {every} figures differ by more than their intervals."
        )


def compare(a: str, left: list[Stage], b: str, right: list[Stage]) -> Difference:
    """`a` and `b` name the runs; where they have the same name, say more of their paths."""
    by_name, by_kind = {stage.name: stage for stage in right}, {stage.kind: stage for stage in right}
    found, used = [], set()
    for stage in left:
        other = by_name.get(stage.name) or by_kind.get(stage.kind)
        if other is None or other.name in used:
            found.append(StageDifference(stage.name, only=a))
            continue
        used.add(other.name)
        found.append(_compare(stage, other, a, b))
    found += [StageDifference(stage.name, only=b) for stage in right if stage.name not in used]
    return Difference(a, b, found, _hoist(found))


def _hoist(stages: list[StageDifference]) -> list[tuple[str, str, str, str, list[str]]]:
    """Take out of the stages' rows what differs in the same way in more than one, and is no setting of theirs."""
    having: dict[tuple, list[str]] = {}
    for stage in stages:
        for row in stage.rows:
            having.setdefault(row, []).append(stage.name)
    shared = {row for row, names in having.items() if len(names) > 1 and row[0] in SHARED}
    for stage in stages:
        stage.rows = [row for row in stage.rows if row not in shared]
    return [(*row, names) for row, names in having.items() if row in shared]


def _compare(left: Stage, right: Stage, a: str, b: str) -> StageDifference:
    found = StageDifference(left.name)
    if left.state != right.state:
        found.rows.append(("state", "", left.state, right.state))
    for heading, one, other in zip(HEADINGS, _facts(left), _facts(right), strict=True):
        for what in [*one, *(key for key in other if key not in one)]:
            values = [_short(facts.get(what, "–")) for facts in (one, other)]
            if one.get(what, "–") != other.get(what, "–"):
                found.rows.append((heading, what, *values))
    metrics = [_metrics(stage) for stage in (left, right)]
    for name, entry in metrics[0].items():
        if name in metrics[1]:
            found.figures.append(Figure(name, entry.get("unit") or "", entry, metrics[1][name]))
    found.lacking = [(name, a) for name in metrics[0] if name not in metrics[1]]
    found.lacking += [(name, b) for name in metrics[1] if name not in metrics[0]]
    weights = [_weights(stage) for stage in (left, right)]
    found.weights = weights[0] == weights[1] if all(weights) else None
    return found


SHARED = ("tokenizer and template", "version", "commit", "machine")
HEADINGS = ("config", "data", "parent", "tokenizer and template", "version", "commit", "machine", "gain")


def _facts(stage: Stage) -> tuple[dict, ...]:
    """What may differ, a dict a heading."""
    manifest = stage.manifest
    inside = {str(given.get("path")): name for given, name in _parents(stage)}
    config = {key: _inside(value, inside) for key, value in stage.config.items() if key not in FREE_KEYS}
    data = {}
    for source in manifest.get("data") or []:
        name = " ".join(str(source[key]) for key in ("name", "config", "split") if source.get(key))
        data[name] = f"{source.get('rows')} rows, {_short(source.get('sha256') or '–')}"
    parents = {role: name for (role, *_), (_, name) in zip(stage.parents, _parents(stage), strict=True)}
    files = {"tokenizer": manifest.get("tokenizer_sha256"), "chat template": manifest.get("chat_template_sha256")}
    verdicts = {True: "shown", False: "not shown", None: "not judged"}
    gains = {gain["name"]: verdicts.get(gain.get("passed"), "not judged") for gain in manifest.get("gains", [])}
    commit = {"git": manifest.get("git_commit")} if manifest else {}
    return config, data, parents, files, manifest.get("versions") or {}, commit, manifest.get("machine") or {}, gains


def _parents(stage: Stage) -> list[tuple[dict, str]]:
    """(parent as stored, what it is): the stage's name inside the run; from outside its path and hash."""
    stored = list((stage.manifest or stage.begun).get("parents", {}).values())
    named = []
    for given, (_, name, _) in zip(stored, stage.parents, strict=True):
        outside = name == str(Path(given.get("path") or "?"))
        named.append((given, f"{name} {_short(given.get('sha256') or '')}".strip() if outside else f"stage {name}"))
    return named


def _inside(value: object, inside: dict[str, str]) -> object:
    """A path to a stage of the same run counts as that stage: two runs lie in two folders."""
    return inside.get(value, value) if isinstance(value, str) else value


def _metrics(stage: Stage) -> dict[str, dict]:
    """The stage's own metrics and those of its evaluations ("math: pass@1"), with a finite value."""
    found = dict(stage.manifest.get("metrics") or {})
    for suite, told in stage.evals.items():
        found |= {f"{suite}: {name}": entry for name, entry in told["metrics"].items()}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry.get("value"), int | float) and math.isfinite(entry["value"])
    }


def _weights(stage: Stage) -> list[tuple[str, str]]:
    files = stage.manifest.get("files") or {}
    return sorted((name, about.get("sha256")) for name, about in files.items() if name.endswith(".safetensors"))


def _short(value: object) -> str:
    """A value as text; a hash by its first characters."""
    text = value if isinstance(value, str) else str(value)
    if text.endswith("+changes"):
        return _short(text.removesuffix("+changes")) + "+changes"
    return text[:SHORT] if len(text) in (40, 64) and set(text) <= set("0123456789abcdef") else text


def lines(difference: Difference) -> list[str]:
    """A few lines for the terminal: what differs everywhere, then by stage its settings and the figures that clearly
    do; MOST_LINES a stage."""
    out = [f"against {difference.b}: {difference.summary}"]
    for heading, what, a, b, names in difference.shared:
        out.append(f"  {heading} {what}: {a} -> {b} ({', '.join(names)})")
    for stage in [] if difference.equal else difference.stages:
        told = [f"only in {stage.only}"] if stage.only else []
        told += ["the same weights, bit by bit"] if stage.weights else []
        for figure in stage.told:
            if figure.verdict == "differs":
                sides = [" ".join(figures.measure(side, figure.unit)).strip() for side in (figure.a, figure.b)]
                told.append(f"{figure.name}: {' -> '.join(sides)}")
        told += [f"{heading} {what}".strip() + f": {a} -> {b}" for heading, what, a, b in stage.rows]
        rest = len(told) - MOST_LINES
        told = told if rest <= 1 else [*told[:MOST_LINES], f"and {rest} more: see the report"]
        out += [f"  {stage.name}: {line}" for line in told]
    return [visible(line) for line in out]


def run_names(a: Path, b: Path) -> tuple[str, str]:
    """What to call two runs: their folders' names, or as much more of the paths as tells them apart."""
    one, other = a.resolve().parts, b.resolve().parts
    size = next((size for size in range(1, len(one) + 1) if one[-size:] != other[-size:]), 1)
    return str(Path(*one[-size:])), str(Path(*other[-size:]))
