r"""GSM8K, MATH and Countdown rows -> problems with a checkable answer for RL, and worked solutions for SFT.

In: GSM8K (Cobbe et al. 2021, arXiv 2110.14168; the Hub's openai/gsm8k, config main): {"question", "answer"}, the
answer a worked solution with calculator marks `<<48/2=24>>` and a last line `#### 72`. MATH (Hendrycks et al. 2021,
arXiv 2103.03874; hendrycks/competition_math, EleutherAI/hendrycks_math): {"problem", "solution", "level", "type"},
the answer in the solution's last \boxed{...}. Countdown: numbers and a target, as in TinyZero
(Jiayi-Pan/Countdown-Tasks-3to4: {"nums", "target"}) or {"input": "30,100,93", "output": "23"}.
Out: {"prompt", "answer"}; {"messages"}; Countdown {"prompt", "numbers", "target"}.

    problems = list(gsm8k(map(json.loads, open("train.jsonl"))))
"""

import re
from collections.abc import Iterable, Iterator

from posttrain.data.fields import BadRow, adapt, text, turn

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
INTEGER = re.compile(r"\s*-?[0-9]{1,18}\s*")
KINDS = ("level", "type", "subject")  # what a MATH row says of its problem


def gsm8k(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"prompt": [{"role": "user", "content": question}], "answer": "1080"}: the final answer, commas removed.

    Raises:
        ValueError: a row without a question, or whose answer does not end in one "#### N" (with `bad`: as its policy
            says).
    """
    return adapt(rows, _gsm8k_problem, bad)


def _gsm8k_problem(row: dict) -> dict:
    question, _, final = _split(row)
    return {"prompt": [turn("user", question)], "answer": final}


def gsm8k_conversations(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"messages": [user question, assistant worked solution]}; the solution ends in the line "#### 1080".

    The calculator marks are removed: at generation there is no calculator to write them.

    Raises:
        ValueError: as for `gsm8k`.
    """
    return adapt(rows, _gsm8k_conversation, bad)


def _gsm8k_conversation(row: dict) -> dict:
    question, solution, final = _split(row)
    reply = f"{CALCULATOR_MARK.sub('', solution).strip()}\n#### {final}"
    return {"messages": [turn("user", question), turn("assistant", reply)]}


def _split(row: dict) -> tuple[str, str, str]:
    """Return the question, the solution before "####", and the answer after it without commas."""
    question = text(row, "question").strip()
    solution, mark, final = text(row, "answer").rpartition("####")
    final = final.strip().replace(",", "")
    if not mark or not final or "####" in solution:
        raise BadRow(
            "no_answer", f"expected an answer that ends in one '#### N'; found one ending {row['answer'][-80:]!r}"
        )
    return question, solution, final


def math_problems(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    r"""Yield {"prompt": [user: problem], "answer": what the solution's last \boxed{} holds}, and `level`, `type` and
    `subject` where the row has them.

    Braces may nest, escaped ones (`\{`) do not count; `\fbox` and `\boxed 5` (up to the next $) are boxes, too.

    Raises:
        ValueError: a row without problem or solution, or whose last box is empty or never closed (with `bad`: as its
            policy says).
    """
    return adapt(rows, _math_problem, bad)


def _math_problem(row: dict) -> dict:
    kinds = {key: row[key] for key in KINDS if row.get(key) is not None}
    return {"prompt": [turn("user", text(row, "problem").strip())], "answer": boxed(text(row, "solution")), **kinds}


def math_conversations(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    r"""Yield {"messages": [user problem, assistant solution]}; the solution keeps its \boxed{} answer.

    Raises:
        ValueError: as for `math_problems`.
    """
    return adapt(rows, _math_conversation, bad)


def _math_conversation(row: dict) -> dict:
    boxed(text(row, "solution"))
    return {"messages": [turn("user", text(row, "problem").strip()), turn("assistant", text(row, "solution").strip())]}


def boxed(solution: str) -> str:
    r"""What the last box of a solution holds. BadRow where there is none, or it is empty or never closed."""
    boxes = list(BOX.finditer(solution))
    inside = _inside(solution, boxes[-1].end()) if boxes else None
    if not inside:
        raise BadRow(
            "no_answer", f"expected a solution with its answer in \\boxed{{}}; found one ending {solution[-80:]!r}"
        )
    return inside


def _inside(solution: str, start: int) -> str | None:
    if solution[start : start + 1] != "{":
        return re.split(r"[$\n]", solution[start:])[0].strip()
    depth, position = 0, start
    while position < len(solution):
        if solution[position] == "\\":
            position += 1  # what it escapes is no brace of TeX
        else:
            depth += {"{": 1, "}": -1}.get(solution[position], 0)
            if depth == 0:
                return solution[start + 1 : position].strip()
        position += 1
    return None


def countdown(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"prompt": [user: the task], "numbers": [30, 100, 93], "target": 23}: an expression of the numbers, each
    used once, with + - * / and brackets, that makes the target, asked for between <answer> and </answer>.

    In: numbers in `nums`, `numbers` (a list) or `input` ("30,100,93"), the target in `target` or `output`.

    Raises:
        ValueError: a row without them, or with something else than whole numbers (with `bad`: as its policy says).
    """
    return adapt(rows, _countdown, bad)


def _countdown(row: dict) -> dict:
    numbers, target = _first(row, "nums", "numbers", "input"), _whole(_first(row, "target", "output"))
    numbers = numbers.split(",") if isinstance(numbers, str) else numbers
    if not isinstance(numbers, list) or not numbers:
        raise BadRow("wrong_type", f"the numbers are {numbers!r:.80}, expected a list or '30,100,93'")
    numbers = [_whole(number) for number in numbers]
    ask = (
        f"Make {target} from the numbers {', '.join(map(str, numbers))}. Use each of them exactly once, with +, -, *, "
        "/ and brackets. Think it through, then give the expression alone between <answer> and </answer>."
    )
    return {"prompt": [turn("user", ask)], "numbers": numbers, "target": target}


def _first(row: dict, *keys: str):
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise BadRow("missing_column", f"none of the columns {', '.join(keys)}; keys: {', '.join(map(str, row))}")


def _whole(value) -> int:
    if isinstance(value, str) and INTEGER.fullmatch(value):
        return int(value)
    if type(value) is not int:  # bool is an int to isinstance
        raise BadRow("wrong_type", f"found {value!r:.80}, expected a whole number")
    return value
