"""What `posttrain eval --suite` shows: lines for the terminal, and a Markdown table of what is stored.

In: results with figures, changes and samples. Out: text. A run has a row a stage; brackets are 95 % intervals, over
prompts; a change is paired, over the same prompts.
"""

from posttrain import figures
from posttrain.eval_report import metric_lines
from posttrain.report import visible

SHOWN_WRONG = 2  # wrong replies on the terminal; the JSON file has more
WIDTH = 118
OWN_TABLES = ("think", "tools", "spelling")
MOST_COLUMNS = 6  # figures of a run's row beside the first


def text(given, results: list) -> str:
    """The whole answer of the verb."""
    first = results[0]
    lines = [headline(given, first), ""]
    if (suite := module_of(given.suite)) is not None:
        lines += [line for one in results for line in [*suite.lines(one), ""]]
        lines += [suite.EXPLAINED, *wrong_ones(first.found.samples)]
    elif len(results) == 1:
        lines += metric_lines(first.found.metrics)
        lines += wrong_ones(first.found.samples)
    else:
        lines += table(results)
    return "\n".join([*lines, *(visible(line) for result in results for line in result.conclusions)])


def module_of(suite: str):
    """The module of a suite that measures and shows in a way of its own; None for the others."""
    from importlib import import_module

    return import_module(f"posttrain.suite_{suite}") if suite in OWN_TABLES else None


def headline(given, result) -> str:
    """What was asked, of what, and how it was sampled."""
    data = result.data[0] if result.data else {}
    kind = f" ({data['config']})" if data.get("config") else ""
    what = f"suite {given.suite}"
    if data:
        rows = f"{data['rows']} rows of " if "rows" in data else ""
        split = f", {data['split']}" if data.get("split") else ""
        what += f": {rows}{data.get('name')}{kind}{split}"
    if "engine" not in result.found.more:
        return what
    more = result.found.more
    each = "1 reply" if more["num_generations"] == 1 else f"{more['num_generations']} replies"
    return (
        f"{what}; {each} a prompt at temperature {more['temperature']:g}, at most {more['max_tokens']} tokens, seed "
        f"{more['sample_seed']}, by {more['engine']}"
    )


def shown(figure: dict | None, *, interval: bool = True) -> str:
    """`43.4 % [41.0, 45.8]`; "-" where there is none."""
    if figure is None:
        return "-"
    value, brackets = figures.measure(figure, figure.get("unit") or "")
    return f"{value} {brackets}".strip() if interval else value


def changed(change: dict | None) -> str:
    """`+42.8 [40.3, 45.2] pretrain`."""
    if change is None:
        return ""
    value, interval = figures.measure(change, change["unit"])
    return f"{'+' if change['value'] > 0 else ''}{value} {interval} {change['against']}".strip()


def table(results: list) -> list[str]:
    """A row a stage: the suite's first figure with its interval and paired change, then others without."""
    names = list(dict.fromkeys(name for result in results for name in result.found.metrics))
    first, others = names[0], names[1:]
    unit = results[-1].found.metrics.get(first, {}).get("unit")
    change = f"change{', points' if unit == '%' else ''}, against"
    rows = [["stage", first, change]]
    for result in results:
        rows.append([result.target.name, shown(result.found.metrics.get(first)), changed(result.changes.get(first))])
    for name in others:
        column = [name, *(shown(result.found.metrics.get(name), interval=False) for result in results)]
        wider = [row + [cell] for row, cell in zip(rows, column, strict=True)]
        if len(wider[0]) > 3 + MOST_COLUMNS or sum(_widths(wider)) + 2 * len(wider[0]) > WIDTH:
            break
        rows = wider
    left = names[1 + len(rows[0]) - 3 :]
    lines = aligned(rows) + ["brackets: 95 % intervals; a change is paired, over the same prompts"]
    return lines + ([f"more in evals/*.md: {', '.join(left)}"] if left else [])


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines in columns, a rule below the first."""
    widths = _widths(rows)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def wrong_ones(samples: list[dict]) -> list[str]:
    """The first wrong replies, each on a line or two."""
    wrong = [sample for sample in samples if sample.get("why") == "one of the first wrong ones"][:SHOWN_WRONG]
    lines = []
    for sample in wrong:
        prompt, reply = (one_line(sample[key]) for key in ("prompt", "reply"))
        gold = f"; right is {one_line(str(sample['answer']), 40)}" if "answer" in sample else ""
        lines += [f"wrong, row {sample['row']}: {prompt}", f"    {reply or '(nothing)'}{gold}"]
    return ["", *lines] if lines else []


def one_line(text: str, most: int = 100) -> str:
    """Text on one line, its control characters as signs, cut."""
    text = " ".join(visible(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown(told: dict, picture: str | None = None) -> str:
    """MODEL/evals/NAME.md: all figures, changes and the call that gives them again; `picture` is a file beside it."""
    lines = [f"# {told['suite']}", "", "| figure | value | 95 % interval | n | change, paired |", "|---" * 5 + "|"]
    for name, figure in told["metrics"].items():
        value, interval = figures.measure(figure, figure.get("unit") or "")
        unit = figure.get("unit") or ""
        unit = "" if unit == "%" else f" {unit}"
        change = changed(told["changes"].get(name))
        lines.append(f"| {cell(name)} | {value}{unit} | {interval} | {figure.get('n')} | {cell(change)} |")
    sources = [
        f"{source.get('rows', '')} rows of {source.get('name')}, {source.get('split')}, sha256 {source.get('sha256')}"
        for source in told["data"]
    ]
    if picture is not None:
        lines += ["", f"![the same as a picture]({picture})"]
    again = [f"    {told['command']}", "", f"{told['created']}; {'; '.join(sources)}"]
    return "\n".join([*lines, "", *again, *[f"- {line}" for line in told["conclusions"]]]) + "\n"


def cell(text: str) -> str:
    return one_line(text, 200).replace("|", "\\|")
