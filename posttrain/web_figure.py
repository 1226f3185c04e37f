"""What cleaning kept, as a picture and as samples, for `posttrain/report.py`.

In: `cleaning` of a stage.json (`data/web_stats.py` makes it). Out: `Markup` holding one `<svg>`, and rows of dropped
documents. Pages are hostile text: what they wrote stays text, here and in the template.
"""

import textwrap

from markupsafe import Markup, escape

from posttrain.figures import compact

WIDTH, LEFT, RIGHT, ROW = 720, 150, 92, 46  # a bar's row holds its line of reasons as well
REASONS = 3  # named beside a bar, those that dropped most
TITLES = {
    "read": "pages read", "url_filter": "URL filter", "extraction": "main text", "language_filter": "language",
    "gopher_repetition": "Gopher repetition", "gopher_quality": "Gopher quality", "c4_quality": "C4 quality",
    "fineweb_quality": "FineWeb quality", "dedup": "MinHash duplicates", "pii": "addresses masked",
}  # fmt: skip


def title(name: str) -> str:
    return TITLES.get(name, name)


def funnel(cleaning: dict) -> Markup:
    """A bar a step: what went in (light), what came out (full), and why the rest was dropped."""
    steps, most = cleaning["steps"], max(1, cleaning["read"])
    height, span = ROW * len(steps) + 6, WIDTH - LEFT - RIGHT
    out = [f'<svg class="funnel" viewBox="0 0 {WIDTH} {height}" role="img"><title>what each step kept</title>']
    for index, step in enumerate(steps):
        top = 4 + ROW * index
        out.append(f'<text class="end" x="{LEFT - 10}" y="{top + 15}">{escape(title(step["name"]))}</text>')
        for kind, count in (("went-in", step["in"]), ("came-out", step["out"])):
            width = span * count / most
            out.append(f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{width:.1f}" height="20" rx="3"/>')
        share = f"{100 * step['out'] / step['in']:.1f} %" if step["in"] else "–"
        place = LEFT + span * step["in"] / most + 6
        out.append(f'<text x="{place:.1f}" y="{top + 15}">{compact(step["out"])} · {share}</text>')
        out.append(f'<text class="why" x="{LEFT}" y="{top + 33}">{escape(reasons(step))}</text>')
    return Markup("".join(out) + "</svg>")


def reasons(step: dict) -> str:
    """`dropped 12: gopher_short_doc 9, gopher_long_doc 3`, the commonest, or what else a step counted."""
    listed = list(step["dropped"].items())
    parts = [f"{reason} {compact(count)}" for reason, count in listed[:REASONS]]
    parts += [f"other {compact(sum(count for _, count in listed[REASONS:]))}"] if len(listed) > REASONS else []
    lost = step["in"] - step["out"]
    said = f"dropped {compact(lost)}: {', '.join(parts)}" if parts else ""
    also = ", ".join(f"{name} {compact(count)}" for name, count in step["also"].items() if name in ("emails", "ips"))
    return textwrap.shorten(said or (f"masked: {also}" if also else ""), 104, placeholder=" …")


def pictures(manifest: dict) -> list[tuple[str, Markup]]:
    """(caption, picture) of a cleaning stage; [] for any other."""
    cleaning = manifest.get("cleaning")
    if not cleaning:
        return []
    return [(f"what each step kept: {cleaning['kept']:,} of {cleaning['read']:,} pages", funnel(cleaning))]


def dropped(manifest: dict) -> list[dict]:
    """{"step", "reason", "url", "text"} of the samples of dropped documents, in the order of the steps."""
    steps = (manifest.get("cleaning") or {}).get("steps", [])
    return [{"step": title(step["name"]), **sample} for step in steps for sample in step["samples"]]
