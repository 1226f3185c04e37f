"""Does the reply keep to the form <think>...</think><answer>...</answer>? It checks the form and no content.

In: completions (strings or message lists). Out: 1.0 or 0.0 each. In a YAML:

    reward_funcs: [correct, format]
    reward_weights: [1.0, 0.2]
    reward_options: {format: {tags: [think, answer]}}
"""

import re
from functools import lru_cache

from posttrain.rewards.options import bad_option
from posttrain.rewards.text import reply_text

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def format_reward(
    prompts, completions, completion_ids=None, *, tags=("think", "answer"), opened: bool = False, **columns
) -> list[float]:
    """1.0 where a completion is each tag's block once, in order, none empty and nothing beside them; else 0.0.

    White space between and around the blocks is free. Any further opening or closing tag of these names fails, in
    whatever spelling (`<THINK>`, `< think >`, `<think x="1">`), so blocks cannot be nested, repeated or faked.

    Args:
        tags: names of the blocks in their order.
        opened: the prompt has opened the first block already, so the completion begins inside it.

    Raises:
        UserError: an option of another kind.
    """
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and NAME.fullmatch(tag) for tag in tags):
        raise bad_option("format", "tags", tags, "a list of names such as [think, answer]")
    if len({tag.lower() for tag in tags}) < len(tags):
        raise bad_option("format", "tags", tags, "names that differ")
    if not isinstance(opened, bool):
        raise bad_option("format", "opened", opened, "true or false")
    return [float(is_in_form(reply_text(completion), tuple(tags), opened)) for completion in completions]


def is_in_form(text: str, tags: tuple[str, ...], opened: bool = False) -> bool:
    """Whether `text` is one non-empty block of each tag in order."""
    if opened:
        text = f"<{tags[0]}>{text}"
    spelled, any_spelling = _patterns(tags)
    found = [match[0] for match in any_spelling.finditer(text)]
    if found != [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]:
        return False
    blocks = spelled.fullmatch(text.strip())
    return blocks is not None and all(re.search(r"\w", block) for block in blocks.groups())


@lru_cache(maxsize=16)
def _patterns(tags: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """(the whole form with a group a block, any tag of these names)."""
    blocks = r"\s*".join(rf"<{tag}>(.*?)</{tag}>" for tag in tags)
    names = "|".join(tags)
    return re.compile(blocks, re.DOTALL), re.compile(rf"<\s*/?\s*(?:{names})\b[^<>]*>", re.IGNORECASE)
