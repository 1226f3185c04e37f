"""Runs in sandboxes: a program against its tests, a script. In: source text and limits. Out: `Verdict`, `Output`.

As many at a time as there are cores; further callers wait. Every sandbox is gone when a function returns, by whatever
way: time-out, too much output, Ctrl-C.
"""

import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache

from posttrain.errors import UserError
from posttrain.sandbox import wire
from posttrain.sandbox.host import Broken, Limits, server

CORES = len(os.sched_getaffinity(0))
_places = threading.BoundedSemaphore(CORES)


@dataclass(frozen=True)
class Verdict:
    """Of `run_tests`. `share`: of the assert statements that held, where each was to be counted; else 1 or 0."""

    passed: bool
    reason: str
    output: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Output:
    """Of `run_python`. `reason` is "" where the script ended with status 0."""

    stdout: str
    stderr: str
    reason: str


def run_tests(
    program: str,
    tests: str,
    entry_point: str | None = None,
    limits: Limits | None = None,
    *,
    helpers: str = "",
    every_assert: bool = False,
) -> Verdict:
    """Whether `tests` run to their end when the names they call are those of `program`.

    Program and tests run in two sandboxes that share one socket. Each call's arguments and result cross it as plain
    values; comparing anything else fails, and so do tests that never call the program.

    Args:
        program: untrusted Python, executed as a module named "solution".
        tests: Python that raises where the program is wrong; trusted, run as "__main__".
        entry_point: the one name of the program that the tests see; None: all that they use and do not define.
        helpers: trusted Python executed before the tests, for the functions that they take from a problem's statement.
        every_assert: go on after an assert statement that fails, for `Verdict.share`.

    Raises:
        UserError: where this machine cannot isolate.
    """
    job = {"program": program, "tests": tests, "entry_point": entry_point, "helpers": helpers}
    return _twice(_run_tests, {**job, "every_assert": every_assert}, limits or Limits())


def run_python(code: str, limits: Limits | None = None) -> Output:
    """What a script prints; the value of its last line, too, where that is an expression. UserError as `run_tests`."""
    return _twice(_run_python, code, limits or Limits())


@lru_cache(maxsize=1)
def sandbox_obstacle() -> str | None:
    """Why untrusted code cannot be isolated on this machine; None where it can. Found by running a program, once."""
    try:
        found = run_python("import os\nprint(os.getpid(), os.listdir('/tmp'))", Limits(seconds=30))
    except UserError as error:
        return str(error)
    return None if found.stdout == "1 []\n" else f"a trial program in a sandbox did not run: {found}"


def _twice(run, *arguments):
    """Run; once more where the zygote died meanwhile (the kernel takes it first where memory runs out)."""
    with _places:
        try:
            return run(*arguments)
        except Broken:
            try:
                return run(*arguments)
            except Broken as error:
                raise UserError(f"untrusted code cannot be isolated here: {error}") from error


def _run_tests(job: dict, limits: Limits) -> Verdict:
    start, nonce = time.monotonic(), secrets.token_hex(16)
    with _Watch(limits) as watch:
        output, talk, (checker_end, program_end) = watch.pipe(), watch.talk(), watch.pair()
        served = watch.spawn("serve", [output, output, program_end])
        checked = watch.spawn("check", [output, output, talk, checker_end])
        watch.say(job | {"nonce": nonce})
        watch.attend(until=checked)
        verdict = watch.heard or {"nonce": nonce, "passed": False, "share": 0.0, "reason": "no verdict"}
        if verdict["nonce"] != nonce:
            verdict = verdict | {"passed": False, "share": 0.0, "reason": "a verdict without the nonce"}
        reason = watch.broken_limit or verdict["reason"]
        if not watch.broken_limit and reason.startswith("the program ended"):
            reason += f": {watch.end_of(served)}"
        whole = not watch.broken_limit
    text = watch.outputs[0].decode(errors="replace")
    share = verdict["share"] if whole else 0.0
    return Verdict(verdict["passed"] and whole, reason, text, time.monotonic() - start, share)


def _run_python(code: str, limits: Limits) -> Output:
    with _Watch(limits) as watch:
        output, errors, talk = watch.pipe(), watch.pipe(), watch.talk()
        script = watch.spawn("script", [output, errors, talk])
        watch.say({"code": code})
        watch.attend(until=script)
        end = watch.end_of(script)
        reason = watch.broken_limit or ("" if end == "exit status 0" else end)
        watch.drain()
    out, err = (text.decode(errors="replace") for text in watch.outputs)
    return Output(out, err, reason)


@dataclass
class _Watch:
    """The trainer's ends of one run's descriptors; what came out of them. Leaving the context ends its sandboxes."""

    limits: Limits
    broken_limit: str | None = None
    heard: dict | None = None  # on `talk`, from the checker
    outputs: list[bytearray] = field(default_factory=list)
    reports: dict[socket.socket, dict] = field(default_factory=dict)

    def __enter__(self) -> "_Watch":
        self.deadline = time.monotonic() + self.limits.seconds
        self._stack, self._theirs, self._pipes, self._talk, self._controls = ExitStack(), [], {}, None, []
        return self

    def __exit__(self, *error) -> None:
        with self._stack:
            self._close_theirs()
            for control in self._controls:
                control.shutdown(socket.SHUT_WR)
            for control in self._controls:
                if "status" in self._last_word(control):
                    control.recv(1)  # returns when the supervisor, too, has ended

    def pipe(self) -> int:
        """A new output; its end for sandboxes."""
        mine, theirs = os.pipe()
        self._stack.callback(os.close, mine)
        self._theirs.append(theirs)
        self._pipes[mine] = bytearray()
        self.outputs.append(self._pipes[mine])
        return theirs

    def pair(self) -> tuple[int, int]:
        ends = tuple(end.detach() for end in socket.socketpair())
        self._theirs += ends
        return ends

    def talk(self) -> int:
        """The socket of `say` and `heard`; its end for a sandbox."""
        self._talk, theirs = self.pair()
        self._theirs.remove(self._talk)
        self._stack.callback(os.close, self._talk)
        return theirs

    def spawn(self, role: str, fds: list[int]) -> socket.socket:
        control = server().spawn(role, self.limits, fds)
        control.settimeout(self.limits.seconds + 30)
        self._stack.enter_context(control)
        self._controls.append(control)
        return control

    def say(self, message: dict) -> None:
        """To the sandbox behind `talk`, which may be dead by now: then its end is what is heard."""
        self._close_theirs()
        try:
            wire.send(self._talk, message)
        except (BrokenPipeError, ConnectionResetError):
            return

    def attend(self, until: socket.socket) -> None:
        """Read outputs until the verdict, the end of the sandbox `until`, the deadline, or too much output."""
        poll = select.poll()
        for fd in (*self._pipes, *self._controls, *([self._talk] if self._talk is not None else [])):
            poll.register(fd, select.POLLIN)
        by_number = {control.fileno(): control for control in self._controls}
        while not self.broken_limit and self.heard is None and until not in self.reports:
            ready = poll.poll(max(0.0, 1000 * (self.deadline - time.monotonic())))
            if not ready:
                self.broken_limit = f"time-out after {self.limits.seconds:g} s"
            for fd, _ in sorted(ready, key=lambda item: item[0] in by_number):  # what they said before their end
                if fd in self._pipes and not self._read(fd):
                    poll.unregister(fd)
                elif fd == self._talk:
                    poll.unregister(fd)
                    self._hear()
                elif fd in by_number:
                    poll.unregister(fd)
                    self._report(by_number[fd])

    def drain(self) -> None:
        """What is left in the pipes of a sandbox that has ended."""
        for fd in self._pipes:
            while not self.broken_limit and self._read(fd):
                pass

    def end_of(self, control: socket.socket) -> str:
        """How process 1 ended, in words; it is killed if it has not."""
        if control not in self.reports:
            poll = select.poll()
            poll.register(control, select.POLLIN)
            if not poll.poll(100):  # a descriptor of a dying process closes a moment before it is reaped
                control.shutdown(socket.SHUT_WR)
        status = self._report(control)["status"]
        if status == -signal.SIGKILL:
            return "killed: CPU time or memory"
        return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"

    def _read(self, fd: int) -> bool:
        part = os.read(fd, 2**16)
        room = self.limits.output_kb * 1024 - len(self._pipes[fd])
        self._pipes[fd] += part[:room]
        if len(part) > room:
            self.broken_limit = f"more than {self.limits.output_kb} KB of output"
        return bool(part)

    def _hear(self) -> None:
        try:
            self.heard = wire.receive(self._talk)
        except (EOFError, ConnectionResetError):
            return

    def _report(self, control: socket.socket) -> dict:
        """How a sandbox ended. Broken where it could not be made."""
        said = self._last_word(control)
        if "error" in said:
            raise Broken(said["error"])
        return said

    def _last_word(self, control: socket.socket) -> dict:
        """Of the supervisor; it comes when everything in its sandbox is dead."""
        if control not in self.reports:
            try:
                self.reports[control] = json.loads(control.recv(2**16) or b'{"error": "the supervisor died"}')
            except (TimeoutError, ConnectionResetError) as error:
                self.reports[control] = {"error": f"the supervisor does not answer: {error}"}
        return self.reports[control]

    def _close_theirs(self) -> None:
        while self._theirs:
            os.close(self._theirs.pop())
