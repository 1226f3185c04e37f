"""Chat templates: load or swap one, encode conversations safely, find the end-of-turn token.

In: a tokenizer (and model) and messages `[{"role", "content"}]`, with the Hub's `tool_calls`, `reasoning_content` and
`tools` where the template has them. Out: token ids with a mask of what the assistant wrote. Text inside a message
never becomes a control token, in training, RL prompts, chat and evaluation alike.
"""

import hashlib
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

from posttrain.errors import UserError
from posttrain.template_render import declared_control, render

PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedChat:
    """One entry a token in both; mask 1 = written by the assistant, end token included."""

    input_ids: list[int]
    assistant_mask: list[int]


def encode_chat(tokenizer, messages: list[dict], *, add_generation_prompt: bool = False, tools=None) -> EncodedChat:
    """Render `messages` with the tokenizer's template and encode them; content stays content.

    A control token spelled out inside a message (`<|im_end|>` typed by a user, or in a tool's arguments) is swapped
    for a private-use character before rendering and encoded as ordinary text afterwards. Other conversations encode
    exactly as `tokenizer.apply_chat_template` does, but for one thing: the tokens before a reply are always those of
    the generation prompt, so a reply that starts with a line break does not melt into the header's.
    UserError where the template refuses the messages.
    """
    if isinstance(messages, str):
        raise UserError(
            f"found a prompt that is a string, {messages[:60]!r}; expected messages: [{{role, content}}, ...]"
        )
    template = template_of(tokenizer, tools)
    control = control_tokens(tokenizer)
    found = _pattern(tuple(control.values()))
    (messages, tools), literal = _hide_control((messages, tools), found)
    special = tokenizer.special_tokens_map
    text, spans = render(template, messages, tools=tools, add_generation_prompt=add_generation_prompt, special=special)
    whole = None if literal else _encode_whole(tokenizer, text, spans, control, found)
    return whole or _encode_pieces(tokenizer, text, spans, literal)


def template_of(tokenizer, tools=None) -> str:
    """The text of the tokenizer's template, of several the one that transformers takes. UserError without one."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "pass --chat_template_path chat_templates/chatml.jinja"
        )
    return tokenizer.get_chat_template(tools=tools)


def control_tokens(tokenizer) -> dict[int, str]:
    """id -> text of the tokens that text never becomes. Wider than `all_special_ids`, which has only those that the
    tokenizer's config names: not always <|im_end|>. Tokens that are added but not special, such as Qwen's <think>, are
    words of the model's language and no control."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


@lru_cache(maxsize=64)
def _pattern(control: tuple[str, ...]) -> re.Pattern:
    """Finds the longest control token at a place; nothing where there are none."""
    longest_first = sorted(filter(None, control), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _hide_control(value, found: re.Pattern) -> tuple[object, dict[str, str]]:
    """Replace control tokens in all texts of `value`, nested lists and dicts with their keys, by private-use
    characters; returns the new value and character -> token."""
    texts = list(_texts(value))
    tokens = dict.fromkeys(token for text in texts for token in found.findall(text))
    if not tokens:
        return value, {}
    taken = set().union(*texts)
    free = (chr(point) for point in range(0xF0000, 0xFFFFE) if chr(point) not in taken)
    hidden = dict(zip(tokens, free, strict=False))

    def hide(value):
        if isinstance(value, str):
            return found.sub(lambda match: hidden[match[0]], value)
        if isinstance(value, dict):
            return {hide(key): hide(each) for key, each in value.items()}
        return [hide(each) for each in value] if isinstance(value, (list, tuple)) else value

    return hide(value), {character: token for token, character in hidden.items()}


def _texts(value):
    """All strings in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _encode_whole(
    tokenizer, text: str, spans: Spans, control: dict[int, str], found: re.Pattern
) -> EncodedChat | None:
    """Encode rendered text at once, as transformers does. None where that would not do: content that becomes control
    after the tokenizer's normalisation, or a header that is encoded otherwise when a reply follows."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if sum(map(control.__contains__, ids)) != len(found.findall(text)):
        return None
    mask = [0] * len(ids)
    for low, high in spans:
        first, last = (bisect_left(offsets, place, key=itemgetter(0)) for place in (low, high))
        opening = next((i for i in range(first - 1, -1, -1) if ids[i] in control), 0)
        if first and ids[opening:first] != _ids(tokenizer, text[offsets[opening][0] : low]):
            return None
        mask[first:last] = [1] * (last - first)
    return EncodedChat(ids, mask)


@lru_cache(maxsize=256)
def _ids(tokenizer, text: str) -> list[int]:
    """Of a header: there are few, and each comes with every turn. Do not change the list."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- text and control encoded apart: slower, and content cannot become control whatever the tokenizer does ----------


def _encode_pieces(tokenizer, text: str, spans: Spans, literal: dict[str, str]) -> EncodedChat:
    """Encode what stands between the template's control tokens as nothing but text. `literal`: private-use character
    -> the control token that somebody typed there."""
    added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    forms = [
        (r"\s*" if token.lstrip else "") + re.escape(form) + (r"\s*" if token.rstrip else "")
        for form, (_, token) in sorted(added.items(), key=lambda item: -len(item[0]))
    ]
    opens_only = _opens_texts_only(tokenizer, added)
    ids, mask, end = [], [], 0
    for match in [*re.finditer("|".join(forms) or r"(?!)", text), None]:
        low, high = match.span() if match else (len(text), len(text))
        more = _encode_text(tokenizer, _parts(text, end, low, spans, literal), end > 0 and opens_only)
        ids, mask, end = ids + more[0], mask + more[1], high
        if match:
            ids.append(added[match[0].strip() if match[0] not in added else match[0]][0])
            mask.append(int(any(start <= low < stop for start, stop in spans)))
    return EncodedChat(ids, mask)


def _parts(text: str, low: int, high: int, spans: Spans, literal: dict[str, str]) -> list[tuple[str, int]]:
    """text[low:high] cut where the assistant begins and ends to write, typed control tokens put back: (text, mask)."""
    cuts = sorted({low, high, *(place for span in spans for place in span if low < place < high)})
    return [
        (
            "".join(literal.get(character, character) for character in text[start:stop]),
            int(any(a <= start < b for a, b in spans)),
        )
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]


def _encode_text(tokenizer, parts: list[tuple[str, int]], follows: bool) -> tuple[list[int], list[int]]:
    """Ids and mask of neighbouring parts, encoded together unless that changes the tokens before what the assistant
    writes. `follows`: the tokenizer must not take the start for the start of a text."""
    text = "".join(part for part, _ in parts)
    ids, offsets = _plain(tokenizer, text, follows)
    mask, end = [0] * len(ids), 0
    for index, (part, inside) in enumerate(parts):
        start, end = end, end + len(part)
        first, last = (bisect_left(offsets, place, key=itemgetter(0)) for place in (start, end))
        if inside and index:
            header, _ = _plain(tokenizer, text[:start], follows)
            if ids[:first] != header:
                before, after = _encode_text(tokenizer, parts[:index], follows), parts[index:]
                rest = _encode_text(tokenizer, after, True)
                return before[0] + rest[0], before[1] + rest[1]
        mask[first:last] = [inside] * (last - first)
    return ids, mask


def _plain(tokenizer, text: str, follows: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of text in which nothing is control."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    if follows and text and _adds_a_space(tokenizer):
        encoded = tokenizer("\n" + text, **options)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        first = bisect_left(offsets, 1, key=itemgetter(0))
        if first and offsets[first - 1][1] <= 1:
            return ids[first:], [(low - 1, high - 1) for low, high in offsets[first:]]
    encoded = tokenizer(text, **options)
    return encoded["input_ids"], encoded["offset_mapping"]


def _adds_a_space(tokenizer) -> bool:
    """As SentencePiece does at the start of a text."""
    return tokenizer.tokenize("a")[0].startswith("▁")


def _opens_texts_only(tokenizer, added: dict) -> bool:
    """Whether that space comes at the start of a text and not after each control token, too."""
    if not added or not _adds_a_space(tokenizer):
        return False
    return _ids(tokenizer, f"{next(iter(added))}a")[1:] != _ids(tokenizer, "a")


def decode(tokenizer, ids: list[int], stops=None) -> str:
    """A completion's text without its end token; other special tokens stay visible, since they are a defect. `stops`:
    `stop_ids(tokenizer)`, which renders the template, for who decodes many."""
    ids, stops = list(ids), stop_ids(tokenizer) if stops is None else stops
    while ids and ids[-1] in stops:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)


def end_of_turn_id(tokenizer) -> int:
    """Id of the token that closes an assistant turn, read off the template's own render."""
    learned = _learned_ids(tokenizer)
    if not learned:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} marks nothing as the assistant's: "
            "put {% generation %} ... {% endgeneration %} around the assistant's content and its end token"
        )
    end = _last_control(tokenizer, learned)
    if end is not None:
        return end
    raise UserError(
        f"the chat template of {tokenizer.name_or_path!r} leaves the turn's end token outside "
        "{% generation %}: it would never be learned; move it inside"
    )


def _learned_ids(tokenizer) -> list[int]:
    encoded = encode_chat(tokenizer, PROBE)
    return [i for i, m in zip(encoded.input_ids, encoded.assistant_mask, strict=True) if m]


def _last_control(tokenizer, ids: list[int]) -> int | None:
    """A line break may follow the end token."""
    return next((i for i in reversed(ids) if i in control_tokens(tokenizer)), None)


def closing_ids(tokenizer) -> list[int]:
    """The control tokens that stand after a reply's content: one of them has to stop generation."""
    control, closing = control_tokens(tokenizer), []
    for id in reversed(encode_chat(tokenizer, PROBE).input_ids):
        if id in control:
            closing.append(id)
        elif tokenizer.decode([id]).strip():  # content; what is left is white space
            break
    return closing[::-1]


def reply_end_id(tokenizer) -> int | None:
    """Id of the token that closes a reply under the tokenizer's template, marked for training or not; None where it
    closes with none."""
    return next(iter(closing_ids(tokenizer)), None)


def stop_ids(tokenizer, model=None) -> tuple[int, ...]:
    """What ends a reply: the eos of tokenizer and generation config, and the template's end of turn."""
    ids = {tokenizer.eos_token_id}
    if model is not None:
        configured = model.generation_config.eos_token_id
        ids |= set(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        ids.add(reply_end_id(tokenizer))
    return tuple(sorted(ids - {None}))


def generation_matches_training(tokenizer, messages: list[dict], tools=None) -> str | None:
    """None where each reply's prompt at generation is, token by token, how the training render begins; else a
    sentence with the first token that differs."""
    whole = encode_chat(tokenizer, messages, tools=tools).input_ids
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn:
            prompt = encode_chat(tokenizer, messages[:turn], add_generation_prompt=True, tools=tools).input_ids
            if whole[: len(prompt)] != prompt:
                where = divergence(tokenizer, whole, prompt)
                return f"the reply in message {turn} is not trained on as it is generated: {where}"
    return None


def common(first: list[int], second: list[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def divergence(tokenizer, trained: list[int], other: list[int], name: str = "at generation") -> str:
    """'token 12 is ... in training and ... at generation, after ...' of two lists of ids that differ."""
    place = common(trained, other)
    here, there = (
        f"{tokenizer.decode(ids[place])!r} ({ids[place]})" if place < len(ids) else "the end"
        for ids in (trained, other)
    )
    before = tokenizer.decode(trained[max(0, place - 8) : place])
    return f"token {place} is {here} in training and {there} {name}, after {before!r}"


# ---- swapping the template ------------------------------------------------------------------------------------------


def read_template(path: str) -> str:
    """The text of a template file; UserError names the templates that exist where it does not."""
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in Path("chat_templates").glob("*.jinja"))
        raise UserError(
            f"chat_template_path: no file {path!r}; there are {', '.join(known) or 'none in chat_templates/'}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"chat_template_path: {path} is no UTF-8 text: {error}") from error


def set_template(tokenizer, model, path: str | None) -> None:
    """Give tokenizer and model the template at `path` (None keeps theirs) and make them agree on how a turn ends.

    Control tokens that the template declares (`{#- control: ... -#}`) and the tokenizer lacks are added as special
    ones; the rows of new ones in embeddings and head become the mean of the old rows. The end-of-turn token becomes
    eos in the tokenizer and in the generation config, beside the base model's own; a pad token that is none, or that
    ends turns, becomes another one. `save_pair` keeps all of it. UserError where the template is not safe to render;
    what cannot be learned with it is the gate's to say.
    """
    if path is not None:
        tokenizer.chat_template = read_template(path)
    control = declared_control(template_of(tokenizer))
    _add_tokens(tokenizer, model, control)
    base_eos, end = tokenizer.eos_token_id, _last_control(tokenizer, _learned_ids(tokenizer))
    end = reply_end_id(tokenizer) if end is None else end  # not learned: the gate says so where it matters
    end = base_eos if end is None else end
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end) if end is not None else None
    _set_pad(tokenizer, model, {end, base_eos}, control)
    model.config.eos_token_id = end
    model.generation_config.eos_token_id = sorted({end, base_eos} - {None})
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_control(tokenizer, tokens: list[str]) -> list[str]:
    """Make `tokens` special where they are not; returns those that the vocabulary did not have."""
    vocabulary, special = tokenizer.get_vocab(), control_tokens(tokenizer).values()
    tokens = [token for token in tokens if token not in special]
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    return [token for token in tokens if token not in vocabulary]


def _add_tokens(tokenizer, model, tokens: list[str]) -> None:
    """add_control, with rows for the model: those of new ids become the mean of the rows that were in use, which are
    fewer than the matrix has where it was padded (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    import torch

    used = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    rows = tokenizer.convert_tokens_to_ids(add_control(tokenizer, tokens))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if rows else ():
            for values in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if values is not None:  # a tied head has its weight set twice, to the same
                    values[rows] = values[:used].mean(0, dtype=torch.float32).to(values.dtype)


def _set_pad(tokenizer, model, ends: set[int | None], control: list[str]) -> None:
    """A pad token of its own: what pads is masked in many a collator by its id, and the end of a turn with it."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    taken = {*ends, tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(control)}
    free = {id: text for id, text in control_tokens(tokenizer).items() if id not in taken}
    named = [text for text in free.values() if "pad" in text.lower()]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        named.append(tokenizer.unk_token)
    if not named:
        named = list(free.values())[:1] or ["<|pad|>"]
    if named[0] not in free.values():
        _add_tokens(tokenizer, model, named[:1])
    tokenizer.pad_token = named[0]


def template_sha256(tokenizer) -> str | None:
    """None without a template."""
    return None if not tokenizer.chat_template else hashlib.sha256(template_of(tokenizer).encode()).hexdigest()
