"""Byte n-grams with Witten-Bell interpolation down to the uniform distribution, counted with numpy.

In: training texts. Out: bits per byte of other texts for each length of context. As `base_evals.ByteTrigram` for
contexts of two bytes, but for tens of megabytes and contexts of up to seven.

    p_n(b | c) = (count(c b) + kinds(c) p_{n-1}(b | c')) / (count(c) + kinds(c))      Witten & Bell 1991

with c' the context without its first byte and kinds(c) the number of different bytes seen after c. A context that was
never seen leaves p_{n-1} as it is. Contexts do not reach over the beginning of a text.
"""

import numpy as np

from posttrain.intervals import measured_ratio


class ByteNgrams:
    """`order`: the longest context in bytes, up to 7: context and byte are one 64-bit number."""

    def __init__(self, texts: list[str], order: int):
        if not 0 <= order <= 7:
            raise ValueError(f"order: found {order}, expected 0 to 7 bytes of context")
        self.order, self.tables = order, []
        data, places = joined(texts)
        for length in range(order + 1):
            self.tables.append(count(keys(data, length)[places >= length]))

    def probabilities(self, texts: list[str]) -> list[np.ndarray]:
        """For contexts of up to 0, 1, ... `order` bytes: the probability of each byte of the texts, end to end."""
        data, places = joined(texts)
        p, found = np.full(len(data), 1 / 256), []
        for length, (pairs, counts, contexts, totals, kinds) in enumerate(self.tables):
            known = keys(data, length)
            at = look_up(contexts, known >> np.uint64(8))
            usable = (at >= 0) & (places >= length)
            at, pair = at[usable], look_up(pairs, known[usable])
            seen = np.where(pair >= 0, counts[pair], 0) if len(counts) else 0
            p = p.copy()
            p[usable] = (seen + kinds[at] * p[usable]) / (totals[at] + kinds[at])
            found.append(p)
        return found

    def bits_per_byte(self, texts: list[str]) -> dict[int, dict]:
        """Length of context, 1 to `order` -> bits per byte with its interval over texts."""
        sizes = [size for text in texts if (size := len(text.encode()))]
        starts = np.cumsum([0, *sizes[:-1]])
        found = {}
        for length, p in enumerate(self.probabilities(texts)):
            bits = np.add.reduceat(-np.log2(p), starts)
            found[length] = measured_ratio(bits.tolist(), sizes, "bits/byte")
        del found[0]
        return found


def joined(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(all bytes (N,) uint8, the place of each in its text (N,))."""
    encoded = [text.encode() for text in texts]
    places = np.concatenate([np.arange(len(each), dtype=np.uint32) for each in encoded])
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), places


def keys(data: np.ndarray, length: int) -> np.ndarray:
    """(N,) uint64: each byte in the lowest 8 bits, the one before it in the next, `length` bytes back. Where fewer
    stand before it, those missing are 0; callers leave such places out."""
    found = data.astype(np.uint64)
    for back in range(1, length + 1):
        found[back:] |= data[:-back].astype(np.uint64) << np.uint64(8 * back)
    return found


def count(found: np.ndarray) -> tuple[np.ndarray, ...]:
    """(context and byte, its count; context, its total, its kinds), keys in order."""
    pairs, counts = np.unique(found, return_counts=True)
    contexts, starts, kinds = np.unique(pairs >> np.uint64(8), return_index=True, return_counts=True)
    return pairs, counts, contexts, np.add.reduceat(counts, starts), kinds


def look_up(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(N,) the place of each in `ordered`, -1 where it is not there."""
    if not len(ordered):  # no text was as long as this context
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)
