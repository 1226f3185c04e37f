"""The tokenizer against a slow trainer and encoder written here, OpenAI's own patterns, and every byte string.

Run: pytest tests/test_tokenizer.py
"""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import tiny
from posttrain.data.sample_texts import DOMAINS, LANGUAGES
from posttrain.errors import UserError
from posttrain.tokenizer import CHAT_TOKENS, SPLITS, Limited, TokenizerConfig, special_tokens, train_tokenizer

SAMPLES = [*LANGUAGES.values(), *DOMAINS.values()]
# GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for the characters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + at) for at, byte in enumerate(OTHERS)}
BYTES = {char: byte for byte, char in CHARS.items()}


def mapped(data: bytes) -> str:
    return "".join(CHARS[byte] for byte in data)


def pieces(text: str, split: str) -> list[str]:
    import regex

    found = regex.findall(SPLITS[split], text)
    assert "".join(found) == text
    return [mapped(piece.encode()) for piece in found]


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def slow_encode(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Sennrich et al. 2016: of all neighbours merge the pair that was learned first, until none is known."""
    symbols = list(piece)
    while known := [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]:
        symbols = merge(symbols, min(known, key=ranks.__getitem__))
    return symbols


def slow_train(texts: list[str], merges: int, split: str, special: int = 5) -> list[tuple[str, str]]:
    """Sennrich et al. 2016, learning: merge the pair that occurs most often; of equal ones that of the lowest ids."""
    ids = {char: special + number for number, char in enumerate(sorted(BYTES))}
    words = Counter(piece for text in texts for piece in pieces(text, split))
    split_words, learned = {word: list(word) for word in words}, []
    for _ in range(merges):
        counts = Counter()
        for word, symbols in split_words.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        learned.append(best)
        ids.setdefault("".join(best), len(ids) + special)
        split_words = {word: merge(symbols, best) for word, symbols in split_words.items()}
    return learned


def merges_of(tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="module", params=sorted(SPLITS))
def trained(request):
    """(split, a tokenizer of 600 tokens trained on the samples)"""
    return request.param, train_tokenizer(SAMPLES, 600, split=request.param)


# ---- what is learned ------------------------------------------------------------------------------------------------


def test_merges_are_those_of_a_slow_trainer(trained):
    split, tokenizer = trained
    assert merges_of(tokenizer) == slow_train(SAMPLES, 600 - 261, split)


def test_encoding_is_that_of_a_slow_encoder(trained):
    split, tokenizer = trained
    ranks = {pair: rank for rank, pair in enumerate(merges_of(tokenizer))}
    for text in SAMPLES:
        expected = [symbol for piece in pieces(text, split) for symbol in slow_encode(piece, ranks)]
        assert tokenizer.tokenize(text) == expected


def test_neither_order_nor_batches_nor_threads_change_what_is_learned(monkeypatch):
    expected = train_tokenizer(SAMPLES, 500).backend_tokenizer.to_str()
    assert train_tokenizer(iter(SAMPLES[::-1]), 500).backend_tokenizer.to_str() == expected
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train_tokenizer(SAMPLES, 500).backend_tokenizer.to_str() == expected
    assert train_tokenizer(SAMPLES[1:], 500).backend_tokenizer.to_str() != expected


def test_the_ids_are_as_documented():
    special = special_tokens(["<|call|>"], 3)
    tokenizer = train_tokenizer(SAMPLES, 300, special=special)
    names = tokenizer.convert_ids_to_tokens(range(300))
    reserved = [f"<|reserved_{number}|>" for number in range(3)]
    assert names[:9] == ["<|endoftext|>", "<|pad|>", *CHAT_TOKENS, "<|call|>", *reserved] == special
    assert names[9:265] == sorted(BYTES) and names[265:] == ["".join(pair) for pair in merges_of(tokenizer)]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert sorted(tokenizer.all_special_ids) == list(range(9))
    assert tokenizer("a<|reserved_1|>b").input_ids == [*tokenizer("a").input_ids, 7, *tokenizer("b").input_ids]


def test_sizes():
    assert len(train_tokenizer(["ab"] * 9, 200_000)) == 262  # nothing but a and b to merge
    assert len(train_tokenizer(["ab", "cd", "cd"], 300, min_frequency=2)) == 262
    assert len(train_tokenizer(SAMPLES, 900, special=special_tokens(reserved=40))) == 900


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"vocab_size": 260}, "vocab_size: found 260, expected at least 261"),
        ({"vocab_size": 270, "reserved_tokens": 10}, "vocab_size: found 270, expected at least 271"),
        ({"special_tokens": ["<|a|>", "<|a|>"]}, r"special_tokens: '<\|a\|>' comes twice"),
        ({"special_tokens": ["<|pad|>"]}, r"special_tokens: '<\|pad\|>' comes twice"),
        ({"special_tokens": [" "]}, "special_tokens: found ' ', expected some text"),
        ({"split": "gpt3"}, "split: found 'gpt3', expected one of gpt4_one_digit, gpt4, gpt2"),
        ({"reserved_tokens": -1}, "reserved_tokens: found -1"),
        ({"max_chars": 0}, "max_chars: found 0"),
    ],
)
def test_settings_that_cannot_be(keys, said):
    with pytest.raises(UserError, match=said):
        TokenizerConfig(**keys)


def test_what_the_texts_raise_comes_out_of_training():
    def texts():
        yield "fine"
        raise UserError("rows.jsonl:2: not valid JSON")

    with pytest.raises(UserError, match="rows.jsonl:2"):
        train_tokenizer(texts(), 300)
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        train_tokenizer(["half a pair: \ud83d"], 300)


# ---- the split ------------------------------------------------------------------------------------------------------


def openai_pattern(name: str, monkeypatch) -> str:
    """The pattern in OpenAI's package, without fetching the vocabulary that goes with it."""
    source = pytest.importorskip("tiktoken_ext.openai_public", reason="tiktoken is not installed")
    monkeypatch.setattr(source, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    monkeypatch.setattr(source, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: {})
    return getattr(source, name)()["pat_str"]


# Python's regex takes U+001C to U+001F for white space, Unicode and the engines in Rust do not.
ODD = st.sampled_from(
    [*"abzAßé0159٣५ \t\n\r\u00a0\u2028'’sdtlvrm.,!?-_/漢字かな한글ابहि", "😀", "'LL", "\r\n", "e\u0301", "\0"]
)
TEXT = st.lists(ODD | st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\x1c\x1d\x1e\x1f")).map(
    "".join
)


@pytest.mark.parametrize(("split", "encoding"), [("gpt4", "cl100k_base"), ("gpt2", "r50k_base")])
def test_splits_are_openais(split, encoding, monkeypatch):
    import regex

    pattern = regex.compile(openai_pattern(encoding, monkeypatch))
    tokenizer = train_tokenizer(SAMPLES, 300, split=split).backend_tokenizer

    @settings(max_examples=400, deadline=None)
    @given(TEXT)
    def check(text):
        expected = [mapped(piece.encode()) for piece in pattern.findall(text)]
        assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == expected

    check()


def test_digits_of_a_token():
    tokens = {
        split: train_tokenizer(["12345 12345 67890"] * 9, 300, split=split).tokenize("12345") for split in SPLITS
    }
    assert tokens == {"gpt4_one_digit": [*"12345"], "gpt4": ["123", "45"], "gpt2": ["12345"]}


# ---- round trips ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_every_byte_string_has_ids_and_comes_back(base_tokenizer, data):
    """No UTF-8 asked: what a model may write, cut anywhere."""
    model = base_tokenizer.backend_tokenizer.model
    ids = [token.id for token in model.tokenize(mapped(data))]
    assert bytes(BYTES[char] for id in ids for char in model.id_to_token(id)) == data
    assert len(ids) <= len(data) and all(id >= 5 for id in ids)
    try:
        assert base_tokenizer.decode(ids) == data.decode()
    except UnicodeDecodeError:
        assert "\ufffd" in base_tokenizer.decode(ids)


SPECIAL_LOOKING = st.sampled_from(
    [*special_tokens(), "<|im_", "end|>", "<|", "|>", "\r\n", "\0", "\ufeff", "  ", "🧑‍🚀"]
)


@given(st.lists(st.text() | SPECIAL_LOOKING).map("".join))
def test_every_text_comes_back_and_none_of_it_is_special(base_tokenizer, text):
    ids = base_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert base_tokenizer.decode(ids) == text
    assert not set(ids) & set(base_tokenizer.all_special_ids)
    assert sum(len(base_tokenizer.convert_ids_to_tokens(id)) for id in ids) == len(text.encode())


@given(st.text(), st.characters(categories=("Cs",)), st.text())
@settings(max_examples=20)
def test_half_a_surrogate_pair_has_no_bytes(base_tokenizer, before, half, after):
    with pytest.raises(TypeError):
        base_tokenizer(before + half + after)


def test_a_saved_tokenizer_is_the_same(base_tokenizer, tmp_path):
    from posttrain.models import load_tokenizer

    base_tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.backend_tokenizer.to_str() == base_tokenizer.backend_tokenizer.to_str()
    assert [again(text).input_ids for text in SAMPLES] == [base_tokenizer(text).input_ids for text in SAMPLES]


# ---- how much is read -----------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=12), max_size=12), st.integers(1, 40), st.integers(1, 8))
def test_limits_are_kept_to_the_character(texts, most, longest):
    read = Limited([{"text": text} for text in texts], TokenizerConfig(max_chars=most, max_document_chars=longest))
    found, whole = list(read), "".join(text[:longest] for text in texts)
    assert "".join(found) == whole[:most]
    assert (read.facts["rows"], read.facts["chars"]) == (len(found), len(whole[:most]))
    assert read.facts["bytes"] == len(whole[:most].encode())
    assert read.facts["cut"] == sum(len(text) > longest for text in texts[: len(found)])
    assert (read.facts["ended"] is None) == (len(whole) < most)


def test_nothing_is_read_after_the_last_character():
    rows = (row for row in tiny.rows("texts", "train", 100, seed=0))
    limited = Limited(rows, TokenizerConfig(max_chars=50))
    assert sum(map(len, limited)) == 50 and limited.facts["ended"] == "max_chars 50"
    assert len(list(rows)) == 99
