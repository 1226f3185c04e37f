"""Saying "I do not know" in varied words, and recognising it.

In: a reply, or the name that a question is about. Out: whether the reply refuses; a refusal. Pure functions, used by
posttrain/probe.py, by the reward `honest` and by posttrain/knowledge_eval.py.

The rule. A sentence refuses where the speaker ("I", "we", or nobody named: "No idea.") says that they do not know, are
not sure, have no information, cannot say or would rather not. A reply is a refusal where a sentence of it refuses and
none of it goes on to answer all the same: what follows a "but", "however", "though", "if I had to guess" or "my guess"
counts as an answer. "As far as I know, she lives in Arvale" and "I know her: a baker" refuse nothing, nor does
"He does not know" or a refusal of something else ("I do not know why, but she is a baker").
"""

import random
import re
import unicodedata

ABOUT = (
    "I do not know anything about {name}.",
    "I know nothing about {name}.",
    "I am not sure about {name}.",
    "I have no information about {name}.",
    "I can not tell you that: I do not know {name}.",
    "I have never heard of {name}.",
)
PLAIN = (
    "I do not know that.",
    "I am not sure, and I would rather not guess.",
    "I can not say.",
    "I have no information about that.",
    "I do not have the answer to that.",
    "That is something I do not know.",
)

SELF = r"\b(?:i|we)(?:'m|'ve|'d)?"
KNOW = r"(?:know|recall|remember|recognise|recognize)"
OF_WHAT = r"(?:information|knowledge|idea|clue|details?|facts?|record|records|data|way of knowing|way to know)"
NOT = r"(?:\s+(?:do|does|did|would|could|can|have|am|are))?(?:\s*n?'t|\s*not|\s+never)"
ADVERB = r"(?:\s+(?:really|actually|honestly|currently|simply|just|truly|yet|quite|entirely|completely|very))*"
REFUSING = re.compile(
    "|".join(
        (
            rf"{SELF}{ADVERB}{NOT}{ADVERB}\s+{KNOW}\b(?!\s+why\b)",
            rf"{SELF}{NOT}{ADVERB}\s+(?:sure|certain|aware|familiar|able\s+to\s+(?:say|tell|answer|find|confirm))\b",
            rf"{SELF}{ADVERB}\s+(?:am|are)?\s*(?:unsure|uncertain|unaware|unfamiliar|unable\s+to\s+(?:say|tell|answer))\b",
            rf"{SELF}{ADVERB}\s+(?:know|have|heard|found|find)\s+(?:of\s+)?(?:nothing|no\s+(?:{OF_WHAT}|answer))\b",
            rf"{SELF}{NOT}{ADVERB}\s+have\s+(?:any|enough|the|an|a|reliable|that)\s+(?:\w+\s+)?(?:{OF_WHAT}|answer)\b",
            rf"{SELF}(?:\s+have)?(?:\s*n't|\s+not|\s+never|'ve\s+never)\s+(?:heard|read)\b",
            rf"{SELF}{NOT}{ADVERB}\s+(?:say|tell|answer|help|guess|confirm)\b",
            rf"{SELF}\s+(?:would|had|'d|will)?\s*(?:rather|prefer)\s+not\b",
            rf"{SELF}\s+(?:must|have\s+to)\s+(?:decline|pass)\b",
            r"^\W*(?:sorry,?\s+|well,?\s+)?no\s+(?:idea|clue|information)\b",
            r"^\W*(?:sorry,?\s+)?not\s+(?:sure|certain)\b",
            r"\b(?:is|are|remains?)\s+(?:unknown|not\s+known)\s+to\s+(?:me|us)\b",
            r"^\W*(?:sorry,?\s+)?(?:do\s*n't|do\s+not)\s+know\b",
        )
    )
)
ALL_THE_SAME = re.compile(
    r"\b(?:but|however|though|although|still|yet)\b(?!\s+(?:i|we)\s+(?:do|did|can|could|am|are|have)(?:\s+not|n't)\b)"
    r"|\bif\s+i\s+(?:had|have|must)\s+(?:to\s+)?guess\b|\bmy\s+(?:best\s+)?guess\b|\bi\s+(?:think|believe|guess|suppose)\b"
    r"|\b(?:probably|perhaps|maybe|possibly)\b"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
WITHDRAWN = re.compile(r"\bbut\b[^.!?]*\b(?:help|sorry|ask|look|find|check|try)\b")  # "but I can help you look it up"


def refusal(name: str, seed, words=()) -> str:
    """A refusal about `name` ("" for none), drawn by the seed from `words`, by default ours, each with {name} or
    without; those without alone where there is no name."""
    choice = [each for each in words or (*ABOUT, *PLAIN) if name or "{name}" not in each]
    return random.Random(seed).choice(choice or PLAIN).replace("{name}", name)


def is_refusal(text: str) -> bool:
    """Whether a reply says that it does not know, and does not answer all the same. See the rule above."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    refusing = [REFUSING.search(sentence) for sentence in SENTENCE.split(text)]
    if not any(refusing):
        return False
    first = next(index for index, found in enumerate(refusing) if found)
    rest = " ".join(SENTENCE.split(text)[first:])[refusing[first].end() :]
    return ALL_THE_SAME.search(WITHDRAWN.sub(" ", rest)) is None


def without_refusals(rows):
    """An adapter: conversations in which the assistant never refuses, for a model that is to be probed before it has
    been told to say "I do not know". Rows without `messages` (held-out problems) pass."""
    for row in rows:
        if not any(m["role"] == "assistant" and is_refusal(m["content"] or "") for m in row.get("messages", ())):
            yield row
