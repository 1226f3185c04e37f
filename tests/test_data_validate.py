"""What is wrong with a row: each fault with the message that users see, and all that is fine.

Run: pytest tests/test_data_validate.py
"""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import DataConfig, load_rows
from posttrain.data.validate import Intake, find_fault, turns_fault, valid
from posttrain.errors import UserError

SYSTEM, USER, REPLY = ({"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "name": "add", "content": "2"}


def turn(role, content):
    return {"role": role, "content": content}


def load(tmp_path, *rows, columns=("messages",), **keys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(DataConfig(str(file), **keys), "train", 0, columns)


FINE = [
    [USER, REPLY],
    [SYSTEM, USER, REPLY],
    [USER, REPLY, USER, REPLY],
    [USER],
    [USER, REPLY, USER],
    [USER, CALLS, TOOL, REPLY],
    [USER, CALLS, TOOL, TOOL, CALLS, TOOL, REPLY, USER, REPLY],
    [USER, {**CALLS, "content": "Let me add."}, {**TOOL, "content": ""}, REPLY],  # a program that prints nothing
    [USER, CALLS, USER],
    [USER, {**REPLY, "reasoning_content": "I think"}],
    [USER, {**REPLY, "tool_calls": None}],
    [USER, {**CALLS, "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}, TOOL],
]


@pytest.mark.parametrize("turns", FINE)
def test_conversations_that_are_fine(tmp_path, turns):
    assert load(tmp_path, {"messages": turns})[0] == [{"messages": turns}]


@pytest.mark.parametrize(
    ("turns", "reason", "words"),
    [
        ([], "empty_content", "no user turn"),
        ([SYSTEM], "wrong_role", "no user turn"),
        ([REPLY], "wrong_role", "turn 0 (assistant): it follows nothing, expected user and assistant turns in"),
        ([SYSTEM, REPLY], "wrong_role", "turn 1 (assistant): it follows a turn of role 'system'"),
        ([USER, USER, REPLY], "repeated_role", "turn 1 (user): it follows a turn of role 'user', expected user and"),
        ([USER, REPLY, REPLY], "repeated_role", "turn 2 (assistant): it follows a turn of role 'assistant'"),
        ([SYSTEM, SYSTEM, USER], "repeated_role", "turn 1 (system): it follows a turn of role 'system', expected a"),
        ([USER, SYSTEM, REPLY], "wrong_role", "turn 1 (system): it follows a turn of role 'user', expected a"),
        ([USER, turn("gpt", "x")], "wrong_role", "role 'gpt', expected one of system, user, assistant, tool; mend or"),
        ([USER, REPLY, TOOL], "wrong_role", "turn 2 (tool): the assistant turn before it has no tool_calls"),
        ([USER, TOOL], "wrong_role", "turn 1 (tool): it follows a turn of role 'user', expected an assistant"),
        ([USER, turn("assistant", "")], "empty_content", "turn 1 (assistant): found content '', expected some text"),
        ([USER, turn("assistant", None)], "empty_content", "turn 1 (assistant): found content None"),
        ([turn("user", " \n\t"), REPLY], "empty_content", "turn 0 (user): found content ' \\n\\t'"),
        ([turn("system", ""), USER, REPLY], "empty_content", "turn 0 (system): found content ''"),
        ([USER, CALLS, {**TOOL, "content": None}], "empty_content", "turn 2 (tool): found content None"),
        ([USER, {**CALLS, "tool_calls": "add(1)"}], "tool_call", "tool_calls: found 'add(1)', expected [{'type'"),
        ([USER, {**CALLS, "tool_calls": [{"name": "add"}]}], "tool_call", "found \"[{'name': 'add'}]\", expected"),
        (
            [USER, {**CALLS, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}],
            "tool_call", "arguments '{\"a\": 1}', expected",
        ),
        ("hello", "wrong_type", "column 'messages': found 'hello', expected a list of {'role': ..., 'content': ...}"),
        ([["user", "hi"]], "wrong_type", "column 'messages': found \"[['user', 'hi']]\""),
        ([turn("user", 5)], "wrong_type", "column 'messages': found"),
        ([turn("user", [{"type": "text", "text": "hi"}])], "wrong_type", "column 'messages': found"),
        ([turn(None, "x")], "wrong_type", "column 'messages': found"),
    ],
)  # fmt: skip
def test_conversations_that_are_not(tmp_path, turns, reason, words):
    good = {"messages": [USER, REPLY]}
    with pytest.raises(UserError) as refused:
        load(tmp_path, good, {"messages": turns})
    assert str(refused.value).startswith(f"{tmp_path}/rows.jsonl:2 (row 1): column 'messages'")
    assert words in str(refused.value) and f"[{reason}; on_bad_row: skip leaves" in str(refused.value)
    rows, description = load(tmp_path, good, {"messages": turns}, on_bad_row="skip")
    assert rows == [good] and description["skipped"] == {reason: 1}


@settings(max_examples=300)
@given(st.lists(st.sampled_from([SYSTEM, USER, REPLY, CALLS, TOOL]), max_size=7))
def test_the_order_of_turns_is_a_regular_language(turns):
    """The rule as an expression of its own: S? then U, then replies or calls with results, always U in between."""
    import re

    letters = {id(t): letter for t, letter in ((SYSTEM, "s"), (USER, "u"), (REPLY, "a"), (CALLS, "c"), (TOOL, "t"))}
    word = "".join(letters[id(turn)] for turn in turns)
    answer = "(a|c(t+c)*(t+a?)?)"  # an answer, or calls with results that may lead to one
    fine = re.fullmatch(f"s?u({answer}u)*{answer}?", word) is not None
    assert (turns_fault(turns, "messages") is None) == fine, word
    fine_prompt = fine and word[-1] in "ut"
    assert (turns_fault(turns, "prompt") is None) == fine_prompt, word


def test_a_prompt_waits_for_a_reply(tmp_path):
    assert load(tmp_path, {"prompt": [SYSTEM, USER]}, {"prompt": [USER, CALLS, TOOL]}, columns=("prompt",))[0]
    with pytest.raises(UserError, match="row 0.*column 'prompt' ends in a turn of role 'assistant', expected user"):
        load(tmp_path, {"prompt": [USER, REPLY]}, columns=("prompt",))
    with pytest.raises(UserError, match="column 'prompt': found 'hello', expected a list of"):
        load(tmp_path, {"prompt": "hello"}, columns=("prompt",))


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"text": "a\0b"}, "nul", "a NUL character after 'a'; mend or remove the row"),
        ({"text": "a", "meta": {"deep": ["x\0"]}}, "nul", "a NUL character after 'x'"),
        ({"text": "a\ud83d"}, "lone_surrogate", "'\\ud83d' is half a surrogate pair, which no tokenizer takes"),
        ({"text": "a", "k\udc00": 1}, "lone_surrogate", "'\\udc00' is half a surrogate pair"),
        ({"text": ""}, "empty_content", "column 'text': found '', expected some text; remove the row"),
        ({"text": 5}, "wrong_type", "column 'text': found '5', expected a string"),
        ({"text": None}, "missing_column", "column 'text' is missing; found text; expected text: name an adapter"),
        (
            {"text": "x" * 101},
            "too_long",
            "101 characters, expected max_row_chars 100 or fewer: raise it, cut the row",
        ),
        ({"text": "x" * 99, "more": ["yz"]}, "too_long", "101 characters"),
    ],
)
def test_texts_that_no_stage_can_take(tmp_path, row, reason, words):
    keys = {"columns": ("text",), "max_row_chars": 100}
    with pytest.raises(UserError) as refused:
        load(tmp_path, {"text": "fine"}, row, **keys)
    assert "rows.jsonl:2 (row 1): " in str(refused.value) and words in str(refused.value)
    assert load(tmp_path, {"text": "fine"}, row, on_bad_row="skip", **keys)[1]["skipped"] == {reason: 1}


def test_texts_that_are_fine(tmp_path):
    rows = [{"text": text} for text in ("\\u0000 as five letters", "\U0001f642", "\ufffd\ufeff", "x" * 100)]
    rows.append({"text": '"\\' * 50})  # as JSON it is twice as long
    assert load(tmp_path, *rows, columns=("text",), max_row_chars=100)[0] == rows


@pytest.mark.parametrize("ids", [("a", "b", "a"), (1, 2, 1)])
@pytest.mark.parametrize("key", ["message_id", "id"])
def test_two_rows_of_one_id(tmp_path, key, ids, caplog):
    rows = [{"text": text, key: value} for text, value in zip("xyz", ids, strict=True)]
    with pytest.raises(UserError) as refused:
        load(tmp_path, *rows, columns=("text",))
    said = f"rows.jsonl:3 (row 2): {key} {ids[0]!r} stands in {tmp_path}/rows.jsonl:1 (row 0), too; remove one, or set"
    assert said in str(refused.value) and "duplicate_id" in str(refused.value)
    for policy, expected, facts in [
        ({"on_bad_row": "skip"}, "xy", {"skipped": {"duplicate_id": 1}, "duplicates": {}}),
        ({"dedup": "id"}, "xy", {"skipped": {}, "duplicates": {"id": 1}}),
        ({"dedup": "both"}, "xy", {"skipped": {}, "duplicates": {"id": 1}}),
        ({"dedup": "text"}, "xyz", {"skipped": {}, "duplicates": {}}),
        ({"dedup": "none"}, "xyz", {"skipped": {}, "duplicates": {}}),
    ]:
        found, description = load(tmp_path, *rows, columns=("text",), **policy)
        assert "".join(row["text"] for row in found) == expected and description.items() >= facts.items()
    assert "data: left out duplicates in" in caplog.text and "1 by id (dedup: id)" in caplog.text


def test_a_text_id_and_a_number_are_not_the_same(tmp_path):
    assert len(load(tmp_path, {"text": "x", "id": 1}, {"text": "y", "id": "1"}, columns=("text",))[0]) == 2


def test_duplicate_texts(tmp_path):
    def said(*texts):
        return {"messages": [turn(role, text) for role, text in zip(("user", "assistant") * 2, texts, strict=False)]}

    rows = [
        said("Hi", "Hello!"),
        said("hi ", "HELLO!"),
        said("Hi", "Hello."),
        said("Hi Hello!", "x"),
        said("Hi", "\ufb01"),
    ]
    rows += [{**said("Hi", "Hello!"), "id": 3}, said("Hi", "fi"), said("Hi", "Hello!", "x", "y")]
    found, description = load(tmp_path, *rows, dedup="text")
    assert found == [rows[i] for i in (0, 2, 3, 4, 7)] and description["duplicates"] == {"text": 3}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"completions": [[REPLY], [REPLY]], "ranks": [0, math.nan]},
            "column 'ranks': found [0, nan], expected finite",
        ),
        (
            {"completions": [[REPLY], [REPLY]], "ranks": [0, math.inf]},
            "column 'ranks': found [0, inf], expected finite",
        ),
        ({"completions": [[REPLY], [REPLY]], "ranks": [0, "1"]}, "column 'ranks': found [0, '1']"),
        ({"completions": [[REPLY], [REPLY]], "ranks": 1}, "column 'ranks': found 1"),
        ({"completions": [[REPLY], [REPLY]], "ranks": [0]}, "column 'ranks': 1 ranks for 2 completions"),
        ({"completions": [[REPLY], [turn("assistant", " ")]]}, "column 'completions': an empty reply"),
        ({"completions": [[REPLY], []]}, "column 'completions': found '[]', expected an assistant turn"),
        ({"chosen": [USER], "rejected": [REPLY]}, "column 'chosen': found"),
        ({"chosen": [REPLY], "rejected": [turn("assistant", "")]}, "column 'rejected': an empty reply"),
    ],
)
def test_replies_and_ranks(tmp_path, row, words):
    with pytest.raises(UserError) as refused:
        load(tmp_path, {"prompt": [USER], **row}, columns=("prompt",))
    assert f"rows.jsonl:1 (row 0): {words}" in str(refused.value)


def test_replies_and_ranks_that_are_fine(tmp_path):
    rows = [
        {"completions": [[REPLY], [CALLS], [CALLS, TOOL, REPLY]], "ranks": [0, 0, 1.5]},
        {"chosen": [REPLY], "rejected": [CALLS]},
        {"completions": "of another layout", "ranks": "too"},
    ]
    rows = [{"prompt": [USER], **row} for row in rows]
    assert load(tmp_path, *rows, columns=("prompt",))[0] == rows


def test_tools_are_schemas(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert load(tmp_path, {"messages": [USER, REPLY], "tools": tools}, {"messages": [USER, REPLY], "tools": None})
    with pytest.raises(UserError, match="column 'tools': found '.*', expected a list of JSON schemas"):
        load(tmp_path, {"messages": [USER, REPLY], "tools": json.dumps(tools)})


def test_only_the_columns_a_stage_needs_are_its_business(tmp_path):
    rows = [{"text": "fine", "prompt": 5, "messages": [REPLY], "tools": "x", "ranks": [math.nan]}]
    assert find_fault(rows[0], ("text",)) is None
    assert load(tmp_path, *rows, columns=("text",))[1]["rows"] == 1


def test_a_row_nested_too_deeply_for_json():
    row = {"text": "a"}
    for _ in range(100_000):
        row = {"text": "a", "more": row}
    intake = Intake("skip")
    assert list(valid([(None, row)], ("text",), intake, "x", 100, False)) == [] and intake.counts == {
        "malformed_json": 1
    }
    while row:  # or Python's own garbage collector would go down as deep
        row = row.pop("more", None)


def test_good_rows_come_out_as_they_are_and_in_order():
    rows = [{"text": str(i), "more": [i, None, {"x": 1.5}]} for i in range(20)]
    intake = Intake("skip")
    mixed = [row for pair in zip(rows, [{"text": ""}] * 20, strict=True) for row in pair]
    found = list(valid(((None, row) for row in mixed), ("text",), intake, "x", 100, True))
    assert [row for row, _ in found] == rows and all(a is b for (a, _), b in zip(found, rows, strict=True))
    assert (intake.kept, intake.refused, intake.total) == (20, 20, 40)


def first_row(rows):
    """An adapter that makes one row of many."""
    return list(rows)[:1]


def test_shares_are_of_what_was_read(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 4 + "{\n[\n")
    config = DataConfig(
        str(tmp_path / "rows.jsonl"),
        dataset_adapter="test_data_validate.first_row",
        on_bad_row="skip",
        max_skipped=0.34,
    )
    assert load_rows(config, "train", 0, ("text",))[1]["rows"] == 1 and "left out 2 of 6 rows" in caplog.text
