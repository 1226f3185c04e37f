"""GSM8K and HH adapters: hand-made rows with the rows they must give, bad rows, and the real files."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from posttrain.data.math import gsm8k, gsm8k_conversations
from posttrain.data.preferences import hh_pairs


def real(name: str) -> Path:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real data to read")
    return Path(folder) / "data" / name


CLIPS = {
    "question": "How many clips did she sell?",
    "answer": "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+1,032 = $<<48+1032=1080>>1,080.\n#### 1,080",
}


def test_gsm8k():
    user = {"role": "user", "content": "How many clips did she sell?"}
    assert list(gsm8k([CLIPS])) == [{"prompt": [user], "answer": "1080"}]
    solution = "In May 48/2 = 24 clips.\nIn all 48+1,032 = $1,080.\n#### 1080"
    assert list(gsm8k_conversations([CLIPS])) == [{"messages": [user, {"role": "assistant", "content": solution}]}]


@pytest.mark.parametrize("adapter", [gsm8k, gsm8k_conversations])
@pytest.mark.parametrize(
    "row, error",
    [
        ({"question": "Q", "answer": "It is 72."}, "It is 72"),
        ({"question": "Q", "answer": "72\n#### "}, "####"),
        ({"question": "Q", "answer": "#### 1\n#### 2"}, "one '#### N'"),
        ({"question": " ", "answer": "#### 1"}, "question"),
        ({"question": "Q"}, "'answer' is None.*question"),
        ({"question": "Q", "answer": 72}, "'answer' is 72"),
    ],
)
def test_gsm8k_refuses_rows_without_an_answer(adapter, row, error):
    with pytest.raises(ValueError, match=error):
        list(adapter([row]))


def test_real_gsm8k():
    rows = [json.loads(line) for line in real("gsm8k/train.jsonl").open(encoding="utf-8")]
    problems, conversations = list(gsm8k(rows)), list(gsm8k_conversations(rows))
    assert len(problems) == len(conversations) == 7473
    assert all(re.fullmatch("-?[0-9]+", problem["answer"]) for problem in problems)
    assert (problems[0]["answer"], problems[-1]["answer"]) == ("72", str(int(rows[-1]["answer"].split()[-1])))
    for problem, row in zip(problems, conversations, strict=True):
        assert row["messages"][1]["content"].splitlines()[-1] == f"#### {problem['answer']}"
        assert "<<" not in row["messages"][1]["content"]


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def test_hh_pairs():
    row = {
        "chosen": hh("Hi", "Hello.", "A pun?\n\nShort.", "Yes "),
        "rejected": hh("Hi", "Hello.", "A pun?\n\nShort.", "No"),
    }
    assert list(hh_pairs([row])) == [
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "A pun?\n\nShort."},
            ],
            "chosen": [{"role": "assistant", "content": "Yes"}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
    ]


UNUSABLE = {
    "differ": {"chosen": hh("Hi", "A", "x", "B"), "rejected": hh("Hi", "C", "x", "D")},
    "differ in length": {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "A", "x", "D")},
    "turn is empty": {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "")},
    "do not alternate": {"chosen": hh("Hi", "A", "B"), "rejected": hh("Hi", "A", "C")},
    "are the same": {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "A")},
}


def test_hh_unusable_rows_are_counted_or_refused(caplog):
    good = {"chosen": hh("Hi", "A"), "rejected": hh("Hi", "B")}
    assert len(list(hh_pairs([good, *UNUSABLE.values(), good]))) == 2
    assert "left out 2 of 7 rows: the dialogues differ" in caplog.text
    assert len(caplog.records) == 4
    for reason, row in UNUSABLE.items():
        with pytest.raises(ValueError, match=reason.removesuffix(" in length")):
            list(hh_pairs([good, row], unusable="stop"))
    with pytest.raises(ValueError, match="unusable='raise'"):
        list(hh_pairs([good], unusable="raise"))


@pytest.mark.parametrize("row", [{"chosen": hh("Hi", "A")}, {"chosen": "Hi", "rejected": "Hi"}, {"text": "Hi"}])
def test_hh_rows_of_another_layout_are_refused(row):
    with pytest.raises(ValueError, match="Human:"):
        list(hh_pairs([row]))


def test_real_hh(caplog):
    with gzip.open(real("hh_rlhf_harmless/pairs.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    empty = sum(row["chosen"].endswith("Assistant:") or row["rejected"].endswith("Assistant:") for row in rows)
    pairs = list(hh_pairs(rows))
    assert len(rows) == 1156
    assert len(pairs) + sum(record.args[0] for record in caplog.records) == 1156
    assert len(pairs) >= 1156 - empty - 10
    for pair in pairs:
        assert pair["prompt"][0]["role"] == pair["prompt"][-1]["role"] == "user"
        assert pair["chosen"] != pair["rejected"]
