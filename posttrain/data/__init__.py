"""Rows for a stage: from `tiny`, local files or the Hub, or a mixture of them, through an adapter if one is named.

In: the data keys of a config. Out, for what fits in memory, `load_rows`: `(rows, description)`, a list of dicts in one
of our layouts (README's table) and what the manifest says of them; for what does not, `stream_rows`: a `Stream`.

A description holds name, config, split, `revision` (the Hub's commit, where its client tells it), `rows`, `skipped`
(reason -> rows left out), `duplicates`, for a mixture the descriptions of its entries, and `sha256`: of the rows that
are given out; of a stream, which nobody has read yet, of its files' names and sizes, or of the Hub's commit.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from posttrain.data import files, mixture
from posttrain.data.config import DataConfig, entries
from posttrain.data.leaks import check_leaks, parse_set, separate
from posttrain.data.log import say
from posttrain.data.overlap import EvalIndex, Unique, origin
from posttrain.data.source import (
    GENERATED,
    Source,
    adapted,
    load_adapter,
    open_source,
    require_hub_name,
    require_options,
)  # fmt: skip
from posttrain.data.splits import cut, cut_stream, parse_split
from posttrain.data.stream import Stream, interleaved, shuffled
from posttrain.data.validate import MESSAGES, Intake, are_messages, row_key, valid
from posttrain.errors import UserError

__all__ = [
    "MESSAGES", "DataConfig", "EvalIndex", "Stream", "are_messages", "check", "check_leaks", "load_adapter",
    "load_rows", "origin", "parse_split", "row_key", "separate", "shuffled", "stream_rows",
]  # fmt: skip
SMALL = 50_000_000  # bytes of local files that a dry run reads as a whole
FEW = 64  # rows that stand for all in a dry run
ENOUGH = 1000  # rows of a stream before the share of bad ones says something


def load_rows(config: DataConfig, split: str, seed: int, columns: tuple[str, ...]) -> tuple[list[dict], dict]:
    """Rows of `split` with the `columns` a stage needs, each checked; the same for the same config, files and seed.

    A slice counts rows after the adapter, `max_rows` those that can be used and are no duplicates. With `streaming`
    the source is read only as far as `max_rows` wants. Raises UserError where there are no rows, for a row that cannot
    be used (under `on_bad_row: stop`, or where more than `max_skipped` are), and for keys that do not fit.
    """
    if config.streaming:
        return _load_from_stream(config, split, seed, columns)
    unique = Unique(config.dedup)
    parts = [_load(entry, at, seed, columns, unique) for entry, at in entries(config, split)]
    if not config.dataset_mixture:
        return parts[0]
    listed = [description for _, description in parts]
    names, sizes = [entry["name"] for entry in listed], [entry["rows"] for entry in listed]
    counts = mixture.plan(config.dataset_mixture, names, sizes, config.max_rows)
    rows = [parts[source][0][index] for source, index in mixture.picks(sizes, counts, seed)]
    for entry, count in zip(listed, counts, strict=True):
        entry |= {"taken": count, "epochs": round(count / entry["rows"], 4)}
    say(f"mixture of {len(rows)} rows: {', '.join(map(_mixed, listed))}")
    return rows, _mixture_facts(split, listed) | {"rows": len(rows), "sha256": _sha256(map(row_key, rows))}


def stream_rows(config: DataConfig, split: str, seed: int, columns: tuple[str, ...]) -> Stream:
    """As `load_rows`, but read while it is iterated: every pass gives the same rows in the same order.

    `max_rows` ends a pass. `description()` counts what the last pass left out. Ids are not compared: that would keep
    all of them in memory. A mixture comes interleaved; no row repeats unless counts or `max_rows` ask for more than
    there is.
    """
    if config.dedup not in ("check", "none"):
        raise UserError(
            f"dedup: {config.dedup} has to remember every row, which streaming is meant to avoid: set dedup: none, or "
            "streaming: false"
        )
    parts = [_stream(entry, at, seed, columns) for entry, at in entries(config, split)]
    if not config.dataset_mixture:
        return parts[0]
    by_count = "count" in config.dataset_mixture[0]
    weights = [entry["count" if by_count else "weight"] for entry in config.dataset_mixture]
    total = sum(weights) if by_count else config.max_rows

    def description() -> dict:
        facts = _mixture_facts(split, [part.description() for part in parts])
        keys = [*(entry["sha256"] for entry in facts["mixture"]), json.dumps([weights, total])]
        return facts | {"rows": total, "sha256": _sha256(keys)}

    return Stream(lambda: interleaved(parts, weights, total), description)


def check(config: DataConfig, split: str, seed: int, columns: tuple[str, ...], planned=()) -> None:
    """What a dry run can know in seconds: local rows load and have their columns, names, options and adapters exist.

    Of `tiny` and of large files a few rows stand for all; of the Hub's data sets only the names are looked at, and of
    files that earlier stages of a chain will write, into their folders `planned`, nothing.
    """
    for entry, at in entries(config, split):
        folder, name = os.path.split(entry.dataset_name)
        if not (name and folder in planned and not files.is_local(entry.dataset_name)):
            _check_one(entry, at, seed, columns)
    for given in config.leak_check_datasets:
        name, _, base = parse_set(given)
        if files.is_local(name):
            files.find(name, base)
        elif name not in GENERATED:
            require_hub_name(name)


def _check_one(config: DataConfig, split: str, seed: int, columns) -> None:
    name, base = config.dataset_name, parse_split(split)[0]
    if config.dataset_adapter is not None:
        require_options(config.dataset_adapter, config.dataset_adapter_options)
    if config.streaming:
        cut_stream((), split)
    if name in GENERATED:  # made row by row: a few stand for all, of whatever slice
        load_rows(replace(config, max_rows=min(FEW, config.max_rows or FEW)), base, seed, columns)
    elif not files.is_local(name):
        require_hub_name(name)
    else:
        found = files.find(name, base, config.dataset_config)
        if sum(file.stat().st_size * (4 if file.suffix in files.PACKED else 1) for file in found) <= SMALL:
            load_rows(replace(config, streaming=False), split, seed, columns)
        elif config.dataset_adapter is None:
            load_rows(replace(config, streaming=True, max_rows=FEW, dedup="none"), base, seed, columns)


def _load(config: DataConfig, split: str, seed: int, columns, unique: Unique) -> tuple[list[dict], dict]:
    """(rows, description) of one source, read as a whole."""
    source, intake = open_source(config, parse_split(split)[0], seed), Intake(config.on_bad_row)
    rows, digest, label, duplicates = [], hashlib.sha256(), _label(config, split), unique.begin()
    unchecked = cut(adapted(config, source, intake), split)
    unique_ids = config.dedup == "check"
    for row, key in valid(unchecked, columns, intake, label, config.max_row_chars, unique_ids):
        if unique.is_new(row):
            rows.append(row)
            digest.update(key.encode())
            if len(rows) == config.max_rows:
                break
    intake.require_share(config.max_skipped, label)
    _require_rows(rows, label, intake)
    if intake.counts:
        say(intake.summary(label))
    if duplicates:
        counted = ", ".join(f"{count} by {kind}" for kind, count in duplicates.items())
        say(f"left out duplicates in {label}: {counted} (dedup: {config.dedup})")
    facts = {"duplicates": dict(duplicates), "rows": len(rows), "sha256": digest.hexdigest()}
    return rows, _facts(config, split, source, intake) | facts


def _stream(config: DataConfig, split: str, seed: int, columns) -> Stream:
    """One source, read anew with every pass."""
    config = replace(config, streaming=True)
    cut_stream((), split)  # refuses at once what it would refuse later
    source, label = open_source(config, parse_split(split)[0], seed), _label(config, split)
    last, told = Intake(config.on_bad_row), False

    def start() -> Iterator[dict]:
        nonlocal last, told
        last = intake = Intake(config.on_bad_row)
        unchecked = cut_stream(adapted(config, source, intake), split)
        rows = valid(unchecked, columns, intake, label, config.max_row_chars, unique_ids=False)
        for row, _ in islice(rows, config.max_rows):
            if intake.kept % ENOUGH == 0:
                intake.require_share(config.max_skipped, label)
            yield row
        intake.require_share(config.max_skipped, label)
        _require_rows(intake.kept, label, intake)
        if intake.counts and not told:  # every pass leaves out the same
            told = True
            say(intake.summary(label))

    def description() -> dict:
        keys = [source.facts, split, config.dataset_adapter, config.dataset_adapter_options, config.max_rows]
        digest = _sha256([json.dumps(keys, sort_keys=True, default=str)])
        return _facts(config, split, source, last) | {"duplicates": {}, "rows": None, "sha256": digest}

    return Stream(start, description)


def _load_from_stream(config: DataConfig, split: str, seed: int, columns) -> tuple[list[dict], dict]:
    """`max_rows` rows of a source that is read no further."""
    if config.max_rows is None and "count" not in (config.dataset_mixture or [{}])[0]:
        raise UserError(
            "max_rows: not set, and streaming is for what does not fit in memory: say how many rows to take (of "
            "held-out rows: eval_max_rows)"
        )
    stream = stream_rows(config, split, seed, columns)
    rows = list(stream)
    return rows, stream.description() | {"rows": len(rows), "sha256": _sha256(map(row_key, rows))}


def _label(config: DataConfig, split: str) -> str:
    kind = config.dataset_config
    return f"{config.dataset_name}{f' ({kind})' if kind else ''}, split {split}"


def _require_rows(rows, label: str, intake: Intake) -> None:
    if not rows:
        left = intake.summary(label) if intake.counts else "check the split, the adapter and max_rows"
        raise UserError(f"dataset_name: {label}: no rows ({left})")


def _facts(config: DataConfig, split: str, source: Source, intake: Intake) -> dict:
    facts = {"name": config.dataset_name, "config": config.dataset_config, "split": split}
    return facts | {"revision": source.revision, "skipped": dict(intake.counts)}


def _mixture_facts(split: str, listed: list[dict]) -> dict:
    sums = {key: dict(sum((Counter(entry[key]) for entry in listed), Counter())) for key in ("skipped", "duplicates")}
    name = " + ".join(entry["name"] for entry in listed)
    return {"name": name, "config": None, "split": split, "revision": None, **sums, "mixture": listed}


def _mixed(entry: dict) -> str:
    again = f", {entry['epochs']:.2f} times over" if entry["taken"] > entry["rows"] else ""
    return f"{entry['taken']} of {entry['name']} ({entry['rows']} rows{again})"


def _sha256(keys: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode())
    return digest.hexdigest()
