"""Reward for saying who the model is: identity rows among the prompts of RL, so that it does not forget.

In: completions (strings or message lists) and the columns that the adapter `identity_prompts` makes. Out: 1.0 where
the reply is right as posttrain/identity_eval.py judges it, 0.0 where not, None for rows that ask for something else.

    reward_funcs: [correct, identity]
    dataset_mixture:
      - {dataset_name: tiny, dataset_config: problems, count: 3000}
      - {dataset_name: recipes/identity/identity.yaml, dataset_adapter: identity_prompts, count: 1000}

A reply that tells all there is to tell is right for most questions, so this pays for long introductions, too: look at
the rollouts, or add `length`.
"""

from posttrain.identity_eval import judge
from posttrain.rewards.text import reply_text


def identity(
    prompts, completions, completion_ids=None, *, expected, refused, own, fact, **columns
) -> list[float | None]:  # fmt: skip
    """1.0 for a right reply, 0.0 for another, None where `expected` is None; the other columns as of
    `data.identity.identity_questions`."""
    names = ("expected", "refused", "own", "fact")
    rows = (dict(zip(names, values, strict=True)) for values in zip(expected, refused, own, fact, strict=True))
    return [
        None if row["expected"] is None else float(judge(reply_text(reply), row))
        for reply, row in zip(completions, rows, strict=True)
    ]
