"""GSM8K, MATH and Countdown adapters: hand-made rows with the rows they must give, bad rows, and the real files."""

import json
import os
import re
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.bad_rows import BadRows
from posttrain.data.math import countdown, gsm8k, gsm8k_conversations, math_conversations, math_problems
from posttrain.rewards.math import correct


def real(name: str) -> Path:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real data to read")
    return Path(folder) / "data" / name


CLIPS = {
    "question": "How many clips did she sell?",
    "answer": "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+1,032 = $<<48+1032=1080>>1,080.\n#### 1,080",
}


def test_gsm8k():
    user = {"role": "user", "content": "How many clips did she sell?"}
    assert list(gsm8k([CLIPS])) == [{"prompt": [user], "answer": "1080"}]
    solution = "In May 48/2 = 24 clips.\nIn all 48+1,032 = $1,080.\n#### 1080"
    assert list(gsm8k_conversations([CLIPS])) == [{"messages": [user, {"role": "assistant", "content": solution}]}]


@pytest.mark.parametrize("adapter", [gsm8k, gsm8k_conversations])
@pytest.mark.parametrize(
    "row, error",
    [
        ({"question": "Q", "answer": "It is 72."}, "It is 72"),
        ({"question": "Q", "answer": "72\n#### "}, "####"),
        ({"question": "Q", "answer": "#### 1\n#### 2"}, "one '#### N'"),
        ({"question": " ", "answer": "#### 1"}, "question"),
        ({"question": "Q"}, "'answer' is None.*question"),
        ({"question": "Q", "answer": 72}, "'answer' is 72"),
    ],
)
def test_gsm8k_refuses_rows_without_an_answer(adapter, row, error):
    with pytest.raises(ValueError, match=error):
        list(adapter([row]))


@pytest.mark.parametrize("adapter", [gsm8k, gsm8k_conversations])
def test_gsm8k_counts_bad_rows_by_reason(adapter):
    bad = BadRows("skip")
    rows = [CLIPS, {"question": "Q", "answer": "72"}, {"question": "Q"}, {"question": " ", "answer": "#### 1"}, CLIPS]
    assert list(adapter(rows, bad=bad)) == list(adapter([CLIPS])) * 2
    assert bad.counts == {"no_answer": 1, "missing_column": 1, "empty_content": 1}
    assert bad.first["no_answer"].startswith("row 1: ")


def test_real_gsm8k():
    rows = [json.loads(line) for line in real("gsm8k/train.jsonl").open(encoding="utf-8")]
    problems, conversations = list(gsm8k(rows)), list(gsm8k_conversations(rows))
    assert len(problems) == len(conversations) == 7473
    assert all(re.fullmatch("-?[0-9]+", problem["answer"]) for problem in problems)
    assert (problems[0]["answer"], problems[-1]["answer"]) == ("72", str(int(rows[-1]["answer"].split()[-1])))
    for problem, row in zip(problems, conversations, strict=True):
        assert row["messages"][1]["content"].splitlines()[-1] == f"#### {problem['answer']}"
        assert "<<" not in row["messages"][1]["content"]


BAG = {
    "problem": "Probability of two reds?\n",
    "solution": "First \\fbox{no}. So $\\boxed{\\frac{1}{\\sqrt{2}}}$.",
    "level": "Level 5",
    "type": "Algebra",
}


def test_math():
    user = {"role": "user", "content": "Probability of two reds?"}
    assert list(math_problems([BAG])) == [
        {"prompt": [user], "answer": "\\frac{1}{\\sqrt{2}}", "level": "Level 5", "type": "Algebra"}
    ]
    reply = {"role": "assistant", "content": "First \\fbox{no}. So $\\boxed{\\frac{1}{\\sqrt{2}}}$."}
    assert list(math_conversations([BAG])) == [{"messages": [user, reply]}]
    (row,) = math_problems(
        [{"problem": "P", "solution": "\\boxed{1}", "subject": "Geometry", "answer": "1", "level": 2}]
    )
    assert row == {"prompt": [{"role": "user", "content": "P"}], "answer": "1", "level": 2, "subject": "Geometry"}


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("\\boxed{1} or \\boxed{2}", "2"),  # the last counts
        ("\\boxed{ 3 } and more }}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x > 1 \\right.}", "\\left\\{ x > 1 \\right."),  # an escaped brace closes nothing
        ("\\boxed{\\text{a } \\backslash\\\\{b}}", "\\text{a } \\backslash\\\\{b}"),  # \\ is no escape of a brace
        ("$\\boxed 5$ apples", "5"),
        ("$\\fbox{7}$", "7"),
        ("\\boxed {8}", "8"),
        ("\\boxed{\\boxed{9}}", "9"),
    ],
)
def test_the_last_box_with_its_braces(solution, answer):
    (row,) = math_problems([{"problem": "P", "solution": solution}])
    assert row["answer"] == answer


@pytest.mark.parametrize("solution", ["no box", "\\boxed{}", "\\boxed{1", "\\boxed{1\\}", "\\boxedness{1}", "\\boxed"])
@pytest.mark.parametrize("adapter", [math_problems, math_conversations])
def test_math_refuses_solutions_without_an_answer(adapter, solution):
    row = {"problem": "P", "solution": solution}
    with pytest.raises(ValueError, match="row 1: .*boxed"):
        list(adapter([BAG, row]))
    bad = BadRows("skip")
    assert len(list(adapter([BAG, row, {"problem": "P"}], bad=bad))) == 1
    assert bad.counts == {"no_answer": 1, "missing_column": 1}


braced = st.recursive(st.text("ab1+ ", min_size=1), lambda inner: st.lists(inner.map("{{{}}}".format)).map("".join))


@settings(deadline=None)
@given(braced, st.text("xyz. $", max_size=9))
def test_any_nesting_of_braces_is_read_whole(inside, after):
    rows = [{"problem": "P", "solution": f"So \\boxed{{{inside}}}{after}"}]
    if inside.strip():
        assert next(math_problems(rows))["answer"] == inside.strip()


@pytest.mark.parametrize("answer", ["72", "\\frac{1}{2}", "x^2+1", "\\{1, 2\\}", "(0,\\infty)"])
def test_the_reward_finds_a_solution_right(answer):
    """The reward reads boxes by code of its own: both must see the same answer."""
    rows = [{"problem": "P", "solution": f"Thus ${{a}}$ is \\boxed{{{answer}}}."}]
    (problem,), (conversation,) = math_problems(rows), math_conversations(rows)
    assert correct([problem["prompt"]], [conversation["messages"][1:]], answer=[problem["answer"]]) == [1.0]


def test_countdown():
    ask = (
        "Make 23 from the numbers 30, 100, 93. Use each of them exactly once, with +, -, *, / and brackets. Think it "
        "through, then give the expression alone between <answer> and </answer>."
    )
    expected = {"prompt": [{"role": "user", "content": ask}], "numbers": [30, 100, 93], "target": 23}
    forms = [{"input": "30,100,93", "output": "23"}, {"nums": [30, 100, 93], "target": 23}]
    assert list(countdown([*forms, {"numbers": [30, 100, "93"], "target": " 23"}])) == [expected] * 3


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"input": "30,100,93"}, "missing_column"),
        ({"nums": [1], "input": None}, "missing_column"),
        ({"nums": [], "target": 1}, "wrong_type"),
        ({"nums": [1, True], "target": 1}, "wrong_type"),
        ({"nums": [1, 2.5], "target": 1}, "wrong_type"),
        ({"input": "1,,2", "output": "1"}, "wrong_type"),
        ({"input": "1,2", "output": "a lot"}, "wrong_type"),
        ({"nums": {"1": 2}, "target": 1}, "wrong_type"),
    ],
)
def test_countdown_refuses_what_is_no_numbers(row, reason):
    bad = BadRows("skip")
    assert list(countdown([row], bad=bad)) == []
    assert bad.counts == {reason: 1}
    with pytest.raises(ValueError, match="row 0: "):
        list(countdown([row]))


def test_real_countdown():
    lines = [json.loads(line) for line in real("countdown/countdown_cd3_test.jsonl").open(encoding="utf-8")]
    rows = list(countdown(lines))
    assert len(rows) == len(lines) == 256
    for row, line in zip(rows, lines, strict=True):
        assert f"{row['numbers']}"[1:-1].replace(" ", "") == line["input"] and str(row["target"]) == line["output"]
    assert all(solvable(row["numbers"], row["target"]) for row in rows)


def solvable(numbers: list[int], target: int) -> bool:
    """Whether an expression of the numbers makes the target, by trying all; so they were not mixed up."""
    for a, b, c in permutations(numbers):
        for first, then in product("+-*/", repeat=2):
            for expression in (f"({a}{first}{b}){then}{c}", f"{a}{first}({b}{then}{c})"):
                try:
                    if abs(eval(expression) - target) < 1e-9:
                        return True
                except ZeroDivisionError:
                    pass
    return False
