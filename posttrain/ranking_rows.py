"""Rows of human preference -> encoded rankings.

In: rows `prompt`, `completions` best to worst with `ranks` (equal = tie; none = each its own), or `prompt`, `chosen`,
`rejected`, which is K = 2; K may differ by row. A `margin` says by how much a reply shall beat the one ranked next:
a number, or a list with one for each step from a rank to the next. Out: `Ranking`s.
"""

from dataclasses import dataclass, field
from functools import cached_property

from posttrain.chat import encode_chat, reply_end_id
from posttrain.data import MESSAGES, are_messages
from posttrain.errors import UserError
from posttrain.layouts import shared_size
from posttrain.ranking_losses import MOST_TIED, tie_groups


@dataclass
class Ranking:
    """K encoded replies with their prompt, best to worst."""

    sequences: list[list[int]]
    ranks: list[int]  # non-decreasing; equal = tie
    row: int
    margins: list[float] = field(default_factory=list)  # (K,) 0 for the best, rising with the rank; empty = none

    @cached_property
    def size(self) -> int:
        """Tokens where those that all sequences begin with stand once."""
        return shared_size(self.sequences)


def replies_of(row: dict) -> list[list[dict]]:
    """A row's completions, best first."""
    return row.get("completions") or [row[key] for key in ("chosen", "rejected") if key in row]


def encode_rankings(tokenizer, rows: list[dict], max_length: int, ties: str = "average") -> tuple[list[Ranking], int]:
    """(rankings, number left out as too long). UserError naming the row where a ranking is malformed.

    A sequence ends with the token that closes the reply: a sampled reply has none of what a template puts after it.
    """
    rankings, too_long, end = [], 0, reply_end_id(tokenizer)
    for index, row in enumerate(rows):
        completions = replies_of(row)
        ranks = _ranks(row, len(completions), index, ties)
        for messages in (row["prompt"], *completions):
            if not are_messages(messages):
                raise UserError(f"row {index}: found {str(messages)[:80]!r}, expected {MESSAGES}")
        sequences = [encode_chat(tokenizer, [*row["prompt"], *reply]).input_ids for reply in completions]
        sequences = [ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids for ids in sequences]
        if max(map(len, sequences)) > max_length:
            too_long += 1
        else:
            rankings.append(Ranking(sequences, ranks, index, _margins(row, ranks, index)))
    if not rankings:
        raise UserError(f"all {len(rows)} rankings have a reply longer than max_length {max_length} tokens: raise it")
    return rankings, too_long


def _ranks(row: dict, num: int, index: int, ties: str) -> list[int]:
    ranks = list(row.get("ranks") or range(num))
    numbers = all(isinstance(rank, int | float) and not isinstance(rank, bool) for rank in ranks)
    if num < 2 or len(ranks) != num or not numbers or sorted(ranks) != ranks:
        raise UserError(
            f"row {index}: {num} completions with ranks {ranks}; expected two or more completions, "
            "best first, with as many ranks in rising order (equal = tie)"
        )
    widest = max(last - first for first, last in tie_groups(ranks))
    if ties == "average" and widest > MOST_TIED:
        raise UserError(
            f"row {index}: {widest} completions share a rank; ties: average takes at most {MOST_TIED}, since it "
            "averages over all their orders: leave some out, or --ties breslow"
        )
    return ranks


def _margins(row: dict, ranks: list[int], index: int) -> list[float]:
    """Of each completion, the sum of the steps from the best rank down to its own."""
    margin, groups = row.get("margin"), tie_groups(ranks)
    if margin is None:
        return []
    steps = margin if isinstance(margin, list) else [margin] * (len(groups) - 1)
    fine = all(isinstance(step, int | float) and not isinstance(step, bool) and 0 <= step < 1e6 for step in steps)
    if len(steps) != len(groups) - 1 or not fine:
        raise UserError(
            f"row {index}: margin {margin!r}; expected a number of at least 0, or a list of one for each of the "
            f"{len(groups) - 1} steps from a rank to the next"
        )
    sums = [float(sum(steps[:place])) for place in range(len(groups))]
    return [total for total, (first, last) in zip(sums, groups, strict=True) for _ in range(last - first)]
