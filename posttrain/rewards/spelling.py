"""The reward `spelled`: counting and spelling, judged. In: replies and the columns `answer` and `form` of the data set
`spelling` (posttrain/data/spelling.py). Out: 1.0 or 0.0 each. One answer is read from a reply, of its last turn:

- number: as `correct` reads it; a reply without digits may say it as a word, "three" or "twice".
- letters: the longest run of single letters, whatever stands between them: s-t-r-a-w, "S T R A W", a list.
- word: the last word in quotes or marks, else the last word; a run of single letters counts as their word.
- letter: the last single letter in quotes or marks, else the first one behind the last "is", else the last one.
Case does not count.
"""

import re

from posttrain.rewards.math import is_correct
from posttrain.rewards.text import last_turns

NUMBERS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "once": 1, "twice": 2, "thrice": 3,
}  # fmt: skip
RUN = re.compile(r"(?<![A-Za-z])[A-Za-z](?:[^A-Za-z]+[A-Za-z](?![A-Za-z]))+")
MARKED = re.compile(r"""["'`*_\u2018\u201c]+([A-Za-z]+)[.,]?["'`*_\u2019\u201d]+""")
SINGLE = re.compile(r"(?<![A-Za-z'\u2019])[A-Za-z](?![A-Za-z'\u2019])")


def spelled(prompts, completions, completion_ids=None, *, answer, form, turns=None, **columns) -> list[float | None]:
    """1.0 where the reply's last turn gives the answer, 0.0 where not, None where `answer` is None."""
    return [
        None if gold is None else float(FORMS[kind](text, gold))
        for text, gold, kind in zip(last_turns(completions, turns), answer, form, strict=True)
    ]


def _number(text: str, gold: str) -> bool:
    if not re.search("[0-9]", text):
        text = re.sub(r"[A-Za-z]+", lambda found: _digits(found[0]), text)
    return is_correct(text, gold)


def _digits(word: str) -> str:
    return str(NUMBERS.get(word.lower(), word))


def _run(text: str) -> str:
    runs = ["".join(re.findall("[A-Za-z]", found)) for found in RUN.findall(text)]
    return max(runs, key=len, default="").lower()


def _letters(text: str, gold: str) -> bool:
    return _run(text) == gold.replace(" ", "")


def _word(text: str, gold: str) -> bool:
    words = MARKED.findall(text) or re.findall("[A-Za-z]+", text)
    return bool(words) and gold in (words[-1].lower(), _run(text))


def _letter(text: str, gold: str) -> bool:
    marked = [letter for letter in MARKED.findall(text) if len(letter) == 1]
    _, said, behind = text.rpartition(" is ")
    found = marked[-1:] or (SINGLE.findall(behind)[:1] if said else []) or SINGLE.findall(text)[-1:]
    return found != [] and found[0].lower() == gold


FORMS = {"number": _number, "letters": _letters, "word": _word, "letter": _letter}
