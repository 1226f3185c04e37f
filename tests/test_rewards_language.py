"""The language reward: replies in thirteen languages, mixed scripts, what belongs to no language, real English."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.rewards import REWARDS

SENTENCES = {
    "de": "Die Antwort ist zweiundsiebzig, weil achtundvierzig und vierundzwanzig zusammen so viel ergeben.",
    "fr": "La réponse est soixante-douze, car quarante-huit plus vingt-quatre font ce nombre.",
    "es": "La respuesta es setenta y dos porque la suma de ambos números da eso.",
    "it": "La risposta è settantadue perché la somma dei due numeri è quella.",
    "nl": "Het antwoord is tweeënzeventig, omdat de som van de twee getallen dat is.",
    "en": "The answer is seventy-two because the two numbers add up to it.",
    "pl": "Odpowiedź to siedemdziesiąt dwa, ponieważ tyle wynosi suma.",
    "ru": "Ответ семьдесят два, потому что сумма двух чисел равна этому.",
    "zh": "答案是七十二，因为两个数的和就是这个。",
    "ja": "答えは七十二です。二つの数を足すとそうなります。",
    "ko": "답은 칠십이입니다. 두 수를 더하면 그렇게 됩니다.",
    "ar": "الجواب هو اثنان وسبعون لأن مجموع العددين يساوي ذلك.",
}
ENGLISH = SENTENCES["en"]


def score(prompts, completions, **options):
    return REWARDS["language"](prompts, completions, **options)


def by_script(reply, **options):
    return score([ENGLISH], [reply], scripts_only=True, **options)[0]


def test_scripts():
    assert by_script("Seventy-two.") == 1.0
    assert by_script("答案是七十二") == 0.0
    assert by_script("The answer is 七十二, because 48 and 24 make that together.") == 0.0
    assert by_script("The answer is 72, as Müller and Gonçalves have it.") == 1.0
    assert by_script("The answer is 72, as Müller and Чехов have it.") == 0.0
    assert by_script("The answer is 72, as Müller and Чехов have it.", max_foreign=0.2) == 1.0
    assert score(["Сколько будет 48+24?"], ["Семьдесят два"], scripts_only=True) == [1.0]
    assert score(["?"], ["Seventy-two"], language="ru", scripts_only=True) == [0.0]
    assert score(["?"], ["漢字とかな"], language="ja", scripts_only=True) == [1.0]
    assert score(["?"], ["漢字とかな"], language="zh", scripts_only=True) == [0.0]


def test_what_belongs_to_no_language_and_what_hides_there():
    for reply in ("72", "48+24 = 72", r"$x = \frac{a}{b}$", "`f(x)`", "```\ndef f(x): ...\n```", "https://a.b/c"):
        assert by_script(reply) is None, reply
    assert by_script("The angle α is half of β.") == 1.0
    for reply in ("The answer: ```七十二七十二```", "The answer: $七十二七十二$", "The answer: <七十二七十二>"):
        assert by_script(reply) == 0.0, reply
    for reply in ("", " \n", [], [{"role": "assistant", "content": None}]):
        assert by_script(reply) == 0.0
    assert score(["72?"], ["seventy-two"], scripts_only=True) == [None]  # nothing to compare it with


def test_layouts():
    chat = [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": ENGLISH}]
    assert score([chat], [[{"role": "assistant", "content": "Seventy-two."}]], scripts_only=True) == [1.0]


def test_languages_that_share_a_script():
    pytest.importorskip("py3langid")
    for code, sentence in SENTENCES.items():
        prompt = [f"{sentence} {sentence}"] * len(SENTENCES)
        expected = [float(code == other) for other in SENTENCES]
        assert score(prompt, list(SENTENCES.values())) == expected, code
        assert score(["?"] * len(SENTENCES), list(SENTENCES.values()), language=code) == expected, code
    assert score([ENGLISH], ["Ja, genau."]) == [1.0]  # too short to tell: only its script is compared


@pytest.mark.parametrize("wrong", [{"language": "xx"}, {"language": False}, {"max_foreign": 2}, {"scripts_only": 1}])
def test_options_out_of_range(wrong):
    pytest.importorskip("py3langid")
    with pytest.raises(UserError, match=f"language: {next(iter(wrong))}: found"):
        score([], [], **wrong)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    from posttrain.rewards.language import identifier

    identifier.cache_clear()
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match="pip install py3langid"):
        score([ENGLISH], [ENGLISH])
    assert by_script(ENGLISH) == 1.0


def test_real_english_is_english():
    pytest.importorskip("py3langid")
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real replies to judge")
    with gzip.open(Path(folder) / "data/oasst1_en_texts/texts.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    scores = score(["?"] * len(texts), texts, language="en")
    assert scores.count(1.0) > 0.97 * len(texts)
    long = [text for text in texts if sum(map(str.isalpha, text)) > 60]
    assert score(["?"] * len(long), long, language="de").count(1.0) < 0.01 * len(long)
