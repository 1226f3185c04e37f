"""What training and evaluation rows have in common. Pure functions on lists of rows.

In: rows of both. Out: which rows of either share something with the other, by kind, counted in rows of the evaluation:

- same_first_turn  the first user turn (or, of texts, the whole row) is the same: rows of one tree
- same_text        the same after NFKC, case folding and with white space as one space
- same_id          the same `message_id`
- ngram_13         13 words in a row, without case and punctuation, stand in both (Brown et al. 2020, arXiv 2005.14165,
                   appendix C). As there, what stands in more than 10 training rows is a common phrase and not counted;
                   rows with the same first turn count as one, so that a question asked often is still found. System
                   turns are left out, and a row of fewer than 13 words has none: same_text is for those.

    find_overlap(train, test).test["same_text"]          # indices of test rows
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from posttrain.data.config import LEAK_KINDS
from posttrain.data.validate import id_of, row_key, texts_of

NGRAM, COMMON = 13, 10
# Any 13 words in a row hold 7 that begin at a multiple of 7: looking for those first reads a text seven times faster.
ANCHOR = 7
WORD = re.compile(r"\w+")
TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


def origin(row: dict) -> str:
    """What a row is about: its first user turn, which rows of one tree share, else the whole row."""
    turns = row.get("prompt") or row.get("messages")
    if isinstance(turns, list):
        users = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
        turns = next(users, None)
    return turns if isinstance(turns, str) else row_key(row)


@lru_cache(maxsize=8)  # a row's texts are looked at twice
def normalised(text: str) -> str:
    """NFKC, case folded, white space as one space."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split())


def words_of(text: str) -> list[str]:
    """The words of a text without case and punctuation."""
    return WORD.findall(normalised(text))


def spoken(row: dict) -> list[tuple[str, str]]:
    """What of a row a model reads or writes: (role, text) of each turn, (column, text) of plain texts."""
    found, replies = [], row.get("completions")
    columns = [(key, row[key]) for key in TEXTS if key in row]
    for column, turns in columns + [
        ("completions", reply) for reply in (replies if isinstance(replies, list) else ())
    ]:
        if isinstance(turns, str):
            found.append((column, turns))
        elif isinstance(turns, list):
            said = ((turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict))
            found += ((role, text) for role, text in said if isinstance(text, str))
    return found


def _passages(row: dict) -> list[str]:
    return [text for role, text in spoken(row) if role != "system"]


def same_text_key(row: dict, first: str) -> str:
    """Rows with equal keys ask or say the same; `first` is the row's `origin`."""
    is_text = isinstance(row.get("text"), str) and not row.get("messages") and not row.get("prompt")
    return normalised(row["text"] if is_text else first)


@dataclass
class Overlap:
    """kind -> indices of the evaluation rows and of the training rows that share something."""

    test: dict[str, set[int]] = field(default_factory=lambda: {kind: set() for kind in LEAK_KINDS})
    train: dict[str, set[int]] = field(default_factory=lambda: {kind: set() for kind in LEAK_KINDS})

    def numbers(self) -> dict[str, int]:
        return {kind: len(found) for kind, found in self.test.items()}


class EvalIndex:
    """The evaluation's rows, looked up by what training rows may share with them. It is small; training may be long.

    `raw` rows are those of a set in a layout of its own (question, answer, ...): each of their texts counts.
    """

    def __init__(self, test: list[dict], raw: bool = False):
        self.test, self.raw = test, raw
        self.first_turns, self.texts, self.ids = defaultdict(set), defaultdict(set), defaultdict(set)
        self.ngrams, self.anchors = set(), set()
        for index, row in enumerate(test):
            first = origin(row)
            self.first_turns[first].add(index)
            self.texts[same_text_key(row, first)].add(index)
            if row.get("message_id") is not None:
                self.ids[row["message_id"]].add(index)
            for text in self._passages(row):
                if raw and len(text.split()) > 3:  # a name, a label or "yes" would be found in anything
                    self.first_turns[text].add(index)
                    self.texts[normalised(text)].add(index)
                words = words_of(text)
                if len(words) >= NGRAM:
                    self.ngrams.update(_ngrams(words, NGRAM))
                    self.anchors.update(_ngrams(words, ANCHOR))

    def _passages(self, row: dict) -> list[str]:
        return list(texts_of(row)) if self.raw else _passages(row)

    def equal(self, row: dict) -> dict[str, set[int]]:
        """kind -> evaluation rows that are equal to this training row in a way, n-grams apart."""
        first, none = origin(row), frozenset()
        return {
            "same_first_turn": self.first_turns.get(first, none),
            "same_text": self.texts.get(same_text_key(row, first), none),
            "same_id": self.ids.get(row.get("message_id"), none) if self.ids else none,
        }

    def shared_ngrams(self, row: dict) -> set[str]:
        """The 13-grams of this training row that stand in evaluation rows."""
        found = set()
        for text in _passages(row) if self.ngrams else ():
            if len(text) < 2 * NGRAM - 1:
                continue
            words = words_of(text)
            for at in range(0, len(words) - ANCHOR + 1, ANCHOR):
                if " ".join(words[at : at + ANCHOR]) in self.anchors:
                    near = words[max(0, at - NGRAM + ANCHOR) : at + NGRAM]
                    found.update(gram for gram in _ngrams(near, NGRAM) if gram in self.ngrams)
        return found

    def holding(self, ngrams: Container[str]) -> set[int]:
        """The evaluation rows in which one of these 13-grams stands."""
        texts = ((index, text) for index, row in enumerate(self.test) for text in self._passages(row))
        return {index for index, text in texts if any(gram in ngrams for gram in _ngrams(words_of(text), NGRAM))}

    def is_seen(self, row: dict, kinds: Iterable[str]) -> bool:
        """Whether a training row shares something of these kinds; for a stream, where no phrase is known as common."""
        equal = self.equal(row)
        return any(equal[kind] if kind in equal else self.shared_ngrams(row) for kind in kinds)


def _ngrams(words: list[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def find_overlap(train: Iterable[dict], test: list[dict], raw: bool = False, ngrams: bool = True) -> Overlap:
    """Which rows of training and evaluation share something, one pass over the training rows."""
    index, overlap = EvalIndex(test, raw), Overlap()
    if not ngrams:
        index.ngrams.clear()
    holders: dict[str, dict[str, list[int]]] = {}  # n-gram -> first turn -> training rows, until it is a common phrase
    for number, row in enumerate(train):
        for kind, found in index.equal(row).items():
            if found:
                overlap.test[kind] |= found
                overlap.train[kind].add(number)
        for gram in index.shared_ngrams(row):
            rows = holders.setdefault(gram, {})
            rows.setdefault(origin(row), []).append(number)
            if len(rows) > COMMON:
                del holders[gram]
                index.ngrams.remove(gram)
    if holders:
        overlap.test["ngram_13"] = index.holding(holders)
        overlap.train["ngram_13"] = {n for rows in holders.values() for numbers in rows.values() for n in numbers}
    return overlap


class Unique:
    """Tells rows that came before, over all sources of a mixture: `dedup` of a config.

    Two ways of being the same: an equal id (`message_id` names a message wherever it stands, `id` only within its
    own source), or equal turns after normalisation.
    """

    def __init__(self, policy: str):
        self.by_id, self.by_text = policy in ("id", "both"), policy in ("text", "both")
        self.seen, self.source, self.counts = set(), 0, Counter()

    def begin(self) -> Counter:
        """Of a new source; the counter of what it leaves out."""
        self.source, self.counts = self.source + 1, Counter()
        return self.counts

    def is_new(self, row: dict) -> bool:
        keys = {}
        if self.by_id and (given := id_of(row)):
            keys["id"] = given if given[0] == "message_id" else (*given, self.source)
        if self.by_text:
            said = "\0".join(f"{kind}\0{normalised(text)}" for kind, text in spoken(row))
            keys["text"] = hashlib.sha256(said.encode()).digest()
        known = next((kind for kind, key in keys.items() if key in self.seen), None)
        if known is not None:
            self.counts[known] += 1
            return False
        self.seen.update(keys.values())
        return True
