"""Regurgitation: planted repeats are found out, an untrained model says nothing by heart, counting by hand.

Run: pytest tests/test_regurgitation.py
"""

import json
import random

import pytest
import torch
from conftest import new_llama

from posttrain.cli import command
from posttrain.errors import UserError
from posttrain.models import save_pair
from posttrain.regurgitation import (
    HELD_OUT,
    SLOPE,
    Settings,
    bucket,
    chosen,
    common,
    conclusion,
    measure,
    passages,
    slope,
)
from posttrain.rl.hf_engine import HFEngine
from posttrain.shapes import ShapeConfig, make_model

PREFIX = LENGTH = 8
TIMES = (1, 5, 40, 120)  # one count in each class
EACH = 6  # different documents of a count


def nonsense(rng: random.Random) -> str:
    """A text that cannot be guessed: 40 letters, and a tokenizer of English makes 16 tokens or more of them."""
    return " ".join("".join(rng.choices("bcdfghjklmnpqrstvwxz", k=5)) for _ in range(8))


@pytest.fixture(scope="module")
def planted():
    """(training texts, held-out texts)."""
    rng = random.Random(0)
    train = [text for times in TIMES for _ in range(EACH) for text in [nonsense(rng)] * times]
    rng.shuffle(train)
    return train, [nonsense(rng) for _ in range(EACH)]


@pytest.fixture(scope="module")
def trained(base_tokenizer, planted):
    """A small Llama after a few hundred steps on the planted texts, each after an end-of-text token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(ShapeConfig(64, 128, 2, 4, 64), base_tokenizer)
        size = PREFIX + LENGTH
        ids = torch.tensor([[base_tokenizer.eos_token_id, *base_tokenizer(t).input_ids[:size]] for t in planted[0]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(160):
            batch = ids[torch.arange(32 * step, 32 * step + 32) % len(ids)]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def shares(found: dict, what: str = "verbatim") -> list[float]:
    """Of held-out passages, then of those seen 1, 2-9, 10-99, 100+ times."""
    names = ["held out", *(f"seen {name}" for name in ("1", "2-9", "10-99", "100+"))]
    return [found["metrics"][f"{what}, {name}"]["value"] for name in names]


def test_the_share_rises_with_how_often_a_document_was_read(trained, base_tokenizer, planted):
    engine = HFEngine(trained, base_tokenizer.pad_token_id)
    found = measure(engine, base_tokenizer, *planted, Settings(PREFIX, LENGTH))
    held_out, once, few, many, most = shares(found)
    assert held_out == 0 and once <= few <= many <= most and most == 1 and many > 0.5 > once
    assert 0 < found["metrics"][SLOPE]["low"] < found["metrics"][SLOPE]["value"]
    tokens = shares(found, "agreeing tokens")
    assert tokens[0] < 1 and tokens[4] == LENGTH and tokens[1] < tokens[3]
    given = {example["given"] + example["said"] for example in found["came_back"]}
    assert found["came_back"][0]["times"] == 120 and len(given) == len(found["came_back"]) > EACH
    assert all(any(text.startswith(passage) for text in planted[0]) for passage in given)
    assert found["groups"] == {HELD_OUT: EACH, "1": EACH, "2-9": EACH, "10-99": EACH, "100+": EACH}
    assert found["conclusion"].startswith("memorised: ") and "100.0 % of those seen 100+ times" in found["conclusion"]


def test_an_untrained_model_says_nothing_by_heart(base_tokenizer, planted):
    engine = HFEngine(new_llama(base_tokenizer), base_tokenizer.pad_token_id)
    found = measure(engine, base_tokenizer, *planted, Settings(PREFIX, LENGTH))
    assert shares(found) == [0] * 5 and found["conclusion"].startswith("no clear sign of memorisation")


def test_the_verb_writes_the_same_figures(trained, base_tokenizer, planted, tmp_path, capsys):
    save_pair(trained, base_tokenizer, tmp_path / "model")
    for name, texts in zip(("train", "held_out"), planted, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [
        "--regurgitation",
        "--prefix_tokens",
        str(PREFIX),
        "--continue_tokens",
        str(LENGTH),
        "--use_vllm",
        "false",
    ]
    data = ["--train_data", str(tmp_path / "train.jsonl"), "--data", str(tmp_path / "held_out.jsonl")]
    command(["eval", str(tmp_path / "model"), *data, *flags, "--json", str(tmp_path / "out.json")])
    told, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    engine = HFEngine(trained, base_tokenizer.pad_token_id)
    own = measure(engine, base_tokenizer, *planted, Settings(PREFIX, LENGTH))
    assert own["metrics"].items() <= found["metrics"].items() and found["conclusions"] == [own["conclusion"]]
    assert told.rstrip().endswith(own["conclusion"]) and "bits per byte" in found["metrics"]
    assert found["regurgitation"]["groups"] == own["groups"] and found["train_data"]["rows"] == len(planted[0])


# --- counting


def test_passages_are_counted_by_their_beginning_whatever_case_and_blanks(base_tokenizer):
    train = ["One day Tom found", "One day Tom found a kite", "one  DAY tom found", "Another one is here", "x"]
    size = len(base_tokenizer("One day").input_ids)
    found, left = passages(base_tokenizer, train, ["One day Anna", "Some other words"], size)
    read = {base_tokenizer.decode(p.ids): p.times for p in found}
    assert read["One day"] == 2  # the third is of other tokens: its beginning is longer
    assert read[base_tokenizer.decode(base_tokenizer("Some other words").input_ids[:size])] == 0
    assert left["training documents too short"] == 1
    assert left["held-out documents that begin as training ones do"] == 1
    same = passages(base_tokenizer, ["ABC", "abc", "abc"], ["xyz"], 3)[0]
    assert {base_tokenizer.decode(p.ids): p.times for p in same} == {"ABC": 3, "xyz": 0}


def test_classes_samples_and_common_beginnings():
    assert [bucket(n) for n in (1, 2, 9, 10, 99, 100, 10**6)] == ["1", "2-9", "2-9", "10-99", "10-99", "100+", "100+"]
    with pytest.raises(ValueError, match="holds 0"):
        bucket(0)
    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([1], [1, 2]) == 1 and common([], [1]) == 0
    from posttrain.regurgitation import Passage

    found = [Passage((number,), number % 2) for number in range(100)]
    groups = chosen(found, 10, seed=0)
    assert list(groups) == [HELD_OUT, "1"] and [len(set(group)) for group in groups.values()] == [10, 10]
    assert chosen(found[::-1], 10, seed=0) == groups != chosen(found, 10, seed=1)


def test_the_slope_is_that_of_a_straight_line_in_the_logarithm():
    """Shares of 20, 50 and 80 % at 1, 10 and 100 copies: 30 points for each tenfold."""
    points = [(times, i < right) for times, right in ((1, 20), (10, 50), (100, 80)) for i in range(100)]
    found = slope(points)
    assert found["value"] == pytest.approx(0.3) and 0.2 < found["low"] < 0.3 < found["high"] < 0.4
    assert (found["n"], found["unit"]) == (300, "%")


def test_the_conclusion_names_what_is_clearly_above_held_out():
    def share(value, low, high):
        return {"value": value, "low": low, "high": high}

    found = {HELD_OUT: share(0.1, 0.05, 0.15), "1": share(0.14, 0.1, 0.2), "100+": share(0.6, 0.5, 0.7)}
    said = conclusion(found)
    assert said == "memorised: 60.0 % of those seen 100+ times come back verbatim, against 10.0 % of held-out passages"


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("bcd", r"--train_data: no passage of 12 tokens to ask for \(1 training documents too short\)"),
        ("bcd" * 9, r"--data: no passage of 12 .* \(1 held-out documents that begin as training ones do\)"),
    ],
)
def test_no_passage_is_an_error_that_says_why(base_tokenizer, train, words):
    with pytest.raises(UserError, match=words):
        passages(base_tokenizer, [train], ["bcd" * 9], 12)


def test_what_is_missing_or_out_of_range_is_refused(tmp_path, base_tokenizer):
    save_pair(new_llama(base_tokenizer), base_tokenizer, tmp_path)
    with pytest.raises(UserError, match="--regurgitation: needs --train_data"):
        command(["eval", str(tmp_path), "--regurgitation", "--data", "tiny"])
    with pytest.raises(UserError, match="--continue_tokens: found 0, expected 1"):
        Settings(length=0)
