"""A run's folder as the report reads it: stages in order, their logs, rollouts, evaluations and best-of-n curves.

In: a run folder (`runs/tiny`) with one folder a stage, each with `stage.json`, `log.jsonl` and perhaps
`rollouts.jsonl`, `evals/*.json` (`posttrain eval`) and `bestof/*.json` (`posttrain bestof`); `chain.json` in it
({"name", "started", "stages": [...], "status": {"grpo": "running" | "failed"}}, all optional) gives the order, else
the parents named in each stage.json do. Out: chain.json and a list of `Stage`. Called by posttrain/report.py.

A run may be unfinished: a stage without stage.json is read as such, with what it has logged so far.
"""

import json
import math
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from posttrain import figures
from posttrain.errors import UserError

ROLLOUTS_SHOWN = 4  # of the first step and of the last


@dataclass
class Stage:
    """One stage folder as read. `manifest` is {} and `digest` "" while there is no stage.json."""

    name: str
    state: str  # finished | running | failed | not finished | not started
    manifest: dict = field(default_factory=dict)
    digest: str = ""
    log: list[dict] = field(default_factory=list)
    rollouts: list[tuple[int, int, list[dict]]] = field(default_factory=list)  # (step, how many it had, some of them)
    begun: dict = field(default_factory=dict)  # run.json, which stands there until stage.json does: config, parents
    evals: dict[str, dict] = field(default_factory=dict)  # name of the suite -> what `posttrain eval` stored
    best_of: dict[str, list[dict]] = field(default_factory=dict)  # name of the file -> curve of `posttrain bestof`
    parents: list[tuple[str, str, bool]] = field(
        default_factory=list
    )  # (role, stage or path, is it what stands there)

    @property
    def kind(self) -> str:
        """The recipe's name for it; the folder's, while nothing else is known."""
        return self.manifest.get("stage") or self.begun.get("stage") or self.name

    @property
    def config(self) -> dict:
        """The resolved config, of a stage that still runs as well."""
        return self.manifest.get("config") or self.begun.get("config") or {}


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
    _require_samples(path, manifest, mend)
    for index, line in enumerate(manifest.setdefault("rounds", [])):
        if not isinstance(line, dict) or not isinstance(line.get("metrics"), dict):
            raise UserError(f"{path}: rounds[{index}] is {line!r}, expected an object with metrics; {mend}")
        entries += [(f"rounds[{index}][{name!r}]", entry) for name, entry in line["metrics"].items()]
    _require_figures(path, entries, mend)
    return manifest, sha256(raw).hexdigest()


def _require_samples(path: Path, manifest: dict, mend: str) -> None:
    for index, sample in enumerate(manifest.setdefault("samples", [])):
        replies = sample.get("replies") if isinstance(sample, dict) else None
        if not isinstance(replies, list) or not all(isinstance(each, dict) and "by" in each for each in replies):
            raise UserError(f"{path}: samples[{index}] is {sample!r}, expected a prompt and replies by name; {mend}")


def _require_figures(path: Path, entries: list[tuple[str, object]], mend: str) -> None:
    for where, entry in entries:
        numbers = [entry.get(key) for key in ("value", "low", "high")] if isinstance(entry, dict) else [""]
        if not all(value is None or isinstance(value, int | float) for value in numbers):
            raise UserError(f"{path}: {where} is {entry!r}, expected numbers for value, low and high; {mend}")


def _evals(folder: Path) -> dict[str, dict]:
    """What `posttrain eval` stored for a stage, a file a suite."""
    found = {}
    for path in sorted(folder.glob("evals/*.json")):
        mend = "evaluate again, or remove the file"
        told = _json(path.read_text("utf-8", errors="replace"), str(path), f"the results of an evaluation; {mend}")
        if not isinstance(told.get("metrics"), dict) or not isinstance(told.setdefault("samples", []), list):
            raise UserError(f"{path}: expected metrics by name and a list of samples; {mend}")
        _require_figures(path, [(f"metrics[{name!r}]", entry) for name, entry in told["metrics"].items()], mend)
        found[path.stem] = told
    return found


def _best_of(folder: Path) -> dict[str, list[dict]]:
    """The curves of `posttrain bestof` in a reward model's folder: points {"n", "kl", judge: {"value", ...}}."""
    found = {}
    for path in sorted(folder.glob("bestof/*.json")):
        mend = "run posttrain bestof again, or remove the file"
        curve = _json(path.read_text("utf-8", errors="replace"), str(path), f"a best-of-n curve; {mend}").get("curve")
        points = curve if isinstance(curve, list) else [None]
        if not points or not all(_is_point(point, points[0]) for point in points):
            raise UserError(f"{path}: expected a curve of points with n, kl and the value of each judge; {mend}")
        found[path.stem] = points
    return found


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


def _is_point(point: object, first: object) -> bool:
    """{"n", "kl", judge: {"value", "low", "high"}} with finite numbers and the judges of the first point."""
    if not isinstance(point, dict) or not {"n", "kl"} <= point.keys() or point.keys() != dict(first).keys():
        return False
    judges = [entry for name, entry in point.items() if name not in ("n", "kl")]
    if not all(isinstance(entry, dict) and {"value", "low", "high"} <= entry.keys() for entry in judges):
        return False
    numbers = [point["n"], point["kl"], *(entry[key] for entry in judges for key in ("value", "low", "high"))]
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) and point["kl"] >= 0


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
    if growing and (folder / "run.json").is_file():
        path = folder / "run.json"
        stage.begun = _json(path.read_text("utf-8", errors="replace"), str(path), "what a stage was started with")
    if (folder / "log.jsonl").is_file():
        stage.log = list(_lines(folder / "log.jsonl", growing=growing))
    if (folder / "rollouts.jsonl").is_file():
        stage.rollouts = _rollouts(folder / "rollouts.jsonl", growing=growing)
    stage.evals, stage.best_of = _evals(folder), _best_of(folder)
    return stage


def _find_parents(stages: list[Stage], run_dir: Path) -> None:
    """Fills `parents`: by the hash of the parent's stage.json, else by its path (then it has changed since)."""
    by_digest = {stage.digest: stage.name for stage in stages if stage.digest}
    by_path = {(run_dir / stage.name).resolve(): stage.name for stage in stages}
    for stage in stages:
        for role, parent in (stage.manifest or stage.begun).get("parents", {}).items():
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
        path = run_dir / "chain.json"
        chain = _json(path.read_text("utf-8"), str(path), "an object with stages")
    names = stages or chain.get("stages")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise UserError(f"{run_dir / 'chain.json'}: stages is {names!r}, expected a list of folder names")
    known = names or sorted(
        path.name for path in run_dir.iterdir() if (path / "stage.json").is_file() or (path / "log.jsonl").is_file()
    )
    if not known and (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: this is one stage; name the folder of its run, such as {run_dir.parent}")
    if not known:
        raise UserError(f"{run_dir}: no stage in it; expected folders with a stage.json, such as {run_dir / 'sft'}")
    found = [_read_stage(run_dir / name, chain.get("status", {}).get(name)) for name in known]
    _find_parents(found, run_dir)
    if names is None:
        order = figures.in_order({s.name: [p for _, p, _ in s.parents if p in known] for s in found})
        found.sort(key=lambda stage: order.index(stage.name))
    return chain, found
