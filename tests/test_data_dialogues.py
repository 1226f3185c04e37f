"""UltraChat, ShareGPT, Alpaca and plain text: each layout as a hand-made row with the row it must give, and odd rows.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_data_dialogues.py
"""

import json
import os
from pathlib import Path

import pytest

from posttrain.data.bad_rows import BadRows
from posttrain.data.dialogues import alpaca, sharegpt, ultrachat
from posttrain.data.text import plain_text
from posttrain.errors import UserError


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


TALK = [user("Hi"), assistant("Hello."), user("Bye"), assistant("Goodbye.")]
TEXTS = ["Hi", "Hello.", "Bye", "Goodbye."]


def refused(adapter, row: dict) -> str:
    """The reason a row is counted under; it must also raise, with its number, where no `bad` is given."""
    bad = BadRows("skip")
    assert list(adapter([row], bad=bad)) == []
    with pytest.raises(ValueError, match="^row 0: "):
        list(adapter([row]))
    with pytest.raises(UserError, match="on_bad_row: skip"):
        list(adapter([row], bad=BadRows("stop")))
    (reason,) = bad.counts.elements()
    return reason


def test_ultrachat():
    assert list(ultrachat([{"id": "0", "data": TEXTS}])) == [{"messages": TALK}]
    hub = {"prompt": "Hi", "prompt_id": "f0", "messages": [{**said, "tokens": 3} for said in TALK]}
    assert list(ultrachat([hub])) == [{"messages": TALK}]
    with_system = {"messages": [system("Be kind."), *TALK]}
    assert list(ultrachat([with_system])) == [with_system]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"id": "0"}, "missing_column"),
        ({"data": []}, "wrong_role"),
        ({"data": ["Hi"]}, "wrong_role"),
        ({"data": ["Hi", " "]}, "empty_content"),
        ({"data": ["Hi", None]}, "wrong_type"),
        ({"data": "Hi"}, "wrong_type"),
        ({"messages": [user("Hi"), user("Hi"), assistant("Hello.")]}, "repeated_role"),
        ({"messages": [assistant("Hello.")]}, "wrong_role"),
        ({"messages": [user("Hi"), {"role": "bot", "content": "Hello."}]}, "wrong_role"),
        ({"messages": [user("Hi"), {"role": "assistant", "content": None}]}, "wrong_type"),
        ({"messages": [user("Hi"), system("Be kind."), assistant("Hello.")]}, "wrong_role"),
        ({"messages": [system("Be kind."), assistant("Hello.")]}, "wrong_role"),
        ({"messages": ["Hi", "Hello."]}, "wrong_type"),
    ],
)
def test_ultrachat_refuses(row, reason):
    assert refused(ultrachat, row) == reason


def test_what_nobody_answers_and_blank_system_turns_are_left_out():
    assert list(ultrachat([{"data": [*TEXTS, "Are you there?"]}])) == [{"messages": TALK}]
    assert list(ultrachat([{"messages": [system(""), *TALK, user(""), user("?")]}])) == [{"messages": TALK}]


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "chatgpt", "bing", "bard", "model", "assistant"])
def test_sharegpt(human, gpt):
    turns = [{"from": (human, gpt)[i % 2], "value": text} for i, text in enumerate(TEXTS)]
    assert list(sharegpt([{"id": "a_0", "conversations": turns}])) == [{"messages": TALK}]
    first = {"from": "system", "value": "Be kind."}
    expected = [{"messages": [system("Be kind."), *TALK]}]
    assert list(sharegpt([{"conversations": [first, *turns]}])) == expected
    assert list(sharegpt([{"conversations": turns, "system": "Be kind."}])) == expected
    assert list(sharegpt([{"conversations": turns, "system": " "}])) == [{"messages": TALK}]


def test_sharegpt_with_role_and_content():
    assert list(sharegpt([{"conversations": TALK}])) == [{"messages": TALK}]


def test_sharegpt_with_a_tool_comes_out_with_its_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Bonn?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": '{"sky": "grey"}'},
            {"from": "gpt", "value": "Grey."},
        ],
        "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
    }
    (got,) = sharegpt([row])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    assert got["messages"] == [
        user("Weather in Bonn?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": '{"sky": "grey"}'},
        assistant("Grey."),
    ]
    schema = {"name": "weather", "parameters": {"type": "object"}}
    assert got["tools"] == [{"type": "function", "function": schema}]
    assert refused(sharegpt, {**row, "tools": "[]"}) == "tool_call"


@pytest.mark.parametrize(
    "turns, reason",
    [
        (None, "missing_column"),
        ([("human", "Hi")], "wrong_role"),
        ([("gpt", "Hello."), ("human", "Hi"), ("gpt", "Hello.")], "wrong_role"),
        ([("human", "Hi"), ("human", "Hi"), ("gpt", "Hello.")], "repeated_role"),
        ([("human", "Hi"), ("claude", "Hello.")], "wrong_role"),
        ([("human", "Hi"), (None, "Hello.")], "wrong_role"),
        ([("human", "Hi"), (["gpt"], "Hello.")], "wrong_role"),
        ([("human", "Hi"), ("gpt", None)], "wrong_type"),
        ([("human", ""), ("gpt", "Hello.")], "empty_content"),
        ([("human", "Hi"), ("gpt", "\n")], "empty_content"),
        ([("human", "Hi"), ("system", "Be kind."), ("gpt", "Hello.")], "wrong_role"),
    ],
)
def test_sharegpt_refuses(turns, reason):
    turns = turns and [{"from": speaker, "value": value} for speaker, value in turns]
    assert refused(sharegpt, {"conversations": turns}) == reason


def test_alpaca():
    rows = [
        {"instruction": "Name a primary colour.", "input": "", "output": "Red.", "text": "Below is an instruction"},
        {"instruction": "Shorten.", "input": "A long text", "output": "Text"},
        {"instruction": "Go on.", "output": "B", "system": "Be brief.", "history": [["Start.", "A"]]},
    ]
    assert [row["messages"] for row in alpaca(rows)] == [
        [user("Name a primary colour."), assistant("Red.")],
        [user("Shorten.\n\nA long text"), assistant("Text")],
        [system("Be brief."), user("Start."), assistant("A"), user("Go on."), assistant("B")],
    ]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"instruction": "Go on."}, "missing_column"),
        ({"instruction": "Go on.", "output": ""}, "empty_content"),
        ({"instruction": "", "input": "Go on.", "output": "B"}, "empty_content"),
        ({"instruction": "Go on.", "input": 3, "output": "B"}, "wrong_type"),
        ({"instruction": "Go on.", "output": "B", "history": [["Start."]]}, "wrong_type"),
        ({"instruction": "Go on.", "output": "B", "history": [["Start.", ""]]}, "empty_content"),
        ({"instruction": "Go on.", "output": "B", "history": "Start."}, "wrong_type"),
    ],
)
def test_alpaca_refuses(row, reason):
    assert refused(alpaca, row) == reason


def test_plain_text():
    rows = [{"text": " a\r\n", "url": "u"}, {"text": "b"}]
    assert list(plain_text(rows)) == [{"text": " a\r\n"}, {"text": "b"}]
    assert list(plain_text([{"content": "a", "text": "b"}], column="content")) == [{"text": "a"}]
    for row, reason in [({}, "missing_column"), ({"text": " \n"}, "empty_content"), ({"text": ["a"]}, "wrong_type")]:
        assert refused(plain_text, row) == reason
    with pytest.raises(ValueError, match="row 1: 'content' is None.*keys: text"):
        list(plain_text([{"content": "a"}, {"text": "b"}], column="content"))


def test_real_documents():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real data to read")
    lines = (Path(folder) / "data/dclm_human_quality/agreement_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in plain_text(rows)] == [row["text"] for row in rows]
    assert len(rows) == 281
