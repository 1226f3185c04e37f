"""The rating table: in a terminal, and with pictures in the board.

In: what `ratings.rate` found. Out: `table`, lines of text; `page`, HTML with an SVG of the ratings, the table and the
win rates, which takes its colours from the page around it. Names of models are escaped.
Run: posttrain ratings runs/tiny
"""

from pathlib import Path

from markupsafe import Markup, escape

from posttrain import figures
from posttrain.errors import UserError

BIASES = {  # figure -> what it says
    "longer": "decided pairs won by the longer reply",
    "first": "decided pairs won by the reply shown first",
}
CSS = """
.ratings { color: var(--body-text-color); padding: .5rem; }
.ratings table { border-collapse: collapse; margin: .5rem 0; }
.ratings th, .ratings td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid
  var(--border-color-primary); font-variant-numeric: tabular-nums; white-space: nowrap; }
.ratings th[scope="row"] { text-align: left; }
.ratings ul { opacity: .8; margin: .5rem 0; padding-left: 1.25rem; list-style: disc; }
"""


def add_verb(verbs, debug) -> None:
    """The verb `ratings` and its flags."""
    ratings = verbs.add_parser(
        "ratings", parents=[debug], help="ratings of a run's stages from the votes of its arena"
    )
    ratings.set_defaults(call=call)
    ratings.add_argument("run", metavar="RUN", help="folder of a run, or one with a votes.log")


def call(options) -> int:
    from posttrain.board.ratings import rate

    print(table(rate(find_votes(options.run).read())))
    return 0


def find_votes(path: str):
    """The `Votes` in a run's folder, or in `path` itself. UserError where there are none."""
    from posttrain.board.votes import LOG, Votes

    for folder in (Path(path) / "votes", Path(path)):
        if (folder / LOG).is_file():
            return Votes(folder)
    raise UserError(
        f"{path}: no {LOG} in it or in its folder votes; expected a run whose stages were ranked in the Arena of "
        f"`posttrain board {path}`"
    )


def _remarks(found: dict) -> list[str]:
    said = [", ".join(_counted(found[key], key[:-1]) for key in ("votes", "prompts", "pairs"))]
    if len(found["groups"]) > 1:
        groups = " | ".join(", ".join(group) for group in found["groups"])
        said.append(f"these were never compared with each other, so that only ratings within a group count: {groups}")
    for key, words in BIASES.items():
        if share := found[key]:
            value, interval = figures.measure(share, "%")
            said.append(f"{words}: {value} {interval if found['prompts'] > 1 else ''} of {share['n']}")
    return said


def table(found: dict) -> str:
    """Ratings with intervals, what was counted, and win rates against each other."""
    if not found["votes"]:
        return "no votes yet"
    rows = [("stage", "rating", "95 % interval", "won", "lost", "tied")]
    for row in found["models"]:
        value, interval = _points(row["rating"])
        rows.append((row["model"], value, interval, *(str(row[key]) for key in ("wins", "losses", "ties"))))
    lines = _aligned(rows) if found["models"] else ["no vote compares two stages"]
    matrix = found["matrix"]
    names = [row["model"] for row in found["models"]]
    if len(names) > 2:
        lines += ["", "wins of the row against the column, %, ties half:"]
        lines += _aligned([("", *names), *((a, *(_percent(matrix[a][b]) for b in names)) for a in names)])
    return "\n".join([*lines, "", *_remarks(found)])


def page(found: dict) -> str:
    """The same as HTML."""
    if not found["votes"]:
        return "<p>No votes yet.</p>"
    parts = [ratings_picture(found["models"])] if found["models"] else [Markup("<p>No vote compares two stages.</p>")]
    cell, head = Markup("<td>{}</td>").format, Markup('<th scope="{}">{}</th>').format
    heads = ("stage", "rating", "95 % interval", "won", "lost", "tied")
    rows = [Markup("").join(head("col", name) for name in heads)]
    for row in found["models"]:
        cells = (*_points(row["rating"]), row["wins"], row["losses"], row["ties"])
        rows.append(head("row", row["model"]) + Markup("").join(map(cell, cells)))
    if found["models"]:
        parts.append(_html_table(rows))
    names = [row["model"] for row in found["models"]]
    if len(names) > 2:
        rates = [Markup("").join(head("col", name) for name in ("", *names))]
        rates += [
            head("row", a) + Markup("").join(cell(_percent(found["matrix"][a][b])) for b in names) for a in names
        ]
        parts += [Markup("<p>Wins of the row against the column, %, ties half:</p>"), _html_table(rates)]
    parts.append(
        Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(r) for r in _remarks(found)))
    )
    return Markup('<div class="ratings">{}</div>').format(Markup("").join(parts))


def ratings_picture(models: list[dict]) -> Markup:
    """A dot a stage on a common axis, best above, its 95 % interval as a bar."""
    values = [v for row in models for v in (row["rating"][key] for key in ("value", "low", "high")) if v is not None]
    low, high = min(values) - 30, max(values) + 30
    width, left, right, line = 440, 118, 16, 26
    height = line * len(models) + 34

    def across(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" style="max-width:{width}px;width:100%" fill="currentColor" '
        'font-size="12" font-family="system-ui,sans-serif"><title>ratings with 95 % intervals</title>'
    ]
    for mark in figures.ticks(low, high, 5):
        at = f"{across(mark):.1f}"
        out.append(f'<path d="M{at} 6V{height - 26}" stroke="currentColor" opacity=".15"/>')
        out.append(f'<text x="{at}" y="{height - 10}" text-anchor="middle" opacity=".7">{mark:.0f}</text>')
    for number, row in enumerate(models):
        y, rating = 20 + line * number, row["rating"]
        name = row["model"] if len(row["model"]) < 17 else "…" + row["model"][-15:]
        out.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if rating["low"] is not None:
            bar = f"M{across(rating['low']):.1f} {y}H{across(rating['high']):.1f}"
            out.append(f'<path d="{bar}" stroke="#1f8a78" stroke-width="2.5" opacity=".6"/>')
        out.append(f'<circle cx="{across(rating["value"]):.1f}" cy="{y}" r="4.5" fill="#1f8a78"/>')
    return Markup("".join(out) + "</svg>")


def _points(rating: dict) -> tuple[str, str]:
    low, high = rating["low"], rating["high"]
    return f"{rating['value']:.0f}", "" if low is None else f"[{low:.0f}, {high:.0f}]"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def _html_table(rows: list[Markup]) -> Markup:
    body = Markup("").join(Markup("<tr>{}</tr>").format(row) for row in rows)
    return Markup('<div style="overflow-x:auto"><table>{}</table></div>').format(body)


def _aligned(rows: list[tuple]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
