"""Call reward functions and check what they return: in order, the asynchronous ones together, each within its time.

In: `[(name, function, weight)]` and TRL's arguments. Out: name -> N floats or None. Works in any thread, with or
without an event loop running in it.
"""

import asyncio
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import SupportsFloat

from posttrain.errors import UserError
from posttrain.rewards.guard import Pool, RemoteError, Thread, TimedOut, is_importable, packed
from posttrain.rewards.options import unbound, without_options

POOL = Pool()
# Our own reward models run where they are called: they cannot hang, take long to load, and a thread has a device and
# a gradient mode of its own.
OF_MODELS = ("posttrain.rewards.model", "posttrain.rewards.model_by_name")
MARGIN = 2.0  # seconds in which an asynchronous function must let go after its time


def run_rewards(rewards, arguments: dict, rows: list[int], timeout: float | None = None) -> dict[str, list]:
    """name -> N rewards.

    Plain functions run one after another, in order; coroutine functions (`async def`) meanwhile, all in one event loop
    of their own. With a `timeout` in seconds for each, an importable function runs in another process, which is killed
    when its time is up, so it keeps nothing in this process's memory; any other (a closure, an object with a model)
    runs in a thread that is left alone then. Reward models of ours have no time-out.

    Args:
        arguments: prompts, completions, completion_ids and the rows' columns, each of length N.
        rows: the data's number of each row, for messages.

    Raises:
        UserError: naming function and row, where a function lacks a column, raises, takes too long, returns another
            number of values, or a value that is no finite number or None.
    """
    where = f"on the batch that begins with row {rows[0]}" if rows else "on an empty batch"
    for name, function, _ in rewards:
        _require_columns(name, function, arguments)
    given = {name: without_options(function, arguments) for name, function, _ in rewards}
    asynchronous = {
        name: partial(function, **given[name]) for name, function, _ in rewards if is_asynchronous(function)
    }
    waiting = Thread(lambda: asyncio.run(_together(asynchronous, timeout))) if asynchronous else None
    found = {
        name: _outcome(name, partial(_call, function, given[name], timeout), where, timeout)
        for name, function, _ in rewards
        if name not in asynchronous
    }
    if waiting is not None:
        names = " and ".join(asynchronous)
        patience = None if timeout is None else timeout + MARGIN
        answers = _outcome(names, partial(waiting.result, patience), where, timeout)
        found |= {name: _outcome(name, answer, where, timeout) for name, answer in answers.items()}
    return {name: _checked(name, found[name], arguments["completions"], rows) for name, _, _ in rewards}


def is_asynchronous(function) -> bool:
    """Whether calling it gives a coroutine: `async def`, a partial of one, an object with `async def __call__`."""
    function = unbound(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _together(functions: dict[str, Callable], timeout: float | None) -> dict[str, Callable]:
    """name -> a function that returns the values, or raises what the coroutine raised."""

    async def one(function) -> Callable:
        try:
            values = await asyncio.wait_for(function(), timeout)
        except TimeoutError as error:
            ours = timeout is not None and not str(error)
            return partial(_raise, TimedOut() if ours else error)
        except Exception as error:  # raised by _outcome, which knows the name
            return partial(_raise, error)
        return lambda: list(values)

    return dict(zip(functions, await asyncio.gather(*map(one, functions.values())), strict=True))


def _raise(error: Exception):
    raise error


def _call(function, arguments: dict, timeout: float | None) -> list:
    if timeout is None or type(unbound(function)).__module__ in OF_MODELS:
        return list(function(**arguments))
    task = packed(_listed, (function, arguments), {}) if is_importable(function) else None
    if task is not None:
        return POOL.call_packed(task, timeout)
    return Thread(partial(_listed, function, arguments)).result(timeout)


def _listed(function, arguments: dict) -> list:
    return list(function(**arguments))


def _outcome(name: str, call: Callable, where: str, timeout: float | None):
    """What `call` returns. UserError where it raises."""
    try:
        return call()
    except UserError:
        raise
    except TimedOut:
        raise UserError(
            f"reward function {name!r} took longer than {timeout:g} s {where}: mend what hangs in it, or raise "
            "reward_timeout"
        ) from None
    except RemoteError as error:
        if error.kind == UserError.__name__:
            raise UserError(error.text) from None
        raise UserError(f"reward function {name!r} raised {error} ({where})") from RuntimeError(error.where)
    except Exception as error:
        raise UserError(f"reward function {name!r} raised {type(error).__name__}: {error} ({where})") from error


def _require_columns(name: str, function, arguments: dict) -> None:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    missing = [
        p.name
        for p in parameters
        if p.kind in named and p.default is inspect.Parameter.empty and p.name not in arguments
    ]
    if missing:
        raise UserError(
            f"reward function {name!r} needs {', '.join(map(repr, missing))}, which is no column of the rows and not "
            f"set in reward_options; the columns are: {', '.join(arguments)}"
        )


def _checked(name: str, values: list, completions: list, rows: list[int]) -> list[float | None]:
    if len(values) != len(completions):
        raise UserError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    for value, row, completion in zip(values, rows, completions, strict=True):
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
            raise UserError(
                f"reward function {name!r} returned {value!r} for row {row}, expected a finite number or None: "
                f"{completion[:80]!r}"
            )
    return [None if value is None else float(value) for value in values]
