"""The report of a run: one HTML file that needs nothing else, the gains as a table for the terminal, the chain as a
picture.

In: a run folder as posttrain/report_read.py reads it. Out: `report.html` in it, or an SVG file of the chain:

    posttrain report runs/tiny [--against runs/other] [--price 2.50] [--picture chain.svg]

A run may be unfinished: a stage without stage.json is shown as such, with the curves it has so far. What a model
wrote is taken as hostile: the templates escape all of it, the page has no script and no link out, and its
Content-Security-Policy allows neither.
"""

import os
import textwrap
from functools import cache
from pathlib import Path

from posttrain import curves, doctor, figures, over_optimization, plots, report_cost, report_diff, web_figure
from posttrain import report_identity as identity
from posttrain import report_page as page
from posttrain.report_page import UNPRINTABLE, gains_of, summary, visible
from posttrain.report_read import Stage, read_run

PANELS_SHOWN = 6  # small panels; those after these are folded


def write_report(
    run_dir: Path, stages: list[str] | None = None, *, against: Path | None = None, price: float | None = None
) -> Path:
    """Writes `run_dir/report.html` (replaced in one step) and returns its path.

    `against` is another run, with which this one is compared; `price` the dollars of a device-hour.
    Raises UserError naming the file when there is no stage, or a stage.json, log.jsonl or chain.json cannot be read.
    """
    chain, found = read_run(run_dir, stages)
    html = _environment().get_template("report_page.html.jinja").render(
        name=chain.get("name") or run_dir.resolve().name,
        chain=chain,
        stages=found,
        gains=gains_of(found),
        summary=summary(found),
        samples=page.samples(found),
        suites=page.evaluations(found),
        identities=identity.table(found),
        by_question=identity.by_question(found),
        costs=report_cost.costs(found, price),
        parts=report_cost.PARTS,
        studies=_studies(found),
        difference=None if against is None else difference(run_dir, found, against),
        picture=[page.chain_picture(found, down=down) for down in (False, True)],
    )  # fmt: skip
    path = run_dir / "report.html"
    _replace(path, UNPRINTABLE.sub("\ufffd", html))  # names of metrics and files as well
    return path


def write_picture(run_dir: Path, file: Path) -> Path:
    """The chain of a run as an SVG file with colours of its own, light and dark. Raises as `write_report` does."""
    _replace(file, UNPRINTABLE.sub("\ufffd", figures.standalone(page.chain_picture(read_run(run_dir)[1]))))
    return file


def difference(run_dir: Path, stages: list[Stage], against: Path) -> report_diff.Difference:
    """This run beside another one. Raises UserError where that cannot be read."""
    names = report_diff.run_names(run_dir, against)
    return report_diff.compare(names[0], stages, names[1], read_run(against)[1])


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@cache
def _environment():
    """The templates beside this file, everything they are given escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["visible"] = visible
    environment.globals |= {
        "figures": figures, "curves": curves, "page": page, "verdict": page.verdict, "panels_shown": PANELS_SHOWN,
        "pictures": plots.stage_pictures, "wide_pictures": web_figure.pictures, "dropped": web_figure.dropped,
        "drift": identity.drift,
        "remarks": lambda stage: doctor.heard(stage.log, stage.config),
        "shown_by_round": lambda metrics: [name for name in metrics if ", " not in name],
    }  # fmt: skip
    return environment


def _studies(stages: list[Stage]) -> dict[str, list[over_optimization.Study]]:
    """Stage -> its pictures of reward against KL."""
    by_name, found = {stage.name: stage for stage in stages}, {}
    for stage in stages:
        reward = next((by_name.get(parent) for role, parent, _ in stage.parents if role.startswith("reward")), None)
        climbed = over_optimization.study(stage, reward)
        found[stage.name] = [*([climbed] if climbed else []), *over_optimization.best_of_study(stage)]
    return found


# ---- the terminal ---------------------------------------------------------------------------------------------------

COLUMNS = (
    ("stage", 9),
    ("gain", 26),
    ("before", 22),
    ("after", 22),
    ("goal", 20),
    ("result", 10),
)  # 119 with the gaps


def gains_table(run_dir: Path, stages: list[str] | None = None) -> str:
    """The gains as plain text in fixed columns, at most 119 wide; the last lines sum up and name what is missing.

    Brackets hold 95 % intervals. Raises UserError as `write_report` does.
    """
    found = read_run(run_dir, stages)[1]
    lines = _row([name for name, _ in COLUMNS]) + ["  ".join("-" * width for _, width in COLUMNS)]
    for stage, gain in gains_of(found):
        unit = gain.get("unit") or ""
        sides = [" ".join(figures.measure(gain[side], unit)).strip() for side in ("before", "after")]
        labels = [gain[side].get("label") or "" for side in ("before", "after")]
        name = gain["name"] + (f", {unit}" if unit not in ("", "%") else "")
        cells = [stage.name, name, *(f"{a}\n{b}" for a, b in zip(sides, labels, strict=True)), gain.get("goal") or ""]
        lines += [*_row([*cells, page.verdict(gain)]), ""]
    shown, open_ones = summary(found)
    lines += [
        f"{shown} of {len(gains_of(found))} gains shown; brackets: 95 % intervals",
        *(visible(line) for line in open_ones),
    ]
    return "\n".join(lines)


def _row(cells: list[str]) -> list[str]:
    """One row as lines: each cell wrapped to its column."""
    wrapped = []
    for (_, width), cell in zip(COLUMNS, cells, strict=True):
        wrapped.append([line for part in cell.split("\n") for line in textwrap.wrap(visible(part), width)])
    height = max(map(len, wrapped))
    columns = [[*lines, *[""] * (height - len(lines))] for lines in wrapped]
    padded = [[line.ljust(width) for line in lines] for lines, (_, width) in zip(columns, COLUMNS, strict=True)]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
