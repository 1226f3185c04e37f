"""Chat encoding and the tokenizer, against transformers' own `apply_chat_template`.

Run: pytest tests/test_chat.py
"""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CHATML, REPOSITORY, new_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat import (
    decode,
    encode_chat,
    end_of_turn_id,
    generation_matches_training,
    set_template,
    stop_ids,
    template_sha256,
)
from posttrain.errors import UserError
from posttrain.models import load_tokenizer, save_pair
from posttrain.tokenizer import bytes_per_token, train_tokenizer

CONTROL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
TURN = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "The answer is 5."}]
# As the Hub's ChatML models have it: line breaks after the role and after the end token.
LINES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_MARKS = LINES.replace("{% generation %}", "").replace("{% endgeneration %}", "")
END_OUTSIDE = LINES.replace("m.content + '<|im_end|>\n' }}{% endgeneration", "m.content }}{% endgeneration").replace(
    "endgeneration %}", "endgeneration %}<|im_end|>"
)
SHIPPED = sorted((REPOSITORY / "chat_templates").glob("*.jinja"))


def with_template(tokenizer, template):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def conversations(text):
    message = st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")), "content": text})
    return st.lists(message, min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(st.text(max_size=20)), prompt=st.booleans(), lines=st.booleans())
def test_ids_and_mask_are_those_of_transformers(tokenizer, messages, prompt, lines):
    tokenizer = with_template(tokenizer, LINES) if lines else tokenizer
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=True
    )
    found = encode_chat(tokenizer, messages, add_generation_prompt=prompt)
    assert found.input_ids == expected["input_ids"]
    assert found.assistant_mask == expected["assistant_masks"]


@pytest.mark.parametrize("template", SHIPPED, ids=lambda path: path.stem)
def test_supervised_tokens_run_from_the_first_of_the_content_to_the_end_token(base_tokenizer, template):
    tokenizer = deepcopy(base_tokenizer)
    set_template(tokenizer, new_llama(tokenizer), str(template))
    messages = [*TURN, {"role": "user", "content": "And 3+4?"}, {"role": "assistant", "content": "It is 7."}]
    chat = encode_chat(tokenizer, messages)
    runs, previous = [], 0
    for token, mask in zip(chat.input_ids, chat.assistant_mask, strict=True):
        if mask and not previous:
            runs.append([])
        if mask:
            runs[-1].append(token)
        previous = mask
    replies = [tokenizer.decode(run[:-1]).split("</think>\n\n")[-1] for run in runs]  # of those that think, after it
    assert replies == ["The answer is 5.", "It is 7."]
    assert {run[-1] for run in runs} == {end_of_turn_id(tokenizer)} == {tokenizer.eos_token_id}
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)
    assert not any(prompt.assistant_mask)
    assert chat.input_ids[: len(prompt.input_ids)] == prompt.input_ids  # training sees what sampling will
    assert generation_matches_training(tokenizer, messages) is None


pieces = st.lists(st.sampled_from((*CONTROL, "<|", "im_end|>", " a", "é🙂", "\n", "\U000f0000")), max_size=8).map(
    "".join
)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(pieces))
def test_control_tokens_typed_by_a_user_are_text(tokenizer, messages):
    chat = encode_chat(tokenizer, messages)
    assert tokenizer.decode(chat.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    counts = {token: chat.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in CONTROL}
    n = len(messages)
    assert counts == {"<|endoftext|>": 0, "<|pad|>": 0, "<|im_start|>": n, "<|im_sep|>": n, "<|im_end|>": n}
    learned = [i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m]
    replies = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(learned) == "".join(replies)


def test_one_control_token_inside_another(tokenizer):
    text = "<|im_<|im_end|>end|> <|<|im_end|>im_end|>"
    chat = encode_chat(tokenizer, [{"role": "user", "content": text}])
    assert chat.input_ids.count(end_of_turn_id(tokenizer)) == 1
    assert text in tokenizer.decode(chat.input_ids)


def test_the_end_token_is_read_off_the_template(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(tokenizer) == end == end_of_turn_id(with_template(tokenizer, LINES))
    with pytest.raises(UserError, match="marks nothing as the assistant's"):
        end_of_turn_id(with_template(tokenizer, WITHOUT_MARKS))
    with pytest.raises(UserError, match="outside"):
        end_of_turn_id(with_template(tokenizer, END_OUTSIDE))


def test_a_template_without_marks_still_renders_prompts(tokenizer):
    plain = with_template(tokenizer, WITHOUT_MARKS)
    chat = encode_chat(plain, TURN, add_generation_prompt=True)
    assert chat.input_ids == plain.apply_chat_template(TURN, add_generation_prompt=True)["input_ids"]
    assert not any(chat.assistant_mask)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "human", "content": "hi"}], "roles human: unknown role 'human'"),
        ([{"role": "user", "content": None}], "roles user"),
        ([{"content": "hi"}], "roles None"),
    ],
)
def test_messages_that_the_template_refuses(tokenizer, messages, words):
    with pytest.raises(UserError, match=words):
        encode_chat(tokenizer, messages)


def test_of_several_templates_the_one_that_transformers_takes(tokenizer):
    several = with_template(tokenizer, {"default": tokenizer.chat_template, "tool_use": LINES})
    assert encode_chat(several, TURN) == encode_chat(tokenizer, TURN)
    assert template_sha256(several) == template_sha256(tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = several.apply_chat_template(TURN, tools=tools)["input_ids"]
    assert encode_chat(several, TURN, tools=tools).input_ids == expected != encode_chat(tokenizer, TURN).input_ids


def test_no_template_and_no_such_template(base_tokenizer, fresh_model, tmp_path):
    for act in (lambda: encode_chat(base_tokenizer, TURN), lambda: set_template(base_tokenizer, fresh_model, None)):
        with pytest.raises(UserError, match="no chat template: pass --chat_template_path"):
            act()
    with pytest.raises(UserError, match="no file 'no.jinja'"):
        set_template(base_tokenizer, fresh_model, "no.jinja")
    assert template_sha256(base_tokenizer) is None


def test_set_template_adds_its_control_tokens_and_ends_turns_with_them(base_tokenizer, fresh_model, tmp_path):
    template = tmp_path / "new.jinja"
    template.write_text(LINES.replace("im_start", "turn").replace("im_end", "stop"))
    tokenizer, old = deepcopy(base_tokenizer), fresh_model.get_input_embeddings().weight.detach().clone()
    set_template(tokenizer, fresh_model, str(template))
    assert len(tokenizer) == len(base_tokenizer) + 2
    new = fresh_model.get_input_embeddings().weight.detach()
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(2, -1), atol=1e-7, rtol=0)
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert tokenizer.eos_token_id == fresh_model.config.eos_token_id == stop
    assert tokenizer.pad_token == "<|pad|>" and set(CONTROL) <= set(tokenizer.all_special_tokens)
    assert set(stop_ids(tokenizer, fresh_model)) == {stop, base_tokenizer.eos_token_id}

    save_pair(fresh_model, tokenizer, tmp_path / "pair")
    again = load_tokenizer(str(tmp_path / "pair"))
    assert encode_chat(again, TURN) == encode_chat(tokenizer, TURN)
    assert again.eos_token_id == stop and template_sha256(again) == template_sha256(tokenizer)


def test_decode_drops_the_end_and_shows_what_does_not_belong(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    text = tokenizer("five", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [*text, end]) == decode(tokenizer, text) == "five"
    assert decode(tokenizer, [start, *text, end]) == "<|im_start|>five"
    assert decode(tokenizer, [end]) == decode(tokenizer, []) == ""


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(base_tokenizer, text):
    ids = base_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert base_tokenizer.decode(ids) == text
    assert all(0 <= i < len(base_tokenizer) for i in ids)


def test_every_character_of_the_first_planes_and_digits_one_by_one(base_tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert base_tokenizer.decode(base_tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert base_tokenizer.tokenize("1234+56") == ["1", "2", "3", "4", "+", "5", "6"]
    assert bytes_per_token(base_tokenizer, ["1234", "+56"]) == 1.0


def test_vocabulary_size(base_tokenizer):
    assert len(base_tokenizer) == 700
    with pytest.raises(UserError, match="vocab_size: found 260, expected at least 261"):
        train_tokenizer(["text"], 260)
    assert len(train_tokenizer(["text"], 261)) == 261


def test_the_hub_format_keeps_template_and_ids(tokenizer, model, tmp_path):
    save_pair(model, tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.chat_template == Path(CHATML).read_text(encoding="utf-8")
    assert encode_chat(again, TURN) == encode_chat(tokenizer, TURN)
