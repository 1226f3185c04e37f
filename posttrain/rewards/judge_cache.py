"""A JSONL file of what a judge said, which several processes may read and append to at once.

In: a key (hash of the request). Out: the judge's text, or None. A line is {"key": ..., "text": ...}, written whole
under a lock; what a killed process left half written is skipped.
"""

import fcntl
import json
import os
from pathlib import Path

from posttrain.errors import UserError


class Cache:
    """`path` None: in memory alone."""

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self.known: dict[str, str] = {}
        self.read_to = 0  # bytes of the file that are in `known`

    def get(self, key: str) -> str | None:
        return self.known.get(key)

    def refresh(self) -> None:
        """Read what has been appended, here or by others, since the last time."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.read_to)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_to += len(whole)
        for line in whole.splitlines():
            entry = _entry(line)
            if entry is not None:
                self.known[entry["key"]] = entry["text"]

    def put(self, key: str, text: str) -> None:
        """UserError where the file cannot be written."""
        self.known[key] = text
        if self.path is None:
            return
        line = json.dumps({"key": key, "text": text}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line  # somebody was killed while writing
                file.write(line)
        except OSError as error:
            raise UserError(
                f"reward_options: judge: cache: {self.path} cannot be written: {error.strerror}"
            ) from error


def _entry(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # half a line
    fine = isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("text"), str)
    return entry if fine else None
