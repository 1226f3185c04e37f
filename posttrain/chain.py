"""Run a chain: a folder of stage YAMLs, in order, each recipe under `accelerate launch`.

In: a folder with `chain.yaml` ({"out": "runs/tiny", "stages": ["tokenizer", ...]}) and one `<stage>.yaml` each; the
recipe of stage X is X.py beside that folder. Out: `<out>/<stage>/`, `<out>/logs/<stage>.log`, `<out>/chain.json`,
`<out>/report.html`, the gains as a table. To run it: `posttrain run recipes/tiny`; to check it only: `--dry-run`.

A finished stage whose config and parents are what they were is skipped; a changed one and all after it run again; an
unfinished one is continued by its recipe.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from posttrain import args, checkpoint, launch, report, stage, yaml_file
from posttrain.environment import usable_cores
from posttrain.errors import UserError
from posttrain.lookup import nearest
from posttrain.progress import clock


@dataclass
class Planned:
    """One stage as it will be run."""

    name: str
    recipe: Path
    argv: list[str]  # the recipe's arguments
    module: ModuleType  # the recipe, imported
    config: dict  # resolved

    @property
    def output_dir(self) -> Path:
        return Path(self.config["output_dir"])


def run(
    folder: str | Path,
    out: str | Path | None = None,
    start_from: str | None = None,
    only: str | None = None,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    debug: bool = False,
    accelerate_config: str | Path | None = None,
) -> int:
    """Run the chain in `folder`; returns the exit code.

    out: where the stages go, in place of the chain's own `out`. start_from: this stage and all after it run, finished
    or not. only: this stage runs, finished or not, and no other. overrides: `key=value` for every stage that has the
    key, `stage.key=value` for one. dry_run: parse and check every stage, train nothing.
    Raises UserError for a chain, stage, key or value that is wrong, before any stage is started.
    """
    began = time.monotonic()
    folder = Path(folder)
    default_out, names = read_chain(folder)
    out = os.path.normpath(out if out is not None else default_out)
    selected = select(names, start_from, only)
    if accelerate_config is not None and not Path(accelerate_config).is_file():
        raise UserError(f"--accelerate_config: no file {accelerate_config}; `accelerate config` writes one")
    stages = plan(folder, selected, default_out, out, overrides)
    if dry_run:
        return check(stages, began)
    Path(out).mkdir(parents=True, exist_ok=True)
    record = {"name": folder.resolve().name, "stages": names, "started": now(), "status": {}}
    command = launch.launcher(accelerate_config, usable_cores())
    code = run_stages(
        stages, Path(out), record, command, asked=start_from is not None or only is not None, debug=debug
    )
    if code == 0:
        show_result(Path(out), names, time.monotonic() - began)
    return code


# ---- reading the chain ----------------------------------------------------------------------------------------------


def read_chain(folder: Path) -> tuple[str, list[str]]:
    """chain.yaml as (out, stage names). UserError where it, a stage's YAML or a recipe is missing or wrong."""
    file = folder / "chain.yaml"
    if not file.is_file():
        raise UserError(f"{file}: no such file; a chain is a folder with chain.yaml (out, stages) and a YAML a stage")
    entries = yaml_file.read(file)
    for key, entry in entries.items():
        if key not in ("out", "stages"):
            raise UserError(f"{file}:{entry.line}: unknown key {key!r}; expected out and stages")
    out, names = (entries[key].value if key in entries else None for key in ("out", "stages"))
    if not isinstance(out, str) or not out:
        raise UserError(
            f"{file}: out: found {out!r}, expected the folder of the results, e.g. out: runs/{folder.name}"
        )
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: stages: found {names!r}, expected a list of names, e.g. stages: [sft, reward, ppo]")
    if len(set(names)) < len(names):
        raise UserError(f"{file}: stages: a name comes twice in {names}; each stage has one YAML and one folder")
    for name in names:
        for path in (folder / f"{name}.yaml", recipe_path(folder, name)):
            if not path.is_file():
                have = [each.stem for each in path.parent.glob(f"*{path.suffix}") if each.stem != "chain"]
                raise UserError(f"{file}: stage {name!r}: no file {path}{nearest(name, have)}")
    return os.path.normpath(out), names


def recipe_path(folder: Path, name: str) -> Path:
    """The recipe beside the chain's folder; `..` and not `parent`, for the folder may be given as `.`."""
    return Path(os.path.normpath(folder / ".." / f"{name}.py"))


def select(names: list[str], start_from: str | None, only: str | None) -> list[str]:
    """The stages to look at, in order."""
    if start_from is not None and only is not None:
        raise UserError("--from and --only exclude each other: give one of them")
    for flag, name in (("--from", start_from), ("--only", only)):
        if name is not None and name not in names:
            raise UserError(f"{flag}: {name!r} is none of the stages {', '.join(names)}{nearest(name, names)}")
    if only is not None:
        return [only]
    return names[names.index(start_from) :] if start_from is not None else names


# ---- each stage's arguments and config ------------------------------------------------------------------------------


def plan(folder: Path, names: list[str], default_out: str, out: str, overrides: Sequence[str]) -> list[Planned]:
    """Every stage with its arguments, its recipe imported and its config resolved: a wrong key stops it all here."""
    modules = {name: import_recipe(recipe_path(folder, name)) for name in names}
    keys = {
        name: {field.name for cls in module.ARGS for field in dataclasses.fields(cls)}
        for name, module in modules.items()
    }
    extra = assign_overrides(overrides, keys)
    stages = []
    for name, module in modules.items():
        file = folder / f"{name}.yaml"
        yaml = {key: entry.value for key, entry in yaml_file.read(file).items()}
        argv = ["--config", str(file), *moved_flags(yaml, default_out, out), *extra[name]]
        config = args.resolved(*args.parse(module.ARGS, argv, description=f"stage {name}"))
        found, expected = config.get("output_dir"), os.path.join(out, name)
        if found is None or os.path.normpath(found) != expected:
            raise UserError(f"{file}: output_dir: found {found}, but this chain keeps stage {name} in {expected}")
        stages.append(Planned(name, recipe_path(folder, name), argv, module, config))
    return stages


def import_recipe(path: Path) -> ModuleType:
    """The recipe as a module, from its path: recipes are scripts to copy, not a package."""
    name = f"_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


def moved_flags(config: dict, old: str, new: str) -> list[str]:
    """Flags that put `new` in place of the leading folder `old` in every string of a stage's YAML that has it."""
    if old == new:
        return []
    moved = {key: move(value, old, new) for key, value in config.items()}
    return [word for key, value in moved.items() if value != config[key] for word in flag(key, value)]


def move(value, old: str, new: str):
    """`value` with `new` for `old` wherever a string in it is that folder or lies in it."""
    if isinstance(value, dict):
        return {key: move(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [move(each, old, new) for each in value]
    if isinstance(value, str) and (value == old or value.startswith(old + "/")):
        return new + value[len(old) :]
    return value


def flag(key: str, value) -> list[str]:
    """A key and a value as command-line words that the parser reads back as that value."""
    if isinstance(value, list):
        return [f"--{key}", *([_word(each) for each in value] or ["[]"])]
    word = _word(value)
    return [f"--{key}={word}"] if word.startswith("-") else [f"--{key}", word]


def _word(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def assign_overrides(overrides: Sequence[str], keys: dict[str, set[str]]) -> dict[str, list[str]]:
    """Stage -> flags for the `key=value` and `stage.key=value` of --set. keys: stage -> the keys its recipe has."""
    extra: dict[str, list[str]] = {name: [] for name in keys}
    for override in overrides:
        left, equals, text = override.partition("=")
        only, dot, key = left.rpartition(".")
        key = key.replace("-", "_")
        if not equals or not key:
            raise UserError(
                f"--set {override}: expected key=value or stage.key=value, e.g. --set sft.learning_rate=1e-3"
            )
        if dot and only not in keys:
            raise UserError(
                f"--set {left}: {only!r} is none of the stages {', '.join(keys)}{nearest(only, list(keys))}"
            )
        stages = [name for name in ([only] if dot else keys) if key in keys[name]]
        if not stages:
            known = set().union(*(keys[name] for name in ([only] if dot else keys)))
            where = f"stage {only} has no such key" if dot else "no stage to run has this key"
            raise UserError(f"--set {left}: {where}{nearest(key, sorted(known))}")
        value = yaml_file.parse(text) if text.startswith("[") else text
        for name in stages:
            extra[name] += flag(key, value)
    return extra


# ---- what has to run ------------------------------------------------------------------------------------------------


def reason_to_run(planned: Planned, *, earlier_ran: bool, asked: bool) -> tuple[str | None, bool]:
    """(why the stage runs, or None if it need not; whether what stands in its folder is to be overwritten)."""
    finished = stage.read_manifest(planned.output_dir)
    unfinished = planned.output_dir / stage.RUN
    if finished is None and not unfinished.is_file():
        return "runs", False
    before = finished or json.loads(unfinished.read_text(encoding="utf-8"))
    changed = changes(before, planned)
    if changed:
        return f"{'' if finished else 'unfinished, and '}{changed}, runs again", True
    if earlier_ran:
        return "an earlier stage has run, runs again", True
    if finished is None:
        return "unfinished, goes on", False
    return ("asked for, runs again", True) if asked else (None, False)


def changes(before: dict, planned: Planned) -> str:
    """What differs between a stage as it was run and as it is planned, in words; empty where nothing does.

    The same chain in another place, or by an absolute path, is the same: both folders are named alike first.
    """
    old_out, new_out = (os.path.dirname(config["output_dir"]) for config in (before["config"], planned.config))
    differ = stage.differences(move(before["config"], old_out, "OUT"), move(planned.config, new_out, "OUT"))
    if differ:
        return f"config changed ({', '.join(differ)})"
    for role, parent in before["parents"].items():
        path = Path(move(parent["path"], old_out, new_out))
        manifest = path / stage.STAGE
        digest = checkpoint.sha256_file(manifest) if manifest.is_file() else None
        if digest != parent["sha256"]:
            return f"{role} {path} changed"
    return ""


def check(stages: list[Planned], began: float) -> int:
    """--dry-run: each recipe checks its config, data and parents; returns 2 if one refuses, else 0."""
    written: set[str] = set()
    failed = 0
    width = max(len(each.name) for each in stages)
    for each in stages:
        start = time.monotonic()
        try:
            each.module.check(each.argv, planned=written)
            said = "ok"
        except UserError as error:
            failed += 1
            said = f"error: {error}"
        written.add(each.config["output_dir"])
        print(f"{each.name:{width}}  {said}  ({time.monotonic() - start:.1f} s)", flush=True)
    print(
        f"{len(stages) - failed} of {len(stages)} stages ok in {time.monotonic() - began:.1f} s; nothing was trained"
    )
    return 2 if failed else 0


# ---- running --------------------------------------------------------------------------------------------------------


def run_stages(
    stages: list[Planned], out: Path, record: dict, launcher: list[str], *, asked: bool, debug: bool
) -> int:
    """Run what has to run, one stage after the other; returns 0, or the exit code of what stopped it.

    record: what chain.json says; its `status` (stage -> running | failed) is kept up to date for the report.
    asked: the user named these stages, so they run even if they are finished.
    """
    ran = False
    for number, each in enumerate(stages, 1):
        reason, overwrite = reason_to_run(each, earlier_ran=ran, asked=asked)
        print(f"[{number}/{len(stages)}] {each.name}: {reason or 'finished, unchanged: skipped'}", flush=True)
        if reason is None:
            continue
        argv = [*each.argv, "--overwrite", "true"] if overwrite else each.argv
        command = [*launcher, str(each.recipe), *argv]
        record["status"] = {each.name: "running"}
        checkpoint.write_json(out / "chain.json", record)
        try:
            code = run_one(each, command, out / "logs" / f"{each.name}.log", debug)
        except launch.Stopped as stopped:
            print(
                f"{each.name}: stopped by {stopped}; the same command goes on from here", file=sys.stderr, flush=True
            )
            record["status"], code = {}, stopped.code
        else:
            record["status"] = {each.name: "failed"} if code else {}
        checkpoint.write_json(out / "chain.json", record)
        if code:
            return code
        ran = True
    checkpoint.write_json(out / "chain.json", record)
    return 0


def run_one(planned: Planned, command: list[str], log: Path, debug: bool) -> int:
    """Run one stage and say how it ended; returns its exit code. Raises launch.Stopped."""
    start = time.monotonic()
    code, tail = launch.run_stage(command, log, debug=debug)
    if code == 0 and stage.read_manifest(planned.output_dir) is None:
        tail.append(f"(the recipe ended without writing {planned.output_dir / stage.STAGE})")
        code = 1
    if code == 0:
        print(f"{planned.name}: finished in {clock(time.monotonic() - start)}", flush=True)
        return 0
    print(f"\n{planned.name} failed with exit code {code}. The last lines of {log}:", file=sys.stderr)
    print(*(f"  {line}" for line in tail), sep="\n", file=sys.stderr)
    print(f"To try this stage alone:\n  {shlex.join(command)}", file=sys.stderr, flush=True)
    return code if code > 0 else 1  # below 0: the launcher was killed by that signal


def now() -> str:
    """The time as chain.json has it, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def show_result(out: Path, names: list[str], seconds: float) -> None:
    """The gains, the report, how to chat with the last language model, the time."""
    path = report.write_report(out)
    print(f"\n{report.gains_table(out)}\n\nreport  {path}")
    models = [out / name for name in names if is_causal_lm(out / name)]
    if models:
        print(f"chat    {posttrain_command()} chat {shlex.quote(str(models[-1]))}")
        print(f"board   {posttrain_command()} board {shlex.quote(str(out))}   (the same and more in the browser)")
    print(f"time    {clock(seconds)}", flush=True)


def is_causal_lm(folder: Path) -> bool:
    """Whether a folder is a finished stage that holds a language model, not a tokenizer or a reward model."""
    config = folder / "config.json"
    if not config.is_file() or stage.read_manifest(folder) is None:
        return False
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    return any(each.endswith("ForCausalLM") for each in architectures)


def posttrain_command() -> str:
    """How to call this program from the shell it was called from, in an activated environment or not."""
    beside = Path(sys.executable).with_name("posttrain")
    return "posttrain" if shutil.which("posttrain") == str(beside) else os.path.relpath(beside)
