"""Call reward functions on rollouts and add them up. In: `[(name, function, weight)]`, rollouts. Out: (N,) rewards."""

import torch

from posttrain.chat import decode, stop_ids
from posttrain.errors import UserError
from posttrain.rewards.calls import run_rewards
from posttrain.rewards.text import own_tokens
from posttrain.rl.types import Experience, Rollouts

# A data row's columns may not take the place of these.
OURS = ("prompt", "prompts", "completions", "completion_ids", "completion_mask", "prompt_ids", "turns", "calls")


def call_rewards(
    rewards, rollouts: Rollouts, tokenizer, timeout: float | None = None
) -> dict[str, list[float | None]]:
    """name -> N rewards. A function gets TRL's arguments: prompts, completions, completion_ids, and the rows' columns.

    Two more columns are for functions that read tokens: `prompt_ids`, and `completion_mask`, 0 where a token is a
    tool's and not the model's; the text of a completion holds both. Two are for replies with tools: `turns`, the texts
    of the model's own turns, and `calls`, how many were answered. `timeout`: seconds for each function. Raises
    UserError as `rewards.calls.run_rewards` does.
    """
    stops = stop_ids(tokenizer)
    texts = [decode(tokenizer, c.ids, stops) for c in rollouts.completions]
    masks = [[1] * len(c.ids) if c.mask is None else c.mask for c in rollouts.completions]
    turns = own_tokens([c.ids for c in rollouts.completions], masks)
    names = dict.fromkeys(key for row in rollouts.rows for key in row if key not in OURS)
    arguments = {
        "prompts": [row.get("prompt") for row in rollouts.rows],
        "completions": texts,
        "completion_ids": [c.ids for c in rollouts.completions],
        **{key: [row.get(key) for row in rollouts.rows] for key in names},
        "prompt_ids": rollouts.prompt_ids,
        "completion_mask": masks,
        "turns": [
            [text] if own == [c.ids] else [decode(tokenizer, ids, stops) for ids in own]
            for text, own, c in zip(texts, turns, rollouts.completions, strict=True)
        ],
        "calls": [c.calls or 0 for c in rollouts.completions],
    }
    return run_rewards(rewards, arguments, [_row(rollouts, i) for i in range(len(rollouts.rows))], timeout)


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
    """The first `num` groups' first completions and rewards, as lines of rollouts.jsonl; `group_rewards`: the lowest
    and the highest of the group."""
    rollouts, rows = experience.rollouts, []
    for index in range(0, len(rollouts.rows), rollouts.num_generations)[:num]:
        completion = rollouts.completions[index]
        group = experience.rewards[index : index + rollouts.num_generations]
        rows.append(
            {
                "step": step,
                "prompt": tokenizer.decode(rollouts.prompt_ids[index]),
                "completion": decode(tokenizer, completion.ids),
                "reward": experience.rewards[index].item(),
                **({"group_rewards": [group.min().item(), group.max().item()]} if len(group) > 1 else {}),
                "rewards": {name: values[index] for name, values in experience.rewards_by_name.items()},
                "advantage": experience.advantages[index][-1].item(),
                "stop": completion.stop,
                "tokens": len(completion.ids),
            }
        )
    return rows
