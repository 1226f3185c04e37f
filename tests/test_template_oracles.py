"""Each shipped template against the official one, string for string, over conversations that hypothesis makes.

The oracles are the templates in TRL's package, mistral_common's own tokenizer, and the examples that model cards
print. Where a template of ours differs on purpose, its test says how, and pins the difference.
Run: pytest tests/test_template_oracles.py
"""

import base64
import json
import os
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_helpers import SPECIAL, calls, rounds, source, talks, texts, tool_talks, tools, words
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.template_render import render

TRL = Path(find_spec("trl").origin).parent / "chat_templates"
battery = settings(max_examples=100, deadline=None)
reasoning = {"reasoning_content": words}


def ours(name, messages, tools=None, prompt=False):
    return render(source(name), messages, tools=tools, add_generation_prompt=prompt, special=SPECIAL)[0]


def official(name, messages, tools=None, prompt=False):
    template = (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, tools=tools, add_generation_prompt=prompt, **SPECIAL
    )
    return rendered[0]


PLAIN = {  # ours -> the file in TRL's package
    "llama3": "llama3",
    "llama3_1": "llama3_1",
    "chatml_plain": "qwen3_instruct_2507",
    "chatml_tools": "qwen3_instruct_2507",
    "gemma": "gemma3",
    "qwen3": "qwen3",
    "qwen3_keep_thinking": "qwen3_training",
}


@pytest.mark.parametrize("name", PLAIN)
@battery
@given(data=st.data(), prompt=st.booleans())
def test_conversations_without_tools(name, data, prompt):
    messages = data.draw(talks(**(reasoning if "qwen3" in name else {})))
    assert ours(name, messages, prompt=prompt) == official(PLAIN[name], messages, prompt=prompt)


@battery
@given(messages=rounds(), prompt=st.booleans())
def test_gemma_without_a_system_turn_is_the_same_in_all_its_versions(messages, prompt):
    assert ours("gemma", messages, prompt=prompt) == official("gemma", messages, prompt=prompt)


WITH_TOOLS = {"chatml_tools": "qwen3_instruct_2507", "qwen3": "qwen3", "qwen3_keep_thinking": "qwen3_training"}


@pytest.mark.parametrize("name", WITH_TOOLS)
@battery
@given(data=st.data(), tools=st.none() | tools, prompt=st.booleans())
def test_tools_of_qwen(name, data, tools, prompt):
    messages = data.draw(tool_talks(**({} if name == "chatml_tools" else reasoning)))
    assert ours(name, messages, tools, prompt) == official(WITH_TOOLS[name], messages, tools, prompt)


USER = {"role": "user", "content": "?"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
ANSWER = {"role": "tool", "name": "f", "content": "5"}
SAID = {"role": "assistant", "content": "five"}
CORNERS = {
    "empty thoughts beside a call": [USER, {**CALL, "content": "<think>\n\n</think>\n\nLet me see."}, ANSWER, SAID],
    "thoughts beside a call": [USER, {**CALL, "content": "<think>\nx\n</think>\n\n"}, ANSWER, SAID],
    "a line break for a thought": [USER, {**CALL, "content": "", "reasoning_content": "\n"}, ANSWER, SAID],
    "no thoughts, though the content has tags": [
        USER,
        {**SAID, "content": "<think>x</think>y", "reasoning_content": ""},
    ],
    "two ends of thoughts": [USER, {**SAID, "content": "<think>a</think>b<think>c</think>\n\nd"}],
    "an end of thoughts and no beginning": [USER, {**SAID, "content": "a\n</think>\nb"}],
    "a tool's answer in a user turn": [USER, SAID, {**USER, "content": "<tool_response>\n5\n</tool_response>"}, SAID],
    "no question": [{"role": "system", "content": "x"}, SAID],
    "a system turn in the middle": [USER, SAID, {"role": "system", "content": "x"}, USER],
    "answers of two calls, twice": [USER, {**CALL, "content": None}, ANSWER, ANSWER, CALL, ANSWER, SAID, ANSWER],
}


@pytest.mark.parametrize("case", CORNERS)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_keep_thinking"])
def test_corners_of_qwen_that_chance_seldom_finds(name, case):
    for listed in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        for prompt in (False, True):
            expected = official(WITH_TOOLS[name], CORNERS[case], listed, prompt)
            assert ours(name, CORNERS[case], listed, prompt) == expected


@battery
@given(messages=tool_talks(most_calls=1), tools=st.none() | tools, prompt=st.booleans())
def test_tools_of_llama_3_1(messages, tools, prompt):
    assert ours("llama3_1", messages, tools, prompt) == official("llama3_1", messages, tools, prompt)


@battery
@given(messages=talks(), prompt=st.booleans())
def test_phi_3_leaves_out_the_end_of_text_that_would_break_the_prefix(messages, prompt):
    end = "" if prompt else SPECIAL["eos_token"]
    assert ours("phi3", messages, prompt=prompt) + end == official("phi3", messages, prompt=prompt)


BLOCK = re.compile(r"(<｜Assistant｜>)<think>\n.*?\n</think>\n\n", re.DOTALL)
without_tags = texts.filter(lambda text: "think>" not in text)


@battery
@given(messages=talks(without_tags, reasoning_content=without_tags), prompt=st.booleans())
def test_deepseek_r1_keeps_the_thoughts_that_the_official_template_drops(messages, prompt):
    """Without the block of each reply, and a reply's first line breaks, which it swallows, both are the same."""
    for message in messages:
        message["content"] = message["content"].lstrip("\n")
    found = ours("deepseek_r1", messages, prompt=prompt)
    assert BLOCK.sub(r"\1", found) == official("deepseek_r1_distill", messages, prompt=prompt)
    thoughts = [m.get("reasoning_content", "").strip("\n") for m in messages if m["role"] == "assistant"]
    assert [
        block[len("<｜Assistant｜><think>\n") : -len("\n</think>\n\n")] for block in whole(BLOCK, found)
    ] == thoughts


def whole(pattern, text):
    return [match[0] for match in pattern.finditer(text)]


@battery
@given(thoughts=words.filter(lambda t: "think>" not in t), answer=words.filter(lambda t: "think>" not in t))
def test_thoughts_inside_the_content_are_those_of_reasoning_content(thoughts, answer):
    inline = [{"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{answer}"}]
    apart = [{"role": "assistant", "content": answer, "reasoning_content": thoughts}]
    question = [{"role": "user", "content": "?"}]
    for name in ("deepseek_r1", "qwen3", "qwen3_keep_thinking"):
        assert ours(name, question + inline) == ours(name, question + apart)


def test_zephyr_and_phi_4_as_their_model_cards_show_them():
    pirate = [
        {"role": "system", "content": "You are a friendly chatbot who always responds in the style of a pirate."},
        {"role": "user", "content": "How many helicopters can a human eat in one sitting?"},
    ]
    assert ours("zephyr", pirate, prompt=True) == (
        "<|system|>\nYou are a friendly chatbot who always responds in the style of a pirate.</s>\n"
        "<|user|>\nHow many helicopters can a human eat in one sitting?</s>\n<|assistant|>\n"
    )
    knight = [
        {"role": "system", "content": "You are a medieval knight and must provide explanations to modern people."},
        {"role": "user", "content": "How should I explain the Internet?"},
    ]
    # The card breaks the lines after <|im_sep|> and <|im_end|>, for the eye; the template in its tokenizer does not.
    assert ours("chatml", knight, prompt=True) == (
        "<|im_start|>system<|im_sep|>You are a medieval knight and must provide explanations to modern people."
        "<|im_end|><|im_start|>user<|im_sep|>How should I explain the Internet?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    )


@battery
@given(messages=talks(), prompt=st.booleans())
def test_zephyr_and_chatml_are_phi_3_and_plain_chatml_but_for_their_marks(messages, prompt):
    """So the oracles of those hold for these."""
    phi = ours("phi3", [{**m, "content": m["content"].replace("<|end|>", "")} for m in messages], prompt=prompt)
    assert ours("zephyr", messages, prompt=prompt) == phi.replace("<|end|>", "</s>")
    turns = [("<|im_start|>", m["role"], "<|im_sep|>", m["content"], "<|im_end|>") for m in messages]
    head = "<|im_start|>assistant<|im_sep|>" if prompt else ""
    assert ours("chatml", messages, prompt=prompt) == "".join(map("".join, turns)) + head


# ---- Mistral --------------------------------------------------------------------------------------------------------


@lru_cache
def mistral_v13():
    """mistral_common's own tokenizer of version 13, over a vocabulary of the 256 bytes."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV13
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    special = [
        {"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)
    ]
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    tekken = Tekkenizer(vocabulary, special, r"[\s\S]", 256 + len(special), len(special), TokenizerVersion.v13)
    return InstructTokenizerV13(tekken)


def mistral_common_text(messages, tools):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    def convert(message):
        content = message["content"]
        if message["role"] == "assistant":
            made = [
                ToolCall(id="123456789", function=FunctionCall(name=c["name"], arguments=json.dumps(c["arguments"])))
                for c in (call["function"] for call in message.get("tool_calls", []))
            ]
            return AssistantMessage(content=content or None, tool_calls=made or None)
        if message["role"] == "tool":
            return ToolMessage(content=content, tool_call_id="123456789", name=message["name"])
        return {"system": SystemMessage, "user": UserMessage}[message["role"]](content=content)

    request = InstructRequest(
        messages=[convert(message) for message in messages],
        available_tools=[Tool.model_validate(tool) for tool in tools] if tools else None,
    )
    encoder = mistral_v13()
    tokens = encoder.encode_instruct(request).tokens
    return encoder.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)


some = texts.filter(len)


@battery
@given(messages=talks(some) | tool_talks(some), tools=st.none() | tools, prompt=st.booleans())
def test_mistral_as_mistral_common_writes_it(messages, tools, prompt):
    assert ours("mistral", messages, tools, prompt) == mistral_common_text(messages, tools)


# ---- a template that comes with a model -----------------------------------------------------------------------------


@battery
@given(messages=talks(), prompt=st.booleans())
@pytest.mark.skipif("POSTTRAIN_SMOLLM2" not in os.environ, reason="POSTTRAIN_SMOLLM2 names no SmolLM2 folder")
def test_plain_chatml_is_smollm2s_where_a_system_turn_opens(messages, prompt):
    """Without one, SmolLM2's template writes one of its own: ours adds nothing that nobody wrote."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    template = (Path(os.environ["POSTTRAIN_SMOLLM2"]) / "chat_template.jinja").read_text(encoding="utf-8")
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=prompt, **SPECIAL
    )
    assert ours("chatml_plain", messages, prompt=prompt) == rendered[0]


@given(call=calls)
def test_a_flat_call_is_the_same_as_one_inside_function(call):
    asked = {"role": "user", "content": "?"}
    for name in ("chatml_tools", "qwen3", "llama3_1", "mistral"):
        both = [
            ours(name, [asked, {"role": "assistant", "content": "", "tool_calls": [made]}])
            for made in (call, call["function"])
        ]
        assert both[0] == both[1]
