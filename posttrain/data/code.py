"""HumanEval and MBPP rows -> programming problems with the tests that a reward runs.

In: HumanEval (Chen et al. 2021, arXiv 2107.03374; the Hub's openai/openai_humaneval) and MBPP (Austin et al. 2021,
arXiv 2108.07732; google-research-datasets/mbpp, configs full and sanitized).
Out: {"prompt", "tests", "solution"}, HumanEval's also {"entry_point"}. `tests` is Python that raises where the
program before it is wrong: run `program + "\\n" + tests` in a process of its own. `solution` is the source's program.

    problems = list(humaneval(map(json.loads, gzip.open("HumanEval.jsonl.gz"))))
"""

from collections.abc import Iterable, Iterator

from posttrain.data.fields import BadRow, adapt, items, text, text_or_none, turn


def humaneval(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"prompt": [user: complete this function], "tests", "entry_point": its name, "solution"}.

    Raises:
        ValueError: a row without `prompt`, `canonical_solution`, `test` or `entry_point` (with `bad`: as its policy
            says).
    """
    return adapt(rows, _humaneval, bad)


def _humaneval(row: dict) -> dict:
    start, name = text(row, "prompt"), text(row, "entry_point")
    ask = f"Complete this Python function. Answer with the whole program in one code block.\n\n```python\n{start}```"
    return {
        "prompt": [turn("user", ask)],
        "tests": f"{text(row, 'test').strip()}\n\ncheck({name})\n",
        "entry_point": name,
        "solution": start + text(row, "canonical_solution"),
    }


def mbpp(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"prompt": [user: the task and its tests, which alone name the function], "tests", "solution"}.

    The task is `text` (full) or `prompt` (sanitized); the tests are `test_list` after `test_setup_code` (full) or
    `test_imports` (sanitized). `challenge_test_list` is not used, as in the paper's main figures.

    Raises:
        ValueError: a row without task, `code` or tests (with `bad`: as its policy says).
    """
    return adapt(rows, _mbpp, bad)


def _mbpp(row: dict) -> dict:
    task = text(row, "prompt" if row.get("text") is None else "text")
    checks = items(row, "test_list", str)
    if not checks:
        raise BadRow("empty_content", "'test_list' is empty, expected assertions")
    setup = [
        text_or_none(row, "test_setup_code") or "",
        *(items(row, "test_imports", str) if row.get("test_imports") else []),
    ]
    tests = "\n".join(checks)
    ask = f"{task.strip()} Answer with one code block. The program must pass these tests:\n\n```python\n{tests}\n```"
    return {
        "prompt": [turn("user", ask)],
        "tests": "\n".join([line.strip() for line in setup if line.strip()] + [tests]) + "\n",
        "solution": text(row, "code"),
    }
