"""Reward functions, found by short name or by dotted path.

In: a name from a YAML (`rewards: [correct]` or `rewards: [my_rewards.short]`). Out: the function, TRL's contract:
`fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, None = does not apply to this row.

    reward = load_reward("correct")

To add one: write such a function in a file of your own, and name it by dotted path.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable

from posttrain.data.tiny import utility_reward
from posttrain.errors import UserError
from posttrain.rewards.math import correct

RewardFn = Callable[..., list[float | None]]

REWARDS: dict[str, RewardFn] = {"correct": correct, "tiny_utility": utility_reward}


def load_rewards(names: list[str], weights: list[float]) -> list[tuple[str, RewardFn, float]]:
    """[(name, function, weight)]; no weights means 1 for each."""
    return [
        (name, load_reward(name), weight) for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    ]


def load_reward(name: str) -> RewardFn:
    """Return the reward function of a short name in REWARDS or of a dotted path "package.module.function".

    Modules are also looked for in the working directory: under `accelerate launch` it is not on Python's path.

    Raises:
        UserError: no such name, module or function, with the nearest one; or the name is not a function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f"reward {name!r}: unknown{_nearest(name, REWARDS)}; known: {', '.join(sorted(REWARDS))}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module was found, but something it imports was not: its traceback says where
        raise UserError(
            f"reward {name!r}: no module {error.name!r}{_nearest(name, REWARDS)}; a dotted path is "
            f"package.module.function, found from the working directory {os.getcwd()} or PYTHONPATH"
        ) from None
    if attribute not in vars(module):
        raise UserError(f"reward {name!r}: no {attribute!r} in {module_name}{_nearest(attribute, vars(module))}")
    function = vars(module)[attribute]
    if not callable(function):
        raise UserError(f"reward {name!r}: its type is {type(function).__name__}, expected a function")
    return function


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
