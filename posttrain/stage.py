"""One stage: from a parsed config and its parents to a folder with a checkpoint and a manifest, or a clear refusal.

In: the recipe's dataclasses, its parents by role, its data. Out: `output_dir`, a plain Hugging Face checkpoint with
`stage.json`, which is written after it: a folder without it is not a finished stage. Then the model card, README.md,
and with `push_to_hub` the way to the Hub. Recipes call

    stage = start("sft", configs, parents={"policy": path}, data=[...])
    ... stage.log(step, loss=...); stage.save(step, write) when due; with stage.running(): ...
    stage.finish(write_model, metrics=...)
"""

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from posttrain import args, card, checkpoint, hub, trackers, yaml_file
from posttrain.args import arg
from posttrain.conditions import known
from posttrain.errors import UserError
from posttrain.licenses import known_license
from posttrain.manifests import RUN, STAGE, ask_hub, describe_parents, read_manifest
from posttrain.provenance import file_sha256s, git_commit, machine, versions

# Keys that change what is printed or kept, never what is computed: a resumed or finished stage may differ in them.
FREE_KEYS = {"output_dir", "resume", "overwrite", "logging_steps", "save_total_limit", "keep_checkpoints"}
FREE_KEYS |= {"report_to", "run_name", "tracker_project"}
FREE_KEYS |= {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "license"}
FREE_KEYS |= {"executor", "workers", "slurm", "ray"}  # where cleaning runs
FREE_KEYS |= {"shards_dir", "shard_workers"}  # where tokens are, and who makes them
WORKING = ("checkpoints", "tokens")  # folders that nobody needs once the stage has finished
CONFIG, LOG = "config.yaml", "log.jsonl"


@dataclass
class StageConfig:
    """Stage: where it writes, how it resumes"""

    output_dir: str = arg(help="folder of the finished stage: a Hugging Face checkpoint and stage.json")
    seed: int = arg(0, help="seed of initialisation, data order and sampling")
    resume: str = arg(
        "auto", help="auto: continue an unfinished run of the same config; must: fail if there is none; never"
    )
    overwrite: bool = arg(False, help="delete what an earlier run left in output_dir and start again")
    save_steps: int = arg(0, help="write a checkpoint to resume from every so many steps; 0 only when interrupted")
    save_total_limit: int = arg(1, help="how many complete checkpoints are kept while running")
    keep_checkpoints: bool = arg(False, help="keep checkpoints/ and tokens/ after the stage has finished")
    logging_steps: int = arg(10, help="a line in log.jsonl every so many steps")
    allow: list[str] = arg([], help="conditions of the gate that may pass; `posttrain inspect` names them")
    report_to: list[str] = arg(["none"], help="beside log.jsonl: none, or some of trackio, wandb, tensorboard")
    run_name: str | None = arg(None, help="the run's name in these trackers; none = from output_dir")
    tracker_project: str = arg("posttrain", help="the project's name in these trackers")
    push_to_hub: bool = arg(False, help="push the finished stage to the Hugging Face Hub; checked before training")
    hub_model_id: str | None = arg(None, help="user/name there; none = your name / the last two parts of output_dir")
    hub_private_repo: bool = arg(True, help="whether a repository that this makes can be seen by you alone")
    hub_token: str | None = arg(None, help="never given here: HF_TOKEN or `hf auth login` gives it")
    license: str | None = arg(None, help="the model's licence, as the Hub names it; none = its base model's")

    def __post_init__(self):
        if self.hub_token is not None:
            raise UserError(
                "hub_token: found a value, expected none: a config is stored in the stage's folder, token and all. "
                "Run `hf auth login` or set HF_TOKEN, and revoke a token that stood in a file"
            )
        known_license("license", self.license)
        trackers.chosen(self.report_to)
        if self.resume not in ("auto", "must", "never"):
            raise UserError(f"resume: found {self.resume!r}, expected auto, must or never")
        args.at_least(self, save_steps=0, save_total_limit=1, logging_steps=1)
        known(self.allow)


class Stage:
    """A running stage; made by `start`. `resume_folder` is the checkpoint to continue from, or None."""

    def __init__(self, name: str, config: dict, parents: dict, data: list[dict], main: bool):
        self.name, self.config, self.parents, self.data, self.main = name, config, parents, data, main
        self.output_dir = Path(config["output_dir"])
        self.resume_folder: Path | None = None
        self.started, self.elapsed_before = time.monotonic(), 0.0
        self.signal: int | None = None
        self.gate: dict | None = None  # what posttrain.gate checked, and what it found and was allowed to pass
        self.processes = ""  # how many there are, where, and how they share the model
        self.trackers: trackers.Trackers | None = None
        self.hub: hub.Target | None = None  # where it is pushed when it has finished
        self._several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._deferring, self._agreed = False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def elapsed(self) -> float:
        """Seconds spent on this stage, earlier interrupted runs included."""
        return self.elapsed_before + time.monotonic() - self.started

    def _on_signal(self, number, frame) -> None:
        self.signal = number  # a second signal during the save changes nothing: the save runs to its end
        if not self._deferring:
            raise SystemExit(128 + number)

    @contextmanager
    def running(self):
        """While training: SIGTERM and Ctrl-C are noted in `stopping` and the loop saves and leaves by itself."""
        self._deferring = True
        try:
            yield
            self._agree()
        finally:
            self._deferring = False
        if self.stopping:
            raise SystemExit(128 + (self.signal or signal.SIGTERM))

    @property
    def stopping(self) -> bool:
        """Whether a signal came: to any of several processes, when all of them last asked `due`."""
        return self._agreed or (self.signal is not None and not self._several)

    def _agree(self) -> None:
        if self._several:
            import accelerate
            import torch

            flag = torch.tensor([self.signal is not None], dtype=torch.int32, device=accelerate.PartialState().device)
            self._agreed = bool(accelerate.utils.gather(flag).any())

    def due(self, step: int, last: int) -> bool:
        """Whether a checkpoint belongs after `step` of `last`: every save_steps and after the last one, since what
        follows (evaluation) can be interrupted too; and when a signal came. Every process asks, and all get the same
        answer: one that left the loop alone would leave the others waiting for its gradients."""
        self._agree()
        every = self.config["save_steps"]
        return self.stopping or (every > 0 and (step % every == 0 or step == last))

    def log(self, step: int, **numbers: float) -> None:
        """One line of log.jsonl; `time` is in seconds since the stage began."""
        if self.main:
            line = {"step": step, "time": round(self.elapsed, 3), **numbers}
            with open(self.output_dir / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.trackers is not None:
                self.trackers.log(step, numbers)

    def note(self, text: str) -> None:
        """One plain line for the user, from the main process."""
        if self.main:
            print(f"{self.name}: {text}", flush=True)

    def append(self, name: str, rows: list[dict]) -> None:
        """Append rows to a JSONL file of the stage (rollouts.jsonl)."""
        if self.main:
            with open(self.output_dir / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def save(self, step: int, write, **facts) -> None:
        """Checkpoint `step`: `write(folder)` fills it; written beside, flushed, hashed, renamed."""
        if self.main:
            folder = self.output_dir / "checkpoints" / f"step-{step:08d}"
            facts = {"step": step, "elapsed": self.elapsed, **facts}
            checkpoint.save(folder, write, keep=self.config["save_total_limit"], **facts)

    def finish(self, write_model, *, metrics: dict, gains=(), samples=(), tokens: int = 0, **facts) -> None:
        """Write the model into output_dir and then the manifest; only the main process writes.

        `write_model(folder)` saves model and tokenizer. `metrics`: name -> {"value", "low", "high", "n"}.
        """
        if not self.main:
            return
        temporary, files = checkpoint.staging(self.output_dir, write_model)
        for name in files:
            (self.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, self.output_dir / name)
        shutil.rmtree(temporary)
        template = self.output_dir / "chat_template.jinja"
        hashes = file_sha256s(self.output_dir, ("tokenizer.json", template.name))
        manifest = {
            "format": 1,
            "stage": self.name,
            "status": "finished",
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seed": self.config["seed"],
            "parents": self.parents,
            "data": self.data,
            "tokenizer_sha256": hashes.get("tokenizer.json"),
            "chat_template_sha256": hashes.get(template.name),
            "config": self.config,
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": {**machine(), "processes": self.processes},
            "metrics": metrics,
            "gains": list(gains),
            "samples": list(samples),
            "gate": self.gate,
            "wall_time_s": round(self.elapsed, 1),
            "tokens": tokens,
            **facts,
            "files": files,
        }
        if self.trackers is not None:
            self.trackers.close()
        checkpoint.write_json(self.output_dir / STAGE, manifest)
        (self.output_dir / RUN).unlink(missing_ok=True)
        if not self.config["keep_checkpoints"]:
            for name in WORKING:
                shutil.rmtree(self.output_dir / name, ignore_errors=True)
        if {"tokenizer.json", "config.json", "model.safetensors"} & files.keys():  # else no model: cleaning
            card.write(self.output_dir)
        if self.hub is not None:
            hub.push_finished(self.output_dir, self.hub)


def start(name: str, configs, *, parents: dict[str, str], data: list[dict]) -> Stage:
    """Check the output folder and the parents, decide what to resume, seed everything.

    Exits 0 where the stage is finished already with this config. Raises UserError for a folder that is not ours,
    another config, an unfinished parent, a damaged checkpoint, or `resume: must` with nothing to resume.
    """
    import accelerate
    import transformers

    from posttrain import processes

    transformers.utils.logging.disable_progress_bar()  # loading and saving take a moment; training has a bar of ours
    process = processes.join()
    config = args.resolved(*configs)
    trackers.require_installed(trackers.chosen(config["report_to"]))
    described = ask_hub(describe_parents(parents), {config.get("model_name_or_path"): config.get("model_revision")})
    stage = Stage(name, config, described, data, process.is_main_process)
    stage.processes = processes.describe(process)
    for path in parents.values():
        checkpoint.verify(Path(path), (read_manifest(path) or {}).get("files", {}))
    found = _look(stage)
    if config["push_to_hub"] and stage.main:
        stage.hub = hub.prepare(config)  # no token, or no right to write: known now and not after the training
        stage.note(f"when finished it is pushed to {stage.hub}")
    process.wait_for_everyone()
    if found == "finished":
        if stage.main:
            print(f"{name}: {stage.output_dir} is finished already with this config (--overwrite true runs it again)")
            if stage.hub is not None:
                hub.push_finished(stage.output_dir, stage.hub)
        raise SystemExit(0)
    if found != "resume" and stage.main:
        _make_fresh(stage)
    process.wait_for_everyone()
    if found == "resume":
        _resume(stage)
    if stage.main and trackers.chosen(config["report_to"]):
        step = checkpoint.read_manifest(stage.resume_folder)["step"] if stage.resume_folder else 0
        stage.trackers = trackers.Trackers(config, stage.output_dir, name, step)
    stage.note(stage.processes)
    accelerate.utils.set_seed(config["seed"])
    return stage


def accelerator(bf16: bool):
    """Accelerate's view of this run: device, processes, mixed precision. UserError where its file wants another."""
    import accelerate

    precision, wanted = "bf16" if bf16 else "no", os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", precision):
        raise UserError(
            f"mixed_precision: Accelerate's file says {wanted}, the recipe bf16: {bf16}; the recipe decides"
        )
    return accelerate.Accelerator(mixed_precision=precision)


def differences(old: dict, new: dict) -> list[str]:
    """`key: old -> new` for every key that matters to the result."""
    keys = sorted((set(old) | set(new)) - FREE_KEYS)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _look(stage: Stage) -> str:
    """What output_dir holds: "fresh", "finished" (same config) or "resume"; UserError where it may not be used."""
    folder, config = stage.output_dir, stage.config
    if folder.is_symlink():
        raise UserError(f"output_dir: {folder} is a symbolic link; name the folder itself")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output_dir: {there} is a file; name a folder")
    mine = [mark for mark in (STAGE, RUN) if (folder / mark).is_file()]
    if folder.is_dir() and any(folder.iterdir()) and not mine:
        raise UserError(f"output_dir: {folder} holds files that are not a stage of posttrain; name an empty folder")
    if config["overwrite"] or not mine:
        if config["resume"] == "must":
            raise UserError(f"resume: must, but {folder} has no unfinished run to resume")
        return "fresh"
    before = read_manifest(folder) if STAGE in mine else _read_run(folder / RUN)
    if before["stage"] != stage.name:
        raise UserError(f"output_dir: {folder} holds a {before['stage']} stage, this is {stage.name}; name another")
    changed = differences(before["config"], config) + _changed_inputs(before, stage)
    if STAGE in mine:
        if changed:
            raise UserError(
                f"{folder} holds a finished {before['stage']} stage of another config:\n  "
                + "\n  ".join(changed)
                + "\nadd --overwrite true to run it again, or name another --output_dir"
            )
        return "finished"
    if config["resume"] == "never" or not checkpoint.complete(folder / "checkpoints"):
        if config["resume"] == "must":
            raise UserError(f"resume: must, but {folder} has no complete checkpoint")
        return "fresh"
    if changed:
        raise UserError(
            f"{folder} holds an unfinished run of another config; it cannot be continued with this one:\n  "
            + "\n  ".join(changed)
            + "\nrestore the config, or add --overwrite true to start again"
        )
    return "resume"


def _read_run(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): start again with --overwrite true") from error


def _changed_inputs(before: dict, stage: Stage) -> list[str]:
    """Parents and data that differ from those the earlier run was started with."""
    roles = sorted(set(before["parents"]) | set(stage.parents))
    pairs = [(f"parent {role}", before["parents"].get(role), stage.parents.get(role)) for role in roles]
    pairs = [(name, old and old["sha256"], new and new["sha256"]) for name, old, new in pairs]
    pairs.append(("data", [d["sha256"] for d in before["data"]], [d["sha256"] for d in stage.data]))
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _make_fresh(stage: Stage) -> None:
    """Empty the folder of what an earlier run left (it is a stage of ours: `_look` has seen to that), mark the run."""
    folder = stage.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    # In this order a kill in between leaves no old checkpoint to the new run, no finished stage without its model, and
    # always a folder that is known as ours.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    run = {"stage": stage.name, "config": stage.config, "parents": stage.parents, "data": stage.data}
    checkpoint.write_json(folder / RUN, run)
    (folder / STAGE).unlink(missing_ok=True)
    for path in set(folder.iterdir()) - {folder / RUN}:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / CONFIG).write_text(yaml_file.dump(stage.config), encoding="utf-8")


def _resume(stage: Stage) -> None:
    """Take the last complete checkpoint and drop what was logged after it."""
    stage.resume_folder = checkpoint.last_complete(stage.output_dir / "checkpoints")
    manifest = checkpoint.read_manifest(stage.resume_folder)
    stage.elapsed_before = manifest["elapsed"]
    if stage.main:
        for name in (LOG, "rollouts.jsonl", "samples.jsonl"):
            file = stage.output_dir / name
            if file.is_file():
                lines = file.read_bytes().splitlines(keepends=True)  # str.splitlines also cuts at U+2028 and others
                whole = [line for line in lines if line.endswith(b"\n")]
                file.write_bytes(b"".join(line for line in whole if json.loads(line)["step"] <= manifest["step"]))
        print(f"{stage.name}: resuming {stage.output_dir} at step {manifest['step']}", flush=True)
