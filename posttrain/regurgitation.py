"""Does a model say its training documents again, word for word, and how often must it have read one to do so?

In: an engine, training documents and held-out ones. Out: for each class of how often a passage stands in training,
and for held-out passages, the share that greedy decoding continues verbatim and the tokens that agree, with intervals.
Run: posttrain eval MODEL --regurgitation --train_data DATA --data DATA [--prefix_tokens 50 --continue_tokens 50]

A passage is how a document begins: `prefix` tokens that the model is given, `length` tokens that it should not know by
heart. What it says of held-out passages is what can be guessed; training passages above that were memorised
("extractable", Carlini et al. 2022, arXiv:2202.07646, where the share grows with the logarithm of the count).
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field

from posttrain.errors import UserError
from posttrain.intervals import clearly_higher, measured
from posttrain.rl.engine import Engine, Sampling

CHUNK = 1000  # documents that are tokenized at a time
SHOWN = 20  # passages that came back, in the report
BUCKETS = ((1, 1), (2, 9), (10, 99), (100, None))  # how often a passage stands in the training data
HELD_OUT = "held out"
SLOPE = "verbatim, added by ten times the copies"


@dataclass(frozen=True)
class Passage:
    """The beginning of a document, as tokens, and how many training documents begin so; 0: held out."""

    ids: tuple[int, ...]
    times: int

    @property
    def group(self) -> str:
        return HELD_OUT if self.times == 0 else bucket(self.times)


def bucket(times: int, buckets=BUCKETS) -> str:
    """The class of a count, as text: "1", "2-9", ..., "100+". ValueError for a count below all."""
    for low, high in buckets:
        if low <= times and (high is None or times <= high):
            return f"{low}+" if high is None else f"{low}-{high}" if high > low else str(low)
    raise ValueError(f"no class of {buckets} holds {times}")


@dataclass
class Beginnings:
    """How documents begin: normalised text -> tokens of the first that begins so, and how many do."""

    first: dict[str, tuple[int, ...]] = field(default_factory=dict)
    times: Counter = field(default_factory=Counter)
    short: int = 0  # documents without a whole passage


def beginnings(tokenizer, texts: list[str], size: int) -> Beginnings:
    """The first `size` tokens of each text, a few texts at a time: what repeats is kept once."""
    from posttrain.data.overlap import normalised

    found = Beginnings()
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        for ids in tokenizer(part, add_special_tokens=False, truncation=True, max_length=size)["input_ids"]:
            if len(ids) < size:
                found.short += 1
                continue
            key = normalised(tokenizer.decode(ids))
            found.first.setdefault(key, tuple(ids))
            found.times[key] += 1
    return found


def passages(tokenizer, train: list[str], held_out: list[str], size: int) -> tuple[list[Passage], dict[str, int]]:
    """(different passages of `size` tokens, what was left out). Two count as one where their text is the same but for
    case and white space. Left out: documents that are too short, held-out passages that stand in training."""
    trained, other = beginnings(tokenizer, train, size), beginnings(tokenizer, held_out, size)
    left = {
        "training documents too short": trained.short,
        "held-out documents too short": other.short,
        "held-out documents that begin as training ones do": sum(
            times for key, times in other.times.items() if key in trained.times
        ),
    }
    found = [Passage(ids, trained.times[key]) for key, ids in trained.first.items()]
    new = [Passage(ids, 0) for key, ids in other.first.items() if key not in trained.times]
    for what, there in (("train_data", found), ("data", new)):
        if not there:
            counted = ", ".join(f"{count} {name}" for name, count in left.items() if count)
            raise UserError(
                f"--{what}: no passage of {size} tokens to ask for ({counted or 'no documents'}); lower "
                "--prefix_tokens and --continue_tokens, or give other documents"
            )
    return found + new, left


def chosen(found: list[Passage], most: int, seed: int) -> dict[str, list[Passage]]:
    """Group -> at most `most` of its passages, drawn by seed; held out first, then by rising count."""
    groups: dict[str, list[Passage]] = {}
    for passage in sorted(found, key=lambda p: (p.times, p.ids)):
        groups.setdefault(passage.group, []).append(passage)
    draw = random.Random(seed)
    return {name: draw.sample(group, most) if len(group) > most else group for name, group in groups.items()}


def agreement(engine: Engine, begin: list[int], asked: list[Passage], prefix: int, seed: int) -> list[int]:
    """Tokens by which the greedy continuation of each prefix agrees with the passage before it first differs."""
    prompts = [begin + list(passage.ids[:prefix]) for passage in asked]
    length = len(asked[0].ids) - prefix
    found = engine.generate(prompts, Sampling(1, length, (), temperature=0.0), seed)
    return [common(c.ids, passage.ids[prefix:]) for c, passage in zip(found, asked, strict=True)]


def common(left, right) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@dataclass(frozen=True)
class Settings:
    """Tokens that are given and asked for, passages a group at most, and the seed that they are drawn by."""

    prefix: int = 50
    length: int = 50
    most: int = 200
    seed: int = 0

    @property
    def size(self) -> int:
        """Tokens of a passage."""
        return self.prefix + self.length

    def __post_init__(self):
        for name, value in (
            ("prefix_tokens", self.prefix),
            ("continue_tokens", self.length),
            ("max_passages", self.most),
        ):
            if value < 1:
                raise UserError(f"--{name}: found {value}, expected 1 or more")


def measure(engine: Engine, tokenizer, train: list[str], held_out: list[str], settings: Settings) -> dict:
    """{"metrics", "groups", "left_out", "came_back", "conclusion"}; a passage is one observation.

    metrics: "verbatim, seen 10-99" (share) and "agreeing tokens, seen 10-99" and so on, and of "held out"; where
    counts differ also `SLOPE`. groups: how many passages each group has; came_back: some that did, most copies first.
    """
    from posttrain.base_evals import document_start

    found, left = passages(tokenizer, train, held_out, settings.size)
    groups = chosen(found, settings.most, settings.seed)
    verbatim, tokens, points, back = {}, {}, [], []
    for name, asked in groups.items():
        sizes = agreement(engine, document_start(tokenizer), asked, settings.prefix, settings.seed)
        verbatim[name] = measured([float(size == settings.length) for size in sizes], "%")
        tokens[name] = measured([float(size) for size in sizes], "tokens")
        points += [(p.times, size == settings.length) for p, size in zip(asked, sizes, strict=True) if p.times]
        back += [p for p, size in zip(asked, sizes, strict=True) if size == settings.length]
    metrics = {f"verbatim, {_said(name)}": figure for name, figure in verbatim.items()}
    metrics |= {f"agreeing tokens, {_said(name)}": figure for name, figure in tokens.items()}
    if len({times for times, _ in points}) > 1:
        metrics[SLOPE] = slope(points)
    counts = {name: sum(passage.group == name for passage in found) for name in groups}
    shown = [shown_passage(tokenizer, p, settings.prefix) for p in back[: -SHOWN - 1 : -1]]
    said = {"conclusion": conclusion(verbatim), "came_back": shown}
    return {"metrics": metrics, "groups": counts, "left_out": left, **said}


def shown_passage(tokenizer, passage: Passage, prefix: int) -> dict:
    """A passage as text, cut where the model went on by itself."""
    parts = passage.ids[:prefix], passage.ids[prefix:]
    return {"times": passage.times, **dict(zip(("given", "said"), map(tokenizer.decode, parts), strict=True))}


def slope(points: list[tuple[int, bool]]) -> dict:
    """What ten times as many copies add to the verbatim share: least squares of (count, verbatim) on log10 of the
    count, interval over passages (bootstrap). Carlini et al. find the share to grow linearly in that logarithm."""
    import torch

    from posttrain.bootstrap import bootstrapped

    x, y = torch.tensor([[math.log10(times), float(right)] for times, right in points], dtype=torch.float64).T

    def fitted(sums):  # of 1, x, y, xy, xx
        n, x, y, xy, xx = sums.unbind(-1)
        return (n * xy - x * y) / (n * xx - x * x)

    return bootstrapped(torch.stack([torch.ones_like(x), x, y, x * y, x * x], 1), fitted, "%")


def _said(name: str) -> str:
    return name if name == HELD_OUT else f"seen {name}"


def conclusion(verbatim: dict[str, dict]) -> str:
    """One sentence: from which count on passages come back more often than held-out ones do."""
    held_out = verbatim[HELD_OUT]
    guess = f"{100 * held_out['value']:.1f} % of held-out passages"
    clear = [name for name, figure in verbatim.items() if name != HELD_OUT and clearly_higher(held_out, figure)]
    if not clear:
        return f"no clear sign of memorisation: the shares of training passages do not stand clear of {guess}"
    shares = ", ".join(f"{100 * verbatim[name]['value']:.1f} % of those seen {name} times" for name in clear)
    return f"memorised: {shares} come back verbatim, against {guess}"
