"""How far a stage is, with its rate and the time left.

In: a name, a total and the steps as they are done. Out: a tqdm bar on a terminal, plain lines everywhere else:

    sft  120/400 step  30 %  3.1 step/s  left 1:30  loss 1.234

    with Progress("sft", total=400) as progress:
        for batch in batches:
            progress.update(loss=train(batch))

Under `posttrain run` a stage writes to a pipe, so it prints lines. Where its own output is a terminal, the chain sets
POSTTRAIN_PROGRESS=chain: the lines then come often and the chain redraws them in place.
"""

import os
import re
import sys
import time
from collections import deque

LINE_SECONDS = 10.0  # between two plain lines: a log of an hour stays readable
CHAIN_SECONDS = 0.5  # between two lines that are redrawn in place
RATE_UPDATES = 50  # the rate is over this many updates: steps grow longer as replies do, an old rate misleads

_LINE = re.compile(r"\S+  \d+/\d+ \S+  \d+ %  ")


def is_progress(line: str) -> bool:
    """Whether a line of a stage's output is one of ours, to be redrawn in place rather than scrolled."""
    return _LINE.match(line) is not None


def clock(seconds: float) -> str:
    """Seconds as `1:30`, or `2:01:30` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(rate: float, unit: str) -> str:
    """A rate as `3.1 step/s`, or the other way up, `12 s/step`, where one step takes longer than a second."""
    return f"{rate:.3g} {unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit}"


class Progress:
    """Counts `total` units of work. Only the main process (RANK 0) prints.

    initial: units done by an earlier run that this one resumes; they count as done, not into the rate.
    """

    def __init__(self, name: str, total: int, unit: str = "step", *, initial: int = 0):
        self.name, self.total, self.unit, self.done = name, total, unit, initial
        self._main = os.environ.get("RANK", "0") == "0"
        self._every = CHAIN_SECONDS if os.environ.get("POSTTRAIN_PROGRESS") == "chain" else LINE_SECONDS
        self._numbers: dict[str, float] = {}
        now = time.monotonic()
        self._marks = deque([(now, initial)], maxlen=RATE_UPDATES + 1)
        self._printed_at, self._printed_done = now, -1
        self._bar = None
        if self._main and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=name, total=total, unit=f" {unit}", initial=initial, dynamic_ncols=True, file=sys.stdout
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, n: int = 1, **numbers: float) -> None:
        """Count n more units; numbers (loss, reward, ...) are shown beside the rate until the next ones come."""
        self.done += n
        self._numbers.update(numbers)
        now = time.monotonic()
        self._marks.append((now, self.done))
        if self._bar is not None:
            self._bar.set_postfix({key: f"{value:.4g}" for key, value in self._numbers.items()}, refresh=False)
            self._bar.update(n)
        elif now - self._printed_at >= self._every:
            self._print(now)

    def close(self) -> None:
        """Show the last state, once, and end the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._printed_done != self.done:
            self._print(time.monotonic())

    def line(self) -> str:
        """The state as one line, without its line end."""
        percent = 100 * self.done // self.total if self.total else 100
        parts = [f"{self.name}  {self.done}/{self.total} {self.unit}", f"{percent} %"]
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        if end > start and after > before:
            rate = (after - before) / (end - start)
            parts += [format_rate(rate, self.unit), f"left {clock(max(self.total - self.done, 0) / rate)}"]
        parts += [f"{key} {value:.4g}" for key, value in self._numbers.items()]
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        self._printed_at, self._printed_done = now, self.done
        if self._main:
            print(self.line(), flush=True)
