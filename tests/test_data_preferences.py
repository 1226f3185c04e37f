"""Preference adapters: hand-made rows with the rows they must give, rows that state no preference, the real HH file.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_data_preferences.py
"""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import extract_prompt

from posttrain.data.bad_rows import BadRows
from posttrain.data.preferences import (
    hh_conversations,
    hh_pairs,
    preference_pairs,
    ultrafeedback_pairs,
    ultrafeedback_rankings,
)
from posttrain.errors import UserError


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


PUN = {
    "chosen": hh("Hi", "Hello.", "A pun?\n\nShort.", "Yes "),
    "rejected": hh("Hi", "Hello.", "A pun?\n\nShort.", "No"),
}
GOOD = {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "B")}


def test_hh_pairs():
    prompt = [user("Hi"), assistant("Hello."), user("A pun?\n\nShort.")]
    assert list(hh_pairs([PUN])) == [{"prompt": prompt, "chosen": [assistant("Yes")], "rejected": [assistant("No")]}]


def test_hh_conversations():
    messages = [user("Hi"), assistant("Hello."), user("A pun?\n\nShort."), assistant("Yes")]
    assert list(hh_conversations([PUN])) == [{"messages": messages}]


UNUSABLE = {
    "differ": ({"chosen": hh("Hi", "A", "x", "B"), "rejected": hh("Hi", "C", "x", "D")}, "unusable_pair"),
    "differ in length": ({"chosen": hh("Hi", "A"), "rejected": hh("Hi", "A", "x", "D")}, "unusable_pair"),
    "is empty": ({"chosen": hh("Hi", "A"), "rejected": hh("Hi", "")}, "empty_content"),
    "do not alternate": ({"chosen": hh("Hi", "A", "B"), "rejected": hh("Hi", "A", "C")}, "wrong_role"),
    "roles do not alternate": (
        {"chosen": hh("Hi") + hh("again", "A"), "rejected": hh("Hi") + hh("again", "B")},
        "repeated_role",
    ),
    "are the same": ({"chosen": hh("Hi", "A"), "rejected": hh("Hi", "A")}, "unusable_pair"),
}


def test_hh_unusable_rows_are_counted_under_either_policy(caplog):
    rows = [GOOD, *(row for row, _ in UNUSABLE.values()), GOOD]
    for policy in ("stop", "skip"):
        bad = BadRows(policy)
        assert len(list(hh_pairs(rows, bad=bad))) == 2
        assert bad.counts == Counter(reason for _, reason in UNUSABLE.values())
    assert bad.first["unusable_pair"].startswith("row 1: the dialogues differ")
    assert not caplog.records, "the stage tells what `bad` counted"
    assert len(list(hh_pairs(rows))) == 2
    assert "hh_pairs: left out 3 of 8 rows: unusable_pair (first: row 1: the dialogues differ" in caplog.text
    assert sum(record.args[1] for record in caplog.records) == 6


@pytest.mark.parametrize("row, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_hh_unusable_rows_stop_where_asked(row, reason):
    with pytest.raises(ValueError, match="row 1: .*(differ|empty|alternate|the same)"):
        list(hh_pairs([GOOD, row], unusable="stop"))
    with pytest.raises(UserError, match=reason):
        list(hh_pairs([GOOD, row], unusable="stop", bad=BadRows("stop")))
    bad = BadRows("skip")
    assert len(list(hh_pairs([GOOD, row], unusable="stop", bad=bad))) == 1
    assert bad.counts == {reason: 1}


def test_hh_conversations_leave_out_what_is_no_dialogue():
    bad = BadRows()
    rows = [GOOD, *({"chosen": hh(*turns)} for turns in (["Hi"], ["Hi", " "], ["Hi", "A", "B"]))]
    assert len(list(hh_conversations(rows, bad=bad))) == 1
    assert bad.counts == {"wrong_role": 2, "empty_content": 1}


@pytest.mark.parametrize("adapter", [hh_pairs, ultrafeedback_pairs, ultrafeedback_rankings, preference_pairs])
def test_an_unknown_way_with_unusable_rows_is_refused(adapter):
    with pytest.raises(ValueError, match="unusable='raise'"):
        list(adapter([], unusable="raise"))


@pytest.mark.parametrize("adapter", [hh_pairs, hh_conversations])
@pytest.mark.parametrize(
    "row, error", [({"rejected": hh("Hi", "A")}, "'chosen' is None"), ({"chosen": "Hi", "rejected": "Hi"}, "Human:")]
)
def test_hh_rows_of_another_layout_are_refused(adapter, row, error):
    with pytest.raises(ValueError, match=error):
        list(adapter([row]))
    with pytest.raises(UserError, match=error):
        list(adapter([row], bad=BadRows()))


def test_real_hh():
    """Counted here with plain splits: no turn empty, Human and Assistant in turn, one end that differs."""
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real data to read")
    with gzip.open(Path(folder) / "data/hh_rlhf_harmless/pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def fine(dialogue: str) -> bool:
        said = dialogue.replace("\n\nAssistant:", "\n\nHuman:\0").split("\n\nHuman:")[1:]
        marks = [part.startswith("\0") for part in said]
        return marks == [False, True] * (len(said) // 2) and all(part.strip("\0 \n") for part in said)

    fine_pairs = [
        row
        for row in rows
        if fine(row["chosen"])
        and fine(row["rejected"])
        and row["chosen"].rpartition("\n\nAssistant:")[0] == row["rejected"].rpartition("\n\nAssistant:")[0]
        and row["chosen"].strip() != row["rejected"].strip()
    ]
    bad = BadRows()
    pairs = list(hh_pairs(rows, bad=bad))
    assert len(rows) == 1156 and len(pairs) == len(fine_pairs) == 1156 - bad.counts.total() == 1150
    for pair, row in zip(pairs, fine_pairs, strict=True):
        assert row["chosen"].endswith(pair["chosen"][0]["content"] + row["chosen"][len(row["chosen"].rstrip()) :])
        assert pair["prompt"][0]["role"] == pair["prompt"][-1]["role"] == "user"
    conversations = list(hh_conversations(rows))
    assert len(conversations) == sum(fine(row["chosen"]) for row in rows)


def binarized(**more) -> dict:
    chosen, rejected = [user("Why?"), assistant("Because.")], [user("Why?"), assistant("No.")]
    return {
        "prompt": "Why?", "prompt_id": "f0", "chosen": chosen, "rejected": rejected, "messages": chosen,
        "score_chosen": 8.5, "score_rejected": 6.0, **more,
    }  # fmt: skip


def test_ultrafeedback_pairs():
    expected = {
        "prompt": [user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("No.")], "margin": 2.5
    }  # fmt: skip
    assert list(ultrafeedback_pairs([binarized()])) == [expected]
    assert list(ultrafeedback_pairs([binarized(score_rejected=8.5)])) == [{**expected, "margin": 0.0}]


def test_ultrafeedback_pairs_that_state_no_preference(caplog):
    bad = BadRows()
    rows = [
        binarized(rejected=[user("Why?"), assistant(" ")]),
        binarized(rejected=[user("Why?"), assistant("Because.")]),
        binarized(score_rejected=9),
        binarized(prompt="How?"),
        binarized(rejected=[user("How?"), assistant("No.")]),
        binarized(),
    ]
    assert len(list(ultrafeedback_pairs(rows, bad=bad))) == 1
    assert bad.counts == {"empty_content": 1, "unusable_pair": 4}
    assert bad.first["unusable_pair"].startswith("row 1: both replies") and not caplog.records
    with pytest.raises(ValueError, match="row 0: 'score_chosen' is None"):
        list(ultrafeedback_pairs([binarized(score_chosen=None)]))
    with pytest.raises(ValueError, match="rejected reply scores higher, by 0.5"):
        list(ultrafeedback_pairs([binarized(score_rejected=9)], unusable="stop"))


def completion(response, overall=None, fine=None) -> dict:
    return {"model": "m", "response": response, "overall_score": overall, "fine-grained_score": fine}


def test_ultrafeedback_rankings():
    row = {
        "instruction": "Sing.",
        "models": ["a", "b", "c", "d", "e", "f"],
        "completions": [
            completion("la", 5.0, 3.25), completion("li", 7.5, 3.0), completion("lo", 5, 4.0),
            completion("lu", None, 1.0), completion("", 9.0, 5.0), completion("le", 1.0, float("nan")),
        ],
    }  # fmt: skip
    assert list(ultrafeedback_rankings([row])) == [
        {
            "prompt": [user("Sing.")],
            "completions": [[assistant(text)] for text in ("li", "la", "lo", "le")],
            "ranks": [0, 1, 1, 2],
        }
    ]
    (fine,) = ultrafeedback_rankings([row], score="fine-grained_score")
    assert [reply[0]["content"] for reply in fine["completions"]] == ["lo", "la", "li", "lu"]
    assert fine["ranks"] == [0, 1, 2, 3]


def test_ultrafeedback_rows_that_rank_nothing(caplog):
    rows = [
        {"instruction": "Q", "completions": replies}
        for replies in ([], [completion("a", 1)], [completion("a", 1), completion("b", 1)])
    ]
    bad = BadRows()
    assert list(ultrafeedback_rankings(rows, bad=bad)) == []
    assert bad.counts == {"unusable_pair": 3}
    assert list(ultrafeedback_rankings(rows)) == [] and "left out 3 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="row 0: 0 replies with 0 different"):
        list(ultrafeedback_rankings(rows, unusable="stop"))
    with pytest.raises(ValueError, match="score='helpfulness'; expected one of overall_score"):
        list(ultrafeedback_rankings(rows, score="helpfulness"))
    for odd in ({"completions": []}, {"instruction": "Q", "completions": ["a"]}):
        with pytest.raises(ValueError, match="row 0"):
            list(ultrafeedback_rankings([odd]))
    with pytest.raises(ValueError, match="'overall_score' is '8', expected a number"):
        list(ultrafeedback_rankings([{"instruction": "Q", "completions": [completion("a", "8")]}]))


WHY = {"prompt": [user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("No.")]}
LAYOUTS = {
    "strings": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "messages and strings": {"prompt": [user("Why?")], "chosen": "Because.", "rejected": "No."},
    "messages": WHY,
    "prompt and conversations": {
        "prompt": "Why?", "chosen": [user("Why?"), assistant("Because.")], "rejected": [user("Why?"), assistant("No.")]
    },
    "conversations": {"chosen": [user("Why?"), assistant("Because.")], "rejected": [user("Why?"), assistant("No.")]},
}  # fmt: skip


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_preference_pairs_of_each_layout(row):
    assert list(preference_pairs([row])) == [WHY]
    renamed = {{"prompt": "question", "chosen": "better", "rejected": "worse"}[key]: row[key] for key in row}
    options = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert list(preference_pairs([renamed], **options)) == [WHY]
    system = {"role": "system", "content": "Be brief."}
    assert list(preference_pairs([{**row, "system": "Be brief."}])) == [{**WHY, "prompt": [system, user("Why?")]}]


def test_margins_of_preference_pairs():
    scored = {**WHY, "score_chosen": 3, "score_rejected": 1}
    assert list(preference_pairs([{**WHY, "margin": 0.5}, scored])) == [{**WHY, "margin": 0.5}, {**WHY, "margin": 2.0}]
    assert list(preference_pairs([{**WHY, "score_chosen": 3}])) == [WHY]


REFUSED = {
    "the same": ({**WHY, "rejected": [assistant("Because.")]}, "unusable_pair"),
    "empty": ({**LAYOUTS["strings"], "chosen": ""}, "empty_content"),
    "no prompt": ({"chosen": "Because.", "rejected": "No."}, "missing_column"),
    "no rejected": ({"prompt": "Why?", "chosen": "Because."}, "missing_column"),
    "mixed": ({"prompt": "Why?", "chosen": "Because.", "rejected": [assistant("No.")]}, "wrong_type"),
    "part early": (
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
        "unusable_pair",
    ),
    "another prompt": ({**LAYOUTS["conversations"], "prompt": "Who?"}, "unusable_pair"),
    "a reply of the user": ({**WHY, "chosen": [user("Because.")]}, "repeated_role"),
    "prompt of the assistant": ({**WHY, "prompt": [assistant("Why?")]}, "wrong_role"),
    "prompt unanswered twice": ({**WHY, "prompt": [user("Why?"), user("Why?")]}, "repeated_role"),
    "unknown role": ({**WHY, "prompt": [{"role": "human", "content": "Why?"}]}, "wrong_role"),
    "no content": ({**WHY, "prompt": [{"role": "user"}]}, "wrong_type"),
    "negative margin": ({**WHY, "margin": -1}, "unusable_pair"),
    "margin is a string": ({**WHY, "margin": "1"}, "wrong_type"),
}


@pytest.mark.parametrize("row, reason", REFUSED.values(), ids=REFUSED)
def test_preference_pairs_refuse_by_default_and_count_where_asked(row, reason):
    with pytest.raises(ValueError, match="row 1: "):
        list(preference_pairs([WHY, row]))
    bad = BadRows("skip")
    assert list(preference_pairs([WHY, row, WHY], bad=bad)) == [WHY, WHY]
    assert bad.counts == {reason: 1}
    if reason in ("unusable_pair", "empty_content"):
        assert list(preference_pairs([row, WHY], unusable="skip", bad=BadRows("stop"))) == [WHY]


said = st.text("abc ", min_size=1).filter(str.strip)


@settings(deadline=None)
@given(
    st.lists(said, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2),
    st.lists(said, min_size=2, max_size=2, unique=True),
)
def test_implicit_prompts_are_split_as_trl_splits_them(turns, replies):
    prompt = [user(content) if i % 2 == 0 else assistant(content) for i, content in enumerate(turns)]
    row = {key: [*prompt, assistant(reply)] for key, reply in zip(("chosen", "rejected"), replies, strict=True)}
    assert list(preference_pairs([row])) == [extract_prompt(row)]
