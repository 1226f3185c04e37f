"""Splits and their slices: `train`, `train[10:20]`, `train[:90%]`, `test[-100:]`.

In: a split as the config names it, rows. Out: the split's name and the rows of the slice, in their order.
"""

import re
from collections.abc import Iterable
from itertools import islice

from posttrain.errors import UserError

SLICE = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def parse_split(split: str):
    """`train[10:20]`, `train[:90%]`, `train[-100:]` -> ("train", function of the row count that gives the slice)."""
    base, *bounds = _parts(split)

    def at(bound: str | None, size: int) -> int | None:
        if bound is None:
            return None
        return size * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)

    return base, lambda size: slice(at(bounds[0], size), at(bounds[1], size))


def cut(rows: Iterable, split: str) -> list:
    """The rows of the slice; all are read."""
    rows = list(rows)
    return rows[parse_split(split)[1](len(rows))]


def cut_stream(rows: Iterable, split: str) -> Iterable:
    """As `cut`, read no further than needed. UserError for bounds that only the number of rows gives a meaning."""
    _, start, stop = _parts(split)
    if any(bound is not None and (bound.endswith("%") or bound.startswith("-")) for bound in (start, stop)):
        raise UserError(
            f"split: found {split!r}, but with streaming the number of rows is not known: expected bounds that count "
            "from the beginning, such as train[:1000], or streaming: false"
        )
    return islice(rows, int(start or 0), None if stop is None else int(stop))


def _parts(split: str) -> tuple[str, str | None, str | None]:
    match = SLICE.fullmatch(split)
    if not match:
        raise UserError(f"split: found {split!r}, expected a name or a slice such as train[:90%]")
    return match.groups()
