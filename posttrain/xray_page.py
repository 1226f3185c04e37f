"""An `Xray` as one HTML page that needs nothing else; what rows contain stays text in it.

In: an `Xray` and a path. Out: the page, replaced in one step. It has no script and no link out, its
Content-Security-Policy allows neither, and everything from rows, files and tokenizers is escaped.
"""

import os
from pathlib import Path

from markupsafe import Markup, escape

from posttrain.conditions import CONDITIONS
from posttrain.figures import compact, number, ticks
from posttrain.xray import Token, Xray
from posttrain.xray_text import runs, sentence

LONGEST = 4000  # tokens of a row on the page
CLASSES = 40  # of the histogram, at most


def write(xray: Xray, path: Path) -> Path:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = lambda text: sentence(str(text))
    page = environment.from_string(Path(__file__).with_name("inspect.html.jinja").read_text("utf-8")).render(
        xray=xray,
        subject=xray.subject,
        conditions=CONDITIONS,
        runs=runs,
        piece=piece,
        histogram=histogram(xray.sizes, xray.subject.max_length),
        longest=LONGEST,
        compact=compact,
        number=number,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def piece(token: Token | str) -> Markup:
    """A token's text: line breaks and tabs as signs, what does not print spelled out, blanks as they are."""
    text = token if isinstance(token, str) else token.text
    return escape(sentence(text))


def histogram(lengths: list[int], most: int | None) -> Markup:
    """Rows by their number of tokens, as one SVG, with a line where they are cut."""
    if not lengths:
        return Markup("")
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // CLASSES))
    classes = [0] * ((high - low) // step + 1)
    for length in lengths:
        classes[(length - low) // step] += 1
    width, height, left, bottom = 640, 190, 46, 24
    top, across = max(classes), (width - left - 8) / len(classes)
    out = [f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img"><title>rows by tokens</title>']
    for mark in [m for m in ticks(0, top, 3) if m == int(m)]:
        y = 8 + (height - bottom - 8) * (1 - mark / top)
        out.append(f'<path class="grid" d="M{left} {y:.1f}H{width - 8}"/>')
        out.append(f'<text class="end" x="{left - 6}" y="{y + 3.5:.1f}">{compact(mark)}</text>')
    for place, count in enumerate(classes):
        size = (height - bottom - 8) * count / top
        x, y = left + place * across, height - bottom - size
        name = f"{low + place * step} to {low + (place + 1) * step - 1} tokens: {count} rows"
        out.append(f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(across - 1, 0.5):.1f}" height="{size:.1f}">')
        out.append(f"<title>{name}</title></rect>")
    if most is not None and low < most < high:
        x = left + (most - low) / step * across
        out.append(f'<path class="limit" d="M{x:.1f} 4V{height - bottom}"><title>cut at {most}</title></path>')
    for tick in ticks(low, max(high, low + 1), 6):
        x = left + (tick - low) / step * across
        out.append(f'<text class="mid" x="{min(x, width - 20):.1f}" y="{height - 6}">{tick:.0f}</text>')
    return Markup("".join(out) + "</svg>")
