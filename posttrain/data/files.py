"""Local files -> raw rows, each with the place it stands at: `rows.jsonl:7` or `rows.parquet, row 6`.

In: a path, a folder or a glob pattern (`data/*.jsonl.zst`). Out: the files that belong to a split in order of name
(`find`), and their rows (`read`). Kinds, told by the name's end:

    .jsonl .json .txt    also as .gz and .zst; .json is an array of objects, or objects one after the other
    .parquet .yaml .yml  as they are

A .txt file is one document, {"text": ...}; a YAML file is one row. Memory stays bounded: a line is never read further
than `max_bytes`, a file is never unpacked as a whole. Files are UTF-8; a BOM is dropped, line ends may be Windows'.
"""

import codecs
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from posttrain import yaml_file
from posttrain.data.log import say
from posttrain.errors import UserError

ROWS, PACKED = (".jsonl", ".json", ".txt"), (".gz", ".zst")
KINDS = (*(row + end for row in ROWS for end in ("", *PACKED)), ".parquet", ".yaml", ".yml")
KNOWN = ".jsonl, .json, .txt (or one of these and .gz or .zst), .parquet, .yaml, .yml"
# A folder may hold other files beside its data: the first of these groups that it has is taken.
GROUPS = ((".jsonl", ".parquet"), (".json",), (".txt",), (".yaml", ".yml"))
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
PIECE = 1 << 16  # bytes read at a time
SPACE, DECODER = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()
MEND = "mend or remove the line"

Place = tuple[str, int]  # ("rows.jsonl:", 7): made for every row, so it becomes text only where it is shown


def is_local(name: str) -> bool:
    """Whether `name` is a path or a glob pattern, not `tiny` or a name on the Hub."""
    return Path(name).exists() or any(mark in name for mark in "*?[")


def kind_of(file: Path) -> str | None:
    """`.jsonl` for rows.jsonl, rows.jsonl.gz and rows.jsonl.zst; None where we do not read such files."""
    end = next((kind for kind in KINDS if file.name.endswith(kind)), None)
    return end and "." + end.split(".")[1]


def find(name: str, split: str, subfolder: str | None = None) -> list[Path]:
    """The files that `name` means, in order of name: those named after the split (`train-0.jsonl`), or all where
    none is named after any split. Training rows are never taken for held-out ones in silence.

    Of a folder they are the files in it, or in its `subfolder` or `data/` where there is one.
    Raises UserError where there are none.
    """
    path = Path(name)
    if path.is_dir():
        return _of_split(_in_folder(path, subfolder), split, f"folder {path}")
    if subfolder is not None:
        say(f"dataset_config: {subfolder} has no meaning for the file {name}; not used")
    if path.exists():
        found = [path]
    else:
        found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
        if not found:
            raise UserError(f"dataset_name: no file matches the pattern {name!r}; put it in quotes, check the folder")
    for file in found:
        if kind_of(file) is None:
            raise UserError(f"dataset_name: {file}: expected a file that ends in {KNOWN}")
    return found if path.exists() else _of_split(found, split, f"pattern {name!r}")


def _in_folder(path: Path, subfolder: str | None) -> list[Path]:
    if subfolder is not None and (path / subfolder).is_dir():
        path = path / subfolder
    elif subfolder is not None:
        say(f"dataset_config: {path} has no subfolder {subfolder}; not used")
    for folder in (path, path / "data"):
        files = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        for kinds in GROUPS:
            if found := [file for file in files if kind_of(file) in kinds and file.is_file()]:
                rest = sum(file.is_file() and kind_of(file) is not None for file in files) - len(found)
                if rest:
                    say(f"{folder}: took its {len(found)} {' and '.join(kinds)} files and not the {rest} others")
                return found
    raise UserError(
        f"dataset_name: folder {path} has no file that ends in {KNOWN}; for files further down give a "
        f"pattern such as '{path}/**/*.jsonl'"
    )


def _of_split(files: list[Path], split: str, what: str) -> list[Path]:
    named = [file for file in files if _named_after(file, split)]
    if not named and any(_named_after(file, other) for file in files for other in SPLITS):
        found = ", ".join(file.name for file in files[:8])
        raise UserError(f"dataset_name: {what} has no file named after split {split!r}; found {found}")
    return named or files


def _named_after(file: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name) is not None


def read(files: list[Path], bad, max_bytes: int) -> Iterator[tuple[Place, dict]]:
    """(place, row) of all files. `bad` is the stage's BadRows; UserError for what is no row under its policy, and for
    a damaged file under any."""
    for file in files:
        kind = kind_of(file)
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind in (".yaml", ".yml"):
            yield (f"{file}:", 1), {key: entry.value for key, entry in yaml_file.read(file).items()}
        else:
            reader = {".jsonl": _jsonl, ".json": _json, ".txt": _text}[kind]
            with _opened(file) as stream:
                yield from _undamaged(reader(file, stream, bad, max_bytes), file)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked piece by piece."""
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as packed, io.BufferedReader(packed, PIECE) as stream:
            yield stream
    elif file.suffix == ".zst":
        import pyarrow

        with pyarrow.OSFile(str(file)) as packed, pyarrow.CompressedInputStream(packed, "zstd") as raw:
            yield io.BufferedReader(raw, PIECE)
    else:
        with open(file, "rb") as stream:
            yield stream


def _undamaged(rows: Iterator, file: Path) -> Iterator:
    if file.suffix not in PACKED:
        yield from rows
        return
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        kind = {".gz": "gzip", ".zst": "zstd"}[file.suffix]
        raise UserError(f"{file}: damaged or cut-off {kind} file ({error}); fetch it again") from error


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """(line, False), or (its first bytes, True) where it is longer than `max_bytes`: the rest is read past."""
    while line := stream.readline(max_bytes + 1):
        cut = len(line) > max_bytes and not line.endswith(b"\n")
        if cut:
            line = line[:80]
            while (rest := stream.readline(PIECE)) and not rest.endswith(b"\n"):
                pass
        yield line, cut


def _jsonl(file: Path, stream: BinaryIO, bad, max_bytes: int) -> Iterator[tuple[Place, dict]]:
    prefix = f"{file}:"
    for number, (line, cut) in enumerate(_lines(stream, max_bytes), 1):
        if cut:
            fault = "too_long", f"the line has more than {max_bytes:,} bytes; raise max_row_chars, or remove the line"
        elif not line.strip():
            continue
        else:
            fault = parse_line(line)
        if isinstance(fault, dict):
            yield (prefix, number), fault
        else:
            bad(fault[0], f"{prefix}{number}: {fault[1]}")


def parse_line(line: bytes) -> dict | tuple[str, str]:
    """The JSON object of a line, or (reason, message) where it holds none."""
    if b"\0" in line:
        if line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "invalid_utf8", "the file is UTF-16, expected UTF-8: save it as UTF-8"
        return "nul", f"not valid JSON: a NUL byte after {line[: line.index(0)][-20:]!r}; {MEND}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "invalid_utf8", f"not valid UTF-8 ({error.reason} at byte {error.start} of the line); {MEND}"
    except RecursionError:
        return "malformed_json", f"not valid JSON (nested too deeply); {MEND}"
    except ValueError as error:
        return "malformed_json", f"not valid JSON ({error}); {MEND}"
    if not isinstance(row, dict):
        return "wrong_type", f"found {type(row).__name__}, expected a JSON object; {MEND}"
    return row


def _json(file: Path, stream: BinaryIO, bad, max_bytes: int) -> Iterator[tuple[Place, dict]]:
    """Objects of one array, or one after the other. Where one is broken nothing says where the next begins, so that
    it stops under every policy."""
    source = _Text(file, io.TextIOWrapper(stream, "utf-8-sig", newline=""), max_bytes)
    in_array = source.peek() == "["
    if in_array:
        source.at += 1
    while (char := source.peek()) and not (in_array and char == "]"):
        row = source.take()
        yield (f"{file}:", source.line), row
        if in_array and source.peek() == ",":
            source.at += 1  # a last comma before the ] is let pass
        elif in_array and source.peek() not in ("]", ""):
            raise source.broken("expected , or ] after an object of the array")
    if in_array and not char:
        raise source.broken("the file ends before the array's ]")
    source.at += in_array
    if source.peek():
        raise source.broken("expected nothing after the array's ]")


class _Text:
    """The unread text of a .json file; `line` is that of the last look at it."""

    def __init__(self, file: Path, stream: io.TextIOBase, max_chars: int):
        self.file, self.stream, self.max_chars = file, stream, max_chars
        self.buffer, self.at, self.line, self.line_at = "", 0, 1, 0

    def more(self) -> bool:
        """Read on, as much again as there is: objects of any length are found in linear time."""
        self.count_lines()
        try:
            piece = self.stream.read(max(PIECE, len(self.buffer) - self.at))
        except UnicodeDecodeError as error:
            raise self.broken(f"not valid UTF-8 ({error.reason})") from error
        self.buffer, self.at, self.line_at = self.buffer[self.at :] + piece, 0, 0
        return bool(piece)

    def count_lines(self) -> None:
        self.line += self.buffer.count("\n", self.line_at, self.at)
        self.line_at = self.at

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            self.at = SPACE.match(self.buffer, self.at).end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def take(self) -> dict:
        """The object that begins at the next character."""
        if self.peek() != "{":
            raise self.broken(f"found {self.buffer[self.at : self.at + 20]!r}, expected an object {{...}}")
        self.count_lines()
        while True:
            try:
                row, self.at = DECODER.raw_decode(self.buffer, self.at)
                return row
            except RecursionError:
                raise self.broken("nested too deeply") from None
            except ValueError as error:
                if len(self.buffer) - self.at > self.max_chars:
                    raise self.broken(f"more than {self.max_chars:,} characters in an object") from None
                if not self.more():
                    raise self.broken(f"not valid JSON ({getattr(error, 'msg', error)})") from error

    def broken(self, what: str) -> UserError:
        self.count_lines()
        return UserError(
            f"{self.file}:{self.line}: {what}; mend the file (to skip bad rows make it .jsonl, a line a row)"
        )


def _text(file: Path, stream: BinaryIO, bad, max_bytes: int) -> Iterator[tuple[Place, dict]]:
    content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        bad(
            "too_long", f"{file}: more than {max_bytes:,} bytes; raise max_row_chars, or cut it into several documents"
        )
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad("invalid_utf8", f"{file}: not valid UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
        return
    yield (f"{file}:", 1), {"text": text.replace("\r\n", "\n")}


def _parquet(file: Path) -> Iterator[tuple[Place, dict]]:
    import pyarrow.parquet

    prefix, number = f"{file}, row ", 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield (prefix, number), row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error}); fetch it again") from error
