"""Pack sequences of different lengths into rows without padding between them.

In: token id lists. Out: `Packed` (input_ids, position_ids and where each sequence stands). Position ids restart at
0 with each sequence; transformers builds a block-diagonal causal mask from that, so sequences never see each
other, on every attention backend (pass no attention_mask and `use_cache=False`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """B rows of S tokens holding N sequences; the tail of a row is one more, ignored, sequence of pads."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor  # (B, S), restarts at each sequence
    starts: list[int]  # (N,) offset of each sequence in the flattened (B * S) tokens
    lengths: list[int]  # (N,)

    def to(self, device) -> "Packed":
        return Packed(self.input_ids.to(device), self.position_ids.to(device), self.starts, self.lengths)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of sequence indices, longest first, each into the fullest row that still takes it (best-fit decreasing).

    A sequence longer than `capacity` gets a row of its own, which then is wider. O(N * capacity) at worst.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> rows
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        free = next((room for room in range(length, capacity + 1) if with_room[room]), None)
        if free is None:
            rows.append([index])
            with_room[max(0, capacity - length)].append(len(rows) - 1)
        else:
            row = with_room[free].pop()
            rows[row].append(index)
            with_room[free - length].append(row)
    return rows


def pack(sequences: list[list[int]], capacity: int, pad_id: int = 0) -> Packed:
    """Pack `sequences` into as few rows of about `capacity` tokens as best-fit finds."""
    rows = best_fit([len(s) for s in sequences], capacity)
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    starts = [0] * len(sequences)
    for row, members in enumerate(rows):
        offset = 0
        for index in members:
            n = len(sequences[index])
            input_ids[row, offset : offset + n] = torch.as_tensor(sequences[index])
            position_ids[row, offset : offset + n] = torch.arange(n)
            starts[index] = row * width + offset
            offset += n
        position_ids[row, offset:] = torch.arange(width - offset)
    return Packed(input_ids, position_ids, starts, [len(s) for s in sequences])


def by_tokens(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Split indices into micro-batches of at most `max_tokens` tokens (a longer sequence stands alone).

    Sorted by length so that a micro-batch packs tightly; every index appears once.
    """
    batches: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or total + lengths[index] > max_tokens:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += lengths[index]
    return batches
