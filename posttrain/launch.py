"""One stage as a process: under `accelerate launch`, its output on the terminal and in a log, signals passed on.

In: the recipe's command line. Out: its exit code, `<out>/logs/<stage>.log`, and the last lines of it for a failure.

The launcher (read in Accelerate 1.15) neither passes SIGTERM on nor waits for the recipe to save: it dies and leaves
the recipe behind. So launcher and recipe share a process group that gets the signal as a whole, and a stage has ended
when the last process of it has closed the output, not when the launcher is gone.
"""

import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain.progress import LINE_SECONDS, is_progress

TAIL_LINES = 20  # of the log, shown when a stage fails
STRAY_SECONDS = 10.0  # what a helper process may outlive the launcher by, before it is killed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The user or the system stopped the stage; `code` is the exit code that says so: 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


def launcher(accelerate_config: Path | None, cores: int) -> list[str]:
    """The command before the recipe's path: a user's Accelerate file, else every GPU there is, else one CPU process.

    cores: CPU cores this process may use; Accelerate's own count ignores affinity and containers.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if accelerate_config is not None:
        return [*command, "--config_file", str(accelerate_config)]
    import torch

    gpus = torch.cuda.device_count()
    processes = ["--num_processes", str(max(gpus, 1)), "--num_machines", "1"]
    if gpus > 1:
        processes += ["--main_process_port", "0"]  # 0: any free port, so that two runs on one machine do not meet
    else:
        # It keeps the launcher's traceback off the end of the log, where the recipe's own error stands.
        processes += ["--quiet"]
    if gpus == 0:
        threads = os.environ.get("OMP_NUM_THREADS") or str(cores)
        processes += ["--cpu", "--num_cpu_threads_per_process", threads]
    return [*command, *processes, "--mixed_precision", "no", "--dynamo_backend", "no"]


class Output:
    """Shows a stage's lines and keeps them: all in the log but progress lines, of which one in LINE_SECONDS."""

    def __init__(self, log):
        self._log = log
        self._live = sys.stdout.isatty()
        self._progress_shown = False
        self._progress_logged = -LINE_SECONDS
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def line(self, line: str) -> None:
        """Take one line without its line end."""
        progress = is_progress(line)
        now = time.monotonic()
        if not progress or now - self._progress_logged >= LINE_SECONDS * 0.9:
            self._log.write(line + "\n")
            self._log.flush()
            self.tail.append(line)
            self._progress_logged = now if progress else self._progress_logged
        if progress and self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line[:width]}", end="", flush=True)
            self._progress_shown = True
        else:
            self.end_progress()
            print(line, flush=True)

    def end_progress(self) -> None:
        """Leave the line that is redrawn in place, so that what follows does not overwrite it."""
        if self._progress_shown:
            print(flush=True)
            self._progress_shown = False


def run_stage(command: list[str], log_file: Path, *, debug: bool = False) -> tuple[int, list[str]]:
    """Run one stage to its end; returns its exit code and the last lines of its log.

    Raises Stopped when a signal came: the stage got it too and has ended. A third signal kills it.
    """
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if sys.stdout.isatty():
        env["POSTTRAIN_PROGRESS"] = "chain"
    if debug:
        env["POSTTRAIN_DEBUG"] = "1"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        output = Output(log)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        with passing_signals(process) as received:
            try:
                for line in read_lines(process, received):
                    output.line(line)
            except BaseException:  # e.g. the log's disk is full: the stage must not go on unseen
                kill_group(process, signal.SIGTERM)
                raise
            finally:
                output.end_progress()
                code = process.wait()
    if received:
        raise Stopped(received[0])
    return code, list(output.tail)


@contextmanager
def passing_signals(process: subprocess.Popen):
    """Pass SIGINT, SIGTERM and SIGHUP on to the stage's process group; yields the list of those that came."""
    received: list[int] = []

    def pass_on(signum, _frame):
        received.append(signum)
        # The recipes save on SIGINT and SIGTERM; a closed terminal should make them save as well.
        forwarded = signal.SIGTERM if signum == signal.SIGHUP else signum
        kill_group(process, signal.SIGKILL if len(received) > 2 else forwarded)

    # A signal that is ignored on purpose (nohup, a background job of a script) stays ignored.
    taken = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
    previous = {each: signal.signal(each, pass_on) for each in taken}
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def kill_group(process: subprocess.Popen, signum: int) -> None:
    """Send a signal to all processes of the stage; none left is fine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def read_lines(process: subprocess.Popen, received: list[int]):
    """The stage's output, line by line until its last process has closed it; of `a\\rb` (a bar) only `b` counts.

    Processes that outlive a launcher which was not stopped by a signal are killed after STRAY_SECONDS.
    """
    rest, ended = b"", None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.5):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                yield from map(_text, lines)
            elif process.poll() is not None and not received:
                ended = ended or time.monotonic()
                if time.monotonic() - ended > STRAY_SECONDS:
                    kill_group(process, signal.SIGKILL)
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
