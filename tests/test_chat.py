"""Chat encoding and the tokenizer, against transformers' own `apply_chat_template`.

Run: pytest tests/test_chat.py
"""

from copy import deepcopy

import pytest
import torch
from conftest import CHATML, REPOSITORY, new_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat import decode, encode_chat, end_of_turn_id, set_template, stop_ids, template_sha256
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
    assert [tokenizer.decode(run[:-1]) for run in runs] == ["The answer is 5.", "It is 7."]
    assert {run[-1] for run in runs} == {end_of_turn_id(tokenizer)} == {tokenizer.eos_token_id}
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)
    assert not any(prompt.assistant_mask)
    assert chat.input_ids[: len(prompt.input_ids)] == prompt.input_ids  # training sees what sampling will


pieces = st.lists(st.sampled_from((*CONTROL, "<|", "im_end|>", " a", "é🙂", "\n", "\U000f0000")), max_size=8).map("".join)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(pieces))
def test_control_tokens_typed_by_a_user_are_text(tokenizer, messages):
    chat = encode_chat(tokenizer, messages)
    assert tokenizer.decode(chat.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    counts = {token: chat.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in CONTROL}
    n = len(messages)
    assert counts == {"<|endoftext|>": 0, "<|pad|>": 0, "<|im_start|>": n, "<|im_sep|>": n, "<|im_end|>": n}
    said = sum((encode_chat(tokenizer, [m]).input_ids for m in messages if m["role"] == "assistant"), [])
    assert sum(chat.assistant_mask) == len(said) - 3 * said.count(2) + 0 * n - _header_extra(tokenizer, said)


def _header_extra(tokenizer, ids):
    """Tokens of "assistant" in each header, less the one that `<|im_start|>` and `<|im_sep|>` are counted as thrice."""
    name = len(tokenizer("assistant", add_special_tokens=False)["input_ids"])
    return ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) * (name + 2 - 3)
