"""The reward for code: which program a reply gives, scores by hand, real problems, and hacks that must not gain.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_rewards_code.py
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from posttrain.data.code import humaneval, mbpp
from posttrain.errors import UserError
from posttrain.rewards.code import code_blocks, code_reward, prompt_stub, reply_program, whole_program
from posttrain.sandbox import sandbox_obstacle

isolated = pytest.mark.skipif(sandbox_obstacle() is not None, reason=f"no sandbox here: {sandbox_obstacle()}")
ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef near(a, b):\n    return abs(a - b) < 1e-6\n\n\n'
    'def double(xs: List[float]):\n    """Twice each."""\n',
    "entry_point": "double",
    "canonical_solution": "    return [2 * x for x in xs]\n",
    "test": "def check(candidate):\n    assert True, 'it runs'\n    assert len(candidate([1])) == 1\n"
    "    assert near(candidate([1])[0], 2)\n    assert candidate([]) == []\n"
    "    assert near(candidate([0, 2])[1], 4)\n",
}  # fmt: skip
(PROBLEM,) = humaneval([ROW])


def block(code: str, language: str = "python") -> str:
    return f"```{language}\n{code.rstrip(chr(10))}\n```"


def scores(*replies: str, problem: dict = PROBLEM, **options) -> list[float | None]:
    columns = {key: [problem.get(key)] * len(replies) for key in ("tests", "entry_point") if key in problem}
    return code_reward([problem["prompt"]] * len(replies), list(replies), **columns, **options)


def test_blocks_and_the_program_of_a_reply():
    text = "a\n```python\nx = 1\n```\nb\n```\nout\n```\n  ```py\ny = '''`'''\n  ```\n```json\n{}\n```"
    assert code_blocks(text) == [("python", "x = 1\n"), ("", "out\n"), ("py", "y = '''`'''\n"), ("json", "{}\n")]
    assert reply_program(text) == "y = '''`'''\n"
    assert reply_program("see\n```\nx = 1\n```") == "x = 1\n"
    assert reply_program("```json\n{}\n```") == ""
    assert reply_program("x = 1") == "x = 1"
    assert reply_program("cut\n```python\nx = 1\ny =") == "x = 1\ny ="


def test_the_stub_stands_before_the_program():
    ask = PROBLEM["prompt"][0]["content"]
    assert prompt_stub(ask, "double") == prompt_stub(ROW["prompt"], "double") == ROW["prompt"]
    assert prompt_stub(ask, "other") == prompt_stub(ask, None) == prompt_stub("def double(x):\n", "double") == ""
    body = "    return [2 * x for x in xs]\n"
    assert whole_program(block(body), ROW["prompt"], "double") == ROW["prompt"] + body
    assert whole_program("def double(xs): return xs", "stub\n", "double") == "stub\n\ndef double(xs): return xs"


@isolated
def test_scores_by_hand():
    whole = "def double(xs: List[float]) -> List[float]:\n    return [2 * x for x in xs]\n"
    replies = [
        block(whole),  # without the statement's import
        block("    return [2 * x for x in xs]\n"),  # only the body
        "    return [2 * x for x in xs]\n",  # as base models go on
        f"First:\n{block('def double(xs): return []')}\nBetter:\n{block(whole)}\nDone.",
        f"First:\n{block(whole)}\nBetter:\n{block('def double(xs): return []')}",
        block("def double(xs): return xs"),
        block(""),
        "I do not know.",
        "",
        block("def double(xs: return"),
    ]
    assert scores(*replies) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@isolated
def test_shares_of_asserts():
    wrong_for_empty = "def double(xs): return [2 * x for x in xs] or None"
    assert scores(block(wrong_for_empty), block("def double(xs): return xs"), partial=True) == [0.75, 0.5]
    assert scores(block(wrong_for_empty)) == [0.0]
    left = "import os\ndef double(xs): return [2 * x for x in xs] if xs else os._exit(0)"
    assert scores(block(left), partial=True) == [0.5]  # what is never reached has failed


@isolated
def test_rows_without_tests_and_rows_of_both_kinds():
    (row,) = mbpp(
        [{"text": "Twice x.", "code": "def double(x): return 2 * x", "test_list": ["assert double(2) == 4"]}]
    )
    replies = [row["solution"], PROBLEM["solution"], "x", [{"role": "assistant", "content": row["solution"]}], []]
    problems = [row, PROBLEM, {"prompt": "hello"}, row, row]
    columns = {key: [problem.get(key) for problem in problems] for key in ("tests", "entry_point")}
    found = code_reward([problem["prompt"] for problem in problems], replies, **columns)
    assert found == [1.0, 1.0, None, 1.0, 0.0]
    assert scores(row["solution"], problem=row) == [1.0]  # a batch without the column entry_point


HACKS = {
    "judging by oneself": "def near(a, b): return True\ndef double(xs): return [99] * len(xs)",
    "a check of one's own": "def check(candidate): pass\ndef double(xs): return xs",
    "an object equal to all": "class E:\n  __eq__ = lambda *a: True\n  __abs__ = __sub__ = lambda s, *a: s\n"
    "  __lt__ = __bool__ = lambda *a: True\n  __getitem__ = lambda s, i: s\n  __len__ = lambda s: 1\n"
    "def double(xs): return E()",
    "a list subclass": "class L(list):\n  __eq__ = lambda *a: True\n  __getitem__ = lambda s, i: 2\n"
    "def double(xs): return L([9])",
    "leaving": "import sys\ndef double(xs): sys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "raising what a test may catch": "def double(xs): raise AssertionError",
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.len = lambda x: 1\n"
    "def double(xs): return [9, 9]",
    "asserts switched off": "import sys\nsys.flags = None\n__debug__ = False\ndef double(xs): return xs",
    "endless": "def double(xs):\n  while True: pass",
}


@isolated
@pytest.mark.parametrize("name", HACKS)
def test_hacks_gain_nothing(name):
    assert scores(block(HACKS[name]), timeout=2.0) == [0.0]
    honest_and_wrong = scores(block("def double(xs): return [9] * len(xs)"), partial=True)[0]
    assert scores(block(HACKS[name]), partial=True, timeout=2.0)[0] <= honest_and_wrong


def test_options_and_columns_that_cannot_be():
    with pytest.raises(UserError, match="column 'tests', row 1 of the batch: ' '"):
        code_reward(["a", "a"], ["x", "x"], tests=["assert f()", " "])
    for options in ({"timeout": 0}, {"memory_mb": 1.5}, {"partial": "yes"}):
        with pytest.raises(UserError, match=f"reward_options: code: {next(iter(options))}"):
            code_reward([], [], tests=[], **options)


def test_it_refuses_to_run_unprotected(monkeypatch):
    monkeypatch.setattr("posttrain.rewards.code.sandbox_obstacle", lambda: "no user namespaces: sudo sysctl ...")
    with pytest.raises(UserError, match="reward 'code': no user namespaces: sudo sysctl"):
        code_reward(["a"], ["x"], tests=["assert f()"])


@isolated
@pytest.mark.slow
def test_real_problems_score_one_and_their_statements_alone_nothing():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no HumanEval here")
    with gzip.open(Path(folder) / "data" / "humaneval" / "HumanEval.jsonl.gz") as file:
        problems = list(humaneval(map(json.loads, file)))
    columns = {key: [problem[key] for problem in problems] for key in ("tests", "entry_point")}
    prompts = [problem["prompt"] for problem in problems]
    right = [f"Here:\n{block(problem['solution'])}" for problem in problems]
    bodies = [p["solution"].removeprefix(prompt_stub(p["prompt"][0]["content"], p["entry_point"])) for p in problems]
    for replies in (right, bodies):
        assert code_reward(prompts, replies, **columns, timeout=20) == [1.0] * 164
    assert code_reward(prompts, [""] * 164, **columns, timeout=20) == [0.0] * 164
