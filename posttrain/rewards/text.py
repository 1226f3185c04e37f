"""What reward functions read from TRL's arguments. In: prompts, completions, token ids. Out: texts, turns, groups."""


def reply_text(completion) -> str:
    """The text of a completion: itself, or of a list of {"role", "content"} messages the last one's ("" for none)."""
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] or "") if completion else ""


def last_turns(completions, turns=None) -> list[str]:
    """What each completion says at last: of `turns`, the texts of the model's own turns, the last one ("" for none);
    without them the completion's text."""
    return [texts[-1] if texts else "" for texts in turns or [[reply_text(one)] for one in completions]]


def prompt_text(prompt) -> str:
    """The text of a prompt: itself, or of a list of messages what the last user said."""
    if not isinstance(prompt, list):
        return prompt or ""
    said = [message["content"] or "" for message in prompt if message["role"] == "user"]
    return said[-1] if said else ""


def own_tokens(completion_ids, completion_mask=None) -> list[list[list[int]]]:
    """Of each completion the model's own turns: its ids cut where the mask is 0 (a tool's text)."""
    masks = completion_mask or [[1] * len(ids) for ids in completion_ids]
    turns: list[list[list[int]]] = []
    for ids, mask in zip(completion_ids, masks, strict=True):
        pieces: list[list[int]] = [[]]
        for token, own in zip(ids, mask, strict=True):
            if own:
                pieces[-1].append(token)
            elif pieces[-1]:
                pieces.append([])
        turns.append([piece for piece in pieces if piece])
    return turns


def groups(prompts, prompt_ids=None) -> list[list[int]]:
    """Indices of one prompt's completions: those that stand side by side with the same prompt tokens (or prompt)."""
    keys, found = prompt_ids if prompt_ids is not None else prompts, []
    for index, key in enumerate(keys):
        if index and key == keys[index - 1]:
            found[-1].append(index)
        else:
            found.append([index])
    return found
