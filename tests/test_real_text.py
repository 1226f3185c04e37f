"""The benchmark on real text in its smallest size: n-grams against another count, compressors against the programs.

Run: pytest tests/test_real_text.py
"""

import gzip
import json
import lzma
import math
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_runs import ROOT, run

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import real_text
from byte_ngrams import ByteNgrams

from posttrain.base_evals import ByteTrigram
from posttrain.data import tiny
from posttrain.data.sample_texts import DOMAINS, LANGUAGES

TRAIN = [row["text"] for row in tiny.rows("texts", "train", 200, seed=0)]
HELD = [*(row["text"] for row in tiny.rows("texts", "test", 20, seed=0)), *LANGUAGES.values()]


# ---- n-grams --------------------------------------------------------------------------------------------------------


def test_contexts_of_two_bytes_are_the_byte_trigram():
    """That model counts in dictionaries, one byte after the other."""
    found, expected = ByteNgrams(TRAIN, 2).bits_per_byte(HELD)[2], ByteTrigram(TRAIN).bits_per_byte(HELD)
    assert found.keys() == expected.keys() and found["n"] == len(HELD)
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)


TEXTS = st.lists(st.text(st.sampled_from("aabé\n"), min_size=1, max_size=12), min_size=1, max_size=8)


@given(TEXTS, st.text(st.sampled_from("abé"), max_size=8))
@settings(max_examples=40, deadline=None)
def test_probabilities_of_the_next_byte_sum_to_one(texts, context):
    """Whatever stands before it, seen or not."""
    model = ByteNgrams(texts, 7)
    start = [context + chr(byte) for byte in range(128)]  # of the other 128 bytes none begins or ends a text alone
    p = [each.reshape(128, -1)[:, -1] for each in model.probabilities(start)]
    for length, each in enumerate(p):
        rest = sum(by_definition(texts, context.encode(), byte, length) for byte in range(128, 256))
        assert each.sum() + rest == pytest.approx(1.0)
        assert each[97] == pytest.approx(by_definition(texts, context.encode(), 97, length))


def by_definition(texts: list[str], context: bytes, byte: int, length: int) -> float:
    """Witten and Bell's recursion, each count a search through all texts."""
    p = 1 / 256
    for size in range(min(length, len(context)) + 1):
        suffix = context[len(context) - size :]
        after = [
            data[at + size]
            for data in map(str.encode, texts)
            for at in range(len(data) - size)
            if data[at : at + size] == suffix
        ]
        if after:
            kinds = len(set(after))
            p = (after.count(byte) + kinds * p) / (len(after) + kinds)
    return p


def test_every_length_of_context_is_given():
    found = ByteNgrams(TRAIN, 6).bits_per_byte(HELD[:20])
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert found[4]["value"] < found[2]["value"] < found[1]["value"]  # the world's sentences are patterns
    with pytest.raises(ValueError, match="order: found 8, expected 0 to 7"):
        ByteNgrams(TRAIN, 8)


def test_equal_letters_everywhere():
    """n bytes of one kind: after the first the chance of the next is (n + 1 / 256) / (n + 1) without context."""
    model = ByteNgrams(["a" * 10], 0)
    assert np.allclose(model.probabilities(["aa"])[0], (10 + 1 / 256) / 11)
    assert np.allclose(model.probabilities(["b"])[0], (1 / 256) / 11)


# ---- compressors ----------------------------------------------------------------------------------------------------


def test_compressors_are_the_programs():
    """Sizes as `gzip -9` and `xz -9e` give them; what was primed unpacks to the same bytes."""
    before, data = ("".join(texts).encode() for texts in (TRAIN, DOMAINS.values()))
    found = real_text.baselines(TRAIN, list(DOMAINS.values()), 1)
    for name in ("gzip -9", "xz -9e"):
        if shutil.which(name.split()[0]):
            packed = subprocess.run(name.split() + ["-c"], input=data, capture_output=True, check=True).stdout
            assert found[name]["value"] == pytest.approx(8 * len(packed) / len(data), rel=0.01)
    assert gzip.decompress(gzip.compress(data, 9, mtime=0)) == data
    unpacker = zlib.decompressobj(-15, zdict=before[-32_768:])
    assert unpacker.decompress(real_text.deflate_after(before, data)) == data
    assert lzma.decompress(real_text.xz(before + data)) == before + data
    # What stood before is worth something where it is of the same kind, and next to nothing where it is not.
    same = real_text.baselines(TRAIN, HELD[:20], 1)
    assert same["xz -9e after the training text"]["value"] < 0.6 * same["xz -9e"]["value"]
    assert all(figure["low"] is None for name, figure in same.items() if "gram" not in name)


# ---- the whole ------------------------------------------------------------------------------------------------------


@given(st.integers(200, 3000), st.integers(1, 4), st.integers(1, 20), st.integers(0, 8))
def test_held_out_rows_are_runs_with_a_margin(rows, blocks, size, margin):
    train, held = real_text.held_out_places(rows, size * blocks, blocks, margin)
    assert len(held) == size * blocks and sum(a + 1 != b for a, b in zip(held, held[1:], strict=False)) == blocks - 1
    assert len(train) == rows - blocks * (size + 2 * margin) and min(held) >= margin and max(held) < rows - margin
    seen = set(train)
    assert not any(index + step in seen for index in held for step in range(-margin, margin + 1))


def test_too_many_held_out_rows():
    with pytest.raises(SystemExit, match="--held 90, --blocks 2, --margin 5: too many for 100 rows"):
        real_text.held_out_places(100, 90, 2, 5)


@pytest.mark.slow
def test_the_smallest_run(tmp_path, monkeypatch):
    """Both recipes for real, 2 steps; the model's figure once more by transformers alone."""
    (tmp_path / "rows.jsonl").write_text(200 * '{"text": "the same everywhere"}\n')

    def launch(arguments: list[str]) -> None:  # the same in a process that has imported torch already
        done = run(arguments, tmp_path)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(real_text, "launch", launch)
    shape = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=1", "bf16=false"]
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--held", "20", "--blocks", "2", "--margin", "5", "--steps", "2"]
    sizes = ["--order", "3", "--tokenizer", "vocab_size=300", "compare_tokenizers=[]", "--pretrain", *shape]
    files = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "found")]
    with pytest.raises(SystemExit, match="all 20 held-out rows are in training, too"):
        real_text.main(flags + sizes + files)
    rows = [{"text": f"{text} {number}, {number + 1} and {number}."} for number, text in enumerate(TRAIN)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = real_text.main(flags + sizes + files)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    table = (tmp_path / "found.md").read_text()
    assert all(f"| {name} | {figure['value']:.3f} |" in table for name, figure in found["bits per byte"].items())
    assert found["model"]["steps"] == 2 and found["model"]["tokens"] == 2 * 8 * 256
    texts = [json.loads(line)["text"] for line in (tmp_path / "work/test.jsonl").read_text().splitlines()]
    train = {json.loads(line)["text"] for line in (tmp_path / "work/train.jsonl").read_text().splitlines()}
    assert texts and not train & set(texts) and len(train) == 200 - 2 * (10 + 2 * 5)
    assert found["bits per byte"]["byte 3-gram"]["value"] == pytest.approx(found["model"]["byte trigram"]["value"])
    assert found["bits per byte"]["the model"]["value"] == pytest.approx(
        bits(tmp_path / "work/pretrain", texts), rel=1e-4
    )


def bits(folder, texts: list[str]) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text).input_ids]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    return total / sum(len(text.encode()) for text in texts)
