"""All adapters alike: each is in the table, takes `bad`, goes row by row, and reports any junk by its reason.

Run: pytest tests/test_data_adapters.py
"""

import copy
import inspect
import json
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import DataConfig, load_adapter, load_rows
from posttrain.data.adapters import ADAPTERS as ALL
from posttrain.data.bad_rows import BadRows
from posttrain.errors import UserError

# identity turns one description into thousands of rows and is tested apart: tests/test_identity.py
ADAPTERS = {name: path for name, path in ALL.items() if not name.startswith("identity")}

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"required": ["x"]}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
TREE = {
    "message_id": "p", "text": "Hi", "role": "prompter", "lang": "en", "deleted": False, "synthetic": False,
    "review_result": True, "labels": {"quality": {"value": 0.5, "count": 3}},
    "replies": [
        {"message_id": "a", "parent_id": "p", "text": "A", "role": "assistant", "lang": "en", "rank": 0},
        {"message_id": "b", "parent_id": "p", "text": "B", "role": "assistant", "lang": "en", "rank": 1},
    ],
}  # fmt: skip
# A row that each adapter can use.
GOOD = {
    "oasst_conversations": {"message_tree_id": "p", "prompt": TREE},
    "oasst_rankings": {"message_tree_id": "p", "prompt": TREE},
    "hh_pairs": {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
    "hh_conversations": {"chosen": "\n\nHuman: Hi\n\nAssistant: A"},
    "ultrafeedback_pairs": {
        "prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, USER | REPLY | {"content": "No."}],
        "score_chosen": 8.0, "score_rejected": 2,
    },
    "ultrafeedback_rankings": {
        "instruction": "Hi",
        "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2.5}],
    },
    "preference_pairs": {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY | {"content": "No."}], "margin": 1},
    "ultrachat": {"messages": [USER, REPLY]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "system": "S"
    },
    "alpaca": {"instruction": "Hi", "input": "there", "output": "Hello.", "history": [["a", "b"]], "system": "S"},
    "tool_conversations": {
        "messages": [
            USER, {**REPLY, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "2"}, REPLY
        ],
        "tools": [SCHEMA],
    },
    "gsm8k": {"question": "Q", "answer": "A\n#### 1"},
    "gsm8k_conversations": {"question": "Q", "answer": "A\n#### 1"},
    "math_problems": {"problem": "P", "solution": "\\boxed{1}", "level": "Level 1"},
    "math_conversations": {"problem": "P", "solution": "\\boxed{1}"},
    "countdown": {"nums": [1, 2], "target": 3},
    "humaneval": {
        "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "def check(f): pass", "entry_point": "f"
    },
    "mbpp": {
        "text": "T", "code": "c", "test_list": ["assert c"], "test_setup_code": "", "test_imports": ["import re"]
    },
    "plain_text": {"text": "a"},
}  # fmt: skip
OUT = ("text", "messages", "prompt")


def test_the_table_is_whole():
    assert GOOD.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_takes_bad_and_only_keywords(name):
    parameters = inspect.signature(load_adapter(name)).parameters
    first, *others = parameters.values()
    assert first.name == "rows" and parameters["bad"].default is None
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in others)
    assert load_adapter(name).__doc__


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_good_row_gives_rows_of_a_known_layout_and_stays_as_it_was(name):
    given, bad = copy.deepcopy(GOOD[name]), BadRows()
    out = list(load_adapter(name)([given], bad=bad))
    assert out and all(any(column in row for column in OUT) for row in out) and not bad.counts
    assert given == GOOD[name]
    assert json.loads(json.dumps(out)) == out


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_through_the_loader(name, tmp_path):
    """By its short name in a config; the second row is junk, which on_bad_row: skip leaves out and counts."""
    file = tmp_path / "rows.jsonl"
    junk = {"unknown": 1} if not name.startswith("oasst") else {"message_id": 7}
    file.write_text("\n".join(json.dumps(row) for row in (GOOD[name], junk)))
    config = DataConfig(dataset_name=str(file), dataset_adapter=name, on_bad_row="skip")
    expected = list(load_adapter(name)([GOOD[name]]))
    columns = tuple(column for column in OUT if column in expected[0])
    rows, description = load_rows(config, "train", 0, columns)
    assert rows == expected and sum(description["skipped"].values()) == 1
    with pytest.raises(UserError, match="on_bad_row: skip"):
        load_rows(DataConfig(dataset_name=str(file), dataset_adapter=name), "train", 0, columns)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if not name.startswith("oasst")])
def test_rows_are_read_one_by_one(name):
    """So that a stream that never ends can be taken from."""
    rows = (GOOD[name] for _ in count())
    assert len(list(islice(load_adapter(name)(rows), 3))) == 3


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.just(float("nan")), st.text("ab{}\\<>/ \n", max_size=6),
    st.sampled_from(["</tool_call>", "<tool_call>", "[]", "{}", "null", "assistant", "tool", "function_call"]),
    st.sampled_from([[], {}, [None], [[]], [{}], {"role": "user"}]),
).map(copy.deepcopy)  # fmt: skip


def spots(value, path=()) -> list[tuple]:
    """The paths to all values within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, part in inner for spot in spots(part, (*path, key)))]


@st.composite
def broken(draw, row: dict) -> dict:
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        *before, last = draw(st.sampled_from([spot for spot in spots(row) if spot]))
        inner = row
        for key in before:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.booleans()):
            del inner[last]
        else:
            inner[last] = draw(JUNK)
        if not row:
            break
    return row


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_junk_is_reported_and_nothing_else_is_raised(name, data):
    row, adapter = data.draw(broken(GOOD[name])), load_adapter(name)
    bad = BadRows("skip")
    out = list(adapter([row], bad=bad))
    json.dumps(out)
    if not name.startswith("oasst"):
        assert len(out) + bad.counts.total() == 1
    if out and not bad.counts:
        assert list(adapter([row])) == out or "nan" in repr(out)
        return
    try:
        assert list(adapter([row])) == out  # what is left out by default
    except ValueError as error:
        assert bad.counts and "row 0" in str(error) or "message" in str(error)
        with pytest.raises(UserError, match="on_bad_row: skip"):
            list(adapter([row], bad=BadRows("stop")))
