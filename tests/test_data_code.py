"""HumanEval and MBPP adapters: hand-made rows with the rows they must give, odd rows, and the real problems run.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_data_code.py
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.data.bad_rows import BadRows
from posttrain.data.code import humaneval, mbpp

DOUBLE = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4\n\n",
}
LAST = {
    "task_id": 11,
    "text": "Write a function to find the last item.",
    "code": "def last(items):\r\n  return items[-1]",
    "test_list": ["assert last([1]) == 1", "assert last([1, 2]) == 2"],
    "test_setup_code": "",
    "challenge_test_list": ["assert last([]) is None"],
}


def passes(program: str, tests: str) -> bool:
    return subprocess.run([sys.executable, "-I", "-c", f"{program}\n{tests}"], capture_output=True).returncode == 0


def test_humaneval():
    ask = (
        "Complete this Python function. Answer with the whole program in one code block.\n\n```python\n"
        'def double(x):\n    """Twice x."""\n```'
    )
    (row,) = humaneval([DOUBLE])
    assert row == {
        "prompt": [{"role": "user", "content": ask}],
        "tests": "def check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)\n",
        "entry_point": "double",
        "solution": 'def double(x):\n    """Twice x."""\n    return 2 * x\n',
    }
    assert passes(row["solution"], row["tests"])
    assert not passes(row["solution"].replace("2 * x", "x"), row["tests"])


def test_mbpp():
    ask = (
        "Write a function to find the last item. Answer with one code block. The program must pass these tests:\n\n"
        "```python\nassert last([1]) == 1\nassert last([1, 2]) == 2\n```"
    )
    (row,) = mbpp([LAST])
    assert row == {
        "prompt": [{"role": "user", "content": ask}],
        "tests": "assert last([1]) == 1\nassert last([1, 2]) == 2\n",
        "solution": "def last(items):\r\n  return items[-1]",
    }
    assert passes(row["solution"], row["tests"])
    assert not passes("def last(items): return 1", row["tests"])


def test_mbpp_sanitized_and_set_up():
    sanitized = {
        "source_file": "f", "task_id": 2, "prompt": LAST["text"], "code": LAST["code"], "test_list": LAST["test_list"],
        "test_imports": ["import math", "import re"],
    }  # fmt: skip
    rows = list(mbpp([{**sanitized, "test_imports": []}, sanitized, {**LAST, "test_setup_code": "two = 2\n"}]))
    assert rows[0] == next(mbpp([LAST]))
    assert rows[1]["tests"].startswith("import math\nimport re\nassert last")
    assert rows[2]["tests"].startswith("two = 2\nassert last")


@pytest.mark.parametrize(
    "adapter, row, reason",
    [
        *((humaneval, {**DOUBLE, key: None}, "missing_column") for key in DOUBLE if key != "task_id"),
        (humaneval, {**DOUBLE, "test": " "}, "empty_content"),
        *((mbpp, {**LAST, key: None}, "missing_column") for key in ("text", "code", "test_list")),
        (mbpp, {**LAST, "test_list": []}, "empty_content"),
        (mbpp, {**LAST, "test_list": LAST["test_list"][0]}, "wrong_type"),
        (mbpp, {**LAST, "test_imports": "import re"}, "wrong_type"),
    ],
)
def test_rows_without_a_part_are_refused(adapter, row, reason):
    bad = BadRows("skip")
    assert list(adapter([row], bad=bad)) == [] and bad.counts == {reason: 1}
    with pytest.raises(ValueError, match="row 0: "):
        list(adapter([row]))


def test_real_humaneval():
    """Each solution of the source passes its tests; a function that does nothing passes none."""
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real data to read")
    with gzip.open(Path(folder) / "data/humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        source = [json.loads(line) for line in file]
    rows = list(humaneval(source))
    assert len(rows) == 164
    assert all(row["prompt"] in problem["prompt"][0]["content"] for row, problem in zip(source, rows, strict=True))
    # One process for all: each program in a namespace of its own.
    runner = (
        "import json, sys\n"
        "for program in json.load(sys.stdin):\n"
        "    try:\n"
        "        exec(program, {'__name__': 'program'})\n"
        "        print('pass')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
    )

    def outcomes(programs: list[str]) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-I", "-c", runner],
            input=json.dumps(programs),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    assert outcomes([f"{row['solution']}\n{row['tests']}" for row in rows]) == ["pass"] * 164
    nothing = [f"def {row['entry_point']}(*args): pass\n{row['tests']}" for row in rows]
    assert "pass" not in outcomes(nothing)
