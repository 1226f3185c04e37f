"""The order in which rows are taken: a pure function of step and seed, so that a resumed run continues exactly."""

import random
from array import array
from functools import lru_cache


def shuffled_indices(step: int, num: int, size: int, seed: int) -> list[int]:
    """Which of `size` rows step `step` takes, `num` a step: slices of an endless row of seeded shuffles.

    Every row comes once before any comes again; nothing is skipped or repeated by an interruption.
    """
    return taken_indices(step * num, num, size, seed)


def taken_indices(start: int, num: int, size: int, seed: int) -> list[int]:
    """`num` rows from place `start` of that endless row."""
    positions = range(start, start + num)
    return [_order(position // size, size, seed)[position % size] for position in positions]


@lru_cache(maxsize=4)
def _order(epoch: int, size: int, seed: int) -> array:
    order = array("q", range(size))  # 8 bytes a row: pretraining has tens of millions of chunks
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order
