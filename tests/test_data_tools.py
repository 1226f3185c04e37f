"""Tool-call conversations: each layout of one conversation gives the same row; odd rows; a template takes the result.

Run: pytest tests/test_data_tools.py
"""

import json
from importlib import resources

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.data.bad_rows import BadRows
from posttrain.data.tools import tool_conversations
from posttrain.errors import UserError


def schema(name: str, **parameters) -> dict:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


WEATHER = schema("weather", type="object", properties={"city": {"type": "string"}}, required=["city"])
CLOCK = schema("clock", type="object", properties={})
# The one row that every layout below must come out as.
ROW = {
    "messages": [
        said("user", "Weather in Bonn and Rome? And the time?"),
        said("assistant", "I look.", tool_calls=[call("weather", city="Bonn"), call("weather", city="Rome")]),
        {"role": "tool", "name": "weather", "content": '{"sky": "grey"}'},
        {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'},
        said("assistant", None, tool_calls=[call("clock")]),
        {"role": "tool", "name": "clock", "content": "noon"},
        said("assistant", "Grey, blue, noon."),
    ],
    "tools": [WEATHER, CLOCK],
}


def test_the_hub_layout_stays_as_it_is():
    assert list(tool_conversations([ROW])) == [ROW]


def hub_with_ids(row: dict) -> dict:
    """As OpenAI's API writes it: ids, arguments as JSON, results without names; here the results come last first."""
    messages, number, ids = [], 0, []
    for message in row["messages"]:
        if message["role"] == "tool":
            messages.append({"role": "tool", "tool_call_id": ids.pop(0), "content": message["content"]})
        else:
            calls = []
            for made in message.get("tool_calls", []):
                number += 1
                function = {**made["function"], "arguments": json.dumps(made["function"]["arguments"])}
                calls.append({"id": f"call_{number}", "type": "function", "function": function})
            ids = [made["id"] for made in calls]
            messages.append({**message, "tool_calls": calls or None})
    blocks, flipped = [], []
    for message in messages:
        if message["role"] == "tool":
            blocks.insert(0, message)
        else:
            flipped += [*blocks, message]
            blocks = []
    return {"messages": flipped + blocks, "tools": json.dumps(row["tools"])}


def hermes(row: dict, python: bool = False, column: bool = True) -> dict:
    """As in Nous Research's set: calls in tags, as JSON or as Python prints a dict, results of one turn together."""
    write = repr if python else json.dumps
    turns = [{"from": "system", "value": "You call functions in <tools></tools>. Here they are: <tools> []</tools>"}]
    if not column:
        turns[0]["value"] = f"Functions are in <tools></tools>. Here: <tools> {write(row['tools'])} </tools>Call them."
    for message in row["messages"]:
        made = [f"<tool_call>\n{write(made['function'])}\n</tool_call>" for made in message.get("tool_calls", [])]
        text = "\n".join([*([message["content"]] if message["content"] else []), *made])
        if message["role"] == "tool":
            try:
                content = json.loads(message["content"])
            except ValueError:
                content = message["content"]
            response = json.dumps({"name": message["name"], "content": content}, ensure_ascii=False)
            text = f"<tool_response>\n{response}\n</tool_response>\n"
            if turns[-1]["from"] == "tool":
                turns[-1]["value"] += text
                continue
        speaker = {"user": "human", "assistant": "gpt", "tool": "tool"}[message["role"]]
        turns.append({"from": speaker, "value": text})
    return {"conversations": turns, **({"tools": json.dumps(row["tools"])} if column else {})}


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("python", [True, False])
def test_hermes(python, column):
    assert list(tool_conversations([hermes(ROW, python, column)])) == [ROW]


def test_hermes_schemas_one_a_line():
    row = hermes(ROW, column=False)
    lines = "\n".join(json.dumps(tool) for tool in ROW["tools"])
    row["conversations"][0]["value"] = f"Call <tools>\n{lines}\n</tools>"
    assert list(tool_conversations([row])) == [ROW]


def test_ids_and_json_arguments_go_and_results_stand_in_the_order_of_their_calls():
    row = hub_with_ids(ROW)
    assert [m.get("tool_call_id") for m in row["messages"][2:4]] == ["call_2", "call_1"]
    assert list(tool_conversations([row])) == [ROW]


def test_sharegpt_with_functions_and_bare_schemas():
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "Noon."},
        ],
        "tools": json.dumps([CLOCK["function"]]),
    }
    messages = [said("system", "Be brief."), said("user", "Time?"), *ROW["messages"][4:6], said("assistant", "Noon.")]
    assert list(tool_conversations([row])) == [{"messages": messages, "tools": [CLOCK]}]


def test_nulls_that_parquet_fills_in_go():
    """A table gives each dict the keys of all: {"city", "zone"} in every call, nulls in schemas and messages."""
    zone = schema("clock", type="object", properties={"zone": {"type": "string"}})
    rows = [
        ROW,
        {
            "messages": [said("user", "?"), said("assistant", None, tool_calls=[call("clock", zone="CET")])],
            "tools": [zone],
        },
    ]
    filled = pyarrow.Table.from_pylist(rows).to_pylist()
    function = filled[0]["messages"][1]["tool_calls"][0]["function"]
    assert function["arguments"] == {"city": "Bonn", "zone": None}
    assert list(tool_conversations(filled)) == rows


def test_a_null_that_is_meant_stays():
    required = schema("clock", required=["zone"])
    ask = said("user", "?")
    dicts = {"messages": [ask, said("assistant", None, tool_calls=[call("clock", zone=None)])], "tools": [required]}
    assert list(tool_conversations([dicts])) == [dicts]
    function = {"name": "clock", "arguments": '{"zone": null}'}
    written = {"messages": [ask, said("assistant", "", tool_calls=[{"function": function}])], "tools": [CLOCK]}
    (got,) = tool_conversations([written])
    assert got["messages"][1]["tool_calls"] == [call("clock", zone=None)]


def test_small_print():
    """A plain conversation; reasoning; results that are no strings; the old function_call; a last call, no result."""
    plain = {
        "messages": [said("user", "Hi"), said("assistant", "Hello.", reasoning_content="A greeting.")],
        "tools": [],
    }
    assert list(tool_conversations([plain, {"messages": [*plain["messages"], said("user", "?")]}])) == [plain, plain]
    old = [
        said("user", "Time?"),
        {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}},
        {"role": "function", "name": "clock", "content": {"hour": 12, "zone": "Köln"}},
        {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": None}},
        {"role": "function", "name": "clock", "content": None},
    ]
    (row,) = tool_conversations([{"messages": old, "tools": [CLOCK]}])
    assert row["messages"][1:] == [
        ROW["messages"][4],
        {"role": "tool", "name": "clock", "content": '{"hour": 12, "zone": "Köln"}'},
        ROW["messages"][4],
    ]


def edited(*path, to) -> dict:
    """ROW with the value at a path replaced."""
    row = json.loads(json.dumps(ROW))
    *before, last = path
    inner = row
    for key in before:
        inner = inner[key]
    inner[last] = to
    return row


def with_messages(*messages: dict) -> dict:
    return {**ROW, "messages": list(messages)}


def without(*indices: int) -> dict:
    return with_messages(*(message for i, message in enumerate(ROW["messages"]) if i not in indices))


FUNCTION = ("messages", 1, "tool_calls", 0, "function")
BAD = {
    "no such tool": (edited(*FUNCTION, "name", to="wether"), "tool_call", "turn 1 calls 'wether'"),
    "no tools": ({**ROW, "tools": None}, "tool_call", "'tools' declares none"),
    "tools are no JSON": ({**ROW, "tools": "[weather]"}, "tool_call", "'tools'"),
    "tools are a dict": ({**ROW, "tools": {"weather": 1}}, "tool_call", "list of JSON schemas"),
    "schema without name": ({**ROW, "tools": [{"type": "function"}]}, "tool_call", "names no function"),
    "arguments are a list": (edited(*FUNCTION, "arguments", to=["Bonn"]), "tool_call", "expected an object"),
    "arguments are no JSON": (edited(*FUNCTION, "arguments", to="{city: Bonn}"), "tool_call", "is no JSON"),
    "arguments are a JSON list": (edited(*FUNCTION, "arguments", to="[1]"), "tool_call", "expected an object"),
    "call without name": (edited(*FUNCTION, "name", to=None), "tool_call", "names no function"),
    "calls are no list": (edited("messages", 1, "tool_calls", to=3), "tool_call", "names no function"),
    "a result too few": (without(3), "tool_call", "turn 3: no result yet of the call of weather"),
    "no result": (without(5), "tool_call", "turn 5: assistant after call"),
    "result without call": (without(1, 2), "tool_call", "turn 1: tool after user"),
    "result of another": (edited("messages", 5, "name", to="weather"), "tool_call", "answers no open call"),
    "a result too many": (with_messages(*ROW["messages"][:6], *ROW["messages"][5:]), "tool_call", "no open call"),
    "two answers": (with_messages(*ROW["messages"], said("assistant", "?")), "repeated_role", "turn 7"),
    "two questions": (with_messages(said("user", "?"), *ROW["messages"]), "repeated_role", "turn 1"),
    "late system": (with_messages(*ROW["messages"], said("system", "?"), ROW["messages"][-1]), "wrong_role", "turn 7"),
    "no user": (without(0), "wrong_role", "turn 0: call after nothing"),
    "unknown role": (edited("messages", 0, "role", to="bot"), "wrong_role", "turn 0 is from 'bot'"),
    "empty question": (edited("messages", 0, "content", to=" "), "empty_content", "turn 0"),
    "empty answer": (edited("messages", 6, "content", to=None), "empty_content", "turn 6"),
    "content is a list": (edited("messages", 0, "content", to=[{"text": "?"}]), "wrong_type", "turn 0"),
    "nothing": ({"tools": []}, "missing_column", "'messages' is None"),
    "no answer": ({"messages": [said("user", "?")]}, "wrong_role", "nothing to learn"),
}  # fmt: skip
PYTHON = "<tool_call>\n{'name': 'clock', 'arguments': {'x': {1, 2}}}\n</tool_call>"
for name, value in {"a set": PYTHON, "broken": "<tool_call>{'name'</tool_call>", "unclosed": "<tool_call>{}"}.items():
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": value}, {"from": "tool", "value": ""}]
    BAD[f"hermes: {name}"] = ({"conversations": turns, "tools": [CLOCK]}, "tool_call", "turn 1: ")


@pytest.mark.parametrize("row, reason, error", BAD.values(), ids=BAD)
def test_calls_that_do_not_fit_are_refused(row, reason, error):
    with pytest.raises(ValueError, match=f"row 1: .*{error}"):
        list(tool_conversations([ROW, row]))
    with pytest.raises(UserError, match=error):
        list(tool_conversations([row], bad=BadRows("stop")))
    bad = BadRows("skip")
    assert list(tool_conversations([ROW, row, ROW], bad=bad)) == [ROW, ROW]
    assert bad.counts == {reason: 1}


def test_results_are_matched_by_id_before_name():
    row = hub_with_ids(ROW)
    row["messages"][2]["tool_call_id"] = "call_9"
    with pytest.raises(ValueError, match=r"turn 2: the result of None \(id 'call_9'\) answers no open call"):
        list(tool_conversations([row]))


words = st.text("abcé <>\"'{}\n", min_size=1).filter(lambda s: s.strip() and "<t" not in s and s == s.strip())
values = st.one_of(
    words, st.integers(-9, 9), st.booleans(), st.lists(st.integers(0, 9)), st.dictionaries(words, words)
)
arguments = st.dictionaries(words, values, max_size=3)


@st.composite
def conversations(draw) -> dict:
    names = draw(st.lists(st.sampled_from(["weather", "clock", "sum"]), min_size=1, max_size=3, unique=True))
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(said("user", draw(words)))
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(
                st.lists(
                    st.builds(lambda n, a: call(n, **a), st.sampled_from(names), arguments), min_size=1, max_size=3
                )
            )
            messages.append(said("assistant", draw(st.none() | words), tool_calls=calls))
            for made in calls:
                content = json.dumps(draw(st.dictionaries(words, words)), ensure_ascii=False)
                messages.append({"role": "tool", "name": made["function"]["name"], "content": content})
        messages.append(said("assistant", draw(words)))
    return {"messages": messages, "tools": [schema(name) for name in names]}


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_every_layout_of_a_conversation_gives_the_same_row(row):
    assert list(tool_conversations([row, hub_with_ids(row)])) == [row, row]
    if "tool" in {message["role"] for message in row["messages"]}:
        assert list(tool_conversations([hermes(row), hermes(row, True), hermes(row, column=False)])) == [row] * 3


def test_an_official_template_takes_the_rows():
    """Qwen 2.5's template, as TRL ships it, writes calls in Hermes' tags: the text we read must come out again."""
    template = (resources.files("trl") / "chat_templates/qwen2_5.jinja").read_text()
    (row,) = tool_conversations([hermes(ROW)])
    messages = [{**message, "content": message["content"] or ""} for message in row["messages"]]
    (text,), _ = render_jinja_template([messages], tools=row["tools"], chat_template=template)
    for message in hermes(ROW)["conversations"]:
        if message["from"] == "gpt":
            assert message["value"] in text
    assert text.count('"name": "weather", "description": "Does weather."') == 1
    assert '<tool_response>\n{"sky": "grey"}\n</tool_response>\n<tool_response>\n{"sky": "blue"}' in text
