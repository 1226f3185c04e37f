"""What training and evaluation share: found, counted, dropped as the config says.

Run: pytest tests/test_data_overlap.py [POSTTRAIN_REAL_DATA=folder for real exports]
"""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import DataConfig, check, check_leaks, load_rows, separate
from posttrain.data.overlap import EvalIndex, find_overlap, normalised, words_of
from posttrain.errors import UserError

WORDS = [f"word{i}" for i in range(1000)]


def asked(text, reply="yes", **more):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}], **more}


def prompt(text, **more):
    return {"prompt": [{"role": "user", "content": text}], **more}


def sentence(start, num, end="."):
    return " ".join(WORDS[start : start + num]) + end


def counts(train, test, **keys):
    return find_overlap(train, test, **keys).numbers()


NONE = {"same_first_turn": 0, "same_text": 0, "same_id": 0, "ngram_13": 0}


# ---- what counts as shared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (asked("What is a cat?"), prompt("What is a cat?"), {"same_first_turn": 1, "same_text": 1}),
        (asked("What is a cat?"), prompt("what is  a CAT?\n"), {"same_text": 1}),
        (asked("\uff37hat is \ufb01re?"), prompt("What is fire?"), {"same_text": 1}),  # full width, a ligature
        (asked("Stra\u00dfe?"), prompt("STRASSE?"), {"same_text": 1}),
        (asked("What is a cat?"), prompt("What is a dog?"), {}),
        ({"text": "One.  Two."}, {"text": "one. two."}, {"same_text": 1}),
        ({"text": "One."}, {"text": "One."}, {"same_first_turn": 1, "same_text": 1}),
        ({"text": "One.", "n": 1}, {"text": "One.", "n": 2}, {"same_text": 1}),
        (asked("a", message_id="m1"), prompt("b", message_id="m1"), {"same_id": 1}),
        (asked("a", id="m1"), prompt("b", id="m1"), {}),  # row numbers of two files are no message ids
        (asked(sentence(0, 13)), prompt("Now " + sentence(0, 13, "!")), {"ngram_13": 1}),
        (asked(sentence(0, 12)), prompt("Now " + sentence(0, 12, "!")), {}),
        (asked("x", sentence(0, 20)), prompt(sentence(7, 20).upper().replace(" ", ", ")), {"ngram_13": 1}),
        (asked("x", sentence(0, 20)), prompt(sentence(8, 20)), {}),
        ({"text": sentence(0, 300)}, {"text": sentence(287, 300)}, {"ngram_13": 1}),
        (
            {"prompt": asked("x")["messages"][:1], "completions": [asked("", sentence(0, 13))["messages"]]},
            {"text": sentence(0, 13)}, {"ngram_13": 1},
        ),
    ],
)  # fmt: skip
def test_kinds(train, test, expected):
    assert counts([train], [test]) == NONE | expected
    assert counts([asked("other"), train, asked("more")], [prompt("apart"), test]) == NONE | expected


def test_system_turns_are_everywhere_and_no_leak():
    system = {"role": "system", "content": sentence(0, 40)}
    train = [{"messages": [system, *asked(f"q{i}")["messages"]]} for i in range(3)]
    assert counts(train, [{"prompt": [system, *prompt("other")["prompt"]]}]) == NONE


def test_numbers_count_rows_of_the_evaluation():
    train = [asked("a"), asked("a", "again"), asked("b"), asked(sentence(0, 14)), asked(sentence(20, 14))]
    test = [prompt("a"), prompt("A"), prompt("c"), prompt(sentence(0, 30)), prompt("b"), prompt("b")]
    found = find_overlap(train, test)
    assert found.numbers() == {"same_first_turn": 3, "same_text": 4, "same_id": 0, "ngram_13": 1}
    assert found.test["same_text"] == {0, 1, 4, 5} and found.train["same_text"] == {0, 1, 2}
    assert found.test["ngram_13"] == {3} and found.train["ngram_13"] == {3}


def test_a_phrase_of_more_than_ten_rows_is_common_but_a_question_asked_often_is_not():
    phrase = sentence(0, 13)
    test = [prompt(phrase + " What now?")]
    for num, expected in ((10, 1), (11, 0)):
        train = [asked(f"question {i}", phrase) for i in range(num)]
        assert counts(train, test)["ngram_13"] == expected
    copies = [asked(phrase + " And then?", f"reply {i}") for i in range(50)]  # one question in fifty conversations
    assert counts(copies, test)["ngram_13"] == 1
    longer = [*(asked(f"question {i}", phrase) for i in range(11)), asked("q", sentence(0, 14))]
    assert counts(longer, [prompt(sentence(0, 14))])["ngram_13"] == 1  # by the 13 words that are not common


def naive_ngrams(train, test, n=13, common=10):
    """By the definition, without any shortcut."""

    def grams(row):
        texts = [turn["content"] for turn in row.get("messages") or row["prompt"]]
        words = [words_of(text) for text in texts]
        return {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}

    holders = {}
    for row in train:
        for gram in grams(row):
            holders.setdefault(gram, set()).add(row["messages"][0]["content"])
    few = {gram for gram, firsts in holders.items() if len(firsts) <= common}
    return {index for index, row in enumerate(test) if grams(row) & few}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_ngrams_are_those_of_the_definition(seed):
    rng = random.Random(seed)
    spans = [WORDS[i : i + 40] for i in range(0, 200, 40)]

    def text():
        pieces = []
        for _ in range(rng.randrange(1, 4)):
            span, start = rng.choice(spans), rng.randrange(30)
            pieces += span[start : start + rng.randrange(1, 25)]
        return ", ".join(pieces)

    train = [asked(text(), text()) for _ in range(rng.randrange(1, 40))]
    test = [prompt(text()) for _ in range(rng.randrange(1, 10))]
    assert find_overlap(train, test).test["ngram_13"] == naive_ngrams(train, test)


@given(st.text(max_size=40))
def test_normalising_twice_is_normalising_once_and_case_and_space_do_not_matter(text):
    once = normalised(text)
    assert normalised(f" {text}\t") == once and once == " ".join(once.split())
    if text.isascii():
        assert normalised(text.upper()) == once


# ---- what is done about it ------------------------------------------------------------------------------------------

TRAIN = [asked("a"), asked("b", message_id="m1"), asked("c"), asked(sentence(0, 20)), asked("d")]
TEST = [prompt("x"), prompt("A "), prompt("b"), prompt("y", message_id="m1"), prompt("z " + sentence(0, 20))]
NUMBERS = {"same_first_turn": 1, "same_text": 2, "same_id": 1, "ngram_13": 1}


def separated(policy, train=TRAIN, test=TEST, **keys):
    rows, kept, numbers = separate(DataConfig("d", on_leak=policy, **keys), train, test, ("train.jsonl", "test.jsonl"))
    return [train.index(row) for row in rows], [test.index(row) for row in kept], numbers


def test_policies(caplog):
    every = list(range(5))
    assert separated("drop_eval") == (every, [0, 4], {**NUMBERS, "dropped_eval": 3, "dropped_train": 0})
    assert caplog.messages[-1] == (
        "data: same_first_turn 1, same_text 2, same_id 1, ngram_13 1 of 5 held-out rows of test.jsonl are in training "
        "on train.jsonl, too; left out 3 of these (on_leak: drop_eval)"
    )
    assert separated("drop_train") == ([2, 3, 4], every, {**NUMBERS, "dropped_eval": 0, "dropped_train": 2})
    assert "left out 2 training rows (on_leak: drop_train)" in caplog.messages[-1]
    assert separated("report") == (every, every, {**NUMBERS, "dropped_eval": 0, "dropped_train": 0})
    assert "left out none of these (on_leak: report)" in caplog.messages[-1]
    with pytest.raises(UserError) as refused:
        separated("stop")
    assert "on_leak: stop: same_first_turn 1, same_text 2, same_id 1, ngram_13 1 of 5 held-out" in str(refused.value)
    assert "First held-out row 1, 'A ', first training row 0: remove them, or set on_leak to" in str(refused.value)


def test_kinds_that_the_policy_acts_on():
    assert separated("drop_eval", leak_kinds=["ngram_13"])[1] == [0, 1, 2, 3]
    assert separated("drop_eval", leak_kinds=["same_first_turn"])[1] == [0, 1, 3, 4]
    assert separated("drop_eval", leak_kinds=[])[1] == [0, 1, 2, 3, 4]
    assert separated("stop", leak_kinds=["same_id"], train=TRAIN[:1])[2]["same_text"] == 1
    assert separated("drop_train", leak_kinds=["same_text", "ngram_13"])[0] == [2, 4]


def test_nothing_shared_is_no_news(caplog):
    rows, kept, numbers = separate(DataConfig("d", on_leak="stop"), TRAIN[2:3], TEST, ("a", "b"))
    assert rows == TRAIN[2:3] and kept == TEST and set(numbers.values()) == {0} and not caplog.records


def test_nothing_left():
    with pytest.raises(
        UserError, match="eval_dataset_split: all 2 held-out rows of test.jsonl are training rows, too"
    ):
        separated("drop_eval", test=TEST[1:3])
    with pytest.raises(UserError, match="^loss_split: all 1 held-out rows .* --loss_split train"):
        separate(DataConfig("d"), TRAIN, TEST[1:2], ("a", "b"), "loss_split")
    with pytest.raises(UserError, match="drop_train: all 2 training rows of train.jsonl are evaluation rows, too"):
        separated("drop_train", train=TRAIN[:2])


# ---- other evaluation sets ------------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """Two evaluation sets in layouts of their own."""
    gsm = [{"question": f"How many {WORDS[i]} are there in all?", "answer": f"It is {i}\n#### {i}"} for i in range(9)]
    code = [
        {"task_id": "x/1", "prompt": 'def f(a):\n    """' + sentence(50, 20) + '"""\n', "test": "assert f(1) == 1"}
    ]
    for name, rows in {"gsm": gsm, "code": code}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def leaks(sets, train, policy="drop_eval", **keys):
    names = [str(sets / "gsm.jsonl"), str(sets / "code.jsonl")]
    config = DataConfig("d", on_leak=policy, leak_check_datasets=names, **keys)
    rows, found = check_leaks(config, train, 0, "train.jsonl")
    return [train.index(row) for row in rows], [found[name] for name in names]


def test_other_sets_of_any_layout(sets, caplog):
    train = [asked("x/1"), asked("how many word3 are  there in all?"), asked("Write", sentence(48, 40)), asked("y")]
    rows, (gsm, code) = leaks(sets, train)
    assert rows == [0, 1, 2, 3]
    assert gsm == {"rows": 9, **NONE, "same_text": 1, "train_rows": 1}
    assert code == {"rows": 1, **NONE, "ngram_13": 1, "train_rows": 0}
    assert f"same_text 1 of 9 rows of {sets}/gsm.jsonl are in training on train.jsonl; left out none" in caplog.text
    assert leaks(sets, train, "drop_train")[0] == [0, 2, 3]
    assert "left out 1 training rows (on_leak: drop_train)" in caplog.text
    assert leaks(sets, train, "drop_train", leak_kinds=["same_text", "ngram_13"])[0] == [0, 3]
    with pytest.raises(
        UserError, match="on_leak: stop: same_text 1 of 9 rows .* the first in training row 1: remove it"
    ):
        leaks(sets, train, "stop")
    with pytest.raises(UserError, match="drop_train: all 1 training rows of train.jsonl are evaluation rows"):
        leaks(sets, train[1:2], "drop_train")


def test_other_sets_that_cannot_be_found(sets):
    for name, words in [
        ("nope.jsonl", "no file or folder 'nope.jsonl'"),
        (str(sets / "*.parquet"), "no file matches"),
        ("user/name main test more", "expected a path or 'user/name config split'"),
    ]:
        config = DataConfig("tiny", "documents", leak_check_datasets=[name])
        with pytest.raises(UserError, match=words):
            check(config, "train", 0, ("text",))
        with pytest.raises(UserError, match=words):
            check_leaks(config, [{"text": "a"}], 0, "d")
    check(DataConfig("tiny", "documents", leak_check_datasets=["user/name main test"]), "train", 0, ("text",))


def test_tiny_as_another_set():
    train, _ = load_rows(DataConfig("tiny", "problems", max_rows=50), "train", 0, ("prompt",))
    test, _ = load_rows(DataConfig("tiny", "problems", max_rows=20), "test", 0, ("prompt",))
    config = DataConfig("tiny", "problems", leak_check_datasets=["tiny problems test"])
    found = check_leaks(config, train + test[:7], 0, "d")[1]["tiny problems test"]
    assert found["same_first_turn"] == found["train_rows"] == 7 and found["rows"] == 200


# ---- streams and real exports ---------------------------------------------------------------------------------------


def test_rows_of_a_stream_that_are_held_out():
    index = EvalIndex(TEST)
    kinds = ["same_first_turn", "same_text", "same_id"]
    assert [index.is_seen(row, kinds) for row in TRAIN] == [True, True, False, False, False]
    assert [index.is_seen(row, ["ngram_13"]) for row in TRAIN] == [False, False, False, True, False]


def test_tiny_and_what_it_drops_by_default():
    """The default drops what it always did: rows with the same first turn. tiny's splits share no question."""
    for kind, column in (("conversations", "messages"), ("problems", "prompt"), ("rankings", "prompt")):
        train, _ = load_rows(DataConfig("tiny", kind, max_rows=2000), "train", 0, (column,))
        test, _ = load_rows(DataConfig("tiny", kind, max_rows=200), "test", 0, (column,))
        rows, kept, numbers = separate(DataConfig("tiny"), train, test, ("a", "b"))
        assert rows == train and kept == test and numbers["same_text"] == 0


@pytest.fixture
def real():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is not set")
    return Path(folder) / "data"


def test_oasst_exports_that_overlap(real):
    """The trees and the flat messages were drawn from one project: some prompts stand in both."""

    def load(name):
        config = DataConfig(str(real / name), dataset_adapter="oasst_conversations")
        return load_rows(config, "train", 0, ("messages",))[0]

    train, test = load("oasst_en_100/en_100_tree.jsonl"), load("oasst1_en_messages/messages.jsonl")
    found = find_overlap(train, test)
    shared = {row["messages"][0]["content"] for row in train} & {row["messages"][0]["content"] for row in test}
    expected = {i for i, row in enumerate(test) if row["messages"][0]["content"] in shared}
    assert found.test["same_first_turn"] == expected <= found.test["same_text"] and len(expected) > 0
    long = {i for i in expected if len(words_of(test[i]["messages"][0]["content"])) >= 13}
    assert long <= found.test["ngram_13"]
    assert found.test["ngram_13"] == naive_ngrams(train, test)


def test_gsm8k_is_found_in_conversations_made_of_it(real):
    path = str(real / "gsm8k/train.jsonl")
    train, _ = load_rows(DataConfig(path, dataset_adapter="gsm8k_conversations"), "train[:500]", 0, ("messages",))
    config = DataConfig("d", leak_check_datasets=[path], on_leak="report")
    found = check_leaks(config, train, 0, "d")[1][path]
    assert found["rows"] == 7473 and found["same_first_turn"] >= 500 and found["train_rows"] == 500
