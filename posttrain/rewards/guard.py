"""Run a function where it can be stopped: in a process of its own, or in a thread that nobody waits for.

In: a function, its arguments and a number of seconds. Out: what it returns, or `TimedOut`, `RemoteError`.
A `Pool` keeps its processes for the next call. It works from any thread, has no signals, does not import the main
script again (as spawn does) and copies no locks and no CUDA state (as fork does). A process that overruns is killed;
all end with this one, also where this one is killed: they read end of file, and while they work an alarm clock runs.

    pool = Pool()
    pool.call(function, (1, 2), {"key": 3}, seconds=10)
"""

import atexit
import contextvars
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import types
import weakref
from functools import partial
from multiprocessing.connection import Connection

START_SECONDS = 120  # a new process imports this package; a busy machine takes its time
GRACE_SECONDS = 5  # a process whose parent is gone ends so long after its time at the latest
SERVE = "import sys; from posttrain.rewards.guard import serve; serve(int(sys.argv[1]))"


class TimedOut(Exception):
    """The function took longer than it was given."""


class RemoteError(Exception):
    """The function raised in its process, or ended it. `kind` is the exception's class by name."""

    def __init__(self, kind: str, text: str, where: str = ""):
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind, self.text, self.where = kind, text, where


def _paths() -> list[str]:
    """Where this process finds modules now; "" is the working directory."""
    return [os.path.abspath(path) for path in sys.path]


class Worker:
    """One process and the pipe to it; `prepare` runs in it first."""

    def __init__(self, prepare=None):
        ours, theirs = multiprocessing.Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths())},
            start_new_session=True,  # so that what it starts is killed with it
        )
        theirs.close()
        self.pipe = ours
        try:
            self.call(pickle.dumps((prepare or str, (), {})), START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def call(self, task: bytes, seconds: float):
        """The task's answer. Raises TimedOut, RemoteError, or EOFError, OSError where the process has ended."""
        self.pipe.send((_paths(), task, seconds + GRACE_SECONDS))
        if not self.pipe.poll(seconds):
            raise TimedOut
        answer = self.pipe.recv()
        if answer[0] == "returned":
            return answer[1]
        raise RemoteError(*answer[1:])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()


class Pool:
    """As many processes as there are calls at one time, kept until this process ends. `prepare`, a function without
    arguments, is the first that each of them runs; it is not counted in the seconds of a call."""

    def __init__(self, prepare=None):
        self.prepare = prepare
        self.idle: list[Worker] = []
        self.lock = threading.Lock()
        POOLS.add(self)

    def call(self, function, args: tuple = (), kwargs: dict | None = None, *, seconds: float):
        """Return function(*args, **kwargs), which an importable function computes elsewhere.

        Raises:
            TimedOut: it took longer than `seconds`; its process was killed.
            RemoteError: it raised there, or its process ended.
        """
        return self.call_packed(pickle.dumps((function, args, kwargs or {})), seconds)

    def call_packed(self, task: bytes, seconds: float):
        """The same for what `packed` made."""
        worker = self._take()
        try:
            value = worker.call(task, seconds)
        except RemoteError:
            self._give(worker)
            raise
        except (EOFError, OSError):
            code = worker.process.wait()
            worker.kill()
            raise RemoteError("ProcessEnded", f"exit code {code}") from None
        except BaseException:  # a time-out, or Ctrl-C while waiting: what it is doing is not wanted any more
            worker.kill()
            raise
        self._give(worker)
        return value

    def _take(self) -> Worker:
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.kill()  # it died while idle (out of memory, say)
        return Worker(self.prepare)

    def _give(self, worker: Worker) -> None:
        with self.lock:
            self.idle.append(worker)

    def close(self) -> None:
        """End the idle processes."""
        with self.lock:
            while self.idle:
                self.idle.pop().kill()

    def forget(self) -> None:
        """After a fork the processes are the parent's."""
        self.idle, self.lock = [], threading.Lock()


POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(POOLS):
        pool.close()


def _forget_all() -> None:
    for pool in list(POOLS):
        pool.forget()


os.register_at_fork(after_in_child=_forget_all)


def serve(descriptor: int) -> None:
    """The process's side: answer tasks until the pipe ends."""
    pipe = Connection(descriptor)
    while True:
        try:
            sys.path[:], task, alarm = pipe.recv()
        except EOFError:
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, alarm)
        answer = _answer(task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


def _answer(task: bytes) -> tuple:
    try:
        function, args, kwargs = pickle.loads(task)
        answer = ("returned", function(*args, **kwargs))
        pickle.dumps(answer)
    except Exception as error:  # sent to the caller, who raises it
        return "raised", type(error).__name__, str(error), traceback.format_exc()
    return answer


def packed(function, args: tuple, kwargs: dict) -> bytes | None:
    """A call as bytes; None where it cannot be sent to another process."""
    try:
        return pickle.dumps((function, args, kwargs))
    except (pickle.PicklingError, TypeError, AttributeError):  # what pickle raises for a lock, a lambda, a generator
        return None


def is_importable(function) -> bool:
    """Whether another process finds the function under its name: a function of a module, or a `partial` of one."""
    if isinstance(function, partial):
        return is_importable(function.func)
    if not isinstance(function, types.FunctionType) or function.__module__ == "__main__":
        return False
    module = sys.modules.get(function.__module__)
    return module is not None and vars(module).get(function.__qualname__) is function


class Thread:
    """A function running in a daemon thread, which nothing waits for at exit."""

    def __init__(self, function):
        self.outcome: list = []
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=lambda: context.run(self._run, function), daemon=True)
        self.thread.start()

    def _run(self, function) -> None:
        try:
            self.outcome.append((function(), None))
        except BaseException as error:  # raised where the result is asked for
            self.outcome.append((None, error))

    def result(self, seconds: float | None):
        """What the function returned or raised. TimedOut where it is not done in so many seconds (None: wait)."""
        self.thread.join(seconds)
        if not self.outcome:
            raise TimedOut
        value, error = self.outcome[0]
        if error is not None:
            raise error
        return value
