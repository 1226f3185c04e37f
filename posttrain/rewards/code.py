"""Does the program pass its tests? The verifiable reward for code: 1.0, 0.0, or None where a row has no tests.

In: completions and the column `tests` (Python that raises where the program is wrong), with `entry_point` where one
function is asked for (adapters humaneval and mbpp write both). Out: one score a completion. In a YAML:

    reward_funcs: [code]
    reward_options: {code: {timeout: 10, partial: true}}

Programs and tests run apart from each other in sandboxes (posttrain/sandbox), as many at a time as there are cores.
Where the machine cannot isolate them, the reward refuses to run.
"""

import re
from concurrent.futures import ThreadPoolExecutor

from posttrain.errors import UserError
from posttrain.rewards.options import bad_option, number
from posttrain.rewards.text import prompt_text, reply_text
from posttrain.sandbox import Limits, run_tests, sandbox_obstacle
from posttrain.sandbox.runs import CORES

PYTHON = ("python", "python3", "py")


def code_reward(
    prompts,
    completions,
    completion_ids=None,
    *,
    tests,
    timeout: float = 5.0,
    memory_mb: int = 512,
    partial: bool = False,
    **columns,
) -> list[float | None]:
    """Return 1.0 where the completion's program passes its tests, 0.0 where not, None where `tests` is None.

    The program is the last ```python block of the reply, else its last block without a language, else all of it. With
    an `entry_point`, the prompt's own block stands before it, and the tests see that one name: functions that the
    statement gives are judged by as it has them.

    Args:
        tests: one text a completion, or None. The column `entry_point`, where there is one, may hold None, too.
        timeout: seconds of one run.
        memory_mb: address space of a process.
        partial: the share of the assert statements that hold in place of all or nothing; those that are never reached
            count as failed.

    Raises:
        UserError: the machine cannot isolate untrusted code; empty tests; an option out of its range.
    """
    number("code", "timeout", timeout, low=0.1)
    number("code", "memory_mb", memory_mb, low=64, whole=True)
    if not isinstance(partial, bool):
        raise bad_option("code", "partial", partial, "true or false")
    if obstacle := sandbox_obstacle():
        raise UserError(f"reward 'code': {obstacle}")
    entry_points = columns.get("entry_point") or [None] * len(completions)
    jobs = []
    for row, (prompt, completion, test, entry_point) in enumerate(
        zip(prompts, completions, tests, entry_points, strict=True)
    ):
        if test is not None and (not isinstance(test, str) or not test.strip()):
            raise UserError(f"column 'tests', row {row} of the batch: {test!r:.80}; expected Python code, or null")
        stub = prompt_stub(prompt_text(prompt), entry_point)
        jobs.append(None if test is None else (whole_program(reply_text(completion), stub, entry_point), test, stub))
    limits = Limits(seconds=timeout, memory_mb=memory_mb)

    def score(item) -> float:
        (program, test, stub), entry_point = item
        verdict = run_tests(program, test, entry_point, limits, helpers=stub, every_assert=partial)
        return verdict.share if partial else float(verdict.passed)

    wanted = list(dict.fromkeys((job, name) for job, name in zip(jobs, entry_points, strict=True) if job is not None))
    with ThreadPoolExecutor(CORES) as pool:  # equal programs, which a group often has, run once
        scores = dict(zip(wanted, pool.map(score, wanted), strict=True))
    return [scores.get((job, name)) for job, name in zip(jobs, entry_points, strict=True)]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block; one that is never closed ends with the text."""
    found, opened = [], False
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if opened and mark == "```":
            opened = False
        elif not opened and mark.startswith("```"):
            found.append((mark[3:].strip().lower(), ""))
            opened = True
        elif opened:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def reply_program(reply: str) -> str:
    """The program that a reply gives: the last of its Python blocks, else of those without a language, else itself."""
    blocks = code_blocks(reply)
    for languages in (PYTHON, ("",)):
        for language, code in reversed(blocks):
            if language in languages:
                return code
    return "" if blocks else reply


def prompt_stub(prompt: str, entry_point: str | None) -> str:
    """The code in a prompt that begins `entry_point`: its block, or all of a prompt that has none (HumanEval's own).

    "" where there is no such code, or what there is cannot be executed by itself.
    """
    if entry_point is None:
        return ""
    for code in [code for language, code in code_blocks(prompt) if language in PYTHON] or [prompt]:
        if _defines(code, entry_point):
            try:
                compile(code, "prompt", "exec")
            except (SyntaxError, ValueError):
                continue
            return code
    return ""


def whole_program(reply: str, stub: str, entry_point: str | None) -> str:
    """The reply's program behind the prompt's stub, which it goes on from where it does not define the function."""
    program = reply_program(reply)
    if not stub:
        return program
    return f"{stub}\n{program}" if _defines(program, entry_point) else stub + program


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.M) is not None
    )
