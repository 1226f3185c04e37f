"""The gate: what is learned and where a reply ends. Each set-up is broken as users meet it, and refused by name.

Run: pytest tests/test_gate.py
"""

from copy import deepcopy
from importlib.resources import files
from pathlib import Path

import pytest
from conftest import CHATML, new_llama
from gate_helpers import ROWS, SFT, Run, own_tokens, refused_and_allowed, rl, sft, user
from test_chat import END_OUTSIDE, with_template

from posttrain import gate
from posttrain.chat import set_template
from posttrain.errors import UserError
from posttrain.sft_rows import encode_chats, gated_rows

# ---- what is learned ------------------------------------------------------------------------------------------------


def test_a_row_without_the_assistant(tokenizer, model):
    rows = [*ROWS[:3], {"messages": [user("hi"), user("hi?")]}, {"messages": []}]
    words = ("row 3: 0 assistant turns, found roles: user, user (and 1 more row)",)
    refused_and_allowed("no_assistant_turn", words, lambda run: sft(tokenizer, model, rows, run))


def test_a_stock_template_without_generation_marks(tokenizer, model):
    """Qwen 2.5's as TRL carries it. One row has a mask of its own, so that something is left when it is allowed."""
    stock = with_template(tokenizer, (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text())
    assert "{% generation" not in stock.chat_template
    marked = (files("trl") / "chat_templates" / "qwen2_5_training.jinja").read_text()
    row = ROWS[0] | own_tokens(stock, ROWS[0]["messages"], chat_template=marked)
    start = stock.convert_tokens_to_ids("<|im_start|>")
    words = ("row 1 (and 38 more rows): none of", f"token 0 '<|im_start|>' (id {start})", "{% generation %}")
    refused_and_allowed("no_supervised_tokens", words, lambda run: sft(stock, model, [row, *ROWS[1:]], run))
    with pytest.raises(UserError, match="no row is left to learn from"):
        sft(stock, model, run=Run("no_supervised_tokens"))


def test_no_reply_begins_before_the_cut(tokenizer, model):
    with pytest.raises(UserError, match="no_supervised_tokens: no reply begins within max_length 5 tokens"):
        sft(tokenizer, model, max_length=5, max_truncated=1.0)
    with pytest.raises(UserError, match="no row is left to learn from"):
        sft(tokenizer, model, max_length=5, max_truncated=1.0, run=Run("no_supervised_tokens"))


def test_an_end_token_outside_the_marks(tokenizer, model):
    outside, end = with_template(tokenizer, END_OUTSIDE), tokenizer.eos_token_id
    replies = sum(m["role"] == "assistant" for m in ROWS[0]["messages"])
    ids = outside.apply_chat_template(ROWS[0]["messages"])["input_ids"]
    place = [at for at, id in enumerate(ids) if id == end][1 + (ROWS[0]["messages"][0]["role"] == "system")]
    words = (
        f"row 0: {replies} assistant turns, but 0 supervised end tokens",
        f"token {place} '<|im_end|>' (id {end}) has mask 0",
    )
    refused_and_allowed("end_token_unsupervised", words, lambda run: sft(outside, model, run=run))


def test_only_the_last_end_is_supervised(tokenizer, model):
    last_only = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{% if m.role == 'assistant' and loop.last %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    )
    two = next(i for i, row in enumerate(ROWS) if sum(m["role"] == "assistant" for m in row["messages"]) > 1)
    words = (f"row {two}: ", " assistant turns, but 1 supervised end tokens", "'<|im_end|>'")
    refused_and_allowed("end_token_unsupervised", words, lambda run: sft(last_only, model, run=run))


def test_pad_is_eos_and_masked_as_padding(tokenizer, model):
    """transformers' own collator takes every pad out of the labels, and with it the end of each turn."""
    from transformers import DataCollatorForLanguageModeling

    same = deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert gated_rows(Run(), same, model, ROWS, SFT)[0]["labels"][-1] == same.pad_token_id  # ours keeps it
    rows = [ROWS[i] | own_tokens(same, ROWS[i]["messages"]) for i in range(4)]
    collated = DataCollatorForLanguageModeling(same, mlm=False)([{"input_ids": row["input_ids"]} for row in rows])
    for row, labels in zip(rows, collated["labels"].tolist(), strict=True):
        pairs = zip(row["assistant_masks"], labels, strict=False)
        row["assistant_masks"] = [int(mask and label != -100) for mask, label in pairs]
    words = (f"'<|im_end|>' (id {same.eos_token_id}) ends a reply and has mask 0", "the tokenizer's pad_token")
    refused_and_allowed("pad_is_masked_end", words, lambda run: sft(same, model, rows, run))


def test_columns_of_tokens_that_do_not_fit(tokenizer, model):
    row = ROWS[0] | own_tokens(tokenizer, ROWS[0]["messages"])
    assert gated_rows(Run(), tokenizer, model, [row], SFT) == gated_rows(Run(), tokenizer, model, ROWS[:1], SFT)
    for changed in (
        {"assistant_masks": None},
        {"assistant_masks": row["assistant_masks"][1:]},
        {"input_ids": [len(tokenizer), *row["input_ids"][1:]]},
        {"assistant_masks": [2, *row["assistant_masks"][1:]]},
    ):
        with pytest.raises(UserError, match="row 1: column input_ids: expected ids below"):
            encode_chats(tokenizer, [ROWS[0], row | changed])


def test_tokens_of_another_tokenizer(tokenizer, model):
    row = ROWS[0] | own_tokens(tokenizer, ROWS[0]["messages"])
    row["input_ids"] = [i if i in (tokenizer.eos_token_id, 2, 3) else 30 for i in row["input_ids"]]
    with pytest.raises(UserError, match=r"render_mismatch: row 0, turn . \(assistant\): sampling begins with token"):
        sft(tokenizer, model, [row])


def test_too_many_cut_rows(tokenizer, model):
    lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in ROWS]
    limit = sorted(lengths)[35]
    cut = [row for row, length in enumerate(lengths) if length > limit]
    words = (
        f"{len(cut)} of 40 conversations are longer than max_length {limit}",
        f"row {cut[0]} with {lengths[cut[0]]} tokens the first; allowed are {(len(cut) - 1) / 40:.0%} (max_truncated)",
    )
    keys = {"max_length": limit, "max_truncated": (len(cut) - 1) / 40}
    refused_and_allowed("truncated", words, lambda run: sft(tokenizer, model, run=run, **keys))
    assert len(sft(tokenizer, model, max_length=limit, max_truncated=len(cut) / 40)) == 40


# ---- where a reply ends ---------------------------------------------------------------------------------------------


def test_a_template_whose_end_is_not_eos(base_tokenizer):
    """The template set on the tokenizer by hand: eos stays the base model's."""
    by_hand = with_template(base_tokenizer, Path(CHATML).read_text())
    model, end = new_llama(by_hand), by_hand.convert_tokens_to_ids("<|im_end|>")
    words = (
        f"the template closes a reply with '<|im_end|>' (id {end})",
        f"but eos_token_id of the generation config is '<|endoftext|>' (id {by_hand.eos_token_id})",
    )
    refused_and_allowed("end_is_not_eos", words, lambda run: sft(by_hand, model, run=run))
    prompts = [{"prompt": row["messages"][:1], "answer": "5"} for row in ROWS if row["messages"][0]["role"] == "user"]
    refused_and_allowed("end_is_not_eos", words, lambda run: rl(by_hand, model, prompts, run))
    assert "the tokenizer's eos" in gate.conditions.end_is_not_eos(by_hand)
    set_template(by_hand, model, CHATML)
    sft(by_hand, model)


def test_a_template_that_ends_a_reply_with_no_token(tokenizer, model):
    plain = with_template(
        tokenizer,
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    with pytest.raises(UserError, match="no_end_token: the template closes a reply with no control token"):
        sft(plain, model, ROWS[:3])
    small = new_llama(tokenizer)
    small.resize_token_embeddings(tokenizer.eos_token_id)
    assert "none of them" in gate.conditions.no_end_token(tokenizer, small)
