"""Votes on replies, kept whatever happens: a log that only grows, and beside it the rankings to learn from.

In: what a labeller was shown and the places they gave. Out, in one folder (a board's is RUN/votes):

    votes.log     the truth: a JSON object a line, appended: a vote, a skip, or a line that cancels a vote
    votes.jsonl   the votes that stand, as rows for recipes/reward.py: `--dataset_name RUN/votes/votes.jsonl`

`votes.jsonl` is made from `votes.log` and never read back here. Skips and cancelled votes are not in it, and nothing
takes a `.log` for a data set, so they cannot be learned from. A line is one write, flushed to the disk before the
labeller is told; a file lock puts several processes in turn. A last line cut off by a crash is put into
`votes.cut`, and `Votes.notes` says so.

Launched by `posttrain board RUN`; `posttrain ratings RUN` reads it.
"""

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from posttrain.checkpoint import fsync, replacing
from posttrain.data.files import parse_line
from posttrain.data.validate import find_bad_text, find_fault, row_key
from posttrain.errors import UserError

LOG, ROWS, CUT = "votes.log", "votes.jsonl", "votes.cut"
MOST_REPLIES = 8
MOST_CHARS = {"comment": 2000, "labeller": 80}
SHOWN = ("prompt", "shown", "seed", "settings", "source", "labeller", "comment", "seconds")
NEEDED = {  # kind of a line -> its keys
    "vote": ("id", "created", "places", *SHOWN),
    "skip": ("id", "created", "reason", *SHOWN),
    "cancel": ("id", "created", "cancels"),
}


@dataclass(frozen=True)
class Item:
    """A prompt and its replies in the order they are shown: label A is the first.

    shown: (model, text) each; settings: all that decided the replies; source: where the prompt came from.
    """

    prompt: list[dict]
    shown: list[tuple[str, str]]
    seed: int = 0
    settings: dict = field(default_factory=dict)
    source: str = "typed"

    def facts(self) -> dict:
        shown = [{"model": model, "text": text} for model, text in self.shown]
        return {"prompt": self.prompt, "shown": shown} | {
            "seed": self.seed, "settings": self.settings, "source": self.source
        }  # fmt: skip


class Votes:
    """The votes of one folder, which is made where it is missing. `notes`: what had to be mended at opening.

    Raises UserError for a log that holds anything but votes, for a symbolic link in its place, and where the file
    system refuses.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.notes = Path(folder), []
        self._seen = None  # sizes of both files after our last write: the same now, nobody else has written
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync(self.folder.parent)
        with self._locked() as log:
            rows = _encoded(training_rows(_net(self._events(log))))
            if not self._rows.exists() or self._rows.read_bytes() != rows:
                if self._rows.exists():
                    self.notes.append(f"{self._rows} was not what {self._log} says (a crash, an edit): written anew")
                self._replace_rows(rows)
            self._remember(log)

    @property
    def _log(self) -> Path:
        return self.folder / LOG

    @property
    def _rows(self) -> Path:
        return self.folder / ROWS

    def vote(self, item: Item, places: list[int], *, labeller: str = "", comment: str = "", seconds=None) -> str:
        """Store a ranking and return its id. places: (K,) one a shown reply, 0 the best, equal = tied.

        Raises UserError for places that are no ranking, texts that are too long, a full disk.
        """
        if not _is_ranking(places, item.shown):
            raise UserError(
                f"places: found {places!r}, expected a whole number for each of {len(item.shown)} replies, 2 or more: "
                "0 for the best, equal ones for a tie"
            )
        order = sorted(set(places))
        event = item.facts() | {"places": [order.index(place) for place in places]}
        return self._append("vote", event | _said(labeller, comment, seconds))

    def skip(self, item: Item, reason: str, *, labeller: str = "", comment: str = "", seconds=None) -> str:
        """Store that this was left unranked, and why; returns its id. UserError for texts that are too long."""
        return self._append("skip", item.facts() | {"reason": reason} | _said(labeller, comment, seconds))

    def cancel(self, vote: str) -> str:
        """Take a vote back by a line that cancels it; returns the line's id. UserError where no such vote stands."""
        return self._append("cancel", {"cancels": vote})

    def read(self) -> list[dict]:
        """The votes that stand, oldest first: the lines of the log as they are (`prompt`, `shown`, `places`, ...)."""
        with self._locked() as log:
            return list(_net(self._events(log)))

    def counts(self) -> dict[str, int]:
        """How many lines there are: votes, skips, cancels, `standing` votes and `rows` to learn from."""
        with self._locked() as log:
            events = self._events(log)
        kinds = [event["event"] for event in events]
        standing = list(_net(events))
        return {kind + "s": kinds.count(kind) for kind in NEEDED} | {
            "standing": len(standing), "rows": sum(1 for _ in training_rows(standing))
        }  # fmt: skip

    def _append(self, kind: str, facts: dict) -> str:
        event = {"event": kind, "id": uuid.uuid4().hex, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        event |= facts
        with self._locked() as log:
            alone = self._seen == self._sizes(log)
            if kind == "cancel" and event["cancels"] not in {vote["id"] for vote in _net(self._events(log))}:
                raise UserError(f"vote {event['cancels']}: {self._log} has no such vote, or it is cancelled already")
            size = os.fstat(log).st_size
            _write_line(log, self._log, _encoded([event]))
            try:
                if alone and kind != "cancel":
                    self._append_row(event)
                else:
                    self._replace_rows(_encoded(training_rows(_net(self._events(log)))))
            except OSError:  # both files have it or neither: who is told of an error votes again
                os.ftruncate(log, size)
                raise
            self._remember(log)
        return event["id"]

    def _append_row(self, event: dict) -> None:
        if not (row := _encoded(training_rows([event] if event["event"] == "vote" else []))):
            return
        rows = _opened(self._rows)
        try:
            _write_line(rows, self._rows, row)
        finally:
            os.close(rows)

    def _replace_rows(self, content: bytes) -> None:
        with replacing(self._rows) as file:
            file.write(content)

    def _events(self, log: int) -> list[dict]:
        events = []
        for number, line in enumerate(_content(log).splitlines(keepends=True), 1):
            event = parse_line(line)
            where = f"{self._log}:{number}"
            if not isinstance(event, dict):
                raise UserError(f"{where}: {event[1]}")
            missing = [key for key in NEEDED.get(event.get("event"), ("event",)) if key not in event]
            if not missing and event["event"] == "vote" and not _is_ranking(event["places"], event["shown"]):
                missing = ["places"]
            if missing:
                raise UserError(
                    f"{where}: no line of a board ({', '.join(missing)} missing or wrong); expected a vote, a skip or "
                    "a cancel: restore the file, or mend or remove the line"
                )
            events.append(event)
        return events

    def _set_cut_aside(self, log: int) -> None:
        """After a crash in the middle of a write: what was never acknowledged goes into a file of its own."""
        size = os.fstat(log).st_size
        if size == 0 or os.pread(log, 1, size - 1) == b"\n":
            return
        content = _content(log)
        whole = content.rfind(b"\n") + 1
        rest = content[whole:]
        if isinstance(parse_line(rest), dict):  # all but its line end
            _write_line(log, self._log, b"\n")
            return
        aside = _opened(self.folder / CUT)
        try:
            _write_line(aside, self.folder / CUT, rest + b"\n")
        finally:
            os.close(aside)
        os.ftruncate(log, whole)
        os.fsync(log)
        self.notes.append(
            f"{self._log} ended in the middle of a line (a crash while it was written): its {len(rest)} bytes are "
            f"in {self.folder / CUT} now; that vote had not been confirmed"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The open log, which no other process or thread writes meanwhile."""
        log = _opened(self._log)
        try:
            fcntl.flock(log, fcntl.LOCK_EX)
            self._set_cut_aside(log)
            yield log
        finally:
            os.close(log)  # ends the lock, too

    def _sizes(self, log: int) -> tuple:
        rows = self._rows.stat() if self._rows.exists() else None
        return os.fstat(log).st_size, rows and (rows.st_ino, rows.st_size)

    def _remember(self, log: int) -> None:
        self._seen = self._sizes(log)


def training_rows(votes: Iterable[dict]) -> Iterator[dict]:
    """Votes of the log -> rows `prompt`, `completions` best to worst, `ranks` (equal = tie), and what else is known:
    `models` and `shown` (where each completion stood), both in the order of the completions.

    A reply that no stage may learn from (empty, a NUL in it) is left out, as is a vote with fewer than two others.
    """
    for vote in votes:
        usable = [index for index, reply in enumerate(vote["shown"]) if reply["text"].strip()]
        best_first = sorted(usable, key=lambda index: vote["places"][index])
        places = sorted({vote["places"][index] for index in usable})
        shown = [vote["shown"][index] for index in best_first]
        row = {
            "id": vote["id"],
            "prompt": vote["prompt"],
            "completions": [[{"role": "assistant", "content": reply["text"]}] for reply in shown],
            "ranks": [places.index(vote["places"][index]) for index in best_first],
            "models": [reply["model"] for reply in shown],
            "shown": best_first,
        }
        row |= {key: vote[key] for key in ("labeller", "comment", "seconds", "seed", "settings", "source", "created")}
        fine = len(best_first) > 1 and not find_fault(row, ("prompt",))
        if fine and not find_bad_text(row, row_key(row), max_chars=1_000_000):
            yield row


def _net(events: list[dict]) -> Iterator[dict]:
    """The votes that no later line cancels."""
    cancelled = {event["cancels"] for event in events if event["event"] == "cancel"}
    return (event for event in events if event["event"] == "vote" and event["id"] not in cancelled)


def _is_ranking(places, shown) -> bool:
    if not isinstance(places, list) or not isinstance(shown, list) or not 2 <= len(places) == len(shown):
        return False
    return all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in places)


def _said(labeller: str, comment: str, seconds: float | None) -> dict:
    for key, text in (("labeller", labeller), ("comment", comment)):
        if not isinstance(text, str) or len(text) > MOST_CHARS[key]:
            raise UserError(f"{key}: {len(str(text)):,} characters, expected at most {MOST_CHARS[key]:,}")
    return {"labeller": labeller.strip(), "comment": comment.strip(), "seconds": seconds}


def _encoded(objects) -> bytes:
    """JSON lines. Half a surrogate pair, which UTF-8 has not, becomes the JSON escape of itself."""
    lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in objects)
    return "".join(lines).encode("utf-8", "backslashreplace")


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link; expected a file of its own: remove the link") from error
        raise


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _write_line(file: int, path: Path, line: bytes) -> None:
    """Append in one write and flush; whatever stops it (a full disk) leaves the file as it was."""
    size = os.fstat(file).st_size
    try:
        written = os.write(file, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))
        os.fsync(file)
        if size == 0:
            fsync(path.parent)  # its name, too
    except OSError:
        os.ftruncate(file, size)
        raise
