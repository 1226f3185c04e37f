"""Numbers as text and pictures as SVG, for `posttrain/report.py`.

In: plain numbers and names. Out: short strings, and `Markup` holding one `<svg>` each. Nothing is read or written.

The pictures are built by hand, not by a plotting library: they carry classes in place of colours, so that one file
follows the reader's dark or light setting, and their text stays text. Every name is escaped on its way in.
"""

import math
import re
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from markupsafe import Markup, escape

from posttrain.errors import UserError

Points = list[tuple[float, float]]  # (step, value), by step

BOX = (160, 98)  # a stage in the picture of the chain, width and height: a name and up to four lines
# The report's colours for a picture that stands alone: light, and what dark changes.
STYLE = """
svg { --paper: #fcfcfb; --card: #fff; --ink: #1d2126; --soft: #5d6670; --faint: #737c86; --rule: #d5d9dc;
  --good: #1d7a4c; --bad: #b3372d; --wait: #96650a; font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --paper: #14171a; --card: #1a1e22; --ink: #e3e6e8; --soft: #a3acb4;
  --faint: #8a949d; --rule: #3a4148; --good: #63c08f; --bad: #ee8177; --wait: #dcae55; } }
.paper { fill: var(--paper); } text { fill: var(--soft); font-size: 11px; } .end { text-anchor: end; }
.box rect { fill: var(--card); stroke: var(--rule); stroke-width: 1.5; } .name { fill: var(--ink); font-size: 14px;
  font-weight: 600; } .lamp { fill: var(--faint); } .finished .lamp { fill: var(--good); } .failed .lamp,
  .not-shown .lamp { fill: var(--bad); } .running .lamp, .not-finished .lamp { fill: var(--wait); }
.box.outside rect, .box.not-started rect, .box.running rect, .box.not-finished rect { stroke-dasharray: 4 3; }
.edge { fill: none; stroke: var(--faint); stroke-width: 1.4; } .assumed { stroke-dasharray: 4 4; } .gained {
  fill: var(--ink); font-weight: 600; } .head { fill: var(--faint); } .role { font-size: 10px; stroke: var(--paper);
  stroke-width: 4px; paint-order: stroke; }
"""


def number(value: float | None) -> str:
    """About four significant digits: 12,345, 53.21, 0.0123, 1.0e-05; an en dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.{3 - int(math.log10(size))}f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def compact(value: float | None) -> str:
    """A large count: 950, 12.3k, 3.40M, 7.62B; an en dash for None."""
    if value is None:
        return "–"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{max(0, 2 - int(math.log10(abs(value) / size)))}f}{suffix}"
    return number(value)


def duration(seconds: float | None) -> str:
    """0.8 s, 42 s, 1 m 33 s, 2 h 05 m; an en dash for None."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def measure(entry: dict, unit: str = "", *, percent: bool = True) -> tuple[str, str]:
    """`{"value", "low", "high"}` -> ("53.0 %", "[50.0, 56.0]"); the interval is "" where it is not known.

    Fractions with unit "%" are shown times 100. Otherwise the interval's half-width decides the digits (two of it).
    `percent=False` leaves out the sign, where a heading already says it.
    """
    value, low, high = (entry.get(key) for key in ("value", "low", "high"))
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    if value is None or not math.isfinite(value):
        return number(value), ""
    if unit == "%":
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]" if known else ""
        return f"{100 * value:.1f}" + (" %" if percent else ""), interval
    if not known or high <= low:
        return number(value), f"[{number(low)}, {number(high)}]" if known else ""
    digits = min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 5)
    return f"{value:,.{digits}f}", f"[{low:,.{digits}f}, {high:,.{digits}f}]"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * index for index in range(first, last + 1)]


# ---- one gain -------------------------------------------------------------------------------------------------------


def interval_strip(gain: dict) -> Markup:
    """Before (grey, above) and after (coloured, below) on one axis, each a dot on its 95 % interval."""
    rows = [("before", gain["before"]), ("after", gain["after"])]
    values = [entry.get(key) for _, entry in rows for key in ("value", "low", "high")]
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    if gain.get("unit") == "%" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    pad = 0.08 * (high - low) if high > low else 1.0
    low, high = (low, high) if (low, high) == (0.0, 1.0) else (low - pad, high + pad)

    def x(value: float) -> float:
        return 5 + 150 * (value - low) / (high - low)

    out = ['<svg class="strip" viewBox="0 0 160 28" role="img"><title>before and after, with intervals</title>']
    out.append('<path class="grid" d="M5 14H155M5 10V18M155 10V18"/>')
    for (kind, entry), y in zip(rows, (7, 21), strict=True):
        value, left, right = entry.get("value"), entry.get("low"), entry.get("high")
        if left is not None and right is not None:
            out.append(f'<path class="span {kind}" d="M{x(left):.1f} {y}H{x(right):.1f}"/>')
        if value is not None and math.isfinite(value):
            out.append(f'<circle class="{kind}" cx="{x(value):.1f}" cy="{y}" r="3.6"/>')
    return Markup("".join(out) + "</svg>")


# ---- the chain ------------------------------------------------------------------------------------------------------


def in_order(parents: dict[str, list[str]]) -> list[str]:
    """Names so that parents come before children, else in the order given. Raises UserError for a circle."""
    try:
        sorter = TopologicalSorter(parents)
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise UserError(f"stages are each other's parents: {circle}; check `parents` in their stage.json") from None
    place, order = {name: index for index, name in enumerate(parents)}, []
    ready = list(sorter.get_ready())
    while ready:
        name = min(ready, key=lambda each: place.get(each, -1))
        ready.remove(name)
        order.append(name)
        sorter.done(name)
        ready += sorter.get_ready()
    return order


def _layers(names: list[str], edges: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Layered drawing after Sugiyama et al. (1981): columns of nodes, and the nodes each edge passes through.

    A node stands one column after its last parent; an edge over several columns gets a place holder in each column
    between, so that it runs through a gap and not behind a box; neighbours are then sorted by the mean of theirs.
    """
    parents = {name: [a for a, b in edges if b == name] for name in names}
    depth: dict[str, int] = {}
    for name in in_order(parents):
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    for name in names:  # a start of its own (a model from elsewhere) stands beside what it starts
        children = [depth[b] for a, b in edges if a == name]
        if not parents[name] and children:
            depth[name] = min(children) - 1
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in names:
        columns[depth[name]].append(name)
    routes = []
    for a, b in edges:
        route = [a] + [f"{a}\0{b}\0{column}" for column in range(depth[a] + 1, depth[b])] + [b]
        for column, holder in enumerate(route[1:-1], depth[a] + 1):
            columns[column].append(holder)
        routes.append(route)
    links = [pair for route in routes for pair in pairwise(route)]
    for sweep in range(6):
        place = {name: index / len(column) for column in columns for index, name in enumerate(column)}
        for column in columns if sweep % 2 else columns[::-1]:
            side = {
                name: [a if b == name else b for a, b in links if (b if sweep % 2 else a) == name] for name in column
            }
            mean = {n: sum(place[s] for s in side[n]) / len(side[n]) if side[n] else place[n] for n in column}
            column.sort(key=mean.__getitem__)
            place |= {name: index / len(column) for index, name in enumerate(column)}
    return columns, routes


@dataclass
class _Layout:
    """Where things stand: `main` runs from parent to child, `cross` across it; `down` the page or to the right."""

    down: bool
    start: dict[str, float]  # where a node begins on the main axis
    middle: dict[str, float]  # its middle on the cross axis

    @property
    def size(self) -> tuple[int, int]:
        """A box on the main and on the cross axis."""
        return (BOX[1], BOX[0]) if self.down else BOX

    def at(self, main: float, cross: float) -> str:
        return f"{cross:.1f} {main:.1f}" if self.down else f"{main:.1f} {cross:.1f}"


def chain(boxes: list[dict], edges: list[tuple[str, str, str, str]], *, down: bool = False) -> Markup:
    """The stages as boxes with arrows from parent to child, left to right or (for a phone) `down` the page.

    boxes: {"name", "title", "lines": up to four short strings, "state", "href" or None}, in the order of the chain.
    edges: (parent, child, label, "known" | "assumed").
    """
    layout = _Layout(down, {}, {})
    (size_main, size_cross), (gap_main, gap_cross) = layout.size, (46, 16) if down else (46, 22)
    columns, routes = _layers([box["name"] for box in boxes], [(a, b) for a, b, *_ in edges])
    extent = {name: 12 for column in columns for name in column} | {box["name"]: size_cross for box in boxes}
    lengths = [sum(extent[name] for name in column) + gap_cross * (len(column) - 1) for column in columns]
    for index, column in enumerate(columns):
        cross = (max(lengths) - lengths[index]) / 2 + 2
        for name in column:
            layout.middle[name], layout.start[name] = cross + extent[name] / 2, 2 + index * (size_main + gap_main)
            cross += extent[name] + gap_cross
    total = (len(columns) * (size_main + gap_main) - gap_main + 4, max(lengths) + 4)
    width, height = total[::-1] if down else total
    kind = "chain down" if down else "chain across"
    out = [f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img">']
    out.append("<title>the chain of stages</title>")
    arriving: dict[str, list[list[str]]] = {}
    for route in routes:
        arriving.setdefault(route[-1], []).append(route)
    for route, (_, child, label, known) in zip(routes, edges, strict=True):
        fan = sorted(arriving[child], key=lambda each: layout.middle[each[-2]])
        out.append(_edge(layout, route, 16 * (fan.index(route) - (len(fan) - 1) / 2), label, known))
    for box in boxes:
        main, cross = layout.start[box["name"]], layout.middle[box["name"]] - size_cross / 2
        out.append(_box(box, *((cross, main) if down else (main, cross))))
    return Markup("".join(out) + "</svg>")


def _edge(layout: _Layout, route: list[str], shift: float, label: str, known: str) -> str:
    """One arrow: curves between columns, straight through the place holders; its head at the child, `shift` aside."""
    at, start, middle, length = layout.at, layout.start, layout.middle, layout.size[0]
    path = "M" + at(start[route[0]] + length, middle[route[0]])
    for a, b in pairwise(route):
        last = b == route[-1]
        goal, cross = start[b] - (6 if last else 0), middle[b] + (shift if last else 0)
        bend = (start[a] + length + goal) / 2
        path += f"C{at(bend, middle[a])} {at(bend, cross)} {at(goal, cross)}"
        if not last:
            path += "L" + at(start[b] + length, cross)
    tip, cross = start[route[-1]], middle[route[-1]] + shift
    head = f"M{at(tip - 1, cross)}L{at(tip - 8, cross - 4)}L{at(tip - 8, cross + 4)}Z"
    out = f'<path class="edge {known}" d="{path}"/><path class="head" d="{head}"/>'
    if label and layout.down:
        anchor = "start" if shift > 0 else "end"
        out += f'<text class="role {anchor}" x="{cross + (10 if shift > 0 else -10):.1f}" y="{tip - 4:.1f}">'
    elif label:
        out += f'<text class="role end" x="{tip - 12:.1f}" y="{cross + (13 if shift > 0 else -6):.1f}">'
    return out + (f"{escape(label)}</text>" if label else "")


def _box(box: dict, x: float, y: float) -> str:
    title = box["title"] if len(box["title"]) <= 18 else box["title"][:17] + "…"
    out = f'<g class="box {box["state"].replace(" ", "-")}">'
    out += f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX[0]}" height="{BOX[1]}" rx="8"/>'
    out += f'<circle class="lamp" cx="{x + BOX[0] - 15:.1f}" cy="{y + 17:.1f}" r="4"/>'
    out += f'<text class="name" x="{x + 13:.1f}" y="{y + 22:.1f}">{escape(title)}</text>'
    for index, line in enumerate(box["lines"]):
        kind = ' class="gained"' if index == 3 else ""
        line = line if len(line) <= 24 else line[:23] + "…"
        out += f'<text{kind} x="{x + 13:.1f}" y="{y + 40 + 15.5 * index:.1f}">{escape(line)}</text>'
    out += "</g>"
    return f'<a href="{escape(box["href"])}">{out}</a>' if box["href"] else out


def standalone(svg: Markup, margin: int = 14) -> str:
    """A picture of the chain as a file of its own: with colours for light and dark, a background, no links."""
    plain = re.sub(r"</?a\b[^>]*>", "", str(svg))
    head, body = plain.split(">", 1)
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', head).groups())
    wide, high = width + 2 * margin, height + 2 * margin
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {wide:.0f} {high:.0f}" '
        f'width="{wide:.0f}" height="{high:.0f}" role="img"><style>{STYLE}</style>'
        f'<rect class="paper" x="{-margin}" y="{-margin}" width="{wide:.0f}" height="{high:.0f}" rx="10"/>{body}\n'
    )
