"""Counting and spelling: the data set, how replies are read, and the suite on a model that cannot spell.

Run: pytest tests/test_spelling.py
"""

import json

import pytest
from conftest import CHATML, new_llama

from posttrain.chat import set_template
from posttrain.cli import command
from posttrain.data import DataConfig, load_rows, spelling
from posttrain.errors import UserError
from posttrain.models import save_pair
from posttrain.rewards.spelling import spelled
from posttrain.suite_spelling import groups_of, tokens_per_character


def rows_of(split: str = "test", num: int | None = None, file: str | None = None, seed: int = 0) -> list[dict]:
    return load_rows(DataConfig("spelling", file, max_rows=num), split, seed, ("prompt",))[0]


def right(reply: str, answer: str, form: str) -> float | None:
    return spelled([None], [reply], answer=[answer], form=[form])[0]


def test_the_answers_are_right_and_the_words_of_the_splits_apart():
    rows = rows_of()
    assert len(rows) == 210 and {row["kind"] for row in rows} == set(spelling.QUESTIONS)
    assert len({json.dumps(row) for row in rows_of(seed=1)} & {json.dumps(row) for row in rows}) < 5
    for row in rows:
        question, word, answer = row["prompt"][0]["content"], row["word"], row["answer"]
        letter = question.split("letter ")[-1][0]
        truth = {
            "dots": str(question.count(".")), "letter count": str(len(word.split(letter)) - 1),
            "length": str(len(list(word))), "spelled": " ".join(list(word)), "backwards": "".join(reversed(word)),
            "first letter": word[:1], "last letter": word[-1:],
        }  # fmt: skip
        assert answer == truth[row["kind"]] and word in question
        assert right(answer, answer, row["form"]) == 1.0
        assert row["few_shot"].endswith(f"Question: {question}\nAnswer:") and row["few_shot"].count("Answer:") == 5
    words = [{row["word"] for row in rows_of(split, 700) if row["kind"] != "dots"} for split in ("train", "test")]
    assert min(map(len, words)) > 80 and not words[0] & words[1]
    assert "strawberry" in spelling.WORDS and len(set(spelling.WORDS)) == len(spelling.WORDS)


@pytest.mark.parametrize(
    ("reply", "answer", "form", "score"),
    [
        ("There are 3 r's in strawberry.", "3", "number", 1.0),
        ("The letter r occurs twice in the word.", "2", "number", 1.0),
        ("There are three of them.", "3", "number", 1.0),
        ("There are two or three.", "3", "number", 0.0),
        ("There are 2, no, 4.", "3", "number", 0.0),
        ("S-T-R-A-W", "s t r a w", "letters", 1.0),
        ("It is spelled:\n1. s\n2. t\n3. r\n4. a\n5. w", "s t r a w", "letters", 1.0),
        ("s t r a a w", "s t r a w", "letters", 0.0),
        ("straw", "s t r a w", "letters", 0.0),
        ('"straw" backwards is "warts".', "warts", "word", 1.0),
        ("w a r t s", "warts", "word", 1.0),
        ('"warts" is "straw" backwards.', "warts", "word", 0.0),
        ("", "warts", "word", 0.0),
        ("The first letter of 'straw' is **s**.", "s", "letter", 1.0),
        ("The last letter is W, a consonant.", "w", "letter", 1.0),
        ("It isn't a vowel: s", "s", "letter", 1.0),
        ("straw", "s", "letter", 0.0),
        ("s, t, r, a or w", "s", "letter", 0.0),
    ],
)
def test_one_answer_is_read_from_a_reply(reply, answer, form, score):
    assert right(reply, answer, form) == score


def test_only_the_last_turn_counts():
    scores = spelled([None], ["3<|result|>4"], answer=["3"], form=["number"], turns=[["3", "4"]])
    assert scores == [0.0]


def test_words_of_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\n".join(f"w{letter}rd" for letter in "abcdefghijklmnopqrst") + "\n\n")
    words = {row["word"] for split in ("train", "test") for row in rows_of(split, 100, str(file))}
    assert words >= {"ward", "word"}
    file.write_text("word\ntwo words\n")
    with pytest.raises(UserError, match=r"words.txt:2: found 'two words', expected one word"):
        rows_of(file=str(file))
    with pytest.raises(UserError, match="no file 'nowhere.txt'"):
        rows_of(file="nowhere.txt")
    with pytest.raises(UserError, match="expected train or test for dataset_name spelling"):
        rows_of("validation")


def test_tokens_a_character_are_those_of_the_words_own_place(tokenizer):
    word = "strawberry"
    row = {"prompt": [{"role": "user", "content": f"How many letters does '{word}' have?"}], "word": word}
    pieces = [tokenizer.decode([i]) for i in tokenizer(row["prompt"][0]["content"])["input_ids"]]
    before = "How many letters does '"
    ends = [len("".join(pieces[: k + 1])) for k in range(len(pieces))]
    inside = [end for end, piece in zip(ends, pieces, strict=True)
              if end > len(before) and end - len(piece) < len(before) + len(word)]  # fmt: skip
    assert tokens_per_character(tokenizer, row, True) == len(inside) / len(word)
    groups = groups_of([{"kind": "a"}] * 4, [0.1, 0.15, 0.3, 1.0])
    assert groups[", up to 0.15 tokens a character"] == [True, True, False, False]
    assert groups[", 0.25 to 0.35 tokens a character"] == [False, False, True, False]
    assert groups[", above 0.5 tokens a character"] == [False, False, False, True]


def test_the_suite_by_kind_and_by_density(base_tokenizer, tmp_path, capsys):
    from copy import deepcopy

    tokenizer, folder = deepcopy(base_tokenizer), tmp_path / "model"
    model = new_llama(tokenizer)
    set_template(tokenizer, model, CHATML)
    save_pair(model, tokenizer, folder)
    ask = ("--rows", "21", "--max_tokens", "6", "--use_vllm", "false")
    assert command(["eval", str(folder), "--suite", "spelling", *ask]) == 0
    found = json.loads((folder / "evals" / "spelling.json").read_text())
    assert found["metrics"]["right"]["n"] == 21 and found["metrics"]["right, dots"]["n"] == 3
    groups = found["details"]["groups"]
    assert sum(count for name, count in groups.items() if name.endswith("a character")) == groups[""] == 21
    assert "evals/spelling" in capsys.readouterr().out and found["data"][0]["name"] == "spelling"
    assert (folder / "evals" / "spelling.svg").read_text().startswith("<svg")
    assert command(["eval", "--again", str(folder / "evals" / "spelling.json")]) == 0
    with pytest.raises(UserError, match="chat template cannot write tool calls"):
        command(["eval", str(folder), "--suite", "spelling", "--tools", "python", *ask])


def test_a_base_model_is_asked_after_solved_questions(base_tokenizer, tmp_path):
    folder = tmp_path / "base"
    save_pair(new_llama(base_tokenizer), base_tokenizer, folder)
    assert command(["eval", str(folder), "--suite", "spelling", "--rows", "7", "--max_tokens", "6"]) == 0
    found = json.loads((folder / "evals" / "spelling.json").read_text())
    assert found["metrics"]["right"]["n"] == 7 and "replies that end" not in found["metrics"]
    (row,) = rows_of(num=1)
    asked = tokens_per_character(base_tokenizer, row, False)
    text = row["few_shot"]
    pieces = base_tokenizer(text[: text.rindex(row["word"])])["input_ids"], base_tokenizer(text)["input_ids"]
    assert asked <= (len(pieces[1]) - len(pieces[0]) + 1) / len(row["word"])
