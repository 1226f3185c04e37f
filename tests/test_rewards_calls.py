"""How reward functions are called: errors, time-outs from any thread, asynchronous ones, processes left behind.

The functions of reward_helpers.py can be imported by another process; closures run in threads.
"""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from reward_helpers import (
    blocks_the_loop,
    dies,
    divides,
    divides_later,
    hangs,
    lazily,
    lengths,
    process_id,
    refuses,
    starts_a_child,
    waits,
    waits_for_ever,
)
from rl_helpers import tiny_tokenizer

from posttrain.errors import UserError
from posttrain.rewards.calls import run_rewards
from posttrain.rewards.guard import Pool, RemoteError, TimedOut
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Completion, Rollouts

ROOT = Path(__file__).parents[1]


def batch(**columns):
    return {"prompts": ["p", "p"], "completions": ["a", "bb"], "completion_ids": [[1], [2, 2]], **columns}


def run(*functions, timeout=None, **columns):
    rewards = [(f"r{i}", function, 1.0) for i, function in enumerate(functions)]
    return run_rewards(rewards, batch(**columns), [40, 41], timeout)


MEETING: dict = {}


async def meets(completions, **columns):
    """Comes back only if another call of it is under way at the same time."""
    barrier = MEETING.setdefault("event", asyncio.Event())
    MEETING["here"] = MEETING.get("here", 0) + 1
    if MEETING["here"] == 2:
        barrier.set()
    await barrier.wait()
    return [2.0] * len(completions)


class AnObject:
    def __call__(self, completions, **columns):
        return [float(threading.get_ident() != MAIN)] * len(completions)


MAIN = threading.get_ident()


@pytest.mark.parametrize("timeout", [None, 60])
def test_values_are_the_same_with_and_without_a_time_out(timeout):
    found = run(lengths, lazily, waits, lambda completions, **_: [None, 3], timeout=timeout)
    assert found == {"r0": [1.0, 2.0], "r1": [1.0, 2.0], "r2": [1.0, 1.0], "r3": [None, 3.0]}
    assert list(found) == ["r0", "r1", "r2", "r3"]


def test_a_time_out_moves_importable_functions_to_one_other_process_and_the_rest_to_a_thread():
    assert run(process_id)["r0"] == [os.getpid()] * 2
    first, second = run(process_id, process_id, timeout=60).values()
    assert first == second != [os.getpid()] * 2
    assert run(lambda **_: [os.getpid()] * 2, AnObject(), timeout=60) == {"r0": [os.getpid()] * 2, "r1": [1.0, 1.0]}
    # what cannot be sent stays here
    assert run(process_id, timeout=60, column=[threading.Lock()] * 2)["r0"] == [os.getpid()] * 2


def in_a_thread(call):
    found = []

    def target():
        try:
            found.append(call())
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    return found[0]


def closure(**_):
    return [time.sleep(60) for _ in range(2)]


closure.__module__ = "__main__"  # another process would look for it in vain


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (hangs, "main thread"),
        (hangs, "another thread"),
        (hangs, "a running loop"),
        (closure, "another thread"),
        (waits_for_ever, "main thread"),
        (waits_for_ever, "a running loop"),
        (blocks_the_loop, "another thread"),
    ],
)
def test_what_hangs_is_named_within_its_time(function, where):
    def attempt():
        with pytest.raises(UserError) as error:
            run(function, timeout=1)
        return str(error.value)

    async def in_a_loop():
        return attempt()

    run(process_id, timeout=60)  # the process is there already
    began = time.monotonic()
    if where == "a running loop":
        message = asyncio.run(in_a_loop())
    else:
        message = attempt() if where == "main thread" else in_a_thread(attempt)
    assert time.monotonic() - began < 15
    assert "'r0' took longer than 1 s on the batch that begins with row 40" in message and "reward_timeout" in message
    assert run(lengths, timeout=60)["r0"] == [1.0, 2.0]  # the next call has a process again


@pytest.mark.parametrize("timeout", [None, 60])
def test_asynchronous_functions_run_together_from_any_thread(timeout):
    for call in (lambda: run(meets, meets, timeout=timeout), lambda: in_a_thread(lambda: run(meets, meets))):
        MEETING.clear()
        assert call() == {"r0": [2.0, 2.0], "r1": [2.0, 2.0]}

    async def in_a_loop():
        return run(waits, lengths)

    assert asyncio.run(in_a_loop()) == {"r0": [1.0, 1.0], "r1": [1.0, 2.0]}


@pytest.mark.parametrize("timeout", [None, 60])
def test_errors_name_function_and_row(timeout):
    cases = {
        divides: r"'r0' raised ZeroDivisionError: division by zero .*row 40",
        divides_later: r"'r0' raised ZeroDivisionError: division by zero .*row 40",
        refuses: "^column 'x', row 3: found 1, expected 2$",
        (lambda completions, **_: [1.0]): "'r0' returned 1 values for 2 completions",
        (lambda completions, **_: [1.0, float("nan")]): "'r0' returned nan for row 41.*'bb'",
        (lambda completions: [1.0, 1.0]): "'r0' raised TypeError.*unexpected keyword",
        (lambda completions, answer, **_: []): "'r0' needs 'answer', which is no column.*prompts, completions",
    }
    for function, message in cases.items():
        with pytest.raises(UserError, match=message):
            run(function, timeout=timeout)
    with pytest.raises(UserError, match="'r0' raised ProcessEnded: exit code 7"):
        run(dies, timeout=60)


def test_a_dead_process_is_replaced_and_its_children_die_with_it(tmp_path):
    pool, file = Pool(), tmp_path / "child"
    pool.call(lengths, ([], [], []), seconds=60)  # it has imported this module
    with pytest.raises(TimedOut):
        pool.call(starts_a_child, (str(file),), seconds=2)
    child = int(file.read_text())
    assert not is_running(child)
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        pool.call(divides, ([],), seconds=30)
    (first,) = pool.idle
    os.kill(first.process.pid, 9)
    first.process.wait()
    assert pool.call(lengths, ([], ["abc"], []), seconds=30) == [3]
    assert first not in pool.idle and len(pool.idle) == 1
    pool.close()


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    for _ in range(50):  # the system takes a moment to bury it
        if not status.exists() or "State:\tZ" in status.read_text():
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", "hang()"])
def test_no_process_is_left_behind(end):
    """At a normal exit, an exit without clean-up, a kill; and at a kill while a function hangs there."""
    script = f"""
    import os, threading, time
    from posttrain.rewards import guard
    guard.GRACE_SECONDS = 1
    pool = guard.Pool()
    print(pool.call(os.getpid, seconds=60), flush=True)
    def hang():
        threading.Thread(target=lambda: pool.call(time.sleep, (300,), seconds=2)).start()
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip(), done.stderr
    assert not is_running(int(done.stdout))


def test_symbolic_answers_end_in_time_in_a_thread_and_after_a_hang(monkeypatch):
    """What slips through the bounds of rewards/math.py is stopped; the next answer is graded by a new process."""
    from posttrain.rewards import symbolic

    pool = Pool(symbolic._prepare)
    monkeypatch.setattr(symbolic, "POOL", pool)
    monkeypatch.setattr(symbolic, "SECONDS", 2.0)
    assert symbolic.same_value(r"\sqrt{8}", r"2\sqrt{2}") is True
    (first,) = pool.idle
    for bomb in (r"\binom{99999999}{9999999}", r"[(((9^{99})^{99})^{99})^{99},\infty)"):  # the bounds refuse both
        assert in_a_thread(lambda bomb=bomb: symbolic.same_value(bomb, r"[0, 1]")) is False
    assert first.process.poll() is not None and pool.idle == []
    assert in_a_thread(lambda: symbolic.same_value(r"(x+1)^2 + \sqrt{7}", r"x^2+2x+1+\sqrt{7}")) is True
    pool.close()


def test_columns_of_the_rows_and_of_tools_reach_the_functions():
    seen = {}

    def reward(**columns):
        seen.update(columns)
        return [0.0, 1.0]

    tokenizer = tiny_tokenizer()
    ids = tokenizer("call<r>5</r>done")["input_ids"] + [tokenizer.eos_token_id]
    mask = [1] * 4 + [0] * 8 + [1] * (len(ids) - 12)
    completions = [Completion(ids, [0.0] * len(ids), "stop", mask), Completion([65], [0.0], "length")]
    rows = [{"prompt": "p", "answer": "5"}, {"prompt": "p", "hint": "h", "completion_mask": "a column of the data"}]
    found = call_rewards([("r", reward, 1.0)], Rollouts(rows, [[1], [1]], completions, 2), tokenizer)
    assert found == {"r": [0.0, 1.0]}
    assert seen["completions"][0] == "call<r>5</r>done"
    assert seen["completion_mask"] == [mask, [1]] and seen["prompt_ids"] == [[1], [1]]
    assert seen["answer"] == ["5", None] and seen["hint"] == [None, "h"]
