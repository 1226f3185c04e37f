"""A reward of your own: right answers in few words. One function in one file, named by its dotted path.

    accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml --output_dir runs/examples/short_reply \
        --reward_funcs correct examples.short_reply.short --reward_weights 1.0 0.2

In: TRL's arguments (prompts, completions, completion_ids, and the rows' columns). Out: a number for each completion,
or None where the function does not apply.
"""


def short(prompts, completions, completion_ids, **columns) -> list[float | None]:
    """1 for an empty completion, falling by 0.02 a token to 0 at 50 tokens."""
    return [max(0.0, 1 - 0.02 * len(ids)) for ids in completion_ids]
