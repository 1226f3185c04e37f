"""Rows that are read while they are used: nothing is kept but a buffer.

In: a function that starts a new pass over some rows. Out: a `Stream`, which can be iterated again and again (each
pass is an epoch and gives the same rows in the same order) and continued in the middle:

    for epoch in range(2):
        for row in shuffled(stream, buffer=10_000, seed=0, epoch=epoch): ...
    rows = shuffled(stream, buffer=10_000, seed=0, epoch=1).skip(12_345)    # exactly what would have come next
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from posttrain.data.mixture import schedule
from posttrain.errors import UserError


class Stream:
    """Rows to be read anew with every `iter()`; `description()` is what the manifest says of them."""

    def __init__(self, start: Callable[[], Iterator[dict]], description: Callable[[], dict] = dict):
        self.start, self.description = start, description

    def __iter__(self) -> Iterator[dict]:
        return self.start()

    def skip(self, num: int) -> Iterator[dict]:
        """One pass without its first `num` rows. They are read, since only so the rest is what it would have been."""
        return islice(self.start(), num, None)

    def without(self, is_seen: Callable[[dict], bool]) -> "Stream":
        """The rows for which `is_seen` is false; how many were left out stands in the description as `leaked`."""
        left_out = [0]

        def start():
            left_out[0] = 0
            for row in self:
                if is_seen(row):
                    left_out[0] += 1
                else:
                    yield row

        return Stream(start, lambda: {**self.description(), "leaked": left_out[0]})


def shuffled(stream: Stream, buffer: int, seed: int, epoch: int = 0) -> Stream:
    """The rows of a stream in the order of a seeded shuffle through a buffer of so many rows.

    The buffer is filled; then each row that goes out is drawn from it at random and replaced by the next one of the
    stream. With a buffer as large as the stream it is a shuffle of all. Every row comes exactly once a pass; the
    order is a pure function of the rows, `buffer`, `seed` and `epoch`.
    """
    if buffer < 1:
        raise UserError(f"shuffle buffer: found {buffer}, expected at least 1 row")

    def start() -> Iterator[dict]:
        rng, rows = random.Random(f"shuffle-{seed}-{epoch}"), iter(stream)
        held = list(islice(rows, buffer))
        for row in rows:
            index = rng.randrange(buffer)
            held[index], row = row, held[index]
            yield row
        rng.shuffle(held)
        yield from held

    return Stream(start, stream.description)


def interleaved(streams: list[Stream], weights: list[float], total: int | None) -> Iterator[dict]:
    """One pass over several streams, row by row in proportion to the weights (see `mixture.schedule`).

    With a `total` it ends after so many rows, and a stream that ends before begins again. Without one it ends where a
    stream that has ended would have to give the next row, so that none repeats.
    """
    passes = [iter(stream) for stream in streams]
    for source in islice(schedule(weights), total):
        row = next(passes[source], None)
        if row is None and total is None:
            return
        if row is None:
            passes[source] = iter(streams[source])
            row = next(passes[source], None)
        if row is None:
            raise UserError(f"dataset_mixture: entry {source + 1} has no rows")
        yield row
