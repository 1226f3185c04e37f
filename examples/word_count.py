"""A tool of your own: one function with type hints and a docstring, named by its dotted path.

    accelerate launch recipes/grpo.py --config examples/tool_use/grpo.yaml --output_dir runs/examples/word_count \
        --tools calculator examples.word_count.word_count

What came out: the products of examples/tool_use with a second tool beside the calculator, which SFT did not show and
no product needs: pass@1 18.5 % [14.1, 22.8] -> 66.4 % [59.7, 73.1], where the calculator alone gives 33.5 -> 83.6 %.
None of the 96 rollouts kept calls it, but a prompt that is new costs: show SFT every tool that you will use.

In: what the model writes between <tool_call> tags. Out: the text that it reads before it goes on. The chat model has
to know of calls: examples/tool_use/sft.yaml comes first.
"""


def word_count(text: str, unit: str = "words") -> str:
    """
    Counts the words, characters or lines of a text.

    Args:
        text: The text.
        unit: What to count. (choices: ["words", "characters", "lines"])
    """
    parts = {"words": text.split(), "characters": text, "lines": text.splitlines()}
    return str(len(parts[unit])) if unit in parts else f"error: unit is {unit!r}, expected one of {', '.join(parts)}"
