"""The data set `spelling`: what a model does not see that reads tokens, not letters. Made from a seed and words.

In: a split, a number of rows, a seed; the words built in, or a file with one a line. Out: rows for the suite spelling
and the reward `spelled`: `prompt`, `answer`, `form` (how the answer is read: number, letters, word, letter), `kind`,
`word` (the text that is asked about) and `few_shot` (the question after solved ones, for a base model).

    dataset_name: spelling
    dataset_config: words.txt            # none = the words below

The kinds come in turn: dots in a row; how often a letter stands in a word, and how many letters it has; the word
letter by letter, and backwards; its first letter and its last one. A word belongs to one split only, by hash.
"""

import random
import re
from pathlib import Path

from posttrain.data.tiny import in_test
from posttrain.errors import UserError

DEFAULT_ROWS = {"train": 4000, "test": 210}
TEST_SHARE = 0.5  # of the words
DOTS = (3, 40)
SHOTS = 4
QUESTIONS = {
    "dots": "How many dots are in this row? {word}",
    "letter count": "How many times does the letter {letter} occur in '{word}'?",
    "length": "How many letters does '{word}' have?",
    "spelled": "Write '{word}' letter by letter, with spaces between the letters.",
    "backwards": "Write '{word}' backwards.",
    "first letter": "What is the first letter of '{word}'?",
    "last letter": "What is the last letter of '{word}'?",
}
FORMS = {"dots": "number", "letter count": "number", "length": "number", "spelled": "letters", "backwards": "word"}
LISTED = """
    act add age aim air ant arm ask bag bat bed bee box boy bus cap car cat cow cup day dog ear egg eye fan fig fox gas
    hat hen ice ink jam key leg lip map mud net nut oak oil owl pan pea pen pig pot rat rib sea sky sun tea toy van wax
    zip apple baker beach berry bread brick candy chair chalk cheese cherry circle cliff cloud coffee copper cotton
    cradle cricket dagger dairy desert dinner dragon eleven engine falcon feather ferry finger flower forest funnel
    garden ginger goblin gravel hammer harbor hollow honey island jacket jelly jungle kettle kitten ladder lemon letter
    lizard lobster magnet mammal meadow mirror mitten monkey muffin napkin needle nickel onion orange oyster paddle
    pebble pepper pickle pillow planet pocket puzzle rabbit ribbon rubber saddle salmon school shadow silver spider
    spoon summer sunset tailor tennis thunder ticket tomato tunnel turtle velvet violin walnut winter yellow zipper
    accordion adventure aluminium apartment architect asparagus avalanche balloonist barefooted beekeeper blackberry
    bookkeeper bumblebee buttercup calculator cantaloupe carpenter caterpillar cauliflower centipede chandelier
    cinnamon committee corridor crocodile cucumber daffodil dandelion dictionary dragonfly earthquake elephant
    embarrassed escalator eucalyptus excellence fahrenheit firefighter flamingo goldfinch grasshopper gooseberry
    hazelnut helicopter hummingbird immediately innkeeper jellyfish kangaroo lighthouse mayonnaise millennium
    mississippi mosquito mountaineer mozzarella necessary nightingale occurrence pineapple porcupine possession
    raspberry reassess refrigerator restaurateur rhododendron rollerskate sassafras saxophone scarecrow strawberry
    successful sunflower telescope tennessee umbrella vaccination vegetable volleyball watermelon whippersnapper
    wheelbarrow woodpecker xylophone yesterday
"""
WORDS = LISTED.split()


def rows(split: str, num: int | None, seed: int, file: str | None = None):
    """Yield `num` rows (None: DEFAULT_ROWS) of a split. UserError for a file of words that cannot be used."""
    words = [word for word in read_words(file) if in_test(f"spelling {word}", TEST_SHARE) == (split == "test")]
    if len(words) <= SHOTS:
        raise UserError(
            f"dataset_config: {file}: {len(words)} words fall to split {split}, expected at least {SHOTS + 1}"
        )
    return _rows(words, split, DEFAULT_ROWS[split] if num is None else num, seed)


def read_words(file: str | None) -> list[str]:
    """The built-in words, or those of a file: one a line, in lower case letters a to z. UserError names the line."""
    if file is None:
        return WORDS
    if not Path(file).is_file():
        raise UserError(
            f"dataset_config: no file {file!r}; expected one with a word a line, or none for those built in"
        )
    lines = [(number, line.strip()) for number, line in enumerate(Path(file).read_text("utf-8-sig").split("\n"), 1)]
    for number, word in lines:
        if word and not re.fullmatch("[a-z]{2,}", word):
            raise UserError(f"{file}:{number}: found {word[:40]!r}, expected one word of two or more letters a to z")
    return list(dict.fromkeys(word for _, word in lines if word))


def _rows(words: list[str], split: str, num: int, seed: int):
    rng = random.Random(f"spelling-{split}-{seed}")
    for index in range(num):
        kind = list(QUESTIONS)[index % len(QUESTIONS)]
        word, *others = rng.sample(words, SHOTS + 1)
        asked, answer, word = _task(rng, kind, word)
        solved = [_task(rng, kind, other) for other in others]
        shots = "".join(f"Question: {question}\nAnswer: {right}\n" for question, right, _ in solved)
        yield {
            "prompt": [{"role": "user", "content": asked}], "answer": answer,
            "form": FORMS.get(kind, "letter"), "kind": kind, "word": word,
            "few_shot": f"{shots}Question: {asked}\nAnswer:",
        }  # fmt: skip


def _task(rng: random.Random, kind: str, word: str) -> tuple[str, str, str]:
    """(question, answer, what it is about)."""
    letter = rng.choice(word)
    if kind == "dots":
        word = "." * rng.randint(*DOTS)
    answer = {
        "dots": str(len(word)), "letter count": str(word.count(letter)), "length": str(len(word)),
        "spelled": " ".join(word), "backwards": word[::-1], "first letter": word[0], "last letter": word[-1],
    }[kind]  # fmt: skip
    return QUESTIONS[kind].format(word=word, letter=letter), answer, word
