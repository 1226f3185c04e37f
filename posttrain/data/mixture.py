"""Several data sets in one: how many rows of each, which ones, in which order. Pure functions of sizes and a seed.

In: weights or counts, and how many rows each source has. Out: `(source, index)` pairs in training order:

    counts = apportion([0.7, 0.3], 1000)          # [700, 300], exact for any weights
    order = picks(sizes, counts, seed=0)          # each source's rows once before any comes again, then shuffled

For what is read while training, `schedule` says which source gives the next row.
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction

from posttrain.errors import UserError


def shares(weights: list[float]) -> list[Fraction]:
    """Weights as exact shares of 1: 0.1 is a tenth, not the binary number nearest to it."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def apportion(weights: list[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each less than one away from its exact share (largest remainders, after
    Hamilton; of equal remainders the first)."""
    exact = [share * total for share in shares(weights)]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def largest_total(weights: list[float], sizes: list[int]) -> int:
    """The most rows of which no source's exact share is more than it has, so that none has to repeat."""
    return min(int(size / share) for size, share in zip(sizes, shares(weights), strict=True))


def plan(mixture: list[dict], names: list[str], sizes: list[int], max_rows: int | None) -> list[int]:
    """How many rows each entry gives. UserError for one that would give none."""
    if "count" in mixture[0]:
        return [entry["count"] for entry in mixture]
    weights = [entry["weight"] for entry in mixture]
    total = largest_total(weights, sizes) if max_rows is None else max_rows
    counts = apportion(weights, total)
    if 0 in counts:
        none = counts.index(0)
        raise UserError(
            f"dataset_mixture: entry {none + 1} ({names[none]}) with weight {weights[none]} has none of {total} rows: "
            "raise its weight or max_rows, or remove it"
        )
    return counts


def picks(sizes: list[int], counts: list[int], seed: int) -> list[tuple[int, int]]:
    """(source, index) of each row in training order, shuffled by the seed.

    Of a source that has as many rows as are asked for or fewer all come, whole times over, and a seeded sample of
    them for the rest; of a larger one a seeded sample.
    """
    order = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        whole, rest = divmod(count, size)
        sample = random.Random(f"mixture-{seed}-{source}").sample(range(size), rest)
        order += [(source, index) for index in [*range(size)] * whole + sample]
    random.Random(f"mixture-{seed}").shuffle(order)
    return order


def schedule(weights: list[float]) -> Iterator[int]:
    """Which source gives the next row, without end: always the one that is furthest below its share.

    After any number of rows each of k sources has given less than one row above its exact share, and less than k - 1
    below it: what they are short of adds up to 0, and the one chosen was short of 1 / k at least.
    """
    exact = shares(weights)
    unit = math.lcm(*(share.denominator for share in exact))
    parts, short = [int(share * unit) for share in exact], [0] * len(exact)
    while True:
        short = [have + part for have, part in zip(short, parts, strict=True)]
        source = short.index(max(short))
        short[source] -= unit
        yield source
