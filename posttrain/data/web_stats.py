"""What each step of cleaning kept and dropped, summed over the tasks.

In: datatrove's stats of completed tasks (`datatrove/<phase>/stats/*.json`) and the samples that filters kept. Out: a
list of steps as stage.json holds it (`also`: what else a step counts, as encodings, lines and masks):

    {"name": "gopher_quality", "in": 812, "out": 640, "dropped": {"gopher_short_doc": 150, ...}, "seconds": 3.1,
     "also": {...}, "samples": [{"reason", "url", "text"}]}
"""

import json
from collections import Counter
from pathlib import Path

from posttrain.errors import UserError

# Stats that say why a document went, of steps without `dropped_REASON`.
LOST = ("timeout", "broken_process", "clean_error")
COUNTED = ("total", "forwarded", "dropped", "doc_len", "extracted", *LOST)
HIDDEN = ("filtered", "written", "reread", "kept", "signatures", "buckets", "clusters")  # not steps of cleaning
UNNAMED = {"extraction": "empty", "dedup": "near_duplicate"}  # the reason of steps that name none
SAMPLES_SHOWN = 3  # of a step and reason
REASONS_SHOWN = 4  # of a step, those that dropped most


def _number(value) -> float:
    return value["total"] if isinstance(value, dict) else value


def _sums(phases: list, output_dir: Path) -> dict[str, Counter]:
    """step name -> its stats, summed over tasks. A step of several phases is taken from the last."""
    sums: dict[str, Counter] = {}
    for phase in phases:
        files = sorted((phase.logs(output_dir) / "stats").glob("*.json"))
        counted: dict[str, Counter] = {name: Counter() for name in phase.steps}
        for file in files:
            listed = json.loads(file.read_text(encoding="utf-8"))
            for name, entry in zip(phase.steps, listed[-len(phase.steps) :], strict=True):
                for key, value in entry["stats"].items():
                    counted[name][key] += _number(value)
                counted[name]["seconds"] += _number(entry["time_stats"])
        sums |= counted
    return sums


def summary(phases: list, output_dir: Path) -> dict:
    """{"steps": [...] in order, "read", "kept", "characters"}. A step that no document reached has zeros."""
    sums = _sums(phases, output_dir)
    found = [_step(name, stats, output_dir) for name, stats in sums.items() if name not in HIDDEN]
    kept = sums.get("kept", Counter())
    read = found[0]["in"]
    return {"steps": found, "read": read, "kept": int(kept["total"]), "characters": int(kept["characters"])}


def _step(name: str, stats: Counter, output_dir: Path) -> dict:
    came = int(stats["total"])
    went = came if name == "pii" else int(stats["forwarded"])
    dropped = {key.removeprefix("dropped_"): int(n) for key, n in stats.items() if key.startswith("dropped_")}
    dropped |= {key: int(stats[key]) for key in LOST if stats[key]}
    if rest := came - went - sum(dropped.values()):
        dropped[UNNAMED.get(name, "other")] = rest
    dropped = dict(Counter(dropped).most_common())
    also = {k: int(v) for k, v in stats.items() if k not in (*COUNTED, "seconds") and not k.startswith("dropped_")}
    return {
        "name": name, "in": came, "out": went, "dropped": dropped, "also": also,
        "seconds": round(stats["seconds"], 3), "samples": _samples(output_dir, name, list(dropped)),
    }  # fmt: skip


def _samples(output_dir: Path, step: str, reasons: list[str]) -> list[dict]:
    """A few dropped documents of the commonest reasons, in the order of the tasks."""
    kept: dict[str, list] = {}
    for path in sorted((output_dir / "work" / "samples").glob(f"{step}-*.json")):
        for reason, found in json.loads(path.read_text(encoding="utf-8")).items():
            kept.setdefault(reason, []).extend(found)
    if step in UNNAMED:
        kept = {UNNAMED[step]: kept.get(step, [])}
    return [{"reason": each, **one} for each in reasons[:REASONS_SHOWN] for one in kept.get(each, [])[:SAMPLES_SHOWN]]


def require_some(found: list[dict]) -> None:
    """UserError where no document is left, naming the step that dropped most."""
    if found[0]["in"] == 0:
        raise UserError("input: no page or row in these files: WARC files need HTML responses, rows a text column")
    if found[-1]["out"] == 0:
        worst = max(found, key=lambda step: step["in"] - step["out"])
        reasons = ", ".join(f"{reason} {count}" for reason, count in list(worst["dropped"].items())[:3])
        raise UserError(
            f"input: of {found[0]['in']} pages none is kept; {worst['name']} dropped {worst['in'] - worst['out']} "
            f"({reasons}): change its settings, or switch it off with {worst['name']}: false"
        )


def left_out(cleaning: dict) -> dict:
    """What the manifest says of the input as a data set: rows, and those that could not be read, by reason."""
    return {"rows": cleaning["read"], "skipped": cleaning["steps"][0]["dropped"]}
