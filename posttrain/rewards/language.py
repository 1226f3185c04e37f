"""Does the reply stay in the language of its prompt, or in a given one?

In: prompts and completions. Out: 1.0 or 0.0 each, None where the reply has words of no language (numbers, formulas).
First the scripts of its letters are looked at (Chinese characters in an English reply), without any library; then
py3langid, whose model for 140 languages is in its package, tells apart those that share a script.

    reward_funcs: [correct, language]
    reward_options: {language: {language: en}}
"""

import re
import sys
import unicodedata
from collections import Counter
from functools import lru_cache

from posttrain.errors import UserError
from posttrain.rewards.options import bad_option, number
from posttrain.rewards.text import prompt_text, reply_text

# Latin and Greek letters in these belong to no language: code, formulas, addresses, tags, lone Greek letters.
NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+"
    r"|https?://\S+|<[^<>]*>|(?<!\w)[α-ωΑ-Ω](?!\w)",
    re.DOTALL,
)
# Languages not written in Latin letters; ISO 639 codes -> first words of their letters' Unicode names.
SCRIPTS = {
    **dict.fromkeys(("zh", "yue", "wuu"), {"CJK", "BOPOMOFO"}),
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL", "CJK"},
    **dict.fromkeys(("ru", "uk", "be", "bg", "mk", "kk", "ky", "mn", "tg", "tt", "ba", "cv"), {"CYRILLIC"}),
    "sr": {"CYRILLIC", "LATIN"},
    "el": {"GREEK"},
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ckb", "sd", "ug", "arz"), {"ARABIC"}),
    **dict.fromkeys(("he", "yi"), {"HEBREW"}),
    **dict.fromkeys(("hi", "mr", "ne", "sa", "bho", "mai"), {"DEVANAGARI"}),
    **dict.fromkeys(("bn", "as"), {"BENGALI"}),
    **{"pa": {"GURMUKHI"}, "gu": {"GUJARATI"}, "or": {"ORIYA"}, "ta": {"TAMIL"}, "te": {"TELUGU"}, "kn": {"KANNADA"}},
    **{"ml": {"MALAYALAM"}, "si": {"SINHALA"}, "th": {"THAI"}, "lo": {"LAO"}, "bo": {"TIBETAN"}, "my": {"MYANMAR"}},
    **{"ka": {"GEORGIAN"}, "hy": {"ARMENIAN"}, "am": {"ETHIOPIC"}, "ti": {"ETHIOPIC"}, "km": {"KHMER"}},
}
CJK_LETTERS = 3  # a Chinese character stands for about so many letters of a word
COMMON = 0.1  # a script with this share of the prompt's letters is one of the prompt's


def language_reward(
    prompts,
    completions,
    completion_ids=None,
    *,
    language: str | None = None,
    max_foreign: float = 0.02,
    min_letters: int = 30,
    least: float = 0.1,
    scripts_only: bool = False,
    **columns,
) -> list[float | None]:
    """1.0 where a completion is in the expected language, 0.0 where not or where it is empty.

    Code, formulas, addresses and tags do not count. A reply with letters but too few to tell languages apart is judged
    by its scripts alone. None where a reply holds no letter.

    Args:
        language: ISO 639 code ("en", "de", "zh"); None: the language of the prompt (of what the user said last).
        max_foreign: share of the letters that may be of other scripts (names, quotations).
        min_letters: with fewer letters, in the prompt or the reply, only scripts are compared.
        least: probability that py3langid must give to the expected language at least.
        scripts_only: compare scripts and nothing else; needs no library, and takes French for English.

    Raises:
        UserError: an option out of its range, a language unknown to py3langid, or py3langid is not installed.
    """
    number("language", "max_foreign", max_foreign, low=0, high=1)
    number("language", "min_letters", min_letters, low=1, whole=True)
    number("language", "least", least, low=0, high=1)
    if not isinstance(scripts_only, bool):
        raise bad_option("language", "scripts_only", scripts_only, "true or false")
    if not scripts_only:
        identifier()
    known = isinstance(language, str) and (scripts_only or language in probabilities(""))
    if language is not None and not known:
        expected_here = "null or an ISO 639 code that py3langid knows, in quotes ('no' is false in YAML)"
        raise bad_option("language", "language", language, expected_here)
    if scripts_only:
        min_letters = sys.maxsize
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        reply = reply_text(completion)
        if not reply.strip():
            scores.append(0.0)
            continue
        told, scripts = expected(prompt_text(prompt), language, min_letters)
        scores.append(judged(reply, told, scripts, max_foreign, min_letters, least))
    return scores


def expected(prompt: str, language: str | None, min_letters: int) -> tuple[str | None, set[str] | None]:
    """(language or None where the prompt does not tell, its scripts or None where any will do)."""
    if language is not None:
        return language, SCRIPTS.get(language, {"LATIN"})
    letters = scripts_of(prompt)
    total = sum(letters.values())
    if not total:
        return None, None
    scripts = {script for script, count in letters.items() if count >= COMMON * total}
    if total < min_letters:
        return None, scripts
    found = probabilities(plain(prompt))
    told = max(found, key=found.__getitem__)
    return (told, scripts | SCRIPTS.get(told, {"LATIN"})) if found[told] >= 0.5 else (None, scripts)


def judged(
    reply: str, language: str | None, scripts: set[str] | None, max_foreign: float, min_letters: int, least: float
) -> float | None:
    """1.0, 0.0, or None for a reply without letters."""
    letters = scripts_of(reply)
    total = sum(letters.values())
    if not total or scripts is None:
        return None
    foreign = sum(count for script, count in letters.items() if script not in scripts)
    if foreign > max_foreign * total:
        return 0.0
    if language is None or total < min_letters:
        return 1.0
    return float(probabilities(plain(reply))[language] >= least)


def plain(text: str) -> str:
    """The text without the letters that no language owns; Chinese in a formula or a code block stays."""
    return NEUTRAL.sub(lambda match: re.sub(r"[\x00-\x7fΑ-ω]+", " ", match[0]), text)


def scripts_of(text: str) -> Counter:
    """Script (first word of a letter's Unicode name: LATIN, CJK, CYRILLIC) -> letters, Chinese ones counted thrice."""
    counts: Counter = Counter()
    for letter, count in Counter(filter(str.isalpha, plain(text))).items():
        script = script_of(letter)
        counts[script] += count * (CJK_LETTERS if script == "CJK" else 1)
    return counts


@lru_cache(maxsize=65536)
def script_of(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()
    return name[1] if name[0] in ("FULLWIDTH", "HALFWIDTH", "MATHEMATICAL") and len(name) > 1 else name[0]


@lru_cache(maxsize=4096)
def probabilities(text: str) -> dict[str, float]:
    """ISO 639 code -> probability under py3langid."""
    return {code: float(probability) for code, probability in identifier().rank(text)}


@lru_cache(maxsize=1)
def identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "py3langid":
            raise
        raise UserError("reward language needs py3langid: pip install py3langid==0.4.0") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
