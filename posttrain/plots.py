"""Pictures as SVG: a reward model's reliability curve, best-of-n against KL, accuracy against tokens to think.

In: points with intervals, as manifests and `bestof.json` store them. Out: `Markup` holding one `<svg>` that takes the
report's colours; `standalone` gives it colours of its own, for a file.
"""

import json
import math
import re
from dataclasses import dataclass

from markupsafe import Markup, escape

from posttrain.errors import UserError
from posttrain.figures import ticks
from posttrain.tokenizer_figure import compression_bars

STYLE = (
    "svg{font-family:system-ui,sans-serif;background:#fff}text{fill:#5d6670;font-size:11px}.end{text-anchor:end}"
    ".mid{text-anchor:middle}.grid{stroke:#e4e6e8;fill:none}.line{fill:none;stroke-width:1.8}.even{stroke:#737c86;"
    "stroke-dasharray:4 4;fill:none}.whisker{stroke-width:1.2;opacity:.5}.c0{stroke:#1f6f8b}.c1{stroke:#c2682a}"
    ".c2{stroke:#7a5aa6}.dot.c0{fill:#1f6f8b}.dot.c1{fill:#c2682a}.dot.c2{fill:#7a5aa6}.dashed{stroke-dasharray:5 3}"
    ".thin{stroke-width:1;opacity:.7}.faint{opacity:.35}"
)


@dataclass(frozen=True)
class Line:
    """Points (x, y, low, high); low and high may be None. A `dashed` line has no dots: a fit. `kind` says how the
    others are drawn: "full"; "thin", with small dots; "bare", no dots; "cloud", dots alone, faint; "ends", a dashed
    line between dots that were measured, with nothing known between them."""

    name: str
    points: list[tuple[float, float, float | None, float | None]]
    colour: int = 0
    dashed: bool = False
    kind: str = "full"


def plot(title: str, lines: list[Line], *, x: str, y: str, even: bool = False, log: bool = False) -> Markup:
    """One picture with named axes; `even` draws the diagonal y = x, from corner to corner of what both axes hold;
    `log` puts x, which is above 0, on a logarithmic axis."""
    width, height, left, right, top, bottom = 440, 286 + 14 * len(lines), 52, 12, 10 + 14 * len(lines), 40
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for point in line.points for value in point[1:] if value is not None]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    pad = 0.05 * (high_y - low_y) or 1.0
    low_y, high_y = low_y - pad, high_y + pad
    high_x = high_x if high_x > low_x else low_x + 1

    def across(value: float) -> float:
        share = math.log(value / low_x, high_x / low_x) if log else (value - low_x) / (high_x - low_x)
        return left + (width - left - right) * share

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low_y) / (high_y - low_y)

    out = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>']
    for mark in ticks(low_y, high_y, 7):
        out.append(f'<path class="grid" d="M{left} {up(mark):.1f}H{width - right}"/>')
        out.append(f'<text class="tick end" x="{left - 6}" y="{up(mark) + 3.5:.1f}">{mark:.3g}</text>')
    for mark in _log_ticks(low_x, high_x) if log else ticks(low_x, high_x, 6):
        out.append(f'<text class="tick mid" x="{across(mark):.1f}" y="{height - 24}">{mark:.3g}</text>')
    out.append(f'<text class="mid" x="{(left + width - right) / 2:.0f}" y="{height - 6}">{escape(x)}</text>')
    out.append(
        f'<text class="mid" transform="translate(11 {(top + height - bottom) / 2:.0f}) rotate(-90)">{escape(y)}</text>'
    )
    if even:
        start, stop = max(low_x, low_y), min(high_x, high_y)
        line = f"M{across(start):.1f} {up(start):.1f}L{across(stop):.1f} {up(stop):.1f}"
        out.append(f'<path class="even" d="{line}"/>')
    for index, line in enumerate(lines):
        out += _drawn(line, 16 + 14 * index, left, across, up)
    return Markup("".join(out) + "</svg>")


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two between low and high, and where those are few their one-and-a-half-folds, too."""
    powers = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    marks = sorted([*powers, *(1.5 * power for power in powers)]) if len(powers) < 6 else powers
    return [mark for mark in marks if low <= mark <= high]


def _drawn(line: Line, at: int, left: int, across, up) -> list[str]:
    """One line with its whiskers and dots, and its name in the legend at height `at`."""
    colour, cloud = f"c{line.colour % 3}", line.kind == "cloud"
    style = " dashed" if line.dashed or line.kind == "ends" else " thin" if line.kind == "thin" else ""
    path, out = "M" + "L".join(f"{across(p[0]):.1f} {up(p[1]):.1f}" for p in line.points), []
    if not cloud:
        out.append(f'<path class="line {colour}{style}" d="{path}"/>')
    for value, middle, low, high in [] if line.dashed or line.kind == "bare" else line.points:
        if low is not None and high is not None:
            bar = f"M{across(value):.1f} {up(low):.1f}V{up(high):.1f}"
            out.append(f'<path class="whisker {colour}" d="{bar}"/>')
        radius = {"cloud": 2, "ends": 4, "thin": 1.8}.get(line.kind, 2.4)
        faint = " faint" if cloud else ""
        out.append(
            f'<circle class="dot {colour}{faint}" cx="{across(value):.1f}" cy="{up(middle):.1f}" r="{radius}"/>'
        )
    if cloud:
        out += [f'<circle class="dot {colour} faint" cx="{left + x}" cy="{at - 4}" r="2"/>' for x in (9, 15, 21)]
    else:
        out.append(f'<path class="line {colour}{style}" d="M{left + 6} {at - 4}h18"/>')
    if line.kind == "ends":
        out.append(f'<circle class="dot {colour}" cx="{left + 15}" cy="{at - 4}" r="3"/>')
    return [*out, f'<text x="{left + 30}" y="{at}">{escape(line.name)}</text>']


def standalone(svg: Markup) -> str:
    """The picture as a file of its own."""
    named = str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace("</title>", f"</title><style>{STYLE}</style>", 1) + "\n"


def reliability_plot(points: list[dict]) -> Markup:
    """The curve of `calibration.reliability`; on the dashed diagonal the model is as often right as it says."""
    line = [(p["confidence"], p["accuracy"]["value"], p["accuracy"]["low"], p["accuracy"]["high"]) for p in points]
    return plot(
        "reliability", [Line("pairs by confidence", line)], x="confidence of the score", y="pairs right", even=True
    )


def by_length_plot(groups: list[dict]) -> Markup:
    """The groups of `calibration.by_length`, from pairs whose better reply is much shorter to much longer."""
    line = [
        (index, g["accuracy"]["value"], g["accuracy"]["low"], g["accuracy"]["high"])
        for index, g in enumerate(groups, 1)
    ]
    edges = [f"{edge:+d}" for group in groups[:-1] if (edge := group["high"]) is not None]
    x = f"better reply longer than the worse, in tokens: groups cut at {', '.join(edges)}"
    return plot("accuracy by length", [Line("pairs right", line)], x=x, y="pairs right")


def agreement_plot(curves: dict) -> Markup:
    """The curves of `knowledge_eval.agreement_curve` before and after; on the dashed diagonal an answer is as often
    right as samples agree on it."""
    lines = [
        Line(side, [(p["agreement"], *(p["right"][key] for key in ("value", "low", "high"))) for p in points], colour)
        for colour, (side, points) in enumerate(curves.items())
        if points
    ]
    return plot("agreement", lines, x="samples that agree", y="answers right", even=True)


def thinking_plot(curve: list[dict]) -> Markup:
    """`suite_think`'s curve: accuracy against mean tokens a reply, from an answer at once over budgets of thought to
    thoughts without a limit and longer ones. The reply that the model would give by itself is no point of it. pass@k
    spends k replies: its x is the tokens of one."""
    points = [point for point in curve if point["label"] != "free"]
    names = ["greedy", *(name for name in points[0] if re.fullmatch(r"pass@\d+", name))]
    lines = []
    for name in dict.fromkeys([*names[:2], names[-1]]):
        place = "greedy tokens" if name == "greedy" else "tokens"
        each = [
            (point[place]["value"], *(100 * point[name][key] for key in ("value", "low", "high"))) for point in points
        ]
        lines.append(Line("temperature 0" if name == "greedy" else name, each, len(lines)))
    ways: dict[str, str] = {}
    for point in points:  # at most 4, at most 8, at most 16: at most 4 to 16
        words, _, number = point["label"].rpartition(" ")
        way = words if number.isdigit() else point["label"]
        ways[way] = f"{ways[way].partition(' to ')[0]} to {number}" if way in ways else point["label"]
    return plot("tokens to think", lines, x=f"tokens a reply: {', '.join(ways.values())}", y="right, %", log=True)


def density_plot(found: list[dict]) -> Markup:
    """`suite_spelling`'s points: right answers against tokens a character, with tools and without."""
    names = [name for name in ("right without tools", "right with tools") if name in found[0]]
    lines = []
    for name in names:
        each = [(p["density"], *(100 * p[name][key] for key in ("value", "low", "high"))) for p in found]
        lines.append(Line("right" if len(names) == 1 else name, each, len(lines)))
    return plot("counting and spelling", lines, x="tokens a character", y="right, %")


def few_shot_plot(points: list[dict]) -> Markup:
    """`few_shot_eval`'s curve: shares in percent and similarities, which are 0 to 100, against examples shown."""
    lines = []
    for name in [name for name in points[0] if name != "examples"]:
        scale = 100 if points[0][name]["unit"] == "%" else 1
        each = [(p["examples"], *(scale * p[name][key] for key in ("value", "low", "high"))) for p in points]
        lines.append(Line(name, each, len(lines), kind="full" if len(lines) < 3 else "thin"))
    return plot("few-shot", lines, x="examples in the prompt", y="0 to 100")


# What an evaluation's details may hold: (caption, how it is drawn).
EVALUATIONS = {
    "curve": ("right answers against tokens a reply", thinking_plot),
    "density": ("right answers by tokens a character", density_plot),
    "few_shot_curve": ("answers by examples in the prompt", few_shot_plot),
}


def evaluation_pictures(details: object) -> list[tuple[str, Markup]]:
    """(caption, picture) of each curve in what `posttrain eval` stored as details; UserError for one that is none."""
    found = []
    for key, (caption, draw) in EVALUATIONS.items() if isinstance(details, dict) else ():
        if key in details:
            try:
                json.dumps(details[key], allow_nan=False)
                found.append((caption, draw(details[key])))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
                raise UserError(f"details.{key} cannot be drawn ({type(error).__name__}: {error})") from error
    return found


def stage_pictures(manifest: dict) -> list[tuple[str, Markup]]:
    """(caption, picture) of what a stage's manifest holds beside its metrics; [] where it holds no such thing."""
    kinds = {
        "reliability": ("reliability: pairs right against how sure the score is", reliability_plot),
        "by_length": ("pairs right by the difference in length", by_length_plot),
        "agreement": ("how often the answer that most samples agree on is right, before and after", agreement_plot),
        "compression": ("bytes per token by language and domain; dashed: a token a byte", compression_bars),
    }
    return [(caption, draw(manifest[key])) for key, (caption, draw) in kinds.items() if manifest.get(key)]
