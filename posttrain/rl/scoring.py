"""Call reward functions on rollouts and add them up. In: `[(name, function, weight)]`, rollouts. Out: (N,) rewards."""

import math
from typing import SupportsFloat

import torch

from posttrain.chat import decode
from posttrain.errors import UserError
from posttrain.rl.types import Experience, Rollouts

OURS = ("prompt", "prompts", "completions", "completion_ids")  # a data row's columns may not take their place


def call_rewards(rewards, rollouts: Rollouts, tokenizer) -> dict[str, list[float | None]]:
    """name -> N rewards. A function gets TRL's arguments: prompts, completions, completion_ids, and the rows' columns.

    `prompt_ids` comes as one more column, for functions that read tokens. Raises UserError naming function and row
    where a function raises, returns another number of values, or a value that is no finite number or None.
    """
    completions = [decode(tokenizer, c.ids) for c in rollouts.completions]
    columns = {key: [row.get(key) for row in rollouts.rows] for key in rollouts.rows[0] if key not in OURS}
    arguments = {
        "prompts": [row.get("prompt") for row in rollouts.rows],
        "completions": completions,
        "completion_ids": [c.ids for c in rollouts.completions],
        **columns,
        "prompt_ids": rollouts.prompt_ids,
    }
    result = {}
    for name, function, _ in rewards:
        try:
            values = list(function(**arguments))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
        if len(values) != len(completions):
            raise UserError(
                f"reward function {name!r} returned {len(values)} values for {len(completions)} completions"
            )
        for index, value in enumerate(values):
            if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
                raise UserError(
                    f"reward function {name!r} returned {value!r} for row {_row(rollouts, index)}, expected a finite "
                    f"number or None: {completions[index][:80]!r}"
                )
        result[name] = [None if value is None else float(value) for value in values]
    return result


def _row(rollouts: Rollouts, index: int) -> int:
    return rollouts.rows[index].get("row", index)


def total_rewards(rewards, by_name: dict[str, list[float | None]], rollouts: Rollouts) -> torch.Tensor:
    """Weighted sum over functions, (N,); None counts as 0. UserError where no function applies to a completion."""
    size = len(rollouts.completions)
    for index in range(size):
        if all(values[index] is None for values in by_name.values()):
            raise UserError(
                f"no reward function applies to row {_row(rollouts, index)}: all returned None ({', '.join(by_name)})"
            )
    total = torch.zeros(size)
    for name, _, weight in rewards:
        total += weight * torch.tensor([value or 0.0 for value in by_name[name]])
    return total


def sample_rows(experience: Experience, step: int, tokenizer, num: int = 4) -> list[dict]:
    """The first `num` groups' first completions and rewards, as lines of rollouts.jsonl."""
    rollouts, rows = experience.rollouts, []
    for index in range(0, len(rollouts.rows), rollouts.num_generations)[:num]:
        completion = rollouts.completions[index]
        rows.append(
            {
                "step": step,
                "prompt": tokenizer.decode(rollouts.prompt_ids[index]),
                "completion": decode(tokenizer, completion.ids),
                "reward": experience.rewards[index].item(),
                "rewards": {name: values[index] for name, values in experience.rewards_by_name.items()},
                "advantage": experience.advantages[index][-1].item(),
                "stop": completion.stop,
                "tokens": len(completion.ids),
            }
        )
    return rows
