"""Options of reward functions: their keywords with a default, set by `reward_options` in a YAML and checked here.

In: a reward function and what the user wrote. Out: the function with its options bound, or a UserError that names the
reward, the key and the nearest one. A column of the data that has an option's name never takes its place.
"""

import inspect
import math
from functools import partial
from numbers import Real

from posttrain.errors import UserError
from posttrain.lookup import nearest

CONTRACT = ("prompts", "completions", "completion_ids")
COLUMNS = ("prompt_ids", "completion_mask", "turns", "calls")  # of every batch; some rewards do without them


def options_of(function) -> dict:
    """name -> default of each option: a named argument with a default that is no column."""
    if isinstance(function, partial):
        return options_of(function.func) | function.keywords
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind in named and p.default is not p.empty and p.name not in CONTRACT + COLUMNS
    }


def unbound(function):
    """The function without the options bound to it."""
    return function.func if isinstance(function, partial) else function


def bind(name: str, function, given):
    """The function with options `given` ({keyword: value}) bound. UserError for one that it does not have."""
    if not isinstance(given, dict):
        raise UserError(f"reward_options: {name}: found {given!r}, expected a mapping such as {{max_length: 64}}")
    known = options_of(function)
    for key in given:
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise UserError(f"reward_options: {name}: unknown key {key!r}{nearest(key, known)}; {has}")
    return partial(function, **given) if given else function


def without_options(function, arguments: dict) -> dict:
    """The arguments less the columns named like an option: any option of a reward of ours, of others those set."""
    bound = function.keywords if isinstance(function, partial) else {}
    ours = (getattr(unbound(function), "__module__", "") or "").startswith("posttrain.rewards.")
    taken = options_of(function) if ours else bound
    return {key: value for key, value in arguments.items() if key not in taken}


def number(reward: str, key: str, value, *, low: float = -math.inf, high: float = math.inf, whole: bool = False):
    """Return `value`. UserError where it is no number (with `whole`, no integer) from `low` to `high`."""
    kind = int if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        least = "" if low == -math.inf else f" of at least {low:g}"
        most = "" if high == math.inf else f"{' and' if least else ' of'} at most {high:g}"
        raise bad_option(reward, key, value, f"{'an integer' if whole else 'a number'}{least}{most}")
    return value


def bad_option(reward: str, key: str, value, expected: str) -> UserError:
    """The error for an option of a reward that has not what is expected of it."""
    return UserError(f"reward_options: {reward}: {key}: found {value!r}, expected {expected}")
