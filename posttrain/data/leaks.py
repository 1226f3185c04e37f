"""Evaluation rows that are training rows, too: `on_leak` and `leak_check_datasets` of a config carried out and told.

In: a config, training rows, held-out rows. Out: both without what the policy drops, and numbers for the manifest.
What counts as shared stands in posttrain/data/overlap.py.
"""

from dataclasses import replace

from posttrain.data import files, source
from posttrain.data.config import LEAK_KINDS, DataConfig
from posttrain.data.log import say
from posttrain.data.overlap import find_overlap, origin
from posttrain.data.validate import Intake
from posttrain.errors import UserError

Rows = list[dict]


def separate(
    config: DataConfig, train: Rows, test: Rows, names: tuple[str, str], key: str = "eval_dataset_split"
) -> tuple[Rows, Rows, dict]:
    """(training rows, held-out rows, numbers): what both share dealt with as `on_leak` says and told in one line.

    `names` are those of both sets and `key` the held-out split's, for messages. numbers: {"same_first_turn": n,
    "same_text": n, "same_id": n, "ngram_13": n, "dropped_eval": n, "dropped_train": n}, all but the last in held-out
    rows. Raises UserError under "stop", and where nothing would be left.
    """
    # Tiny's sentences are a few patterns filled in: long n-grams in common say nothing there.
    found = find_overlap(train, test, ngrams=names != ("tiny", "tiny"))
    seen, leaked = (_of_kinds(side, config.leak_kinds) for side in (found.test, found.train))
    shared = f"{shown(found.numbers())} of {len(test)} held-out rows of {names[1]} are in training on {names[0]}, too"
    if config.on_leak == "stop" and seen:
        raise UserError(
            f"on_leak: stop: {shared}. First held-out row {min(seen)}, {origin(test[min(seen)])[:60]!r}, "
            f"first training row {min(leaked)}: remove them, or set on_leak to drop_eval or drop_train"
        )
    seen = seen if config.on_leak == "drop_eval" else set()
    leaked = leaked if config.on_leak == "drop_train" else set()
    if len(seen) == len(test):
        raise UserError(
            f"{key}: all {len(test)} held-out rows of {names[1]} are training rows, too: name another split or slice, "
            f"such as --dataset_train_split train[:-100] --{key} train[-100:]"
        )
    if any(found.numbers().values()):
        dropped = f"left out {len(leaked)} training rows" if leaked else f"left out {len(seen) or 'none'} of these"
        say(f"{shared}; {dropped} (on_leak: {config.on_leak})")
    numbers = {**found.numbers(), "dropped_eval": len(seen), "dropped_train": len(leaked)}
    return _without(leaked, train, names[0]), _without(seen, test, names[1]), numbers


def check_leaks(config: DataConfig, train: Rows, seed: int, name: str) -> tuple[Rows, dict[str, dict]]:
    """(training rows, {set: numbers}) after a search for the rows of `leak_check_datasets`, whatever their layout.

    A set's numbers count its own rows, and as `train_rows` the training rows that share something with them. Only
    `drop_train` and `stop` act on it: the sets are not evaluated here. Raises UserError as `separate` does.
    """
    found, leaked = {}, set()
    for given in config.leak_check_datasets:
        rows = [row for _, row in open_set(given, config, seed).rows(Intake("stop"))]
        overlap = find_overlap(train, rows, raw=True)
        here = _of_kinds(overlap.train, config.leak_kinds)
        found[given] = {"rows": len(rows), **overlap.numbers(), "train_rows": len(here)}
        shared = f"{shown(overlap.numbers())} of {len(rows)} rows of {given} are in training on {name}"
        if here and config.on_leak == "stop":
            raise UserError(
                f"on_leak: stop: {shared}, the first in training row {min(here)}: remove it, or set on_leak: "
                f"drop_train, which leaves out {len(here)} training rows"
            )
        if any(overlap.numbers().values()):
            dropped = f"left out {len(here)} training rows" if config.on_leak == "drop_train" else "left out none"
            say(f"{shared}; {dropped} (on_leak: {config.on_leak})")
        leaked |= here
    return _without(leaked if config.on_leak == "drop_train" else set(), train, name), found


def parse_set(given: str) -> tuple[str, str | None, str]:
    """(name, config, split) of `path`, `user/name`, `user/name config` or `user/name config split`; else test."""
    words = [given] if files.is_local(given) else given.split()
    if not 1 <= len(words) <= 3:
        raise UserError(f"leak_check_datasets: found {given!r}, expected a path or 'user/name config split'")
    name, kind, split = [*words, None, None][:3]
    return name, kind, split or "test"


def open_set(given: str, config: DataConfig, seed: int) -> source.Source:
    """The raw rows of one of `leak_check_datasets`."""
    name, kind, split = parse_set(given)
    general = replace(config, dataset_mixture=[], dataset_name=name, dataset_config=kind, dataset_adapter=None,
                      dataset_adapter_options={}, dataset_revision=None, max_rows=None, streaming=False)  # fmt: skip
    return source.open_source(general, split, seed)


def shown(numbers: dict[str, int]) -> str:
    """`same_text 3, ngram_13 7`, without the kinds that were not found."""
    return ", ".join(f"{kind} {numbers[kind]}" for kind in LEAK_KINDS if numbers[kind])


def _of_kinds(found: dict[str, set[int]], kinds: list[str]) -> set[int]:
    return set().union(*(found[kind] for kind in kinds))


def _without(dropped: set[int], rows: Rows, name: str) -> Rows:
    if dropped and len(dropped) == len(rows):
        raise UserError(f"on_leak: drop_train: all {len(rows)} training rows of {name} are evaluation rows, too")
    return [row for number, row in enumerate(rows) if number not in dropped] if dropped else rows
