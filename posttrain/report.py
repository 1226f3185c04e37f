"""The report of a run: one HTML file that needs nothing else, and the gains as a table for the terminal.

In: a run folder (`runs/tiny`) with one folder a stage, each with `stage.json`, `log.jsonl` and perhaps
`rollouts.jsonl`; `chain.json` in it ({"name", "started", "stages": [...], "status": {"grpo": "running" | "failed"}},
all optional) gives the order, else the parents named in each stage.json do. Out: `report.html` beside them.
To make it again: `posttrain report runs/tiny`.

A run may be unfinished: a stage without stage.json is shown as such, with the curves it has so far. What a model
wrote is taken as hostile: the template escapes all of it, the page has no script and no link out, and its
Content-Security-Policy allows neither.
"""

import json
import math
import os
import re
import textwrap
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from posttrain import doctor, figures, plots, web_figure
from posttrain.errors import UserError

LONGEST_TEXT = 4000  # characters of one reply or prompt; the rest is counted, not shown
ROLLOUTS_SHOWN = 4  # of the first step and of the last
PANELS_SHOWN = 9  # the panels after these are folded
UNPRINTABLE = re.compile("[^\n\t -~\xa0-\ud7ff\ue000-\U0010ffff]")  # control characters and lone surrogates
ORDER = ("loss", "reward", "utility", "score", "kl", "accuracy", "pass", "correct", "length", "entropy", "bits", "std")
LAST = ("clip", "grad_norm", "learning_rate", "throughput", "per_second", "epoch", "tokens", "time")


@dataclass
class Stage:
    """One stage folder as read. `manifest` is {} and `digest` "" while there is no stage.json."""

    name: str
    state: str  # finished | running | failed | not finished | not started
    manifest: dict = field(default_factory=dict)
    digest: str = ""
    log: list[dict] = field(default_factory=list)
    rollouts: list[tuple[int, int, list[dict]]] = field(default_factory=list)  # (step, how many it had, some of them)
    parents: list[tuple[str, str, bool]] = field(
        default_factory=list
    )  # (role, stage or path, is that what stands there)


# ---- reading --------------------------------------------------------------------------------------------------------


def _json(text: str, where: str, expected: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}); expected {expected}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}, expected {expected}")
    return value


def _lines(path: Path, *, growing: bool):
    """Objects of a .jsonl file. The last line of a file still being written may be cut off: it is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if growing and not line.endswith("\n"):
                return
            if line.strip():
                yield _json(line, f"{path}:{number}", "one JSON object a line")


def _manifest(path: Path) -> tuple[dict, str]:
    """stage.json and its sha256. Raises UserError naming the file and the key it cannot be read without."""
    raw = path.read_bytes()
    mend = "run the stage again, or remove the file to have it shown as not finished"
    manifest = _json(raw.decode("utf-8", errors="replace"), str(path), f"the manifest of a stage; {mend}")
    for key, kind in (("stage", str), ("status", str), ("parents", dict), ("metrics", dict), ("gains", list)):
        if not isinstance(manifest.setdefault(key, kind()), kind) or manifest[key] == "":
            raise UserError(f"{path}: key {key!r} is {manifest[key]!r}, expected a {kind.__name__}; {mend}")
    entries = [(f"metrics[{name!r}]", entry) for name, entry in manifest["metrics"].items()]
    for index, gain in enumerate(manifest["gains"]):
        if not isinstance(gain, dict) or not isinstance(gain.get("name"), str):
            raise UserError(f"{path}: gains[{index}] is {gain!r}, expected an object with a name; {mend}")
        entries += [(f"gains[{index}][{side!r}]", gain.get(side)) for side in ("before", "after")]
    for index, sample in enumerate(manifest.setdefault("samples", [])):
        replies = sample.get("replies") if isinstance(sample, dict) else None
        if not isinstance(replies, list) or not all(isinstance(each, dict) and "by" in each for each in replies):
            raise UserError(f"{path}: samples[{index}] is {sample!r}, expected a prompt and replies by name; {mend}")
    for index, line in enumerate(manifest.setdefault("rounds", [])):
        if not isinstance(line, dict) or not isinstance(line.get("metrics"), dict):
            raise UserError(f"{path}: rounds[{index}] is {line!r}, expected an object with metrics; {mend}")
        entries += [(f"rounds[{index}][{name!r}]", entry) for name, entry in line["metrics"].items()]
    for where, entry in entries:
        numbers = [entry.get(key) for key in ("value", "low", "high")] if isinstance(entry, dict) else [""]
        if not all(value is None or isinstance(value, int | float) for value in numbers):
            raise UserError(f"{path}: {where} is {entry!r}, expected numbers for value, low and high; {mend}")
    return manifest, sha256(raw).hexdigest()


def _rollouts(path: Path, *, growing: bool) -> list[tuple[int, int, list[dict]]]:
    """A few rollouts of the first and the last step, evenly spaced in the order they were made: not picked by hand."""
    by_step: dict[int, list[dict]] = {}
    for row in _lines(path, growing=growing):
        step = row.get("step", 0)
        by_step.setdefault(step, []).append(row)
        for between in sorted(by_step)[1:-1]:  # only the two ends are kept: the file may be long
            del by_step[between]
    return [
        (step, len(rows), rows[:: math.ceil(len(rows) / ROLLOUTS_SHOWN)]) for step, rows in sorted(by_step.items())
    ]


def _read_stage(folder: Path, status: str | None) -> Stage:
    stage = Stage(folder.name, "not started")
    if (folder / "stage.json").is_file():
        stage.manifest, stage.digest = _manifest(folder / "stage.json")
        stage.state = stage.manifest["status"]
    elif folder.is_dir():
        stage.state = status or "not finished"
    elif status == "failed":
        stage.state = "failed"  # before it could make its folder
    growing = stage.state != "finished"
    if (folder / "log.jsonl").is_file():
        stage.log = list(_lines(folder / "log.jsonl", growing=growing))
    if (folder / "rollouts.jsonl").is_file():
        stage.rollouts = _rollouts(folder / "rollouts.jsonl", growing=growing)
    return stage


def _find_parents(stages: list[Stage], run_dir: Path) -> None:
    """Fills `parents`: by the hash of the parent's stage.json, else by its path (then it has changed since)."""
    by_digest = {stage.digest: stage.name for stage in stages if stage.digest}
    by_path = {(run_dir / stage.name).resolve(): stage.name for stage in stages}
    for stage in stages:
        for role, parent in stage.manifest.get("parents", {}).items():
            path, digest = Path(parent.get("path") or "?"), parent.get("sha256")
            found = by_digest.get(digest) or by_path.get(path.resolve())
            changed = found is not None and digest is not None and by_digest.get(digest) != found
            stage.parents.append((role, found or str(path), not changed))


def read_run(run_dir: Path, stages: list[str] | None = None) -> tuple[dict, list[Stage]]:
    """chain.json ({} where there is none) and every stage in order.

    `stages` gives the order and the choice; else chain.json; else parents before children, among all folders of
    `run_dir` with a stage.json or a log.jsonl. Raises UserError naming the file that is missing or broken.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder; expected one with a folder for each stage, such as runs/tiny")
    chain = {}
    if (run_dir / "chain.json").is_file():
        chain = _json(
            (run_dir / "chain.json").read_text("utf-8"), str(run_dir / "chain.json"), "an object with stages"
        )
    names = stages or chain.get("stages")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise UserError(f"{run_dir / 'chain.json'}: stages is {names!r}, expected a list of folder names")
    known = names or sorted(
        path.name for path in run_dir.iterdir() if (path / "stage.json").is_file() or (path / "log.jsonl").is_file()
    )
    if not known:
        raise UserError(f"{run_dir}: no stage in it; expected folders with a stage.json, such as {run_dir / 'sft'}")
    found = [_read_stage(run_dir / name, chain.get("status", {}).get(name)) for name in known]
    _find_parents(found, run_dir)
    if names is None:
        order = figures.in_order({s.name: [p for _, p, _ in s.parents if p in known] for s in found})
        found.sort(key=lambda stage: order.index(stage.name))
    return chain, found


# ---- what the page shows --------------------------------------------------------------------------------------------


def visible(text: object) -> str:
    """Text as a reader should see it: control characters and lone surrogates as signs, and not without end."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    rest = len(text) - LONGEST_TEXT
    return UNPRINTABLE.sub("\ufffd", text[:LONGEST_TEXT]) + (f" … ({rest:,} more characters)" if rest > 0 else "")


def _rank(name: str) -> tuple:
    late = next((len(ORDER) + 1 + place for place, part in enumerate(LAST) if part in name), None)
    early = next((place for place, part in enumerate(ORDER) if part in name), len(ORDER))
    return (early if late is None else late, name not in ORDER, name)


def panels(log: list[dict]) -> tuple[list[dict], dict[str, float]]:
    """Numeric series of a log -> panels {"name", "lines", "skipped"}, most important first, and those with one value.

    `eval_loss`, `held_out_loss` and `loss` share a panel. `skipped` counts values that are not finite. A step logged
    twice (a stage that was resumed) counts once, with the later value.
    """
    series: dict[str, dict[float, float]] = {}
    for index, row in enumerate(log, 1):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, {})[row.get("step", index)] = value
    grouped: dict[str, dict] = {}
    single = {}
    for name, values in series.items():
        points = [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]
        if len({value for _, value in points}) < 2:
            single[name] = points[-1][1] if points else math.nan
            continue
        base = name
        for prefix in ("eval_", "eval/", "held_out_", "train_", "train/"):
            base = base.removeprefix(prefix)
        panel = grouped.setdefault(base, {"name": base, "lines": {}, "skipped": 0})
        panel["lines"][name] = points
        panel["skipped"] += len(values) - len(points)
    return sorted(grouped.values(), key=lambda panel: _rank(panel["name"])), single


def samples(stages: list[Stage]) -> list[dict]:
    """The same prompts over all stages: {"prompt", "replies": {by: text}}; the first stage to show a reply has it."""
    merged: dict[str, dict[str, str]] = {}
    for stage in stages:
        for sample in stage.manifest.get("samples", []):
            replies = merged.setdefault(visible(sample.get("prompt")), {})
            for reply in sample["replies"]:
                replies.setdefault(reply["by"], reply.get("text"))
    return [{"prompt": prompt, "replies": replies} for prompt, replies in merged.items()]


def skipped(manifest: dict) -> str:
    """`12 of data.jsonl: malformed_json 3, too_long 9; ...`: what each data set of a stage left out, by reason."""
    found = []
    for source in manifest.get("data") or []:
        overlap = source.get("overlap") or {}
        counts = {**(source.get("skipped") or {}), **(source.get("duplicates") or {})}
        counts |= {"in both sets": overlap.get("dropped_eval", 0) + overlap.get("dropped_train", 0)}
        listed = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
        if listed:
            found.append(f"{sum(counts.values())} of {source.get('name')}: {listed}")
    return "; ".join(found)


def verdict(gain: dict) -> str:
    """shown | not shown | not judged (the stage stored no `passed`)."""
    return {True: "shown", False: "not shown"}.get(gain.get("passed"), "not judged")


def _gains(stages: list[Stage]) -> list[tuple[Stage, dict]]:
    return [(stage, gain) for stage in stages for gain in stage.manifest.get("gains", [])]


def _summary(stages: list[Stage]) -> tuple[int, list[str]]:
    """How many gains are shown, and ["grpo: failed, so no gain to show", ...] for the stages that are not finished."""
    shown = sum(verdict(gain) == "shown" for _, gain in _gains(stages))
    open_ones = [f"{stage.name}: {stage.state}, so no gain to show" for stage in stages if stage.state != "finished"]
    return shown, open_ones


def _chain_picture(stages: list[Stage], *, down: bool) -> str:
    boxes, edges, names = [], [], {stage.name for stage in stages}
    for index, stage in enumerate(stages):
        manifest = stage.manifest
        size = manifest.get("parameters")
        facts = [f"{figures.compact(size)} params"] if size else []
        facts += [figures.duration(manifest.get("wall_time_s"))] if manifest.get("wall_time_s") is not None else []
        goals = [verdict(gain) for gain in manifest.get("gains", [])]
        result = f"{goals.count('shown')} of {len(goals)} gains shown" if goals else stage.state
        lines = [" · ".join(facts), result] if facts else [result]
        state = "not shown" if stage.state == "finished" and "not shown" in goals else stage.state
        boxes.append(
            {"name": stage.name, "title": stage.name, "lines": lines, "state": state, "href": f"#stage-{index}"}
        )
        roles: dict[str, list[str]] = {}
        for role, parent, _ in stage.parents:
            roles.setdefault(parent, []).append(role)
        for parent in roles.keys() - names:
            names.add(parent)
            line = ["from outside this run"]
            boxes.append({"name": parent, "title": Path(parent).name, "lines": line, "state": "outside", "href": None})
        labels = {parent: ", ".join(each) if len(roles) > 1 else "" for parent, each in roles.items()}
        edges += [(parent, stage.name, label, "known") for parent, label in labels.items()]
        if not manifest and index:  # its parents are written down when it finishes: until then, the order of the chain
            edges.append((stages[index - 1].name, stage.name, "", "assumed"))
    return figures.chain(boxes, edges, down=down)


def write_report(run_dir: Path, stages: list[str] | None = None) -> Path:
    """Writes `run_dir/report.html` (replaced in one step) and returns its path.

    Raises UserError naming the file when there is no stage, or a stage.json, log.jsonl or chain.json cannot be read.
    """
    import jinja2

    chain, found = read_run(run_dir, stages)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = visible
    shown, open_ones = _summary(found)
    page = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text("utf-8")).render(
        name=chain.get("name") or run_dir.resolve().name,
        chain=chain,
        stages=found,
        gains=_gains(found),
        shown=shown,
        open_ones=open_ones,
        samples=samples(found),
        panels=panels,
        panels_shown=PANELS_SHOWN,
        verdict=verdict,
        figures=figures,
        pictures=plots.stage_pictures,
        wide_pictures=web_figure.pictures,
        dropped=web_figure.dropped,
        skipped=skipped,
        shown_by_round=lambda metrics: [name for name in metrics if ", " not in name],
        remarks=lambda stage: doctor.heard(stage.log, stage.manifest.get("config") or {}),
        picture=[_chain_picture(found, down=down) for down in (False, True)],
    )
    path = run_dir / "report.html"
    beside = path.with_suffix(".html.part")
    beside.write_text(UNPRINTABLE.sub("\ufffd", page), encoding="utf-8")  # names of metrics and files as well
    os.replace(beside, path)
    return path


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
    for stage, gain in _gains(found):
        unit = gain.get("unit") or ""
        sides = [" ".join(figures.measure(gain[side], unit)).strip() for side in ("before", "after")]
        labels = [gain[side].get("label") or "" for side in ("before", "after")]
        name = gain["name"] + (f", {unit}" if unit not in ("", "%") else "")
        cells = [stage.name, name, *(f"{a}\n{b}" for a, b in zip(sides, labels, strict=True)), gain.get("goal") or ""]
        lines += [*_row([*cells, verdict(gain)]), ""]
    shown, open_ones = _summary(found)
    lines += [
        f"{shown} of {len(_gains(found))} gains shown; brackets: 95 % intervals",
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
