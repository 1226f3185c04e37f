"""Chat templates: load or swap one, encode conversations safely, find the end-of-turn token.

In: a tokenizer (and model) and messages `[{"role", "content"}]`. Out: token ids with a mask of what the assistant
wrote. Text inside a message never becomes a control token, in training, RL prompts, chat and evaluation alike.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the mark, not `add_generation_prompt`
CONTROL = re.compile(r"<\|[A-Za-z0-9_]+\|>")
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


@dataclass(frozen=True)
class EncodedChat:
    """One entry a token in both; mask 1 = written by the assistant, end token included."""

    input_ids: list[int]
    assistant_mask: list[int]


def encode_chat(tokenizer, messages: list[dict], *, add_generation_prompt: bool = False, tools=None) -> EncodedChat:
    """Render `messages` with the tokenizer's template and encode them; content stays content.

    A control token spelled out inside a message (`<|im_end|>` typed by a user) is swapped for a private-use
    character before rendering and encoded as ordinary text afterwards. Conversations without one encode exactly
    as `tokenizer.apply_chat_template` does. UserError where the template refuses the messages.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if isinstance(messages, str):
        raise UserError(
            f"found a prompt that is a string, {messages[:60]!r}; expected messages: [{{role, content}}, ...]"
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "pass --chat_template_path chat_templates/chatml.jinja"
        )
    control = sorted(control_tokens(tokenizer).values(), key=len, reverse=True)
    messages, literal = _hide_control(messages, control)
    try:
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=GENERATION.search(tokenizer.chat_template) is not None,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as error:  # TypeError: text + None, a message without its content
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(f"the chat template refuses messages with roles {roles}: {error}") from error
    return _encode_rendered(tokenizer, rendered[0], spans[0] if spans else [], literal)


def control_tokens(tokenizer) -> dict[int, str]:
    """id -> text of the tokens that text never becomes. Wider than `all_special_ids`, which has only those that the
    tokenizer's config names: not always <|im_end|>."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _hide_control(messages: list[dict], control: list[str]) -> tuple[list[dict], dict[str, str]]:
    """Replace control tokens in contents by private-use characters; returns new messages and character -> token."""
    found = [t for t in control if any(t in (m.get("content") or "") for m in messages)]
    if not found:
        return messages, {}
    taken = set("".join(m.get("content") or "" for m in messages))
    free = (chr(point) for point in range(0xF0000, 0xFFFFE) if chr(point) not in taken)
    literal = dict(zip(free, found, strict=False))
    hidden = []
    for message in messages:
        content = message.get("content")
        for character, token in literal.items():
            content = content.replace(token, character) if content else content
        hidden.append({**message, "content": content})
    return hidden, literal


def _encode_rendered(tokenizer, text: str, spans: list[tuple[int, int]], literal: dict[str, str]) -> EncodedChat:
    """Encode rendered text piece by piece: literal pieces without special tokens, the rest with them."""
    ids, mask, position = [], [], 0
    pieces = re.split(f"([{''.join(literal)}])", text) if literal else [text]
    for piece in pieces:
        if piece in literal:
            piece_ids = tokenizer(literal[piece], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            starts = [position] * len(piece_ids)
        else:
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            piece_ids = encoded["input_ids"]
            starts = [position + start for start, _ in encoded["offset_mapping"]]
        ids += piece_ids
        mask += [int(any(low <= start < high for low, high in spans)) for start in starts]
        position += len(piece)
    return EncodedChat(ids, mask)


def decode(tokenizer, ids: list[int]) -> str:
    """A completion's text without its end token; other special tokens stay visible, since they are a defect."""
    ids, stops = list(ids), stop_ids(tokenizer)
    while ids and ids[-1] in stops:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)


def end_of_turn_id(tokenizer) -> int:
    """Id of the token that closes an assistant turn, read off the template's own render."""
    encoded = encode_chat(tokenizer, PROBE)
    supervised = [i for i, m in zip(encoded.input_ids, encoded.assistant_mask, strict=True) if m]
    if not supervised:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} marks nothing as the assistant's: "
            "put {% generation %} ... {% endgeneration %} around the assistant's content and its end token"
        )
    for token_id in reversed(supervised):  # a line break may follow the end token
        if token_id in control_tokens(tokenizer):
            return token_id
    raise UserError(
        f"the chat template of {tokenizer.name_or_path!r} leaves the turn's end token outside "
        "{% generation %}: it would never be learned; move it inside"
    )


def reply_end_id(tokenizer) -> int | None:
    """Id of the token that closes a reply under the tokenizer's template, marked for training or not; None where it
    closes with none."""
    opened = len(encode_chat(tokenizer, PROBE[:1], add_generation_prompt=True).input_ids)
    special = control_tokens(tokenizer)
    return next((i for i in encode_chat(tokenizer, PROBE).input_ids[opened:] if i in special), None)


def stop_ids(tokenizer, model=None) -> tuple[int, ...]:
    """What ends a reply: the eos of tokenizer and generation config, and the template's end of turn."""
    ids = {tokenizer.eos_token_id}
    if model is not None:
        configured = model.generation_config.eos_token_id
        ids |= set(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        ids.add(reply_end_id(tokenizer))
    return tuple(sorted(ids - {None}))


def read_template(path: str) -> str:
    """The text of a template file; UserError names the templates that exist where it does not."""
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in Path("chat_templates").glob("*.jinja"))
        raise UserError(
            f"chat_template_path: no file {path!r}; there are {', '.join(known) or 'none in chat_templates/'}"
        )
    return file.read_text(encoding="utf-8")


def set_template(tokenizer, model, path: str | None) -> None:
    """Give tokenizer and model the template at `path` (None keeps theirs) and make them agree on how a turn ends.

    Control tokens new to the tokenizer are added as special ones, with embeddings set to the mean of the old rows.
    The end-of-turn token becomes eos in the tokenizer and in the generation config, beside the base model's own.
    """
    if path is not None:
        tokenizer.chat_template = read_template(path)
    elif tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "pass --chat_template_path chat_templates/chatml.jinja"
        )
    known = set(tokenizer.get_vocab())
    new = [token for token in dict.fromkeys(CONTROL.findall(tokenizer.chat_template)) if token not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    base_eos, end = tokenizer.eos_token_id, end_of_turn_id(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.config.eos_token_id = end
    model.generation_config.eos_token_id = sorted({end, base_eos} - {None})
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def template_sha256(tokenizer) -> str | None:
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()
