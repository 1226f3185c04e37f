r"""Few-shot translation: a base model that has read three invented languages is told by examples which one is meant.

In: nothing but the seed. Out, in a folder: `parallel.jsonl`, documents of six sentence pairs in one language each, to
read beside tiny's documents; `orrish.jsonl`, `vellan.jsonl` and `tukish.jsonl`, each with eight examples and sixty
sentences that no document has. The languages differ in their words and in their order: verb last, verb first,
adjective after noun. Nothing in a document names its language, so that without an example one can only guess.

    python -m examples.translation.tongues runs/examples/translation
    accelerate launch recipes/pretrain.py --config examples/translation/pretrain.yaml
    posttrain eval runs/examples/translation/base --few_shot runs/examples/translation/orrish.jsonl \
        --few_shot_format '{input} = {output}' --num_fewshot 0 1 2 4 8 --similarity chrf bleu
"""

import json
import random
import sys
import zlib
from functools import cache
from pathlib import Path

ADJECTIVES = ("old", "small", "red", "kind", "tall", "sad")
NOUNS = ("dog", "cat", "goat", "boy", "girl", "king", "bird", "fish", "baker", "hen")
VERBS = ("sees", "likes", "hears", "helps", "finds", "calls")
# language -> its consonants, its vowels, the order of subject, verb, object
TONGUES = {"orrish": ("rbmd", "oa", "SOV"), "vellan": ("vlns", "ei", "VSO"), "tukish": ("tkpg", "ua", "SVO")}
DOCUMENTS, PAIRS, EXAMPLES, QUESTIONS = 9000, 6, 8, 60


@cache
def lexicon(tongue: str, seed: int = 0) -> dict[str, str]:
    """English word -> the language's: two syllables each, all different."""
    consonants, vowels, _ = TONGUES[tongue]
    syllables = [consonant + vowel for consonant in consonants for vowel in vowels]
    words = [first + second for first in syllables for second in syllables]
    random.Random(f"{tongue} {seed}").shuffle(words)
    return dict(zip((*ADJECTIVES, *NOUNS, *VERBS), words, strict=False))


def translate(sentence: str, tongue: str, seed: int = 0) -> str:
    """'The old dog sees the red cat.' in the language."""
    words, order = lexicon(tongue, seed), TONGUES[tongue][2]
    _, adjective, noun, verb, _, other, thing = sentence.rstrip(".").split()
    subject, object_ = (words[adjective], words[noun]), (words[other], words[thing])
    if tongue == "tukish":  # the adjective stands behind its noun
        subject, object_ = subject[::-1], object_[::-1]
    parts = {"S": " ".join(subject), "V": words[verb], "O": " ".join(object_)}
    return " ".join(parts[part] for part in order) + "."


def sentence(rng: random.Random) -> str:
    first, second = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"The {first} {rng.choice(VERBS)} the {second}."


def held_out(text: str) -> bool:
    """One sentence of ten stands in no document, in no language."""
    return zlib.crc32(text.encode()) % 10 == 0


def draw(rng: random.Random, asked: bool) -> str:
    while held_out(text := sentence(rng)) != asked:
        pass
    return text


def document(rng: random.Random, seed: int = 0) -> str:
    tongue = rng.choice(list(TONGUES))
    pairs = [draw(rng, asked=False) for _ in range(PAIRS)]
    return "\n".join(f"{text} = {translate(text, tongue, seed)}" for text in pairs) + "\n"


def rows(tongue: str, seed: int = 0) -> list[dict]:
    """The few-shot file of a language: EXAMPLES of the documents' kind, then QUESTIONS held out."""
    rng = random.Random(f"rows {seed}")
    texts = [draw(rng, asked=False) for _ in range(EXAMPLES)]
    while len(texts) < EXAMPLES + QUESTIONS:
        if (text := draw(rng, asked=True)) not in texts:
            texts.append(text)
    return [{"input": text, "output": translate(text, tongue, seed)} for text in texts]


def write(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"documents {seed}")
    texts = [{"text": document(rng, seed)} for _ in range(DOCUMENTS)]
    for name, lines in {"parallel": texts, **{tongue: rows(tongue, seed) for tongue in TONGUES}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
