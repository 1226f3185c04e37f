"""A tool of your own: one function with type hints and a docstring, named by its dotted path.

    accelerate launch recipes/grpo.py --config examples/tool_use/grpo.yaml --output_dir runs/examples/word_count \
        --tools calculator examples.word_count.word_count

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
