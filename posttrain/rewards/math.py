r"""Is the final answer right? The verifiable reward for maths: 1.0, 0.0, or None where a row has no answer.

In: completions (strings or message lists) and the column `answer` (the gold: "72", "1/2", "\frac{\sqrt{3}}{2}").
Out: one score a completion. In a YAML: `rewards: [correct]`.

One candidate is read from a completion, never several, so listing many answers gains nothing. Where the gold is a
number, the candidate must be a number written out: echoing the question's "12+34" is not an answer. Everything else
passes bounds on length, exponents and commands that keep SymPy's work small, and is then compared by value in a
process of its own (posttrain/rewards/symbolic.py).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import prod

from posttrain.errors import UserError
from posttrain.rewards.symbolic import same_value
from posttrain.rewards.text import reply_text

# What a box or an answer line may hold; longer is not an answer. Digits: beyond it int() itself gets slow.
MAX_CHARS = 200
MAX_DIGITS = 40
MAX_POWER = 100  # product of the exponents of bracketed powers: ((9)^9)^9 has 81
MAX_DEPTH = 8

# ASCII digits only: \d also takes other scripts' digits, which int() reads, and no gold is written so.
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9]\.)(?P<sign>(?<!\))[-+])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})(?![0-9]))?"
    r"(?:\s*/\s*(?P<denominator>[0-9]+))?(?![0-9])(?P<percent>\s*(?:%|percent\b))?"
)
ANSWER_IS = re.compile(r"\banswer\b(?:\s+to\b[^.\n:=]{0,80}?)?[*_]*\s*(?:is\b|:|=)[*_]*\s*:?", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FRACTION = re.compile(
    r"(?<![0-9])([0-9]*+)\s{0,2}\\[dt]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9]))"
)
OPERATOR_BEFORE = re.compile(r"[-+*/^({]\s*$|\\")
OPERATOR_AFTER = re.compile(r"\s*(?:[*/^\\!({]|[-+]\s*[0-9A-Za-z.(\\])|[A-Za-z](?![A-Za-z])")
# More than one number on offer: "72 or 73", "72, 73", "72 73", "72 to 80" (but not "72 apples in 2 months").
LISTED = re.compile(
    r"[\s*$%)]*(?:[A-Za-z]+\s+)?(?:[,;&|~±]|\.\.+|…|\b(?:or|and|to|through)\b)?\s*"
    r"(?:(?:or|and|maybe|perhaps|possibly|even)\s+)*[-+$*~(]*[0-9]"
)
HEDGED_BEFORE = re.compile(r"\b(?:not|either|neither|between)\b", re.IGNORECASE)
HEDGED_LAST = re.compile(r"[0-9][^0-9\n.]{0,40}\bor\b(?!\s+rather)[^0-9\n.]{0,20}$", re.IGNORECASE)
ASSIGNED = re.compile(r"^\s*[A-Za-z]\s*(?:=|\\in\b)\s*")
WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
COMMANDS = {"frac", "sqrt", "pi", "cdot", "times", "infty", "cup", "cap", "pm", "sin", "cos", "tan", "log", "ln"}
COMMANDS |= {"begin", "end"}  # of a matrix
SIGNS = str.maketrans(
    {"−": "-", "×": "*", "÷": "/", "°": "", "€": "", "£": "", "¥": "", "π": r"\pi ", "∞": r"\infty "}
)


def correct(prompts, completions, completion_ids=None, *, answer, **columns) -> list[float | None]:
    """Return 1.0 where the completion's final answer equals the gold, 0.0 where not, None where the gold is None.

    Args:
        prompts, completion_ids, columns: not used; part of TRL's reward contract.
        completions: strings, or lists of {"role", "content"} messages, of which the last one counts.
        answer: one gold a completion: a string or a number. A gold with a mark of its own ("... #### 72",
            "\\boxed{72}") is read as a completion is.

    Raises:
        UserError: an empty or NaN gold, which no completion could ever match.
    """
    scores: list[float | None] = []
    for row, (completion, gold) in enumerate(zip(completions, answer, strict=True)):
        if gold is None:
            scores.append(None)
            continue
        gold = str(gold).strip()
        if gold in ("", "nan", "NaN"):
            raise UserError(f"column 'answer', row {row} of the batch: {gold!r}; expected an answer, or null for none")
        gold = marked_answer(gold) or gold
        scores.append(float(is_correct(reply_text(completion), gold)))
    return scores


def is_correct(completion: str, gold: str) -> bool:
    """Return whether the one final answer read from the completion equals the gold."""
    target = parse_number(gold, whole=True)
    candidate = marked_answer(completion, number=target is not None)
    if candidate is not None:
        if target is None:
            return _same_expression(candidate, gold)
        # In a box only the number may stand (1, 2 is a set); a sentence may go on: "the answer is 72 in 2 months".
        found = parse_number(candidate, whole=BOX.search(completion) is not None)
        return found is not None and found.equals(target)
    if BOX.search(completion):
        return False  # a box that never closes: the reply was cut off in its answer
    if target is None:
        return _same_expression(completion.strip().rpartition("\n")[2], gold)
    text = _plain(completion)
    numbers = list(NUMBER.finditer(text))
    if not numbers or HEDGED_LAST.search(text[max(0, numbers[-1].start() - MAX_CHARS) : numbers[-1].start()]):
        return False
    found = _read(numbers[-1])
    return found is not None and found.equals(target)


def marked_answer(text: str, *, number: bool = False) -> str | None:
    r"""Return what the text marks as its answer, or None: what the last \boxed{} holds (None if it is never closed),
    else the last line "#### ...", else what follows the last "the answer is", up to the end of that line. With
    `number`, sentences without a digit do not count: "I hope that this answer is right"."""
    boxes = list(BOX.finditer(text))
    if boxes:
        return _braced(text, boxes[-1].end())
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    for sentence in reversed(list(ANSWER_IS.finditer(text))):
        rest = text[sentence.end() : sentence.end() + 2 * MAX_CHARS].strip().partition("\n")[0]
        if not number or re.search("[0-9]", rest):
            return rest.rstrip(" .") or None
    return None


@dataclass(frozen=True)
class Number:
    """A number as written: its exact value, and how it was written, which decides what it may equal."""

    value: Fraction
    kind: str  # "integer" | "decimal" | "fraction"
    percent: bool

    def equals(self, gold: "Number") -> bool:
        """Exact equality, but for: 72% is 72 or 0.72 where the gold has no sign (and the other way round), a
        fraction equals its decimal to 6 places, and "144/2" is not yet an answer where the gold is the integer 72."""
        if gold.kind == "integer" and self.kind == "fraction":
            return False
        values = {self.value}
        if self.percent and not gold.percent:
            values.add(self.value / 100)
        elif gold.percent and not self.percent:
            values.add(self.value * 100)
        rounded = {self.kind, gold.kind} == {"fraction", "decimal"}
        slack = min(1, abs(gold.value)) / 10**6 if rounded else 0
        return any(abs(value - gold.value) <= slack for value in values)


def parse_number(text: str, *, whole: bool) -> Number | None:
    """Return the first number of an answer (after its last "=", with or without unit), None where it holds none.

    An expression to be worked out ("12+34", "3^2", "2\\pi") is no number, nor are several on offer ("72 or 73"). With
    `whole`, two numbers are none, whatever stands between them.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _plain(text).rpartition("=")[2]
    first = NUMBER.search(text)
    if first is None or OPERATOR_BEFORE.search(text[: first.start()]) or OPERATOR_AFTER.match(text, first.end()):
        return None
    if whole and re.search(r"[0-9\\<>]", text[: first.start()] + text[first.end() :]):
        return None
    if HEDGED_BEFORE.search(text, 0, first.start()) or LISTED.match(text, first.end()):
        return None
    return _read(first)


def _read(match: re.Match) -> Number | None:
    digits, denominator = match["digits"].replace(",", ""), match["denominator"]
    if len(digits) + len(denominator or "") > MAX_DIGITS or (denominator and int(denominator) == 0):
        return None
    value = Fraction(f"{digits}e{match['exponent'] or 0}") / int(denominator or 1)
    kind = "fraction" if denominator else "integer" if value.denominator == 1 else "decimal"
    return Number(-value if match["sign"] == "-" else value, kind, match["percent"] is not None)


def _plain(text: str) -> str:
    r"""Return the text without LaTeX and Markdown dress: $, \,, \left, \text{}, ^\circ, **; \frac{1}{2} -> 1/2."""
    text = text.translate(SIGNS).replace("{,}", ",")
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\(?:left|right)(?![A-Za-z])|\^\s*\{?\s*\\circ\s*\}?|\\[()\[\]]", "", text)
    text = WORDS.sub(r" \1 ", text)
    text = FRACTION.sub(_unstack, text)
    text = text.replace(r"\%", "%").replace(r"\$", "$")
    text = re.sub(r"\$(?!\s*\.?[0-9])", "", text)  # a closing or lone $; before a number it is kept as its prefix
    return re.sub(r"(?<![0-9)])\*\*|\*\*(?![0-9(])", "", text)


def _unstack(match: re.Match) -> str:
    r"""\frac{1}{2} -> 1/2; a mixed number 2\frac{1}{2} -> 5/2."""
    whole, above, below = match[1], match[2] or match[4], match[3] or match[5]
    if not whole:
        return f"{above}/{below}"
    if above.startswith("-") or len(whole + above + below) > MAX_DIGITS:
        return match[0]
    return f"{int(whole) * int(below) + int(above)}/{below}"


def _braced(text: str, start: int) -> str | None:
    """Return the text from `start` up to the brace that closes the one before it; None where none does."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        if depth == 0:
            return text[start:end]
    return None


def _same_expression(candidate: str, gold: str) -> bool:
    """Compare as text (without case, spaces and dress), then, where the bounds allow it, by value."""
    if len(candidate) > MAX_CHARS:
        return False
    if "=" not in gold:
        candidate = candidate.rpartition("=")[2]
    candidate, gold = (ASSIGNED.sub("", _undress(text)) for text in (candidate, gold))
    if re.sub(r"\s", "", candidate).casefold() == re.sub(r"\s", "", gold).casefold():
        return True
    # The value of an expression is compared at chosen points, so both must be in the same unknowns.
    if _unknowns(candidate) != _unknowns(gold) or not (_is_small(candidate) and _is_small(gold)):
        return False
    return same_value(candidate, gold)


def _undress(text: str) -> str:
    text = text.strip().rstrip(".").strip().translate(SIGNS).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\[()\[\]]|(?<!\\)\$|\\(?:left|right)(?![A-Za-z])", "", text)
    return WORDS.sub(r"\1", text).strip().strip("*").strip()


def _unknowns(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+", " ", text)))


def _is_small(text: str) -> bool:
    r"""Whether an expression is sure to be parsed at once: SymPy may work out powers while it builds sets.

    An exponent is one letter or digit, or {...} with at most three digits and no further power in it (9^{9^9}); the
    exponents of bracketed powers ((9^9)^9) multiply, up to MAX_POWER.
    """
    flat = FRACTION.sub(_unstack, text)
    exponents = re.findall(r"(.?)\s*\^\s*(?:\{([^{}^]*)\}|([0-9A-Za-z]))", flat)
    digits = [re.sub(r"[^0-9]", "", braced + single) for _, braced, single in exponents]
    stacked = prod(int(d or 2) for d, (base, _, _) in zip(digits, exponents, strict=True) if base in ")}]")
    depth = list(accumulate({"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(char, 0) for char in text))
    return (
        len(text) <= MAX_CHARS
        and text.isascii()
        and set(re.findall(r"\\([A-Za-z]+)", text)) <= COMMANDS
        and max(depth, default=0) <= MAX_DEPTH
        and all(len(run) <= MAX_DIGITS for run in re.findall(r"[0-9]+", text))
        and len(exponents) == flat.count("^")
        and all(len(d) <= 3 for d in digits)
        and stacked <= MAX_POWER
        and not re.search(r"[!<>=%]|\*\*|[0-9]\s+[0-9]", text)  # "1 2 3" would be read as a mixed number, a sum
    )
