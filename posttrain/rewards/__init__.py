"""Reward functions, found by short name or by dotted path, with their options.

In: names and `reward_options` of a YAML (`reward_funcs: [correct, my.short]`). Out: functions of TRL's contract:
`fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, None = does not apply to this row.

    reward = load_reward("correct")
    rewards = load_rewards(["correct", "overlong"], [1.0, 0.5], {"overlong": {"max_length": 512, "cache": 128}})

To add one: write such a function in a file of your own, and name it by dotted path. Its arguments with a default are
its options. Before a run is spent on it, attack it: `posttrain attack-reward my_rewards.short`.
"""

import asyncio
from collections.abc import Callable

from posttrain.data.tiny import utility_reward
from posttrain.errors import UserError
from posttrain.lookup import function_by_name, nearest
from posttrain.rewards.code import code_reward
from posttrain.rewards.format import format_reward
from posttrain.rewards.guard import Thread
from posttrain.rewards.honest import honest, informs, stated
from posttrain.rewards.identity import identity
from posttrain.rewards.judge import judge_reward
from posttrain.rewards.language import language_reward
from posttrain.rewards.length import length_reward, overlong_reward
from posttrain.rewards.math import correct
from posttrain.rewards.model_by_name import model_reward
from posttrain.rewards.model_by_name import reward_parents as reward_parents
from posttrain.rewards.options import bind
from posttrain.rewards.repetition import repetition_reward
from posttrain.rewards.spelling import spelled
from posttrain.rewards.tool_use import answered, call_cost

RewardFn = Callable[..., list[float | None]]

REWARDS: dict[str, RewardFn] = {
    "correct": correct,
    "math": correct,
    "format": format_reward,
    "length": length_reward,
    "overlong": overlong_reward,
    "repetition": repetition_reward,
    "language": language_reward,
    "code": code_reward,
    "model": model_reward,
    "judge": judge_reward,
    "honest": honest,
    "stated": stated,
    "informs": informs,
    "identity": identity,
    "answered": answered,
    "call_cost": call_cost,
    "spelled": spelled,
    "tiny_utility": utility_reward,
}
FACTS = {"answer": [], "others": []}
TRIED = ("format", "length", "overlong", "repetition", "language", "code", "model", "judge", "honest")


def load_rewards(
    names: list[str], weights: list[float], options: dict[str, dict] | None = None
) -> list[tuple[str, RewardFn, float]]:
    """[(name, function, weight)]; no weights means 1 for each. `options`: name -> {keyword: value}.

    Raises:
        UserError: a name that is unknown or stands there twice; options of a reward that is not among the names; a
            keyword the reward does not have, with the nearest one; a value out of its range.
    """
    options = options or {}
    for name in options:
        if name not in names:
            raise UserError(
                f"reward_options: {name!r} is none of reward_funcs ({', '.join(names)}){nearest(name, names)}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"reward_funcs: {twice[0]!r} stands there twice; give it the sum of its weights")
    return [
        (name, _with_options(name, options.get(name)), weight)
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    ]


def _with_options(name: str, given: dict | None) -> RewardFn:
    """The reward with its options; those of ours are tried on an empty batch, which shows at once what is wrong."""
    function = load_reward(name)
    bound = function if given is None else bind(name, function, given)
    if name in TRIED:
        values = bound(prompts=[], completions=[], completion_ids=[], prompt_ids=[], tests=[], **FACTS)
        if asyncio.iscoroutine(values):
            Thread(lambda: asyncio.run(values)).result(None)  # where an event loop runs already (a notebook), too
    return bound


def load_reward(name: str) -> RewardFn:
    """Return the reward function of a short name in REWARDS or of a dotted path "package.module.function".

    Modules are also looked for in the working directory: under `accelerate launch` it is not on Python's path.

    Raises:
        UserError: no such name, module or function, with the nearest one; or the name is not a function.
    """
    return function_by_name("reward", name, REWARDS)
