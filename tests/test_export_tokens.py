"""Tokenizers in GGUF files: llama.cpp cuts the same texts into the same tokens, or the file is refused.

Run: pytest tests/test_export_tokens.py    (with POSTTRAIN_REAL_DATA set, a real SentencePiece model, too)
"""

import json
import os
import random
from copy import deepcopy
from pathlib import Path

import export_helpers as helpers
import pytest
from template_helpers import gpt2_like, source, spaced
from tokenizers import Regex, normalizers, pre_tokenizers

from posttrain import check_export, export, gguf_tokenizer
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.gguf_engine import LlamaCpp
from posttrain.tokenizer import train_tokenizer

REAL = os.environ.get("POSTTRAIN_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="POSTTRAIN_REAL_DATA names no folder with models/stories260k")


def trained(split: str, texts=None):
    texts = texts or [row["text"] for row in tiny.rows("documents", "train", 100, seed=0)]
    return train_tokenizer([*texts, "12 345 6789 it's I'LL\n\n\n  x\t y é 日本語 naïve"] * 2, 600, split=split)


def smollm():
    """GPT-2's split after each digit was cut off, as SmolLM has it."""
    tokenizer = deepcopy(gpt2_like())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def state(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


KINDS = {
    "qwen2": lambda: trained("gpt4_one_digit"),
    "dbrx": lambda: trained("gpt4"),
    "gpt-2": lambda: trained("gpt2"),
    "smollm": smollm,
}


@pytest.mark.parametrize("pre", KINDS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(pre, tmp_path):
    tokenizer = KINDS[pre]()
    assert gguf_tokenizer.split_name(state(tokenizer)) == pre
    folder = helpers.save(tmp_path, (model := helpers.new("llama", tokenizer)), tokenizer)
    export.write(folder, "test", tmp_path / "t.gguf", "f16", model, tokenizer)
    rng = random.Random(1)
    letters = [*"abcé日🙂 \n\t'.,-_0123456789", "  ", "'s", "\r\n", "\u0301", "ß", "Ⅷ", "½", "٣", "|", "ﬁ"]
    with LlamaCpp(tmp_path / "t.gguf", 64) as engine:
        export.prove_tokens(engine, tokenizer)
        for _ in range(150):
            text = "".join(rng.choices(letters, k=rng.randint(1, 30)))
            assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_another_split_under_the_same_name_is_found(tmp_path, monkeypatch):
    """Three digits a token and one: told only by the tokens."""
    tokenizer = trained("gpt4")
    monkeypatch.setattr(gguf_tokenizer, "split_name", lambda state: "qwen2")
    folder = helpers.save(tmp_path, helpers.new("llama", tokenizer), tokenizer)
    with pytest.raises(UserError, match="llama.cpp cuts texts otherwise than the tokenizer, at '.*"):
        export.gguf(folder, "test", tmp_path / "out", "f16")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.unchecked.gguf"]


def test_earlier_turns_that_hugging_face_cuts_otherwise_are_a_note_and_no_fault(tmp_path):
    """GPT-2's split cuts Llama 3's two line breaks before a reply in two; they are one token when it is generated."""
    from posttrain.chat import set_template

    tokenizer = deepcopy(gpt2_like())
    model = helpers.new("llama", tokenizer)
    template = tmp_path / "llama3.jinja"
    template.write_text(source("llama3"), encoding="utf-8")
    set_template(tokenizer, model, str(template))
    said = export.gguf(helpers.save(tmp_path, model, tokenizer), "test", tmp_path / "out", "f32")
    assert "note       prompt 4 as tokens: token " in said and "earlier turns look otherwise" in said


def test_splits_that_llama_cpp_has_not():
    tokenizer = deepcopy(gpt2_like())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    with pytest.raises(UserError, match="llama.cpp has no split that cuts texts as this pre_tokenizer does"):
        gguf_tokenizer.vocabulary(tokenizer, 500)
    with pytest.raises(UserError, match="whose spaces are not added as Llama 2's are"):
        gguf_tokenizer.vocabulary(spaced("first"), 500)
    tokenizer = deepcopy(gpt2_like())
    with pytest.raises(UserError, match="the model's embeddings 100 rows"):
        gguf_tokenizer.vocabulary(tokenizer, 100)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="normalizer Lowercase: llama.cpp has none"):
        gguf_tokenizer.vocabulary(tokenizer, 500)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "Unicode's form NFC" in gguf_tokenizer.vocabulary(tokenizer, 500).remarks[0]


def test_tokens_have_the_type_they_have(tokenizer):
    ours = deepcopy(tokenizer)
    ours.add_tokens(["<think>"])
    words = gguf_tokenizer.vocabulary(ours, len(ours) + 2)
    kind = dict(zip(words.tokens, words.types, strict=True))
    assert (kind["<|im_end|>"], kind["<think>"], kind["e"], kind[f"[PAD{len(ours)}]"]) == (3, 4, 1, 5)
    assert words.tokens[-1] == f"[PAD{len(ours) + 1}]" and len(set(words.tokens)) == len(ours) + 2


def test_a_begin_token_only_where_texts_have_one(base_tokenizer, tokenizer):
    assert gguf_tokenizer.adds_bos(base_tokenizer), "a base model's documents begin with it"
    assert not gguf_tokenizer.adds_bos(tokenizer), "ChatML has none"


@needs_real_data
def test_a_real_sentencepiece_model(tmp_path):
    """stories260k, trained elsewhere: with byte tokens; a story in llama.cpp, word for word."""
    folder = Path(REAL) / "models" / "stories260k"
    said = export.gguf(folder, "stories260k", tmp_path, "q8_0")
    assert "5 matrices have rows that are no multiple of 32 and stay f16" in said
    from posttrain.serve import load

    reference = check_export.Reference(*load(str(folder)), ["Once upon a time", "Lily's 3 cats:\n\t<b>é🙂</b>"], 60)
    with LlamaCpp(tmp_path / "model.gguf", reference.context) as engine:
        found = check_export.check_gguf(reference, engine)
    assert found.faults == [] and found.positions == 120 and found.same >= 110
    assert (tmp_path / "model.gguf").stat().st_size < (folder / "model.safetensors").stat().st_size / 3
