"""Rows for the tokenizer's stage: in memory, or with `streaming` read while the tokenizer is trained.

In: the data and evaluation keys of a config. Out: training rows, held-out rows and what the manifest says of both.
"""

from collections.abc import Iterable

from posttrain import evals
from posttrain.data import DataConfig, EvalIndex, Stream, load_rows, stream_rows
from posttrain.errors import UserError

COLUMNS = ("text",)


def eval_columns(group_by: str | None) -> tuple[str, ...]:
    """The columns that held-out rows need."""
    return COLUMNS if group_by is None else (*COLUMNS, group_by)


def load_texts(
    data: DataConfig, held_out: evals.EvalConfig, seed: int, group_by: str | None
) -> tuple[Iterable[dict], list[dict], list[dict]]:
    """(training rows, held-out rows, their descriptions).

    With `streaming` the first is a `Stream`, which leaves out what the held-out rows share with it: they are known
    before it is read. Else the held-out rows are what gives way (see `on_leak`).
    """
    if not data.streaming:
        return evals.load_both(data, held_out, seed, COLUMNS, eval_columns(group_by))
    if data.on_leak == "stop" or data.leak_check_datasets:
        raise UserError(
            "on_leak, leak_check_datasets: with streaming, training rows that held-out rows share are left out, and "
            "nothing else can be checked before they are read: leave on_leak, or set it to drop_train or report"
        )
    test, facts = load_rows(evals.eval_data(data, held_out), held_out.eval_dataset_split, seed, eval_columns(group_by))
    index = EvalIndex(test)

    def is_seen(row: dict) -> bool:
        return any(found for kind, found in index.equal(row).items() if kind in data.leak_kinds)

    stream = stream_rows(data, data.dataset_train_split, seed, COLUMNS)
    stream = stream if data.on_leak == "report" else stream.without(is_seen)
    return stream, test, [stream.description(), facts]


def describe_read(facts: dict, rows: Iterable[dict], read: dict) -> None:
    """Add to the training rows' entry in the manifest what of them was read: `Limited.facts` as `read`, and of a
    stream, which nobody had read before, the rows that were left out."""
    if isinstance(rows, Stream):
        facts |= rows.description() | {"rows": read["rows"]}
    facts["read"] = read
