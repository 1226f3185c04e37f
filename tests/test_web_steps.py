"""Steps of cleaning against oracles: languages, addresses, planted personal data, how often MinHash finds a copy.

Run: pytest tests/test_web_steps.py
"""

import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
import web_pages
from datatrove.data import Document

from posttrain.data import web, web_labels
from posttrain.data.web_config import FINEWEB, StepsConfig, WebConfig
from posttrain.data.web_steps import LanguageFilter, MainText, MaskedPII, Samples, UrlFilter
from posttrain.errors import UserError
from posttrain.intervals import wilson

ROOT = Path(__file__).parents[1]


# ---- settings -------------------------------------------------------------------------------------------------------


def test_our_settings_are_the_librarys_own_but_for_what_fineweb_and_we_changed():
    """FineWeb's thresholds are datatrove's defaults; the two differences are the ones web_config names."""
    import inspect

    from datatrove.pipeline import dedup, filters, formatters

    classes = {
        "gopher_repetition": filters.GopherRepetitionFilter, "gopher_quality": filters.GopherQualityFilter,
        "c4_quality": filters.C4QualityFilter, "fineweb_quality": filters.FineWebQualityFilter,
        "language_filter": filters.LanguageFilter, "url_filter": filters.URLFilter, "extraction": MainText.__mro__[1],
        "dedup": dedup.MinhashConfig, "pii": formatters.PIIFormatter,
    }  # fmt: skip
    different = {}
    for name, cls in classes.items():
        defaults = {key: each.default for key, each in inspect.signature(cls).parameters.items()}
        for key, value in FINEWEB[name].items():
            if json.dumps(defaults[key]) != json.dumps(value) and not (defaults[key] is None and value == []):
                different[f"{name}.{key}"] = value
    assert different == {
        "c4_quality.filter_no_terminal_punct": False, "extraction.timeout": 30, "language_filter.languages": ["en"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dedup": {"ngrams": 3}}, "dedup: does not take 'ngrams'; did you mean 'n_grams'"),
        ({"pii": {"remove_ips": 1}}, "pii: remove_ips: found 1"),
        ({"c4_quality": {"min_num_sentences": True}}, "c4_quality: min_num_sentences: found True"),
        ({"language_filter": {"languages": "en"}}, "languages: found 'en'"),
    ],
)
def test_settings_that_a_step_does_not_have(given, words):
    with pytest.raises(UserError, match=words):
        StepsConfig(**given)


def test_the_recipes_config_is_fineweb():
    """Its comments show other settings; none is set."""
    from posttrain.args import parse, resolved
    from posttrain.stage import StageConfig

    _, config, steps = parse((StageConfig, WebConfig, StepsConfig), ["--config", str(ROOT / "recipes/web/clean.yaml")])
    assert resolved(steps) == resolved(StepsConfig()) and config.workers == 8


# ---- language and address -------------------------------------------------------------------------------------------

TEXTS = {
    "en": web_pages.english(1),
    "de": "Der Hund liegt vor dem Haus und wartet darauf, dass jemand mit ihm in den Wald geht.",
    "fr": "Le chien est devant la maison et attend que quelqu'un l'emmène se promener dans la forêt.",
    "ru": "Собака лежит перед домом и ждёт, когда кто-нибудь пойдёт с ней гулять в лес.",
    "ja": "犬は家の前で誰かが森へ散歩に連れて行ってくれるのを待っています。",
    "es": "El perro está delante de la casa y espera a que alguien lo lleve a pasear por el bosque.",
}


def test_each_language_is_kept_by_its_own_filter_alone():
    for wanted in TEXTS:
        step = LanguageFilter([wanted], 0.65)
        for language, text in TEXTS.items():
            document = Document(text=text, id="")
            assert step.filter(document) == (True if language == wanted else (False, language))
            assert document.metadata["language"] == language and 0.65 < document.metadata["language_score"] <= 1
    both = LanguageFilter(["en", "de"], 0.65)
    assert both.filter(Document(text=TEXTS["de"], id="")) is True
    assert LanguageFilter(["en"], 0.65).filter(Document(text="ok 12 x7", id=""))[0] is False
    assert LanguageFilter([], 0.65).filter(Document(text=TEXTS["ja"], id="")) is True


def address(url: str | None, **options) -> bool | str:
    step = UrlFilter(use_integrated_lists=False, **options)
    found = step.filter(Document(text="x", id="", metadata={"url": url} if url else {}))
    return found[1] if isinstance(found, tuple) else found


@pytest.mark.filterwarnings("ignore:The 'registered_domain'")
def test_addresses_without_a_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("looked for a network"))
    assert address("http://news.bbc.co.uk/a", extra_domains=["bbc.co.uk"]) == "domain"
    assert address("http://a.b.example.com/", extra_domains=["a.b.example.com"]) == "subdomain"
    assert address("http://example.com/bad", extra_urls=["http://example.com/bad"]) == "url"
    assert address("http://example.com/casino-list", banned_words=["casino"]) == "hard_blacklisted"
    assert address("http://my-sub-string.com/", banned_subwords=["substring"]) == "blacklisted_subword"
    assert address("http://example.com/good", extra_domains=["example.org"]) is True
    assert address(None, extra_domains=["example.org"]) is True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'registered_domain'")
def test_the_lists_in_the_package_know_a_domain_of_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    step = UrlFilter()
    step.filter(Document(text="x", id="", metadata={"url": "http://example.com/"}))
    assert len(step.block_listed_domains) > 1_000_000
    name = next(name for name in sorted(step.block_listed_domains) if name.endswith(".com") and name.count(".") == 1)
    assert step.filter(Document(text="x", id="", metadata={"url": f"http://www.{name}/"})) == (False, "domain")


# ---- markup and repetition -----------------------------------------------------------------------------------------


def test_broken_markup_gives_text_or_nothing():
    """In the process that extraction runs in, one after the other: none of them ends it."""
    text = web_pages.english(3, 9)
    paragraphs, first = text.replace("\n", "<p>"), text.split("\n")[0]
    pages = {
        "unclosed": f"<html><body><div><p>{paragraphs}<b><i>", "no html": f"<p>{paragraphs}",
        "wild": f"<html><body><article><p>{paragraphs}</p></div></article></span><p <a href=></p><!-- <p>x</body>",
        "xml": f"<?xml version='1.0' encoding='latin-1'?><html><body><p>{paragraphs}</p></body></html>",
        "deep": "<div>" * 20_000 + f"<p>{paragraphs}", "script": f"<script>'<p>{paragraphs}'</script>", "empty": "",
    }  # fmt: skip
    step = MainText(**FINEWEB["extraction"] | {"deduplicate": False})
    documents = [Document(text=page, id=name) for name, page in pages.items()]
    found = {document.id: document.text for document in step.run(iter(documents))}
    assert set(found) == {"unclosed", "no html", "wild", "xml"} and all(first in each for each in found.values())
    assert (
        step.stats["total"].total == 7
        and step.stats["dropped"].total == 3
        and "broken_process" not in step.stats.stats
    )


def test_a_row_of_one_repeated_token_goes_by_the_first_rule():
    rules = web.quality_steps(StepsConfig())
    found = web_labels.verdicts(rules, ["a " * 20_000, "spam\n" * 20_000, web_pages.english(1, 20)])
    assert found == ["gopher_repetition: top_2_gram", "gopher_repetition: dup_line_frac", None]


# ---- planted personal data ------------------------------------------------------------------------------------------

MASKED = [
    "jane@firm.com", "jane.doe@mail.firm.co.uk", "j+tag@firm.io", "JANE_DOE-1@FIRM.COM", "mailto:jane@firm.com",
    "<jane@firm.com>", "o'neil@firm.com", "8.8.8.8", "http://151.101.1.69/x", "1.2.3.4", "185.60.216.35:8080",
]  # fmt: skip
KEPT = [
    "10.0.0.1", "192.168.1.20", "172.16.5.5", "127.0.0.1", "2.10.3", "256.1.1.1 is not one"[:7], "12:30", "@jane",
    "jane at firm dot com", "3.14", "2001:4860:4860::8888", "1,234.56", "+1 202 555 0143",
]  # fmt: skip


def test_planted_addresses():
    """Of 200 texts with one planted each: every one of a masked kind goes, everything of a kept kind stays."""
    pick, step = random.Random(0), MaskedPII()
    for number in range(200):
        masked = number % 2 == 0
        planted = pick.choice(MASKED if masked else KEPT)
        words = web_pages.english(number, 6).split(" ")
        words.insert(pick.randrange(len(words)), planted)
        text = " ".join(words)
        assert (step.format(text) == text) == (not masked), planted
        bare = planted.strip("<>").removeprefix("mailto:").removeprefix("http://").split("/")[0].split(":")[0]
        assert masked is False or bare not in step.format(text)
    assert step.stats["emails"].total + step.stats["ips"].total == 2 * 100  # each text was formatted twice
    assert MaskedPII(remove_ips=False).format("8.8.8.8 a@b.com") == "8.8.8.8 email@example.com"


# ---- near-duplicates ------------------------------------------------------------------------------------------------


def test_minhash_finds_copies_as_often_as_its_curve_says():
    """P(found) = 1 - (1 - s^8)^14 for Jaccard similarity s of the 5-grams (Broder 1997; 14 buckets of 8 hashes)."""
    signature = web.phases(WebConfig("x"), StepsConfig(), "rows", [Path("x")], Path("x"))[1].pipeline[-1]
    pick, pairs = random.Random(0), 40
    for shared, total in ((95, 100), (80, 100), (65, 100), (40, 100)):
        found = 0
        for _ in range(pairs):
            # Lists of distinct words: n - 4 shingles each, `shared` of `total` in both.
            words = ["".join(pick.choices("abcdefghij", k=9)) for _ in range(total + 4)]  # digits all become 0
            cut = (total - shared) // 2  # one lacks the first so many, the other the last
            one, other = words[: len(words) - cut], words[cut:]
            sides = [signature.get_signature(signature.get_shingles(" ".join(side))) for side in (one, other)]
            found += any(a == b for a, b in zip(*sides, strict=True))
        s = (total - 2 * cut) / total
        low, high = wilson(found, pairs, z=3.3)  # 99.9 %
        assert low <= 1 - (1 - s**8) ** 14 <= high, (s, found)


# ---- samples and labels ---------------------------------------------------------------------------------------------


def test_samples_keep_the_first_of_each_reason(tmp_path):
    with Samples(str(tmp_path), "step", 2) as samples:
        for number in range(5):
            reason = "odd" if number % 2 else "even"
            document = Document(
                text=f"{number}" * 1000, id="", metadata={"filter_reason": reason, "url": f"u{number}"}
            )
            samples.write(document, rank=7)
    kept = json.loads((tmp_path / "step-00007.json").read_text())
    assert {reason: [one["url"] for one in found] for reason, found in kept.items()} == {
        "even": ["u0", "u2"], "odd": ["u1", "u3"],
    }  # fmt: skip
    assert len(kept["even"][0]["text"]) == 600


def test_agreement_with_labels_by_hand():
    """Six good, four bad; kept: four good, one bad."""
    found = web_labels.agreement([1] * 6 + [0] * 4, [True] * 4 + [False] * 2 + [True] + [False] * 3)
    assert [round(found[key]["value"], 6) for key in ("share", "precision", "recall", "bad_kept")] == [
        0.6, 0.8, 0.666667, 0.25,
    ]  # fmt: skip
    assert web_labels.agreement([1, 0], [False, False])["precision"] is None


def test_a_gain_is_shown_where_good_documents_are_kept_clearly_more_often(tmp_path):
    good, bad = [web_pages.english(seed, 20) for seed in range(12)], ["buy now " * 100] * 12
    path, facts = tmp_path / "labels.jsonl", {"kept": 3, "read": 4}
    for flipped, passed in ((0, True), (12, False)):  # flipped: the good ones are those that the rules drop
        labels = [int(number < 12) ^ bool(flipped) for number in range(24)]
        lines = [json.dumps({"text": text, "label": label}) for text, label in zip(good + bad, labels, strict=True)]
        path.write_text("\n".join(lines) + "\n")
        metrics, gains = web_labels.measure(WebConfig("x", eval_labels=str(path)), StepsConfig(), facts)
        assert gains[0]["before"]["value"] == 0.5 and gains[0]["passed"] is passed
        assert gains[0]["after"]["value"] == metrics["labelled good, kept"]["value"] == float(passed)
    metrics, gains = web_labels.measure(WebConfig("x"), StepsConfig(), facts)
    assert gains == [] and metrics["pages kept"] == {"value": 0.75, "low": None, "high": None, "n": 4, "unit": "%"}


def test_labels_that_are_none(tmp_path):
    path = tmp_path / "labels.jsonl"
    for content, words in [
        ('{"text": "x", "label": 2}\n', "labels.jsonl:1.*label 2"), ('{"text": "x", "label": true}\n', "label True"),
        ('{"text": "x", "label": 1}\n', "rows of both labels"), ('{"label": 1}\n', "expected text"),
    ]:  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            web_labels.read_labels(str(path))


def benchmark():
    spec = importlib.util.spec_from_file_location("web_quality", ROOT / "tests/benchmarks/web_quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_in_its_smallest_size():
    good = [(web_pages.english(seed, 20), 1) for seed in range(3)]
    bad = [("buy now " * 100, 0), ("short", 0)]
    result = benchmark().compare(good + bad)
    found = {line["rules"]: line["agreement"] for line in result["choices"]}
    assert found["no rule"]["precision"]["value"] == 0.6
    assert [found["all four"][key]["value"] for key in ("precision", "recall", "bad_kept")] == [1, 1, 0]
    assert sum(each["bad"] for each in result["reasons"]) == 2 and sum(each["good"] for each in result["reasons"]) == 0
    assert "| all four | 100.0 %" in benchmark().table({"documents": 5, "good": 3, "command": "x", **result})


@pytest.mark.slow
@pytest.mark.skipif("POSTTRAIN_REAL_DATA" not in os.environ, reason="POSTTRAIN_REAL_DATA is not set")
def test_rules_keep_what_people_call_good():
    """DCLM's labels: the stored figures of tests/benchmarks/results, found again."""
    path = Path(os.environ["POSTTRAIN_REAL_DATA"]) / "data" / "dclm_human_quality" / "agreement_data.jsonl"
    stored = json.loads((ROOT / "tests/benchmarks/results/web_quality.json").read_text())
    expected = next(line["agreement"] for line in stored["choices"] if line["rules"] == "all four")
    rows = web_labels.read_labels(str(path))
    kept = [why is None for why in web_labels.verdicts(web.quality_steps(StepsConfig()), [text for text, _ in rows])]
    assert web_labels.agreement([label for _, label in rows], kept) == expected
    assert expected["precision"]["low"] > expected["share"]["high"]
