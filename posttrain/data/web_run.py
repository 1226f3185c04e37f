"""Runs the phases of cleaning on datatrove's executors: local processes, Slurm or Ray.

In: phases, each a datatrove pipeline and its number of tasks, and the stage's folder. Out: every task completed, or a
UserError that names the log of one that failed. What a task has completed is not run again: datatrove marks it in
`datatrove/<phase>/completions`, after its output is closed. Output without that mark is written anew.
"""

import fcntl
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from posttrain.data.web_config import WebConfig
from posttrain.data.web_steps import die_with_parent
from posttrain.errors import UserError
from posttrain.lookup import nearest
from posttrain.progress import Progress

LOGS, LOCK, OUTPUT, JOB = "datatrove", "lock", "output.log", "slurm_job"
POLL_SECONDS = 1.0
# Imported once by the process that local workers are forked from, in place of once a worker and phase.
PRELOADED = ["posttrain.data.web_readers", "datatrove.pipeline.dedup", "spacy", "trafilatura", "fasttext"]
QUEUE_SECONDS = 30.0  # between two looks at Slurm's queue


@dataclass
class Phase:
    """A pipeline that runs as `tasks` tasks; `steps` names those of its steps that are counted, in order."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int
    steps: list[str]

    def logs(self, output_dir: Path) -> Path:
        return output_dir / LOGS / self.name


class Locked(PipelineStep):
    """First step of a local task: as long as its process lives, nobody else starts on this folder."""

    type, name = "🔒 - LOCK", "one run a folder"

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        if multiprocess.parent_process() is not None:
            die_with_parent()
        hold(self.path, shared=True)
        return data


HELD = {}  # path -> open file: a lock lasts as long as its file is open


def hold(path: Path, *, shared: bool) -> None:
    """Lock `path` for this process. UserError where another process holds it.

    A run that was killed can leave workers behind that go on writing: with this, the next run waits for no torn file.
    The locks are POSIX record locks, since those do not pass to forked processes.
    """
    if path not in HELD:  # closing any file of this name would end the lock
        HELD[path] = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.lockf(HELD[path], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"output_dir: {path.parent} is being written by another run, or by workers that a killed one left; wait "
            "until they have ended, or end them"
        ) from error


def run(phase: Phase, config: WebConfig, output_dir: Path) -> None:
    """Run what is left of a phase. UserError where a task failed, naming its log."""
    logs = phase.logs(output_dir)
    logs.mkdir(parents=True, exist_ok=True)
    executor = executor_of(phase, config, output_dir)
    progress = Progress(f"clean:{phase.name}", phase.tasks, "task", initial=_completed(logs))
    with progress, _watched(lambda: _completed(logs), progress), _stderr_to(output_dir / LOGS / OUTPUT):
        if config.executor == "slurm":
            _run_on_slurm(executor, phase, logs)
        else:
            executor.run()
    if _completed(logs) < phase.tasks:
        raise UserError(f"{phase.name}: {_failure(phase, logs)}")


def executor_of(phase: Phase, config: WebConfig, output_dir: Path):
    """datatrove's executor of a phase, with the keys the user gave for it."""
    logs = str(phase.logs(output_dir))
    if config.executor == "local":
        multiprocess.set_forkserver_preload(PRELOADED)
        pipeline = [Locked(output_dir / LOGS / LOCK), *phase.pipeline]
        return LocalPipelineExecutor(pipeline, tasks=phase.tasks, workers=config.workers, logging_dir=logs)
    cls = SlurmPipelineExecutor if config.executor == "slurm" else RayPipelineExecutor
    given = getattr(config, config.executor)
    own = {"self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
    known = set(inspect.signature(cls).parameters) - own
    for key in given:
        if key not in known:
            raise UserError(f"{config.executor}: does not take {key!r}{nearest(key, known)}")
    name = {"job_name": f"clean-{phase.name}"} if config.executor == "slurm" else {}
    return cls(phase.pipeline, tasks=phase.tasks, workers=config.workers, logging_dir=logs, **(name | given))


def _completed(logs: Path) -> int:
    folder = logs / "completions"
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


@contextmanager
def _watched(done: Callable[[], int], progress: Progress):
    """Shows tasks as they are completed, while the executor waits for them."""
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(POLL_SECONDS):
            progress.update(done() - progress.done)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.update(done() - progress.done)


@contextmanager
def _stderr_to(path: Path):
    """What datatrove, its workers and their libraries print goes to a file: it is a line a step and task."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def _failure(phase: Phase, logs: Path) -> str:
    """Which tasks did not complete, and the last error of the first of them."""
    done = {int(path.name) for path in (logs / "completions").glob("*")}
    missing = [rank for rank in range(phase.tasks) if rank not in done]
    log = logs / "logs" / f"task_{missing[0]:05d}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if "Error" in line or "Killed" in line]
    last = errors[-1][-300:] if errors else "no error in its log: it was ended from outside, or never began"
    return (
        f"{len(missing)} of {phase.tasks} tasks did not complete, the first is task {missing[0]}: {last} (see {log}); "
        "mend it and run the same command again: completed tasks are kept"
    )


def _run_on_slurm(executor: SlurmPipelineExecutor, phase: Phase, logs: Path) -> None:
    """Submit what is left, or find the jobs of an earlier run still in the queue, and stay until they have left it.

    UserError where Slurm refuses. Its number is kept: two arrays of the same tasks would write the same files.
    """
    job = logs / JOB
    try:
        if not (job.is_file() and _queued(job.read_text())):
            executor.run()
            if executor.job_id != -1:  # nothing was left to submit
                job.write_text(str(executor.job_id))
        while _completed(logs) < phase.tasks and _queued(job.read_text()):
            time.sleep(QUEUE_SECONDS)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise UserError(f"executor slurm: {error}; what Slurm said is in {logs.parent / OUTPUT}") from error
    if _completed(logs) < phase.tasks:
        time.sleep(QUEUE_SECONDS)  # a shared file system shows new files late


def _queued(job: str) -> bool:
    listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return bool(listed.stdout.strip())


def start_ray(config: WebConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("executor: ray is not installed: pip install 'posttrain[ray]', or take local or slurm")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
