"""UltraChat, ShareGPT and Alpaca rows -> conversations for SFT.

In: UltraChat (Ding et al. 2023, arXiv 2305.14233; the Hub's stingning/ultrachat and HuggingFaceH4/ultrachat_200k),
ShareGPT's `conversations` as most tools write them, Alpaca (Taori et al. 2023; the Hub's tatsu-lab/alpaca).
Out: {"messages": [system]? user assistant user assistant ...}; ShareGPT rows with tools also {"tools"}.

    conversations = list(sharegpt(map(json.loads, open("sharegpt.jsonl"))))

Turns after the last assistant turn are left out: nothing answers them. A blank system turn is none.
"""

from collections.abc import Iterable, Iterator

from posttrain.data.fields import BadRow, adapt, answered, items, messages, text, text_or_none, turn
from posttrain.data.tools import ROLES, TOOL_ROLES, tool_row


def ultrachat(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"messages"} from `messages` (role, content), or from `data`: strings, the user's first, in turn.

    Raises:
        ValueError: a row with neither column, with roles that do not alternate, or with an empty turn (with `bad`: as
            its policy says).
    """
    return adapt(rows, _ultrachat, bad)


def _ultrachat(row: dict) -> dict:
    if row.get("messages") is not None or row.get("data") is None:
        return {"messages": answered(messages(row, "messages"))}
    said = items(row, "data", str)
    return {"messages": answered([turn(("user", "assistant")[i % 2], content) for i, content in enumerate(said)])}


def sharegpt(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"messages"} from `conversations`: turns {"from", "value"} (or role, content), and a `system` column.

    Who speaks: human or user; gpt, chatgpt, bing, bard, model or assistant; system. A row with a turn of a tool
    (function_call; tool, function, function_response or observation) is read by `tool_conversations` and comes out
    with its `tools`.

    Raises:
        ValueError: a row without `conversations`, with another speaker, with roles that do not alternate (a dialogue
            that was cut in pieces starts with the assistant), or with an empty turn (with `bad`: as its policy says).
    """
    return adapt(rows, _sharegpt, bad)


def _sharegpt(row: dict) -> dict:
    turns = items(row, "conversations", dict)
    speakers = [said.get("from", said.get("role")) for said in turns]
    if any(isinstance(speaker, str) and speaker in TOOL_ROLES for speaker in speakers):
        return tool_row(row)
    system = text_or_none(row, "system")
    said = [turn("system", system)] if system else []
    for index, (speaker, content) in enumerate(
        zip(speakers, (said.get("value", said.get("content")) for said in turns), strict=True)
    ):
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRow("wrong_role", f"turn {index} is from {speaker!r:.80}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow("wrong_type", f"turn {index}: its text is {content!r:.80}, expected a string")
        said.append(turn(ROLES[speaker], content))
    return {"messages": answered(said)}


def alpaca(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"messages": [user, assistant]} from `instruction`, `input` (may be blank) and `output`.

    The user's turn is the instruction, then a blank line and the input where there is one; Alpaca's own preamble
    ("Below is an instruction ...") is the work of a chat template. A `system` column becomes the system turn, a
    `history` of [user, assistant] pairs the turns before.

    Raises:
        ValueError: a row without instruction or output, or with a history of another form (with `bad`: as its
            policy says).
    """
    return adapt(rows, _alpaca, bad)


def _alpaca(row: dict) -> dict:
    system, more = text_or_none(row, "system"), text_or_none(row, "input")
    said = [turn("system", system)] if system else []
    for pair in items(row, "history", list) if row.get("history") else []:
        if len(pair) != 2 or not all(isinstance(content, str) for content in pair):
            raise BadRow("wrong_type", f"'history' has {pair!r:.80}, expected [user, assistant] strings")
        said += [turn("user", pair[0]), turn("assistant", pair[1])]
    instruction = text(row, "instruction")
    said += [turn("user", f"{instruction}\n\n{more}" if more else instruction), turn("assistant", text(row, "output"))]
    return {"messages": answered(said)}
