"""Reward functions, good and bad, in a light module that another process imports quickly.

In: TRL's arguments of a reward function. Out: what test_rewards_calls.py expects of them, or nothing at all.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import UserError


def lengths(prompts, completions, completion_ids, **columns):
    return [len(c) for c in completions]


def process_id(prompts, **columns):
    return [float(os.getpid())] * len(prompts)


def hangs(prompts, **columns):
    while True:
        pass


def refuses(prompts, **columns):
    raise UserError("column 'x', row 3: found 1, expected 2")


def divides(prompts, **columns):
    return [1 / 0]


def dies(prompts, **columns):
    os._exit(7)


def lazily(completions, **columns):
    return (float(len(c)) for c in completions)


async def waits(completions, **columns):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)


async def waits_for_ever(completions, **columns):
    await asyncio.sleep(1000)


async def blocks_the_loop(completions, **columns):
    time.sleep(20)


async def divides_later(completions, **columns):
    await asyncio.sleep(0)
    return [1 / 0]


def starts_a_child(file: str):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(file).write_text(str(child.pid))
    time.sleep(300)
