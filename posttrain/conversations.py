"""Conversations and the tokens of their turns: rendered turn by turn, compared, named in words.

In: messages and their token ids. Out: where each turn begins and ends, what stands before and after each reply, and
short texts such as "token 17 '<|im_end|>' (id 4)". For the gate (posttrain/conditions.py) and `posttrain inspect`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from posttrain.chat import common, encode_chat
from posttrain.errors import UserError

PROBE_ROW = -1


@dataclass(frozen=True)
class Conversation:
    """What a stage trains on or samples from, as messages and as the tokens it will use."""

    row: int  # PROBE_ROW: none of the data
    messages: list[dict]
    ids: list[int]
    tools: list | None = None
    opened: bool = False  # ends with what opens the assistant's next turn: a prompt

    @property
    def name(self) -> str:
        return "the template's probe (two questions)" if self.row == PROBE_ROW else f"row {self.row}"

    @property
    def replies(self) -> int:
        return sum(message.get("role") == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered turn by turn; None where the template refuses it so far."""

    conversation: Conversation
    prompts: dict[int, list[int] | None]  # turn of the assistant -> what sampling begins it with
    upto: dict[int, list[int] | None]  # turn of the assistant -> the conversation up to its end


def render(tokenizer, conversation: Conversation) -> Rendered:
    """The conversation before and after each turn of the assistant, each rendered by itself."""
    messages, last = conversation.messages, len(conversation.messages) - 1
    turns = [turn for turn, message in enumerate(messages) if message.get("role") == "assistant"]
    tools = conversation.tools
    prompts = {turn: ids_of(tokenizer, messages[:turn], tools, add_generation_prompt=True) for turn in turns}
    upto = {turn: ids_of(tokenizer, messages[: turn + 1], tools) for turn in turns if turn < last}
    return Rendered(conversation, prompts, upto | ({last: conversation.ids} if last in turns else {}))


def ids_of(tokenizer, messages: list[dict], tools=None, add_generation_prompt: bool = False) -> list[int] | None:
    """Token ids of these messages; None where the template refuses them (many refuse to begin with the assistant, or
    a call of a tool without its answer)."""
    try:
        return encode_chat(tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt).input_ids
    except UserError:
        return None


def turn_bounds(tokenizer, each: Conversation) -> list[tuple[int, int]]:
    """[start, stop) in tokens of each message. Where the template does not render a beginning by itself, its turn is
    empty and counts with the next one. What opens a prompt's reply is no message's."""
    stops, whole = [], len(each.messages) if not each.opened else None
    for turn in range(1, len(each.messages) + 1):
        ids = each.ids if turn == whole else ids_of(tokenizer, each.messages[:turn], each.tools)
        stop = common(ids, each.ids) if ids is not None else 0
        stops.append(max(stop, stops[-1] if stops else 0))
    return list(zip([0, *stops], stops, strict=False))


def neutral(value, key: str = ""):
    """Messages or tools with `x` in place of all that somebody wrote; ids of tool calls keep their length."""
    if isinstance(value, str):
        kept = key in ("role", "type") or not value.strip()
        return value if kept else "x" * (len(value) if key.endswith("id") else 1)
    if isinstance(value, list):
        return [neutral(item) for item in value]
    if isinstance(value, dict):
        return {
            name if name.isidentifier() else f"x{n}": neutral(v, name) for n, (name, v) in enumerate(value.items())
        }
    return value


# ---- words ----------------------------------------------------------------------------------------------------------


def token(tokenizer, ids: list[int], position: int) -> str:
    """`token 17 '<|im_end|>' (id 4)`, or that the row ends before it."""
    if position >= len(ids):
        return f"no token {position} (it ends after {len(ids)})"
    return f"token {position} {piece(tokenizer, ids[position])} (id {ids[position]})"


def piece(tokenizer, id: int) -> str:
    """A token's text in quotes, short, with nothing that moves a terminal's cursor."""
    text = token_text(tokenizer, id)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def token_text(tokenizer, id: int) -> str:
    return token_reader(tokenizer)(id)


def token_reader(tokenizer) -> Callable[[int], str]:
    """id -> what the token stands for, white space included; bytes that are no whole character as \\xf0."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added, byte_level = tokenizer.added_tokens_decoder, "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    table = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's stand-ins, turned round

    @cache
    def read(id: int) -> str:
        name = tokenizer.convert_ids_to_tokens(int(id)) or ""
        if id in added:
            return name
        if byte_level:
            raw = bytes(table[character] for character in name if character in table)
        elif name.startswith("<0x") and name.endswith(">"):  # SentencePiece's byte fallback
            raw = bytes([int(name[3:-1], 16)])
        else:
            return name.replace("\u2581", " ")
        return raw.decode("utf-8", errors="backslashreplace")

    return read


def named(tokenizer, ids: Iterable[int]) -> str:
    return ", ".join(f"{piece(tokenizer, id)} (id {id})" for id in sorted(ids)) or "none"


def begins(whole: list[int], start: list[int]) -> bool:
    return whole[: len(start)] == start
