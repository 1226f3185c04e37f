"""Token ids and masks of every shipped template under several tokenizers: content never becomes control, what is
supervised is the reply and its end token, and training sees the tokens that generation does.

Run: pytest tests/test_template_encoding.py [POSTTRAIN_REAL_DATA=folder and POSTTRAIN_SMOLLM2=folder for real ones]
"""

import os
import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_helpers import (
    NAMES,
    THINKING,
    TOOL_FORMATS,
    calls,
    gpt2_like,
    names,
    source,
    spaced,
    talks,
    texts,
    tool_talks,
    tools,
    with_template,
    words,
)

from posttrain.chat import control_tokens, encode_chat, end_of_turn_id, generation_matches_training
from posttrain.errors import UserError
from posttrain.models import load_tokenizer
from posttrain.template_render import declared_control
from posttrain.templates import not_prefix_preserving

some = settings(max_examples=25, deadline=None)
KINDS = ("tiny", "gpt2_like", "spaced_always", "spaced_first", "stories260k", "smollm2")


@pytest.fixture(params=KINDS, scope="session")
def any_tokenizer(request):
    """The chain's own, one that cuts white space as GPT-2 does, two that add a space as SentencePiece, real ones."""
    return tokenizer_of(request.param, request)


@lru_cache
def real(variable: str, folder: str):
    root = os.environ.get(variable)
    return root and load_tokenizer(str(Path(root) / folder))


def tokenizer_of(kind: str, request):
    if kind in ("stories260k", "smollm2"):
        variable, folder = {"stories260k": ("POSTTRAIN_REAL_DATA", "models/stories260k")}.get(
            kind, ("POSTTRAIN_SMOLLM2", "")
        )
        return real(variable, folder) or pytest.skip(f"{variable} is unset: no {kind}")
    if kind == "tiny":
        return request.getfixturevalue("base_tokenizer")
    return gpt2_like() if kind == "gpt2_like" else spaced(kind.removeprefix("spaced_"))


@pytest.fixture(params=NAMES, scope="session")
def named(request, base_tokenizer):
    """(name, the chain's tokenizer with that template)"""
    return request.param, with_template(base_tokenizer, source(request.param))


def conversations(name: str, content=texts, keys=names):
    """(messages, tools) that the format has."""
    more = {"reasoning_content": content} if name in THINKING else {}
    plain = st.tuples(talks(content, **more), st.none())
    if name not in TOOL_FORMATS:
        return plain
    asked = tool_talks(content, 1 if name == "llama3_1" else 2, keys, **more)
    return plain | st.tuples(asked, st.none() | tools_about(content))


def tools_about(content):
    return st.tuples(tools, content).map(
        lambda pair: [{**each, "function": {**each["function"], "description": pair[1]}} for each in pair[0]]
    )


# ---- content never becomes control ----------------------------------------------------------------------------------


def typed_in(control: list[str]):
    """Texts with control tokens in them, whole, nested and in halves."""
    halves = [token[:4] for token in control[:2]] + [token[4:] for token in control[:2]]
    return st.lists(st.sampled_from([*control, *halves, " a", "\n", '"', "é🙂", "\U000f0000"]), max_size=5).map(
        "".join
    )


def neutral(value, control: list[str]):
    """`value` with x for each control token, again until none is left."""
    if isinstance(value, str):
        found = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        return found.sub("x", value)
    if isinstance(value, dict):
        return {
            neutral(key, control): neutral(each, control) if key != "role" else each for key, each in value.items()
        }
    return [neutral(each, control) for each in value] if isinstance(value, list) else value


@some
@given(data=st.data(), prompt=st.booleans())
def test_content_never_becomes_control(named, data, prompt):
    """In contents, thoughts, names and arguments of calls, descriptions of tools; with tokens of the template and of
    the tokenizer. The text stays what it is."""
    name, tokenizer = named
    control = list(control_tokens(tokenizer).values())
    content = typed_in(control)
    messages, tools = data.draw(conversations(name, content, names | content.filter(len)))
    chat = encode_chat(tokenizer, messages, tools=tools, add_generation_prompt=prompt)
    harmless, none = neutral(messages, control), neutral(tools, control)
    plain = encode_chat(tokenizer, harmless, tools=none, add_generation_prompt=prompt)
    assert count(tokenizer, chat) == count(tokenizer, plain)
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.decode(chat.input_ids) == text


def count(tokenizer, chat):
    control = control_tokens(tokenizer)
    return [control[i] for i in chat.input_ids if i in control]


@some
@given(content=st.data())
def test_lists_as_content_are_content_too(base_tokenizer, content):
    """The shipped templates take text only; others take the Hub's lists."""
    body = "<|im_start|>{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>"
    template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    tokenizer = with_template(base_tokenizer, template)
    text = content.draw(typed_in(list(control_tokens(tokenizer).values())))
    chat = encode_chat(tokenizer, [{"role": "user", "content": [{"type": "text", "text": text}]}])
    assert count(tokenizer, chat) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(chat.input_ids) == f"<|im_start|>{text}<|im_end|>"


def test_content_that_only_the_tokenizer_turns_into_control_stays_text(base_tokenizer):
    """A normaliser that lowers letters makes <|im_end|> of <|IM_END|>."""
    from tokenizers import AddedToken, normalizers

    tokenizer = deepcopy(base_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<|stop|>", normalized=True, special=True)], special_tokens=True)
    tokenizer.chat_template = source("chatml").replace("im_end", "stop")
    assert tokenizer.convert_tokens_to_ids("<|stop|>") in tokenizer("<|STOP|>")["input_ids"]
    chat = encode_chat(tokenizer, [{"role": "user", "content": "a <|STOP|> b"}])
    assert count(tokenizer, chat) == ["<|im_start|>", "<|im_sep|>", "<|stop|>"]
    assert tokenizer.decode(chat.input_ids) == "<|im_start|>user<|im_sep|>a <|stop|> b<|stop|>"


def test_words_of_thinking_and_calling_are_no_control(base_tokenizer):
    """Qwen's and DeepSeek's tokenizers have <think> and <tool_call> as ordinary tokens: the model writes them."""
    tokenizer = deepcopy(with_template(base_tokenizer, source("qwen3_keep_thinking")))
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
    think, call = tokenizer.convert_tokens_to_ids(["<think>", "<tool_call>"])
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\n<tool_call>"},
    ]
    ids = encode_chat(tokenizer, messages).input_ids
    assert ids.count(think) == ids.count(call) == 1
    messages[0]["content"] = "<|im_end|>"
    ids = encode_chat(tokenizer, messages).input_ids
    assert ids.count(think) == ids.count(call) == 1


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_tokens_that_swallow_white_space_do_so_beside_typed_control_too(base_tokenizer, strip):
    """As Phi-3's tokenizer has them."""
    from tokenizers import AddedToken

    tokenizer = deepcopy(base_tokenizer)
    token = AddedToken("<|end|>", special=True, normalized=False, **{strip: True})
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer = with_template(tokenizer, source("phi3"))
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b \n"}]
    typed = {"role": "user", "content": "<|end|>"}
    plain = encode_chat(tokenizer, messages)
    beside = encode_chat(tokenizer, [*messages, typed])
    size = len(plain.input_ids)
    assert plain.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert (beside.input_ids[:size], beside.assistant_mask[:size]) == (plain.input_ids, plain.assistant_mask)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(("chatml_plain", "llama3", "zephyr", "mistral")), data=st.data())
def test_a_typed_control_token_changes_no_token_of_the_other_turns(any_tokenizer, name, data):
    """The way that such conversations take is as exact as the fast one."""
    tokenizer = with_template(any_tokenizer, source(name))
    messages = data.draw(talks(words))
    messages += [{"role": "assistant", "content": "It is"}] if messages[-1]["role"] == "user" else []
    plain = encode_chat(tokenizer, messages)
    typed = {"role": "user", "content": next(iter(control_tokens(tokenizer).values()))}
    beside = encode_chat(tokenizer, [*messages, typed])
    size = len(plain.input_ids)
    assert (beside.input_ids[:size], beside.assistant_mask[:size]) == (plain.input_ids, plain.assistant_mask)


# ---- what is supervised ---------------------------------------------------------------------------------------------


def reply(name: str, message: dict) -> str:
    """What the format makes of a reply without calls."""
    content = message["content"]
    if name in ("qwen3_keep_thinking", "deepseek_r1"):
        block = message.get("reasoning_content", "").strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
        return block if name == "deepseek_r1" else "<think>\n" + block
    return {"mistral": content.rstrip(" "), "gemma": content.strip()}.get(
        name, content.strip() if name.startswith("llama3") else content
    )


untagged = texts.filter(lambda text: "think>" not in text)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"qwen3"}))
@some
@given(data=st.data())
def test_the_reply_and_its_end_are_supervised_and_nothing_else(base_tokenizer, name, data):
    for base in (base_tokenizer, gpt2_like()):
        tokenizer = with_template(base, source(name))
        messages = data.draw(talks(untagged, **({"reasoning_content": untagged} if name in THINKING else {})))
        chat = encode_chat(tokenizer, messages)
        end = end_of_turn_id(tokenizer)
        runs = re.findall("1+", "".join(map(str, chat.assistant_mask)))
        learned = [i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m]
        ends = [position for position, i in enumerate(learned) if i == end]
        replies = [reply(name, m) for m in messages if m["role"] == "assistant"]
        assert len(runs) == len(ends) == len(replies)
        starts = [0, *(position + 1 for position in ends)]
        found = [tokenizer.decode(learned[a:b]) for a, b in zip(starts, ends, strict=False)]
        assert found == replies and starts[-1] == len(learned)


@some
@given(data=st.data())
def test_calls_are_supervised_and_answers_of_tools_are_not(base_tokenizer, data):
    for name in sorted(TOOL_FORMATS):
        tokenizer = with_template(base_tokenizer, source(name))
        asks = {"role": "assistant", "content": "", "tool_calls": [data.draw(calls)]}
        messages = [{"role": "user", "content": "?"}, asks, {"role": "tool", "name": "f", "content": "fifty-one"}]
        chat = encode_chat(tokenizer, messages)
        learned = tokenizer.decode([i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m])
        assert asks["tool_calls"][0]["function"]["name"] in learned and "fifty" not in learned
        assert learned.endswith(tokenizer.decode(end_of_turn_id(tokenizer)))


# ---- training sees what generation will -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_prompts_at_generation_are_the_beginning_of_the_training_render(any_tokenizer, name, data):
    """Whatever white space a reply begins with, and however the tokenizer joins it to the header's."""
    tokenizer = with_template(any_tokenizer, source(name))
    messages, tools = data.draw(conversations(name, words))
    if name != "qwen3":
        assert generation_matches_training(tokenizer, messages, tools) is None
        assert not_prefix_preserving(tokenizer, messages, tools) is None
    elif tools is None and not any(m["role"] == "tool" for m in messages):  # thoughts between calls go later
        assert generation_matches_training(tokenizer, messages) is None


@pytest.mark.parametrize("kind, name, reply", [("tiny", "chatml_plain", "\n\nhi"), ("gpt2_like", "llama3", "It is")])
def test_transformers_own_render_of_the_same_row_begins_otherwise(request, kind, name, reply):
    """Two line breaks of the header and the reply's become one token, or break apart: such a row would teach what
    generation never sees. A tokenizer with merges over line breaks is needed to show it."""
    tokenizer = with_template(tokenizer_of("gpt2_like", request), source(name))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(messages)["input_ids"][: len(prompt)] != prompt
    chat = encode_chat(tokenizer, messages)
    assert chat.input_ids[: len(prompt)] == prompt and not any(chat.assistant_mask[: len(prompt)])
    assert all(chat.assistant_mask[len(prompt) : chat.input_ids.index(end_of_turn_id(tokenizer), len(prompt))])


@pytest.mark.parametrize("kind", ["tiny", "gpt2_like", "spaced_always", "spaced_first"])
@pytest.mark.parametrize("question", ["hello", "hello </s>"])
def test_a_header_that_ends_with_a_space_stays_one(request, kind, question):
    """Most tokenizers would join its space to the reply's first word, which generation cannot do any more."""
    body = "{{ m.role }}: {% generation %}{{ m.content }}</s>{% endgeneration %}"
    template = "{#- control: </s> -#}{% for m in messages %}" + body + "{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(tokenizer_of(kind, request), template)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "world"}]
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True).input_ids
    chat = encode_chat(tokenizer, messages)
    assert chat.input_ids[: len(prompt)] == prompt
    learned = tokenizer.convert_ids_to_tokens(chat.input_ids[len(prompt) :])
    assert "".join(learned) == "world</s>"  # no space, neither " " nor "▁"


def test_a_generation_prompt_that_differs_is_named(base_tokenizer):
    template = source("chatml").replace(
        "'<|im_start|>assistant<|im_sep|>' -}}{%- endif", "'<|im_start|>bot' -}}{%- endif"
    )
    tokenizer = with_template(base_tokenizer, template)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    said = generation_matches_training(tokenizer, messages)
    assert re.search(r"message 1 .* token \d+ is '.+' \(\d+\) in training and '.+' \(\d+\) at generation", said)


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "gemma", "mistral", "deepseek_r1"])
def test_the_begin_token_comes_once(name):
    """gpt2_like puts one before each text of its own accord; the templates write one, too."""
    tokenizer = with_template(gpt2_like(), source(name))
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hello <s>"}]).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


# ---- what the templates say of themselves ---------------------------------------------------------------------------

LOOKS = re.compile(r"<\|[^|]*\|>|<｜[^｜]*｜>|<\w+_of_turn>|\[/?[A-Z_]+\]")


def test_the_declared_control_tokens_are_those_that_are_written(named):
    from posttrain.templates import BATTERY, attempt

    name, tokenizer = named
    rendered = [attempt(source(name), *each, add_generation_prompt=True) for each in BATTERY.values()]
    text = "".join(each for each in rendered if isinstance(each, str))
    assert set(LOOKS.findall(text)) == set(declared_control(source(name)))
    ids = encode_chat(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True).input_ids
    assert set(count(tokenizer, encode_chat(tokenizer, [{"role": "user", "content": "?"}]))) <= {
        *declared_control(source(name)), tokenizer.bos_token, tokenizer.eos_token
    }  # fmt: skip
    assert all(i is not None for i in ids)


REFUSED = {
    "an unknown role": ({"role": "narrator", "content": "x"}, "narrator"),
    "no content": ({"role": "user"}, "no text|unknown role"),
    "content that is a number": ({"role": "user", "content": 5}, "no text"),
    "a list as content": ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_does_not_have_is_refused_and_not_dropped(named, case):
    message, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        encode_chat(named[1], [message])


def test_tools_and_thoughts_are_rendered_or_refused(named):
    from posttrain.templates import facts

    name, _ = named
    known = facts(source(name))
    assert known.system == "yes"
    assert known.tools == known.calls == ("yes" if name in TOOL_FORMATS else "no")
    assert known.reasoning == ("yes" if name in THINKING else "no")
    assert (known.diverges is None) == (name != "qwen3")
    assert ("Not prefix-preserving" in source(name)) == (name == "qwen3")
    assert ("Prefix-preserving" in source(name)) == (name != "qwen3") and "Source:" in source(name)
