"""Rows for a stage: from `tiny`, a local file or folder, or a data set of the Hub, through an adapter if one is named.

In: the data keys of a config. Out: `(rows, description)`: a list of dicts in one of our layouts (README's table), and
name, split, count and SHA-256 of what was read, for the manifest. A bad line stops with its file and number.
"""

import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.args import arg
from posttrain.data.adapters import ADAPTERS
from posttrain.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MESSAGES = "a list of {'role': ..., 'content': ...}"
LAYOUTS = {"text": "a string", "messages": MESSAGES, "prompt": MESSAGES}
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass
class DataConfig:
    """Data: what the stage learns from"""

    dataset_name: str = arg(help="tiny, a .jsonl, .jsonl.gz or .parquet file, a folder of them, or a name on the Hub")
    dataset_config: str | None = arg(
        None, help="kind of tiny rows (documents, conversations, ...), or the Hub's config"
    )
    dataset_train_split: str = arg("train", help="split to train on; a slice such as train[:90%] is fine")
    dataset_adapter: str | None = arg(None, help="rows -> rows function: a short name or a dotted path")
    max_rows: int | None = arg(None, help="take so many rows (tiny: make so many)")
    dataset_seed: int | None = arg(None, help="seed of tiny's world; none = seed")

    def __post_init__(self):
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows: found {self.max_rows}, expected at least 1")


def load_rows(config: DataConfig, split: str, seed: int, columns: tuple[str, ...]) -> tuple[list[dict], dict]:
    """Rows of `split` with the `columns` a stage needs. UserError where there are none or a column is missing."""
    name, kind = config.dataset_name, config.dataset_config
    world_seed = seed if config.dataset_seed is None else config.dataset_seed
    base, part = parse_split(split)
    if name == "tiny":
        rows = list(_tiny(kind, base, config.max_rows, world_seed))
    else:
        source: Iterable[dict] = _local(Path(name), base) if Path(name).exists() else _hub(name, kind, base)
        rows = _adapted(config.dataset_adapter, source, name)
    rows = rows[part(len(rows))][: config.max_rows]
    label = f"{name}{f' ({kind})' if kind else ''}, split {split}"
    if not rows:
        raise UserError(f"dataset_name: {label}: no rows (check the split, the adapter and max_rows)")
    for index, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(
                f"{label}, row {index}: column {missing[0]!r} is missing; found {', '.join(map(str, row))}; expected "
                f"{', '.join(columns)}: name an adapter with dataset_adapter ({', '.join(ADAPTERS)}, or a dotted path)"
            )
        for column in columns:
            fine = isinstance(row[column], str) if column == "text" else are_messages(row[column])
            if column in LAYOUTS and not fine:
                raise UserError(
                    f"{label}, row {index}: column {column!r}: found {str(row[column])[:80]!r}, expected "
                    f"{LAYOUTS[column]}: mend the row, or name an adapter with dataset_adapter"
                )
    digest = hashlib.sha256()
    for index, row in enumerate(rows):
        try:
            digest.update(row_key(row).encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"{label}, row {index}: {error.object[error.start]!a} is half a surrogate pair, which no tokenizer "
                "takes; mend or remove the row"
            ) from error
    description = {"name": name, "config": kind, "split": split, "rows": len(rows), "sha256": digest.hexdigest()}
    return rows, description


def row_key(row: dict) -> str:
    """A row as text; equal rows have equal keys."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def origin(row: dict) -> str:
    """What a row is about: its first user turn, which rows of one tree share, else the whole row."""
    turns = row.get("prompt") or row.get("messages")
    if isinstance(turns, list):
        users = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
        turns = next(users, None)
    return turns if isinstance(turns, str) else row_key(row)


def are_messages(value) -> bool:
    """Whether it is a list of {"role", "content"}; a content may be missing (tool calls), but is no other type."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | None)
        for turn in value
    )


def parse_split(split: str):
    """`train[10:20]`, `train[:90%]`, `train[-100:]` -> ("train", function of the row count that gives the slice)."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"split: found {split!r}, expected a name or a slice such as train[:90%]")
    base, *bounds = match.groups()

    def at(bound: str | None, size: int) -> int | None:
        if bound is None:
            return None
        return size * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)

    return base, lambda size: slice(at(bounds[0], size), at(bounds[1], size))


def _tiny(kind: str | None, split: str, num: int | None, seed: int) -> Iterator[dict]:
    from posttrain.data import tiny

    if kind not in tiny.KINDS:
        raise UserError(
            f"dataset_config: found {kind!r}, expected one of {', '.join(tiny.KINDS)} for dataset_name tiny"
        )
    if split not in ("train", "test"):
        raise UserError(f"split: found {split!r}, expected train or test for dataset_name tiny")
    return tiny.rows(kind, split, num, seed)


def _local(path: Path, split: str) -> Iterator[dict]:
    """Rows of a file, or of a folder's files in order of name: those named after the split (`train-0.jsonl`), or all
    where none is named after any split. Training rows are never taken for held-out ones in silence."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"dataset_name: folder {path} has no file that ends in {', '.join(SUFFIXES)}")
        named = [p for p in files if _named_after(p, split)]
        if not named and any(_named_after(p, other) for p in files for other in SPLITS):
            found = ", ".join(p.name for p in files[:8])
            raise UserError(f"dataset_name: folder {path} has no file named after split {split!r}; found {found}")
        files = named or files
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"dataset_name: {file}: expected a file that ends in {', '.join(SUFFIXES)}")
        yield from _parquet(file) if file.suffix == ".parquet" else read_jsonl(file)


def _named_after(file: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name) is not None


def read_jsonl(file: Path) -> Iterator[dict]:
    """Objects of a JSONL file, gzipped or not. UserError with file and line for what is not a JSON object."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
        for number, line in enumerate(_unzipped(lines, file), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{file}:{number}: not valid JSON in UTF-8 ({error}); mend or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: found {type(row).__name__}, expected a JSON object")
            yield row


def _unzipped(lines: Iterable[bytes], file: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: damaged or cut-off gzip file ({error}); fetch it again") from error


def _parquet(file: Path) -> Iterator[dict]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error}); fetch it again") from error


def _hub(name: str, config: str | None, split: str) -> Iterable[dict]:
    import datasets

    _require_hub_name(name)

    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"dataset_name: {name!r} could not be loaded from the Hub: {str(error).splitlines()[0]}; "
            "check the name and the network, or name a local file or folder"
        ) from error


def _require_hub_name(name: str) -> None:
    if len(Path(name).parts) != 2 or name.startswith((".", "/")):
        raise UserError(f"dataset_name: no file or folder {name!r}, and it is neither tiny nor a Hub name (user/name)")


def load_adapter(name: str):
    """The adapter under a short name or a dotted path. UserError where there is none."""
    path = ADAPTERS.get(name, name)
    module, _, function = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"dataset_adapter: no function {name!r} ({error}); expected {', '.join(ADAPTERS)}, or a dotted path"
        ) from error


def _adapted(adapter: str | None, source: Iterable[dict], name: str) -> list[dict]:
    if adapter is None:
        return list(source)
    try:
        return list(load_adapter(adapter)(source))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"dataset_adapter: {adapter} cannot read {name}: {type(error).__name__}: {error}") from error


def check(config: DataConfig, split: str, seed: int, columns: tuple[str, ...]) -> None:
    """What a dry run can know in seconds: local rows load and have their columns, names and adapters exist."""
    if config.dataset_name == "tiny":  # made row by row: a few stand for all, of whatever slice
        config, split = replace(config, max_rows=min(64, config.max_rows or 64)), parse_split(split)[0]
    if config.dataset_name == "tiny" or Path(config.dataset_name).exists():
        load_rows(config, split, seed, columns)
    else:
        _require_hub_name(config.dataset_name)
    if config.dataset_adapter is not None:
        load_adapter(config.dataset_adapter)
