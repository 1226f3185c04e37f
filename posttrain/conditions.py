"""The conditions of the gate: each a pure function that says what is wrong, naming row and token, or None.

In: a tokenizer, a model, conversations and their token ids. Out: text such as "row 3: token 17 '<|im_end|>' (id 4)
has mask 0; ...", or None where the condition holds. `CONDITIONS` says what each means and how to mend it;
posttrain/gate.py says which stage has which, and refuses.
"""

import difflib
from collections.abc import Iterable

from posttrain.chat import EncodedChat, closing_ids, common, control_tokens, reply_end_id, stop_ids
from posttrain.conversations import (
    Conversation,
    Rendered,
    begins,
    ids_of,
    named,
    neutral,
    token,
    turn_bounds,
)
from posttrain.errors import UserError

# name -> (what it means where it does not hold, how to mend it)
CONDITIONS = {
    "no_assistant_turn": (
        "a row has no turn of the assistant: there is nothing to learn in it",
        "leave the row out or give it a reply",
    ),
    "no_supervised_tokens": (
        "the mask of a row is all zero: the row would be trained on and teach nothing",
        "put {% generation %} ... {% endgeneration %} around content and end token of the assistant in the template",
    ),
    "no_end_token": (
        "the template closes a reply with no token that the model can write: generation would never stop",
        "close the assistant's turn with a control token of the tokenizer, inside {% generation %}",
    ),
    "end_token_unsupervised": (
        "a turn's end token is not learned: replies would never end",
        "move the end token inside {% generation %}",
    ),
    "pad_is_masked_end": (
        "the pad token is the end token, and was masked with the padding: replies would never end",
        "give the tokenizer a pad token of its own, or mask padding by its position and not by its id",
    ),
    "end_is_not_eos": (
        "generation does not stop at the token that closes a turn of the template",
        "add the template's end token to eos_token_id in generation_config.json, and make it the tokenizer's eos",
    ),
    "not_prefix_preserving": (
        "a turn is rendered otherwise once another follows: training sees a history that sampling never does",
        "use a template that renders earlier turns as it did before, such as chat_templates/chatml.jinja",
    ),
    "retokenised_turns": (
        "the text of a turn stays, but its tokens change once another turn follows",
        "begin and end each turn of the template with a control token, which text never merges with",
    ),
    "render_mismatch": (
        "training does not begin a reply with the tokens that sampling begins it with",
        "make the template's add_generation_prompt write exactly what stands before the assistant's content",
    ),
    "control_in_content": (
        "text that somebody wrote became a control token: it could end the turn or open another",
        "encode contents with posttrain.chat.encode_chat, or remove the token's text from the row",
    ),
    "truncated": (
        "more rows than allowed are cut at their end, or left out, for their length",
        "raise max_length (SFT: or max_truncated), or shorten or filter the rows",
    ),
    "score_not_at_end": (
        "the reward is not read at the token that ends a reply",
        "close the assistant's turn in the template, and let each completion be one or more turns that end with it",
    ),
    "packing_leaks": (
        "the model does not keep the conversations of a packed row apart: one would see the other",
        "SFT: --packing false; else a model whose attention in transformers follows position_ids, as that of Llama, "
        "Qwen and GPT-2 does",
    ),
    "template_differs_from_parent": (
        "a parent was trained with another chat template",
        "use the parent's template (leave out chat_template_path), or train the parents with this one",
    ),
}


def known(names: Iterable[str]) -> tuple[str, ...]:
    """The names of `--allow`, checked. UserError for one that is no condition."""
    for name in names:
        if name not in CONDITIONS:
            near = difflib.get_close_matches(name, CONDITIONS, n=1)
            raise UserError(
                f"allow: {name!r} is no condition of the gate{f'; did you mean {near[0]!r}?' if near else '.'} "
                f"Known: {', '.join(CONDITIONS)}"
            )
    return tuple(names)


# ---- what is learned ------------------------------------------------------------------------------------------------


def no_assistant_turn(conversations: list[Conversation]) -> str | None:
    bad = [each for each in conversations if not each.replies]
    if not bad:
        return None
    roles = ", ".join(str(message.get("role")) for message in bad[0].messages) or "none"
    return f"row {bad[0].row}: 0 assistant turns, found roles: {roles}{others(bad)}; expected one or more in each row"


def others(bad: list[Conversation]) -> str:
    rest = len({each.row for each in bad}) - 1
    return f" (and {rest} more row{'s' if rest > 1 else ''})" if rest else ""


def no_supervised_tokens(
    tokenizer, conversations: list[Conversation], chats: list[EncodedChat], max_length: int
) -> str | None:
    pairs = list(zip(conversations, chats, strict=True))
    bad = [each for each, chat in pairs if each.replies and 1 not in chat.assistant_mask]
    if bad:
        start = token(tokenizer, bad[0].ids, 0)
        return f"row {bad[0].row}{others(bad)}: none of {len(bad[0].ids)} tokens is supervised, from {start} on"
    if all(1 not in chat.assistant_mask[1:max_length] for chat in chats):  # the first token is never learned
        first = min((chat.assistant_mask.index(1) for chat in chats if 1 in chat.assistant_mask), default=None)
        said = f"no reply begins within max_length {max_length} tokens of its conversation"
        return said if first is None else f"{said}; the earliest begins at token {first}"
    return None


def masked_end(tokenizer, model, conversations, chats) -> tuple[Conversation, int, int | None] | None:
    """(first conversation with fewer supervised end tokens than replies, how many, the position of one that is not
    supervised). Rows where nothing is supervised are another condition's."""
    ends = set(stop_ids(tokenizer, model))
    for each, chat in zip(conversations, chats, strict=True):
        found = sum(1 for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m and i in ends)
        if found < each.replies and 1 in chat.assistant_mask:
            return each, found, _masked_position(tokenizer, each, chat, ends)
    return None


def _masked_position(tokenizer, each: Conversation, chat: EncodedChat, ends: set[int]) -> int | None:
    bounds = turn_bounds(tokenizer, each)
    for (start, stop), message in zip(bounds, each.messages, strict=True):
        here = [p for p in range(start, stop) if each.ids[p] in ends]
        if message.get("role") == "assistant" and not any(chat.assistant_mask[p] for p in here):
            return here[0] if here else None
    return None


def end_token_unsupervised(tokenizer, model, conversations, chats) -> str | None:
    bad = masked_end(tokenizer, model, conversations, chats)
    if bad is None or _is_pad(tokenizer, bad) or not closing_ids(tokenizer):
        return None
    each, found, position = bad
    ends = named(tokenizer, stop_ids(tokenizer, model))
    return (
        f"row {each.row}: {each.replies} assistant turns, but {found} supervised end tokens"
        + (f"; {token(tokenizer, each.ids, position)} has mask 0" if position is not None else "")
        + f"; expected one of {ends} in each turn"
    )


def pad_is_masked_end(tokenizer, model, conversations, chats) -> str | None:
    bad = masked_end(tokenizer, model, conversations, chats)
    if bad is None or not _is_pad(tokenizer, bad):
        return None
    each, _, position = bad
    return (
        f"row {each.row}: {token(tokenizer, each.ids, position)} ends a reply and has mask 0; it is the tokenizer's "
        "pad_token, too, so a mask of the padding takes it away"
    )


def _is_pad(tokenizer, bad: tuple[Conversation, int, int | None]) -> bool:
    each, _, position = bad
    return position is not None and each.ids[position] == tokenizer.pad_token_id


# ---- where a reply ends ---------------------------------------------------------------------------------------------


def no_end_token(tokenizer, model=None) -> str | None:
    closing = closing_ids(tokenizer)
    if not closing:
        return "the template closes a reply with no control token; expected one, such as <|im_end|>"
    outputs = None if model is None else model.config.get_text_config().vocab_size
    if outputs is not None and min(closing) >= outputs:
        return f"the model has {outputs} outputs, and the end token {named(tokenizer, closing)} is none of them"
    return None


def end_is_not_eos(tokenizer, model=None) -> str | None:
    """Without a model, the tokenizer's eos stands for the generation config's."""
    eos, whose = tokenizer.eos_token_id, "the tokenizer's eos"
    if model is not None:
        eos, whose = model.generation_config.eos_token_id, "eos_token_id of the generation config"
    stops, closing = set(eos if isinstance(eos, list) else [eos]) - {None}, closing_ids(tokenizer)
    if not closing or stops & set(closing):
        return None
    return (
        f"the template closes a reply with {named(tokenizer, closing)}, but {whose} is {named(tokenizer, stops)}; "
        "expected the same token"
    )


def score_not_at_end(tokenizer, conversations: list[Conversation]) -> str | None:
    end = reply_end_id(tokenizer)
    bad = [each for each in conversations if each.ids[-1:] != [end] or each.messages[-1].get("role") != "assistant"]
    if not bad or end is None:
        return None
    last, role = token(tokenizer, bad[0].ids, len(bad[0].ids) - 1), bad[0].messages[-1].get("role")
    return (
        f"row {bad[0].row}: its score is read at {last} of a turn of role {role}{others(bad)}; "
        f"expected {named(tokenizer, [end])} of the assistant's turn"
    )


# ---- training sees what sampling will -------------------------------------------------------------------------------


def not_prefix_preserving(tokenizer, samples: list[Rendered]) -> str | None:
    return _changed_turn(tokenizer, samples, same_text=False)


def retokenised_turns(tokenizer, samples: list[Rendered]) -> str | None:
    return _changed_turn(tokenizer, samples, same_text=True)


def _changed_turn(tokenizer, samples: list[Rendered], *, same_text: bool) -> str | None:
    """The first reply whose tokens are others once more turns follow, with the same text or with another."""
    for each in samples:
        whole = each.conversation.ids
        for turn, ids in each.upto.items():
            if ids is None or begins(whole, ids):
                continue
            kept = tokenizer.decode(whole).startswith(tokenizer.decode(ids))
            if kept == same_text:
                at = common(whole, ids)
                return (
                    f"{each.conversation.name}, turn {turn} (assistant): {token(tokenizer, ids, at)} as the last "
                    f"turn, but {token(tokenizer, whole, at)} once more turns follow; expected the same"
                )
    return None


def render_mismatch(tokenizer, samples: list[Rendered]) -> str | None:
    """Each turn by itself, so that what later turns change is not counted here, too."""
    for each in samples:
        for turn, prompt in each.prompts.items():
            whole = each.upto[turn]
            if prompt is not None and whole is not None and not begins(whole, prompt):
                at = common(whole, prompt)
                return (
                    f"{each.conversation.name}, turn {turn} (assistant): sampling begins with "
                    f"{token(tokenizer, prompt, at)}, training has {token(tokenizer, whole, at)}; expected the same"
                )
    return None


# ---- content stays content ------------------------------------------------------------------------------------------


def control_rows(tokenizer, conversations: list[Conversation]) -> dict[int, str]:
    """Index in `conversations` -> which control token came from content. Control ids are compared with those of the
    same turns with neutral content, which conversations of one structure share."""
    control, expected, found = set(control_tokens(tokenizer)), {}, {}
    for index, each in enumerate(conversations):
        plain, tools = neutral(each.messages), neutral(each.tools)
        structure = f"{plain!r}{tools!r}"
        if structure not in expected:
            ids = ids_of(tokenizer, plain, tools, each.opened)
            expected[structure] = None if ids is None else [i for i in ids if i in control]
        wanted, positions = expected[structure], [p for p, i in enumerate(each.ids) if i in control]
        if wanted is None or begins(wanted, [each.ids[p] for p in positions]):
            continue
        safe = ids_of(tokenizer, each.messages, each.tools, each.opened) or []  # where content stays text
        place = common(safe, each.ids)
        if place not in positions:  # or not even there
            place = positions[common(wanted, [each.ids[p] for p in positions])]
        found[index] = (
            f"row {each.row}: {token(tokenizer, each.ids, place)} came from content: the row has {len(positions)} "
            f"control tokens, the same turns with other content have {len(wanted)}"
        )
    return found


# ---- lengths, packing, parents --------------------------------------------------------------------------------------


def truncated(sizes: list[int], max_length: int, most: float) -> str | None:
    """`sizes` in tokens, `most` as a share of them."""
    long = [row for row, size in enumerate(sizes) if size > max_length]
    if len(long) <= most * len(sizes):
        return None
    return (
        f"{len(long)} of {len(sizes)} conversations are longer than max_length {max_length} and would lose their end "
        f"or be left out, row {long[0]} with {sizes[long[0]]} tokens the first; allowed are {most:.0%} (max_truncated)"
    )


def left_out(kept: list[int], num: int, most: float) -> str | None:
    """kept: the rows that are short enough, in their order, of `num`."""
    if num - len(kept) <= most * num:
        return None
    first = min(set(range(num)) - set(kept))
    return f"{num - len(kept)} of {num} rows are too long and left out, row {first} the first; allowed are {most:.0%}"


def packing_leaks(model) -> str | None:
    """Two documents in one row, twice, with another first document: the second's outputs must be the same. On a CPU to
    the bit, unless experts share their products among tokens; elsewhere but for rounding."""
    import torch

    config, home, was_training = model.config.get_text_config(), model.device, model.training
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    on_gpu = home.type == "cpu" and attention.startswith("flash") and torch.cuda.is_available()
    device = torch.device("cuda") if on_gpu else home  # where the trainer will take it: flash has no CPU kernel
    size, vocabulary = 8, config.vocab_size
    ids = (torch.arange(1, 2 * size + 1) * 7) % vocabulary
    changed = torch.cat([(ids[:size] + vocabulary // 2) % vocabulary, ids[size:]])
    positions = torch.arange(size).repeat(2)[None].to(device)
    model.eval()
    try:
        if on_gpu:
            model.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            first, second = (
                model(input_ids=each[None].to(device), position_ids=positions, use_cache=False).logits.float()
                for each in (ids, changed)
            )
    except TypeError as error:
        return f"{type(model).__name__} takes no position_ids, which say where a conversation begins ({error})"
    finally:
        model.train(was_training)
        if on_gpu:
            model.to(home)
    if first.dim() == 3:  # (1, 16, V) of a language model; (1, 1) of a reward model, read at the last token
        first, second = first[:, size:], second[:, size:]
    experts = getattr(config, "num_experts_per_tok", None)
    rounding = 1e-2 if device.type != "cpu" else 1e-5 if experts else 0.0
    difference = (first - second).abs().max().item()
    if difference <= rounding * first.abs().max().item():
        return None
    return (
        f"{type(model).__name__} with attn_implementation {attention}: in a packed row another first document changes "
        f"the outputs of the second, from token {size} on, by up to {difference:.2g}; expected no change"
    )


def template_differs_from_parent(sha256: str | None, parents: dict[str, tuple[str, str | None]]) -> str | None:
    """parents: role -> (path, SHA-256 of the template it was trained with, or None)."""
    for role, (path, theirs) in parents.items():
        if theirs is not None and theirs != sha256:
            ours = "none" if sha256 is None else sha256[:12]
            return f"{role} {path} was trained with template {theirs[:12]}, this stage has {ours}; expected the same"
    return None
