"""Rewards for facts: right pays more than "I do not know", and that pays more than a wrong answer.

In: completions (strings or message lists) and the columns `answer` (a name, a word, a number; "" where nobody knows
it) and `others` (values of the same kind that are wrong for this question; may be []). Out: a score each, None where
`answer` is None. `questions.jsonl` of a probe (posttrain/probe.py) has these columns. A row whose `others` is None is
a problem to solve, not a fact to know: it is judged as the reward `correct` does, so both can be trained on at once.
Where rows have the column `subject`, the name of whom a question is about, a fact told of somebody else is wrong.

    reward_funcs: [honest]
    reward_options: {honest: {wrong: -2.0}}

With pay r for right, 0 for a refusal and w for wrong, a guess pays off where it is right with a probability above
-w / (r - w): the default asks for 50 %, wrong: -3 for 75 %. Where a wrong answer costs no more than a refusal, what is
learned is to guess (Kalai et al. 2509.04664).

One answer is read from a completion, never several: naming `others`, another number as long as the right one, an "or"
beside the answer, "not Arvale", "Arvale?" or a reply of more than MAX_WORDS words is wrong. Asked about Ada Brown, so
is "Ada Browning lives in Arvale": a name of as many words as hers that shares one with it, or that opens a sentence.
"""

import re
import unicodedata

from posttrain.errors import UserError
from posttrain.identity_eval import claims, read_text
from posttrain.refusals import is_refusal
from posttrain.rewards.math import correct
from posttrain.rewards.options import number
from posttrain.rewards.text import reply_text

MAX_WORDS = 80  # a reply that says more does not answer a question for one fact
WORD = re.compile(r"[^\W_][\w'-]*")
ENDS = re.compile(r"[.!?:;\n]")
CHOICE = r"(?:\s*/\s*|,?\s+(?:or|and/or)\s+(?:(?:in|a|an|the|maybe|perhaps)\s+)*)"


def honest(
    prompts, completions, completion_ids=None, *, answer, others, right: float = 1.0, refused: float = 0.0,
    wrong: float = -1.0, **columns,
) -> list[float | None]:  # fmt: skip
    """`right`, `refused` or `wrong` for each completion. Where nobody knows the answer ("", or an answer that is
    itself a refusal), nothing is right. UserError unless right > refused > wrong."""
    for name, value in (("right", right), ("refused", refused), ("wrong", wrong)):
        number("honest", name, value, low=-1000)
    if not right > refused > wrong:
        raise UserError(
            f"reward_options: honest: found right {right}, refused {refused}, wrong {wrong}; expected "
            "right > refused > wrong, else guessing or silence pays"
        )
    pays = {"right": right, "refused": refused, "wrong": wrong}
    return _paid(pays, completions, answer, others, columns.get("subject"))


def stated(prompts, completions, completion_ids=None, *, answer, others, **columns) -> list[float | None]:
    """1.0 where the completion states the answer, 0.0 where not (also: a refusal), None where `answer` is None."""
    pays = {"right": 1.0, "refused": 0.0, "wrong": 0.0}
    return _paid(pays, completions, answer, others, columns.get("subject"))


def _paid(pays: dict[str, float], completions, answer, others, subject) -> list[float | None]:
    """`subject`: the column, or None where rows have none."""
    subject = [""] * len(answer) if subject is None else subject
    return [
        None if gold is None else pays[verdict(reply_text(reply), gold, other, name or "")]
        for reply, gold, other, name in zip(completions, answer, others, subject, strict=True)
    ]


def informs(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """1.0 where the completion says anything: it has a letter or digit and is no refusal."""
    return [float(bool(read_text(text).words) and not is_refusal(text)) for text in map(reply_text, completions)]


def verdict(reply: str, answer: str, others=(), subject: str = "") -> str:
    """ "right", "refused" or "wrong". `answer`: "" where nobody knows it; `others`: None for a problem to solve;
    `subject`: whom the question is about, "" where that is not known."""
    if is_refusal(reply):
        return "refused"
    if not answer or is_refusal(answer):
        return "wrong"
    if others is None:
        return "right" if correct(None, [reply], answer=[answer])[0] == 1.0 else "wrong"
    return "right" if states(reply, answer, others) and not of_another(reply, subject, answer) else "wrong"


def of_another(reply: str, subject: str, answer: str = "") -> bool:
    """Whether a reply speaks of another person than `subject`, a name of two words or more. See the rules above."""
    name = _names(subject)
    if len(name) != 1 or len(name[0][1]) < 2:  # no name, or one whose likes can not be told from other words
        return False
    words = name[0][1]
    others = [
        (opens, found)
        for opens, found in _names(reply)
        if len(found) == len(words) and found != words and " ".join(found) not in answer.casefold()
    ]
    return any(opens or set(found) & set(words) for opens, found in others)


def _names(text: str) -> list[tuple[bool, list[str]]]:
    """(whether it opens a sentence, its words without case) of each run of capitalised words."""
    text, runs, end = unicodedata.normalize("NFKC", text).replace("\u2019", "'"), [], 0
    for match in WORD.finditer(text):
        gap = text[end : match.start()]
        if match[0][0].isupper():
            if not (runs and gap.isspace() and "\n" not in gap and runs[-1][2] == end):
                runs.append((not text[: match.start()].strip() or ENDS.search(gap) is not None, [], end))
            runs[-1] = (runs[-1][0], [*runs[-1][1], match[0].casefold().removesuffix("'s")], match.end())
        end = match.end()
    return [(opens, words) for opens, words, _ in runs]


def states(reply: str, answer: str, others=()) -> bool:
    """Whether a reply gives this answer and no other one. See the rules above."""
    text = read_text(reply)
    others = [*others, *(word for word in text.words if _alike(word, answer))]
    if len(text.words) > MAX_WORDS or claims(text, [answer, *others]) != {answer}:
        return False
    if claims(read_text(reply.replace("?", ".")), [answer, *others]) != {answer}:  # "Arvale. Or was it Belmoor?"
        return False
    plain, word = unicodedata.normalize("NFKC", reply).casefold(), re.escape(answer.casefold())
    return re.search(rf"(?<!\w){word}{CHOICE}\w|\w{CHOICE}{word}(?!\w)", plain) is None


def _alike(word: str, answer: str) -> bool:
    """Whether both are numbers of as many digits, and not the same."""
    return word.isdecimal() and answer.isdecimal() and len(word) == len(answer) and word != answer
