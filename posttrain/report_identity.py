"""Who the models of a run say they are: stage by stage, and as a curve over each stage that watched it.

In: stages as posttrain/report_read.py gives them, with the metrics of posttrain/identity_eval.py and its series in
log.jsonl. Out: rows of tables and pictures for the report.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup

from posttrain.figures import measure
from posttrain.identity_names import KEPT, RIGHT, SERIES, YIELDED
from posttrain.over_optimization import AXIS
from posttrain.plots import Line, plot
from posttrain.report_read import Stage

SHORT = {RIGHT: "right about itself", KEPT: "keeps to it when called otherwise", YIELDED: "takes the other name"}
# What a stage's gain says in a word: name of the gain -> (metric, where it is shown, where it is not).
VERDICTS = {
    "knows who it is": (RIGHT, "learned", "not learned"),
    "keeps who it is": (RIGHT, "kept", "fell"),
    "keeps to it when called otherwise": (KEPT, "kept", "fell"),
}


def table(stages: list[Stage]) -> list[tuple[Stage, list[dict]]]:
    """(stage, [{"name", "before", "after", "verdict"}]) of each stage that was asked who it is; `verdict` is None or
    (word, whether it is good, the paired change in words)."""
    found = []
    for stage in stages:
        said = {}
        for gain in stage.manifest.get("gains", []):
            if gain["name"] in VERDICTS:
                metric, shown, not_shown = VERDICTS[gain["name"]]
                good = gain.get("passed") is True
                said[metric] = (shown if good else not_shown, good, _change(gain.get("change")))
        rows = [
            {"name": SHORT[metric], "before": before, "after": after, "verdict": said.get(metric)}
            for metric in SHORT
            for before, after in [_ends(stage, metric)]
            if after is not None
        ]
        found += [(stage, rows)] if rows else []
    return found


def _change(entry: object) -> str:
    """`-2.8 [-5.0, -0.6] points`; "" where it is not there."""
    if not isinstance(entry, dict) or not all(_number(entry, key) for key in ("value", "low", "high")):
        return ""
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}] points"


def by_question(stages: list[Stage]) -> tuple[list[str], list[tuple[str, list[dict | None]]]]:
    """(columns, [(fact, way of asking or kind of message, its figure in each column)]): the first stage before and
    each stage after it."""
    asked = [stage for stage, _ in table(stages)]
    if not asked:
        return [], []
    columns = [f"before {asked[0].name}", *(stage.name for stage in asked)]
    names = dict.fromkeys(
        name
        for stage in asked
        for name in stage.manifest["metrics"]
        if name.startswith((f"{RIGHT}, ", f"{KEPT}, ")) and not name.endswith((", before", ", base"))
    )
    rows = []
    for name in names:
        figures = [_ends(asked[0], name)[0], *(_ends(stage, name)[1] for stage in asked)]
        rows.append((name.removeprefix("identity "), figures))
    return columns, [row for row in rows if ", round " not in row[0]]


@dataclass(frozen=True)
class Drift:
    """`warns`: the model knows less of itself than before."""

    pictures: list[tuple[str, Markup]]  # caption, picture
    said: str
    warns: bool


def drift(stage: Stage) -> Drift | None:
    """The curve of a stage that asked while it trained, over its steps and, where it logs a KL, over the root of
    that; None where it did not ask."""
    asked = [line for line in stage.log if any(_number(line, series) for series in SERIES)]
    if not asked:
        return None
    last = max(line["step"] for line in stage.log)
    pictures = [("over the steps", _picture(stage, asked, lambda line: line["step"], last, "step"))]
    kls = [line for line in asked if _number(line, "kl")]
    if kls and any(line["kl"] > 0 for line in kls):
        end = (stage.manifest.get("metrics") or {}).get("KL to the start") or {"value": kls[-1]["kl"]}
        pictures.append(
            (
                "by how far it has moved",
                _picture(stage, kls, lambda line: _root(line["kl"]), _root(end["value"]), AXIS),
            )
        )
    verdicts = [row["verdict"] for _, rows in table([stage]) for row in rows if row["verdict"]]
    return Drift(pictures, _sentence(stage, asked), any(word == "fell" for word, *_ in verdicts))


def _picture(stage: Stage, asked: list[dict], place, end: float, axis: str) -> Markup:
    """Shares in percent; at both ends the figures before and after, with their intervals, where the stage has them."""
    lines = []
    for colour, (series, metric) in enumerate(SERIES.items()):
        before, after = _ends(stage, metric)
        points = sorted((place(line), 100 * line[series], None, None) for line in asked if _number(line, series))
        if after is not None:
            points = [point for point in points if point[0] < end]
        for at, entry in ((0.0, before), (end, after)):
            points += [(at, *(100 * entry[key] for key in ("value", "low", "high")))] if entry is not None else []
        lines.append(Line(SHORT[metric], sorted(points, key=lambda point: point[0]), colour))
    return plot("who it says it is", [line for line in lines if line.points], x=axis, y="replies, %")


def _sentence(stage: Stage, asked: list[dict]) -> str:
    told = []
    for series, metric in list(SERIES.items())[:2]:
        before, after = _ends(stage, metric)
        if before and after:
            told.append(f"{SHORT[metric]} {measure(before, '%')[0]} before, {measure(after, '%')[0]} after")
        values = [(line[series], line["step"]) for line in asked if _number(line, series)]
        if values:
            low, step = min(values)
            told.append(
                f"{'lowest' if before and after else SHORT[metric] + ', lowest'} {100 * low:.1f} % at step {step}"
            )
    return f"{'; '.join(told)}. While it trains a question has one reply, before and after it has several."


def _ends(stage: Stage, metric: str) -> tuple[dict | None, dict | None]:
    """A figure before and after a stage; None where it was not measured."""
    metrics = stage.manifest.get("metrics") or {}
    before = metrics.get(f"{metric}, before") or metrics.get(f"{metric}, base")
    return tuple(
        entry if entry and all(_number(entry, key) for key in ("value", "low", "high")) else None
        for entry in (before, metrics.get(metric))
    )


def _root(kl: float) -> float:
    return math.sqrt(max(0.0, kl))


def _number(row: dict, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])
