"""Rewards for replies with tools: what the model itself says at last, and what its calls cost.

In: completions, whose text holds calls and what tools answered; `turns`, of each the texts of the model's own turns;
`calls`, how many of its calls were answered; for `answered` the columns `answer` and `others` (None for a problem that
is worked out). Out: a number each. In a YAML:

    reward_funcs: [answered, call_cost]
    reward_weights: [1.0, 0.25]

With `call_cost` a call pays where it makes a right answer likelier by more than its weight: what the model knows, or
works out well enough, it then answers at once. Without it nothing speaks against a call for everything.
"""

from posttrain.rewards.honest import stated
from posttrain.rewards.text import last_turns


def answered(
    prompts, completions, completion_ids=None, *, answer, others, turns=None, **columns
) -> list[float | None]:
    """1.0 where the model's last turn states the answer as `stated` reads it, 0.0 where not, None where `answer` is
    None: what only a tool said does not count."""
    return stated(prompts, last_turns(completions, turns), answer=answer, others=others, **columns)


def call_cost(prompts, completions, completion_ids=None, *, calls=None, **columns) -> list[float]:
    """-1 for each answered call of a reply, failed ones too; 0 without one, and where there are no tools."""
    return [-float(number) for number in calls or [0] * len(completions)]
