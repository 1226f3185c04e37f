"""The data keys of a config, checked; a mixture's entries as data keys of their own.

In: the keys as the parser gives them. Out: a `DataConfig`, or a UserError that names the key. `entries(config)` is
what a mixture loads: one DataConfig an entry.
"""

import math
from dataclasses import dataclass, replace

from posttrain.args import arg
from posttrain.data.bad_rows import POLICIES
from posttrain.errors import UserError
from posttrain.lookup import nearest

DEDUP = ("check", "id", "text", "both", "none")
ON_LEAK = ("drop_eval", "drop_train", "stop", "report")
LEAK_KINDS = ("same_first_turn", "same_text", "same_id", "ngram_13")
# A mixture's entry: key -> what it must be. The rest of the data keys count for all entries alike.
ENTRY_KEYS = {
    "dataset_name": str, "dataset_config": str, "dataset_train_split": str, "dataset_adapter": str,
    "dataset_adapter_options": dict, "dataset_revision": str, "max_rows": int, "weight": float, "count": int,
}  # fmt: skip
TYPES = {str: "text", int: "a whole number", float: "a number", dict: "a mapping"}


@dataclass
class DataConfig:
    """Data: what the stage learns from"""

    dataset_name: str | None = arg(
        None, help="tiny or spelling; a file, a folder or a pattern such as 'data/*.jsonl.zst'; or a name on the Hub"
    )
    dataset_config: str | None = arg(
        None, help="kind of tiny rows (documents, conversations, ...), the Hub's config, or a folder's subfolder"
    )
    dataset_train_split: str = arg("train", help="split to train on; a slice such as train[:90%] is fine")
    dataset_adapter: str | None = arg(None, help="rows -> rows function: a short name or a dotted path")
    max_rows: int | None = arg(None, help="take so many rows (tiny: make so many; a mixture by weight: in all)")
    dataset_seed: int | None = arg(None, help="seed of tiny's world; none = seed")
    dataset_revision: str | None = arg(None, help="Hub: branch, tag or commit; none = the newest")
    dataset_adapter_options: dict = arg({}, help="the adapter's own keywords, such as {lang: de}")
    dataset_mixture: list[dict] = arg(
        [], help="in place of dataset_name: entries of its keys with a weight or a count each; see README, Data"
    )
    streaming: bool = arg(False, help="read rows while training, for what does not fit in memory")
    on_bad_row: str = arg("stop", help="stop: at the first row that cannot be used; skip: leave it out and count it")
    max_skipped: float = arg(0.5, help="on_bad_row skip: stop all the same where more than this share is bad")
    max_row_chars: int = arg(1_000_000, help="a longer row is a bad row; a line of 16 times that is not even read")
    dedup: str = arg(
        "check", help="check: two rows of one id are a bad row; id, text, both: keep the first of each; none: neither"
    )
    on_leak: str = arg(
        "drop_eval", help="what training and held-out rows share: drop_eval, drop_train, stop or report (count only)"
    )
    leak_kinds: list[str] = arg(
        ["same_first_turn", "same_text", "same_id"], help="what on_leak acts on; ngram_13 is only counted unless named"
    )
    leak_check_datasets: list[str] = arg(
        [], help="more evaluation sets that must not be in training: 'path' or 'user/name config split' each"
    )

    def __post_init__(self):
        if self.dataset_mixture and self.dataset_name is not None:
            raise UserError("dataset_name: with dataset_mixture it must not be set: make it an entry of the mixture")
        if not self.dataset_mixture and not self.dataset_name:
            raise UserError("dataset_name: required and not given; add `--dataset_name tiny`, or a dataset_mixture")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows: found {self.max_rows}, expected at least 1")
        if self.max_row_chars < 1:
            raise UserError(f"max_row_chars: found {self.max_row_chars}, expected at least 1")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"max_skipped: found {self.max_skipped}, expected a share between 0 and 1")
        for key, options in {"on_bad_row": POLICIES, "dedup": DEDUP, "on_leak": ON_LEAK}.items():
            _one_of(key, getattr(self, key), options)
        for kind in self.leak_kinds:
            _one_of("leak_kinds", kind, LEAK_KINDS)
        if self.dataset_adapter_options and self.dataset_adapter is None and not self.dataset_mixture:
            raise UserError("dataset_adapter_options: given without dataset_adapter, whose keywords they are")
        if self.dataset_mixture:
            _check_mixture(self)


def entries(config: DataConfig, split: str) -> list[tuple[DataConfig, str]]:
    """(data keys, split) of each entry of a mixture; of a config without one, its own alone."""
    if not config.dataset_mixture:
        return [(config, split)]
    return [(_alone(config, entry), entry.get("dataset_train_split") or split) for entry in config.dataset_mixture]


def _alone(config: DataConfig, entry: dict) -> DataConfig:
    own = ("dataset_name", "dataset_config", "dataset_adapter", "dataset_revision", "max_rows")
    options = entry.get("dataset_adapter_options") or {}
    return replace(config, dataset_mixture=[], dataset_adapter_options=options, **{key: entry.get(key) for key in own})


def _one_of(key: str, found: str, options: tuple[str, ...]) -> None:
    if found not in options:
        raise UserError(f"{key}: found {found!r}, expected one of {', '.join(options)}{nearest(found, options)}")


def _check_mixture(config: DataConfig) -> None:
    for key in ("dataset_config", "dataset_adapter", "dataset_revision"):
        if getattr(config, key) is not None:
            raise UserError(f"{key}: with dataset_mixture it belongs into the entries, each has its own")
    if config.dataset_adapter_options:
        raise UserError("dataset_adapter_options: with dataset_mixture they belong into the entries")
    used = set()
    for number, entry in enumerate(config.dataset_mixture, 1):
        where = f"dataset_mixture: entry {number}"
        for key, value in entry.items():
            if key not in ENTRY_KEYS:
                near = nearest(key, ENTRY_KEYS) or f"; an entry takes {', '.join(ENTRY_KEYS)}"
                raise UserError(f"{where}: unknown key {key!r}{near}")
            _check_type(f"{where}: {key}", value, ENTRY_KEYS[key])
        if not entry.get("dataset_name"):
            raise UserError(f"{where}: dataset_name is missing; found {', '.join(entry) or 'nothing'}")
        found = {"weight", "count"} & entry.keys()
        if len(found) != 1:
            raise UserError(f"{where}: found {' and '.join(sorted(found)) or 'neither'}, expected a weight or a count")
        used |= found
        try:
            _alone(config, entry)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if len(used) > 1:
        raise UserError("dataset_mixture: some entries have a weight, others a count; expected the same for all")
    if used == {"count"} and config.max_rows is not None:
        raise UserError("max_rows: with counts in dataset_mixture the total is their sum; remove one of the two")


def _check_type(where: str, value, kind: type) -> None:
    if value is None and kind in (str, dict):
        return
    fine = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fine or isinstance(value, bool):
        raise UserError(f"{where}: found {value!r}, expected {TYPES[kind]}")
    if kind in (int, float) and not (value > 0 and math.isfinite(value)):
        raise UserError(f"{where}: found {value}, expected more than 0")
