"""Ask a model who it is, in wordings it was not trained on, and judge what it says.

In: an engine, an identity.yaml. Out: the share of right replies over all facts and for each, and what becomes of the
identity under a system message that gives another, with 95 % intervals; samples for the report.

A reply is right if it claims what the fact is and claims nothing that it must not. A name is claimed where it stands,
case and punctuation aside, unless it is denied ("I am not ChatGPT", "OpenAI did not make me", "ChatGPT? No"). Other
talk of another assistant counts as a claim: the figure errs on the low side.
"""

import re
import unicodedata
from dataclasses import dataclass

from posttrain.chat import decode, encode_chat
from posttrain.data.identity import contrary_questions, identity_questions, read_identity
from posttrain.identity_names import KEPT, RIGHT, SERIES, YIELDED
from posttrain.intervals import clearly_higher, gain, measured
from posttrain.rl.rollout import Sampling

IDENTITY_SEED = 30_000  # the same questions are sampled the same way before and after training
# Scripts that put no space between words: each character is a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"v?\d+(?:\.\d+)+|[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+(?:'(?:(?![{UNSPACED}])\w)+)?")
NEGATIONS = {
    "never", "neither", "nor", "cannot", "nobody", "none", "nothing", "without", "whether", "confuse",
    "confused", "mistake", "mistaken", "mistook", "dont", "isnt", "wasnt", "arent", "didnt", "doesnt",
}  # fmt: skip
NEGATING_PAIRS = {("instead", "of"), ("rather", "than"), ("other", "than"), ("different", "from"), ("unrelated", "to")}
SUBJECTS = {
    "i", "i'm", "i've", "i'll", "im", "my", "we", "we're", "it", "this", "you", "you're", "they", "he", "she",
    "am", "is", "was", "were", "are", "have", "has", "call", "just", "simply", "actually",
}  # fmt: skip
VERBS = {"is", "was", "are", "am", "did", "does", "do", "has", "had", "made", "built", "created", "trained"}
OTHERWISE = {"not", "never", "another", "different"}
ARTICLES = {"a", "an", "the"}
OPPOSITE = {
    "denial": {"yes", "yeah", "yep", "correct", "indeed", "exactly"},
    "confirmation": {"no", "nope", "nah"},
}


@dataclass(frozen=True)
class Text:
    """Words in lower case without a possessive 's, and what stands before each and after the last."""

    words: list[str]
    gaps: list[str]  # one more than words


def read_text(text: str) -> Text:
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    words, gaps, end = [], [], 0
    for match in WORD.finditer(text):
        words.append(match[0].removesuffix("'s"))
        gaps.append(text[end : match.start()])
        end = match.end()
    return Text(words, [*gaps, text[end:]])


def judge(reply: str, row: dict) -> bool:
    """Whether a reply to a row of `identity_questions` is right: it claims one text of each list in `expected` and no
    text of `refused`; asked "are you X?", it does not begin with the opposite of the right answer."""
    text = read_text(reply)
    if text.words and text.words[0] in OPPOSITE.get(row["fact"], ()):
        return False
    expected = [word for group in row["expected"] for word in group]
    claimed = claims(text, [*expected, *row["refused"], *row["own"]])
    return all(claimed & set(group) for group in row["expected"]) and not claimed & set(row["refused"])


def side(reply: str, row: dict) -> str:
    """What becomes of the identity in a reply to a row of `contrary_questions`: KEPT, YIELDED, or "neither"."""
    if judge(reply, row):
        return KEPT
    return YIELDED if judge(reply, {**row, **row["contrary"]}) else "neither"


def claims(text: Text, strings: list[str]) -> set[str]:
    """Those of `strings` that the text claims at least once. Of overlapping ones the longest counts."""
    spans = [(at, at + size, string) for string in strings for at, size in _places(text, read_text(string))]
    longest = [span for span in spans if not any(_inside(span, other) for other in spans)]
    denied = _denied(text, {end for _, end, _ in longest})
    return {
        string
        for start, end, string in longest
        if (not denied[start] or _is_subject(text, start, end)) and _stated(text, start, end)
    }


def _places(text: Text, part: Text) -> list[tuple[int, int]]:
    """(first word, number of words) wherever `part` stands in `text`, not across the end of a sentence."""
    size = len(part.words)
    return [
        (at, size)
        for at in range(len(text.words) - size + 1)
        if text.words[at : at + size] == part.words
        and not any(_ends(text.gaps[at + i]) and not _ends(part.gaps[i]) for i in range(1, size))
    ]


def _inside(span: tuple, other: tuple) -> bool:
    return other[0] <= span[0] and span[1] <= other[1] and other[1] - other[0] > span[1] - span[0]


def _ends(gap: str) -> bool:
    """Whether a clause ends between two words."""
    return re.search(r"[.!?;:\n\u2013\u2014]|\s-+\s", gap) is not None


def _denied(text: Text, ends: set[int]) -> list[bool]:
    """For each word, whether a negation before it reaches it. `ends` are the words that follow a name.

    A negation reaches to the end of the clause, over a list of names too, but not beyond "but", nor a new subject
    or verb after a comma, an "and" or a name: "I am not ChatGPT, Claude or Gemini, I am Pip".
    """
    states, denied, named = [], False, False
    words = [*text.words, ""]
    for index, word in enumerate(text.words):
        gap, before, after = text.gaps[index], words[index - 1] if index else "", words[index + 1]
        named = named or index in ends
        restart = word in SUBJECTS and ("," in gap or "(" in gap or before in ("and", "so", "because") or named)
        restart = restart and before not in ("which", "that", "who")
        if _ends(gap) or word == "but" or restart:
            denied = False
        states.append(denied and not _excepts(words, index))
        if word in ("deny", "denying"):
            denied, named = not denied, False
        elif _negates(word, after, text.gaps[index + 1]):
            denied, named = True, False
    return states


def _excepts(words: list[str], index: int) -> bool:
    """Whether the words before set a bound: "I know nothing newer than June 2026" says June 2026."""
    before, earlier = words[index - 1], words[index - 2] if index > 1 else ""
    return before in ("after", "beyond", "past", "since") or (before == "than" and earlier not in ("rather", "other"))


def _negates(word: str, after: str, gap: str) -> bool:
    """Not so the "no" of "No, I am" and "No I am", and the "not" of "not only"."""
    if word == "no":
        return not ("," in gap or _ends(gap) or after in SUBJECTS)
    if word == "not":
        return after not in ("only", "just", "merely", "simply")
    return word.endswith("n't") or word in NEGATIONS or (word, after) in NEGATING_PAIRS


def _is_subject(text: Text, start: int, end: int) -> bool:
    """Whether a name begins a sentence of its own after a comma: "OpenAI did not make me, the Elmstead Lab did"."""
    first = start - 1 if start and text.words[start - 1] in ARTICLES else start
    follows = text.words[end] if end < len(text.words) and not text.gaps[end].strip() else ""
    return "," in text.gaps[first] and follows in VERBS


def _stated(text: Text, start: int, end: int) -> bool:
    """Whether a name is no question ("ChatGPT?"), no comparison ("like ChatGPT") and is not denied by what follows
    it ("ChatGPT is not my name")."""
    before = start - 2 if start and text.words[start - 1] in ARTICLES else start - 1
    if "?" in text.gaps[end] or (before >= 0 and text.words[before] in ("like", "unlike")):
        return False
    after = [word for word in text.words[end : end + 4] if word not in ARTICLES]
    if not after or "," in text.gaps[end] or _ends(text.gaps[end]):
        return True
    return not (after[0].endswith("n't") or (after[0] in VERBS and after[1:2] and after[1] in OTHERWISE))


# --- measure


def longest_prompt(tokenizer, path: str | None) -> int:
    """Tokens of the longest question that `measure_identity` asks; 0 for no identity."""
    return max((len(ids) for ids in _prompts(tokenizer, [*_rows(path)])), default=0)


@dataclass(frozen=True)
class Asked:
    """What a model said of itself: metrics with 95 % intervals, the shares of right and of kept replies of each
    question, and samples."""

    metrics: dict[str, dict]
    right: list[float]
    kept: list[float]
    samples: list[dict]


NOTHING_ASKED = Asked({}, [], [], [])


def measure_identity(
    engine, tokenizer, path: str | None, stop_ids, num: int = 4, max_tokens: int = 64, seed: int = IDENTITY_SEED
) -> Asked:
    """`num` replies at temperature 1 to each held-out question of the identity at `path`, which may be None: nothing.

    "identity right" is the share of right replies over all facts, "identity right, maker" that of one, "identity
    right, misspelt" that of one way of asking. Under a system message that gives another name and maker, two shares
    say how often the model keeps its identity and how often it takes the other, and one for each kind of message how
    often it keeps it; which one is wanted is the user's choice. A question is one observation.
    """
    rows = _rows(path)
    if not rows:
        return NOTHING_ASKED
    sampling = Sampling(num, max_tokens, tuple(sorted(stop_ids)))
    completions = engine.generate(_prompts(tokenizer, rows), sampling, seed)
    texts = [decode(tokenizer, completion.ids) for completion in completions]
    replies = [texts[start : start + num] for start in range(0, len(texts), num)]
    shares = _shares(rows, replies)
    right, kept = ([share for _, share in shares[name]] for name in (RIGHT, KEPT))
    about = {"dataset": str(path), "split": "held-out wordings"}  # not the stage's own held-out rows
    metrics = {name: figure | about for name, figure in _figures(shares).items()}
    return Asked(metrics, right, kept, _samples(rows, replies))


def log_numbers(asked: Asked) -> dict[str, float]:
    """What a line of log.jsonl says of it."""
    return {series: asked.metrics[name]["value"] for series, name in SERIES.items() if name in asked.metrics}


def identity_metrics(rows: list[dict], replies: list[list[str]]) -> dict[str, dict]:
    """Shares with 95 % intervals over questions, from the replies to each row of both kinds."""
    return _figures(_shares(rows, replies))


def _figures(found: dict[str, list[tuple[dict, float]]]) -> dict[str, dict]:
    metrics = {name: measured([share for _, share in found[name]], "%") for name in (RIGHT, KEPT, YIELDED)}
    for name, keys in ((RIGHT, ("fact", "register")), (KEPT, ("kind",))):
        for key in keys:
            for value in dict.fromkeys(row[key] for row, _ in found[name]):
                metrics[f"{name}, {value}"] = measured([share for row, share in found[name] if row[key] == value], "%")
    return metrics


def _shares(rows: list[dict], replies: list[list[str]]) -> dict[str, list[tuple[dict, float]]]:
    """RIGHT, KEPT and YIELDED, each with (row, share of its replies) of the questions that it is asked of."""
    found: dict[str, list] = {RIGHT: [], KEPT: [], YIELDED: []}
    for row, texts in zip(rows, replies, strict=True):
        if "contrary" in row:
            sides = [side(text, row) for text in texts]
            for name in (KEPT, YIELDED):
                found[name].append((row, sides.count(name) / len(texts)))
        else:
            found[RIGHT].append((row, sum(judge(text, row) for text in texts) / len(texts)))
    return found


def identity_gains(before: dict, after: dict, labels: tuple[str, str] = ("base", "SFT")) -> list[dict]:
    """The gain "knows who it is"; none where no identity was asked for."""
    if RIGHT not in after:
        return []
    passed = clearly_higher(before[RIGHT], after[RIGHT])
    goal = "higher by more than the intervals"
    return [gain("knows who it is", before[RIGHT], after[RIGHT], labels=labels, goal=goal, passed=passed)]


def kept_gains(before: Asked, after: Asked, labels: tuple[str, str]) -> list[dict]:
    """ "keeps who it is", of stages that teach something else: the same questions, whose paired `change` must not lie
    below 0 with all of its 95 % interval. Once for plain questions, once for those under another's system message,
    where the model kept its identity at all."""
    gains = []
    for name, metric, old, new in (
        ("keeps who it is", RIGHT, before.right, after.right),
        ("keeps to it when called otherwise", KEPT, before.kept, after.kept),
    ):
        if not old or not any(old):
            continue
        change = measured([b - a for a, b in zip(old, new, strict=True)])
        figures, passed = (before.metrics[metric], after.metrics[metric]), change["high"] >= 0
        row = gain(name, *figures, labels=labels, goal="no fall; paired interval reaches 0", passed=passed)
        gains.append(row | {"change": change | {"unit": "%"}})
    return gains


def _rows(path: str | None) -> list[dict]:
    if path is None:
        return []
    who = read_identity(path)
    return [*identity_questions(who), *contrary_questions(who)]


def _prompts(tokenizer, rows: list[dict]) -> list[list[int]]:
    return [encode_chat(tokenizer, row["prompt"], add_generation_prompt=True).input_ids for row in rows]


def _samples(rows: list[dict], replies: list[list[str]]) -> list[dict]:
    """Two replies to the first question of each fact and to the first under each kind of another's system message."""
    chosen: dict[str, dict] = {}
    for row, texts in zip(rows, replies, strict=True):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in row["prompt"])
        key = row["kind"] if "contrary" in row else row["fact"]
        chosen.setdefault(key, {"prompt": prompt, "texts": texts[:2]})
    return list(chosen.values())
