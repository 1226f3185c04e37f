"""Where raw rows come from: `tiny`, local files or the Hub; and the adapter that turns them into ours.

In: data keys and a split's name. Out: `open_source` gives a `Source`: raw rows to be read as often as wanted, each
with its place, and what the manifest says of them. `adapted` puts the adapter behind it.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.data import files
from posttrain.data.adapters import ADAPTERS
from posttrain.data.config import DataConfig
from posttrain.data.files import Place
from posttrain.data.validate import Intake
from posttrain.errors import UserError

GENERATED = ("tiny", "spelling")  # made from a seed
BYTES_A_CHAR = 16  # of a raw line for each of max_row_chars: six an escaped character, and room for other columns
BROKEN = (ValueError, LookupError, TypeError, AttributeError)  # what an adapter raises for rows it was not made for


@dataclass
class Source:
    """Raw rows. `rows(bad)` starts a new pass; `facts` identify the content without reading it (files with sizes, the
    Hub's commit); `revision` is that commit where the Hub's client tells it."""

    name: str
    rows: Callable[..., Iterator[tuple[Place, dict]]]
    facts: dict = field(default_factory=dict)
    revision: str | None = None


def open_source(config: DataConfig, split: str, seed: int) -> Source:
    """The source of data keys without a mixture. UserError where there is none."""
    name = config.dataset_name
    if name == "tiny":
        return _tiny(config, split, seed)
    if name == "spelling":
        return _spelling(config, split, seed)
    if files.is_local(name):
        return _local(config, split)
    return _hub(config, split)


def _tiny(config: DataConfig, split: str, seed: int) -> Source:
    from posttrain.data import tiny, tiny_tools

    kind, seed = config.dataset_config, seed if config.dataset_seed is None else config.dataset_seed
    kinds = (*tiny.KINDS, *tiny_tools.KINDS)
    if kind not in kinds:
        raise UserError(f"dataset_config: found {kind!r}, expected one of {', '.join(kinds)} for dataset_name tiny")
    _require_split("tiny", split)
    prefix = f"tiny ({kind}), split {split}, row "

    def rows(bad):
        world = tiny_tools if kind in tiny_tools.KINDS else tiny
        made = world.rows(kind, split, config.max_rows, seed)
        return (((prefix, number), row) for number, row in enumerate(made))

    return Source("tiny", rows, {"tiny": [kind, split, config.max_rows, seed]})


def _spelling(config: DataConfig, split: str, seed: int) -> Source:
    from posttrain.data import spelling

    file, seed = config.dataset_config, seed if config.dataset_seed is None else config.dataset_seed
    _require_split("spelling", split)
    spelling.read_words(file)
    prefix = f"spelling, split {split}, row "

    def rows(bad):
        made = spelling.rows(split, config.max_rows, seed, file)
        return (((prefix, number), row) for number, row in enumerate(made))

    return Source("spelling", rows, {"spelling": [file, split, config.max_rows, seed]})


def _require_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise UserError(f"split: found {split!r}, expected train or test for dataset_name {name}")


def _local(config: DataConfig, split: str) -> Source:
    found = files.find(config.dataset_name, split, config.dataset_config)
    sizes = [[file.name, file.stat().st_size] for file in found]
    max_bytes = BYTES_A_CHAR * config.max_row_chars
    return Source(config.dataset_name, lambda bad: files.read(found, bad, max_bytes), {"files": sizes})


def _hub(config: DataConfig, split: str) -> Source:
    import datasets
    import httpx
    from datasets.packaged_modules.cache.cache import Cache

    name, kind, revision = config.dataset_name, config.dataset_config, config.dataset_revision
    require_hub_name(name)

    def refused(error: Exception) -> UserError:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(
            f"dataset_name: {name!r} could not be loaded from the Hub: {said}; check the name"
            f"{f', dataset_config {kind!r}' if kind else ''}{f', dataset_revision {revision!r}' if revision else ''} "
            "and the network, or name a local file or folder"
        )

    failures = (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError)
    try:
        builder = datasets.load_dataset_builder(name, kind, revision=revision)
        if config.streaming:
            data = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=split)
    except failures as error:
        raise refused(error) from error
    commit = builder.hash if len(builder.hash or "") == 40 else None  # the client names a data set's cache so
    # Without a network the client takes what it fetched last, of whatever revision.
    if revision is not None and isinstance(builder, Cache) and not (commit or "").startswith(revision):
        raise UserError(
            f"dataset_revision: {revision} of {name} cannot be looked up without a network, and the newest in the "
            f"cache is commit {commit}: connect to the network, or set dataset_revision: {commit}"
        )
    prefix = f"{name}{f' ({kind})' if kind else ''}, split {split}, row "

    def rows(bad):
        try:
            for number, row in enumerate(data):
                yield (prefix, number), row
        except failures as error:
            raise refused(error) from error

    return Source(name, rows, {"hub": [name, kind, split, commit]}, commit)


def require_hub_name(name: str) -> None:
    if len(Path(name).parts) != 2 or name.startswith((".", "/")):
        raise UserError(f"dataset_name: no file or folder {name!r}, and it is neither tiny nor a Hub name (user/name)")


def load_adapter(name: str):
    """The adapter under a short name or a dotted path, which is also looked for in the working directory: under
    `accelerate launch` that is not on Python's path. UserError where there is none."""
    path = ADAPTERS.get(name, name)
    module, _, function = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"dataset_adapter: no function {name!r} ({error}); expected {', '.join(ADAPTERS)}, or a dotted path"
        ) from error


def require_options(name: str, options: dict) -> None:
    """UserError for an option that the adapter does not take."""
    parameters = list(inspect.signature(load_adapter(name)).parameters.values())[1:]
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "bad"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and "bad" not in options:
        return
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"dataset_adapter_options: {name} does not take {key!r}; {mend}")


class _Watched:
    """Raw rows on their way to an adapter, and the place of the last one until all are read."""

    def __init__(self, pairs: Iterable[tuple[Place, dict]], intake: Intake):
        self.pairs, self.intake, self.place = pairs, intake, None

    def __iter__(self) -> Iterator[dict]:
        for place, row in self.pairs:
            self.place = place
            self.intake.read += 1
            yield row
        self.place = None

    def shown(self) -> str:
        return f"{self.place[0]}{self.place[1]}" if self.place else ""


class _Placed:
    """The stage's BadRows as adapters see it: each message gets the place of the row read last."""

    def __init__(self, intake: Intake, watched: _Watched):
        self.intake, self.watched = intake, watched
        self.policy, self.counts, self.first = intake.policy, intake.counts, intake.first

    def __call__(self, reason: str, message: str) -> None:
        place = self.watched.shown()
        self.intake(reason, f"{place}: {message}" if place else message)


def adapted(config: DataConfig, source: Source, intake: Intake) -> Iterator[tuple[Place | None, dict]]:
    """(place, row) after the adapter. The place is that of the raw row read last, which is the row's own where an
    adapter goes row by row; of one that reads all rows first there is none.

    Raises UserError, with the place, where the adapter raises: without a keyword `bad` it cannot skip.
    """
    name, options = config.dataset_adapter, config.dataset_adapter_options
    watched = _Watched(source.rows(intake.unreadable), intake)
    if name is None:
        for row in watched:
            yield watched.place, row
        return
    adapter = load_adapter(name)
    require_options(name, options)
    takes_bad = "bad" in inspect.signature(adapter).parameters
    if takes_bad:
        options = {**options, "bad": _Placed(intake, watched)}
    try:
        for row in adapter(watched, **options):
            yield watched.place, row
    except BROKEN as error:
        hint = "" if takes_bad or intake.policy == "stop" else " (it has no keyword `bad`, so it cannot skip)"
        place = watched.shown() or source.name
        raise UserError(
            f"dataset_adapter: {name} cannot read {place}: {type(error).__name__}: {error}{hint}"
        ) from error
