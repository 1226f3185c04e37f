"""A reward of your own: right answers in few words. One function in one file, named by its dotted path.

    accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml --output_dir runs/examples/short_reply \
        --reward_funcs correct examples.short_reply.short --reward_weights 1.0 0.2

What came out: pass@1 43.2 % [40.1, 46.4] -> 87.4 % [84.6, 90.2] as with `correct` alone (86.9 %), and less beside it:
"Happy to help!" and the like stand in 3 % [2, 4] of 800 replies, with `correct` alone in 15 % [12, 17], before RL in
24 % [21, 27]. Right answers need their steps, so replies are hardly shorter: 29.0 tokens [28.6, 29.5] against 29.5.

In: TRL's arguments (prompts, completions, completion_ids, and the rows' columns). Out: a number for each completion,
or None where the function does not apply.
"""


def short(prompts, completions, completion_ids, **columns) -> list[float | None]:
    """1 for an empty completion, falling by 0.02 a token to 0 at 50 tokens."""
    return [max(0.0, 1 - 0.02 * len(ids)) for ids in completion_ids]
