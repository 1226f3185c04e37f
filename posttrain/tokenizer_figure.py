"""Bytes per token by language and domain as a picture, for the report.

In: the `compression` of a tokenizer's manifest. Out: `Markup` holding one `<svg>` in the report's colours.
"""

from markupsafe import Markup, escape

MOST = 3  # tokenizers that are drawn, the trained one first; the report has three colours
WIDTH, NAMES, NUMBERS, BAR, GAP = 440, 128, 34, 8, 9  # in the picture's own units; NAMES, NUMBERS: room for text


def compression_bars(compression: dict) -> Markup:
    """A group of bars for each group of texts, a bar for each tokenizer, its bytes per token beside it."""
    shown, groups = compression["tokenizers"][:MOST], compression["groups"]
    names = [each["name"] for each in shown]
    ratios = [[group["bytes"] / max(1, group["tokens"][name]) for name in names] for group in groups]
    scale = (WIDTH - NAMES - NUMBERS) / max(map(max, ratios))
    top, step = 14 * len(shown) + 12, BAR * len(shown) + GAP
    height = top + step * len(groups)
    out = [f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img"><title>bytes per token</title>']
    for index, each in enumerate(shown):
        at = 14 * index
        out.append(f'<rect class="dot c{index}" x="{NAMES}" y="{at + 3}" width="16" height="8"/>')
        out.append(f'<text x="{NAMES + 22}" y="{at + 11}">{escape(each["name"])}, {each["size"]:,} tokens</text>')
    for row, (group, found) in enumerate(zip(groups, ratios, strict=True)):
        start = top + row * step
        kind = f"{group['kind']}: " if group["kind"] == "held-out" else ""
        middle = start + BAR * len(shown) / 2 + 4
        out.append(
            f'<text class="end" x="{NAMES - 8}" y="{middle:.1f}">{escape(shortened(kind + group["name"]))}</text>'
        )
        for index, ratio in enumerate(found):
            at, length = start + index * BAR, ratio * scale
            out.append(
                f'<rect class="dot c{index}" x="{NAMES}" y="{at}" width="{length:.1f}" height="{BAR - 1}"/>'
                f'<text x="{NAMES + length + 4:.1f}" y="{at + 7}" style="font-size:8px">{ratio:.2f}</text>'
            )
    out.append(f'<path class="even" d="M{NAMES + scale:.1f} {top - 4}V{height}"/>')  # one token a byte
    return Markup("".join(out) + "</svg>")


def shortened(name: str, width: int = 22) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
