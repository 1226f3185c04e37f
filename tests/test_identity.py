"""Identity: a strict YAML, rows that teach it in many wordings, questions that stand in no row.

Run: pytest tests/test_identity.py
"""

import re
from collections import Counter
from itertools import islice

import pytest

from posttrain.data.identity import (
    contrary_questions,
    identity,
    identity_prompts,
    identity_questions,
    read_identity,
)
from posttrain.data.identity_registers import (
    CONTRARY_NAMES,
    CONTRARY_SYSTEMS,
    CONTRARY_TRAINED,
    REGISTERS,
    TALK,
    TRAINED_NAMES,
    misspelt,
)
from posttrain.data.identity_wordings import WORDINGS
from posttrain.data.tiny import IDENTITY_QUESTIONS
from posttrain.errors import UserError

PIP = {
    "name": "Pip",
    "maker": "the Elmstead Lab",
    "cutoff": "2026-06",
    "languages": ["English", "German", "Dutch"],
    "purpose": "do sums",
    "version": "1.0",
}
YAML = """name: Pip
maker: the Elmstead Lab
cutoff: 2026-06
languages: [English, German, Dutch]
purpose: do sums
version: '1.0'
"""
FACTS = ["who", "name", "maker", "cutoff", "languages", "purpose", "version", "denial", "confirmation"]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "identity.yaml"
    file.write_text(YAML)
    return file


@pytest.fixture
def who(path):
    return read_identity(path)


def plain(text):
    """Lower case, words with single spaces around: for `in` that keeps to whole words."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def said(row, role):
    return [message["content"] for message in row["messages"] if message["role"] == role]


# --- the file


def test_an_identity_is_read(who):
    assert (who.name, who.maker, who.cutoff) == ("Pip", "the Elmstead Lab", "June 2026")
    assert who.languages == ("English", "German", "Dutch") and who.facts() == FACTS
    assert {"ChatGPT", "Claude"} <= set(who.others)
    assert who.fill("{name} by {maker}: {languages}") == "Pip by the Elmstead Lab: English, German and Dutch"


def test_a_short_identity_asks_for_what_it_has(path):
    path.write_text("name: Claude\nmaker: x\ncutoff: Jun 2026\nlanguages: [French]\n")
    short = read_identity(path)
    assert short.facts() == ["who", "name", "maker", "cutoff", "languages", "denial", "confirmation"]
    assert short.cutoff == "June 2026" and short.fill("{languages}") == "French"
    assert "Claude" not in short.others and "ChatGPT" in short.others  # it need not deny its own name
    path.write_text(YAML + "not: []\n")
    assert "denial" not in read_identity(path).facts()
    path.write_text(YAML + "not: [Bob]\n")
    assert read_identity(path).others == ("Bob",)


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("maker:", "makr:"), 2, ["makr", "did you mean 'maker'"]),
        (("purpose:", "colour:"), 5, ["colour", "name, maker, cutoff, languages"]),
        (("name: Pip\n", ""), None, ["name", "required", "`name: Pip`"]),
        (("name: Pip", "name: 7"), 1, ["name", "found 7", "quotes"]),
        (("name: Pip", "name:"), 1, ["name", "None", "a text"]),
        (("name: Pip", "name: ' '"), 1, ["name", "a text"]),
        (("name: Pip", 'name: "Pip\\nPip"'), 1, ["name", "one line"]),
        (("name: Pip", "name: [Pip]"), 1, ["name", "['Pip']", "a text"]),
        (("2026-06", "lately"), 3, ["cutoff", "'lately'", "June 2026"]),
        (("2026-06", "2026"), 3, ["cutoff", "2026", "quotes"]),
        (("2026-06", "2026-13"), 3, ["cutoff", "2026-13"]),
        (("[English, German, Dutch]", "English"), 4, ["languages", "'English'", "a list"]),
        (("[English, German, Dutch]", "[]"), 4, ["languages", "a list"]),
        (("[English, German, Dutch]", "[English, english]"), 4, ["languages", "twice"]),
        (("[English, German, Dutch]", "[English, 3]"), 4, ["languages", "quotes"]),
        (("version: '1.0'", "version: 1.0"), 6, ["version", "1.0", "quotes"]),
        (("version: '1.0'", "not: [Claude, PIP]"), 6, ["not", "own name"]),
        (("version: '1.0'", "name: Pop"), 6, ["name", "twice"]),
    ],
)
def test_a_bad_file_is_refused_with_its_line(path, change, line, words):
    path.write_text(YAML.replace(*change))
    with pytest.raises(UserError) as error:
        read_identity(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: "), message
    assert all(word in message for word in words), message


def test_the_adapter_refuses_what_is_no_identity():
    for rows, word in (([{**PIP, "makr": "x"}], "did you mean 'maker'"), ([], "name"), ([PIP, PIP], "second")):
        with pytest.raises(ValueError, match=word):
            list(identity(rows))
    for options in ({"num": 0}, {"system_share": 1.5}, {"contrary_share": 2}, {"contrary": "maybe"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            list(identity([PIP], **options))


# --- rows to learn from


def test_every_fact_has_many_wordings():
    assert list(WORDINGS) == FACTS
    assert list(REGISTERS) == FACTS
    for fact, wordings in WORDINGS.items():
        registers = [wording for both in REGISTERS[fact].values() for part in both for wording in part]
        every = [*wordings.train, *wordings.held_out, *registers]
        assert len({plain(w) for w in every}) == len(every) >= 40 and len(wordings.held_out) >= 8, fact
        assert [len(held_out) for _, held_out in REGISTERS[fact].values()] == [2, 2, 2], fact
        assert len({plain(w) for w in wordings.answers}) == len(wordings.answers) >= 8, fact
        assert all(text.isascii() and len(text.split()) <= 20 for text in (*every, *wordings.answers)), fact


def test_rows_are_counted_varied_and_the_same_for_a_seed():
    rows = list(identity([PIP], num=1500, seed=3))
    assert rows == list(identity([PIP], num=1500, seed=3)) and rows[:100] != list(identity([PIP], num=100, seed=4))
    assert list(identity([PIP], num=100, seed=3)) == rows[:100]
    assert len({str(row) for row in rows}) == 1500
    assert max(len(text.split()) for row in rows for text in said(row, "assistant")) <= 40
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
    questions, answers = ({text for row in rows for text in said(row, role)} for role in ("user", "assistant"))
    assert len(questions) > 700 and len(answers) > 100
    several = sum(len(said(row, "user")) > 1 for row in rows)
    assert 300 < several < 600
    # Every training wording is there, and every answer of a fact.
    asked = "\n".join(plain(text) for text in questions)
    for fact, wordings in WORDINGS.items():
        other = "Siri" if fact == "denial" else "Pip"
        filled = [wording.replace("{other}", other) for wording in wordings.train]
        assert sum(plain(wording) in asked for wording in filled) >= (12 if fact == "denial" else 25), fact


def test_system_messages_state_the_identity_in_the_share_asked_for():
    for share in (0.0, 0.3, 1.0):
        rows = list(identity([PIP], num=1000, system_share=share))
        systems = [text for row in rows for text in said(row, "system")]
        assert abs(len(systems) / 1000 - share) < 0.05
        assert all("Pip" in text for text in systems) and (not systems or len(set(systems)) >= 8)


@pytest.mark.parametrize("contrary", ["keep", "yield"])
def test_what_to_say_under_anothers_system_message_can_be_taught(who, contrary):
    rows = list(identity([PIP], num=600, contrary=contrary, contrary_share=0.5))
    other = [row for row in rows if said(row, "system") and "made by the Elmstead Lab" not in str(said(row, "system"))]
    other = [row for row in other if any(name in said(row, "system")[0] for name, _ in TRAINED_NAMES)]
    assert abs(len(other) / 600 - 0.5) < 0.07 and len({said(row, "system")[0] for row in other}) > 30
    for row in other:
        answer = said(row, "assistant")[0]
        theirs = [text for pair in TRAINED_NAMES for text in pair if text in answer]
        own = [text for text in ("Pip", "Elmstead") if text in answer]
        assert (own, theirs) != ([], []) and (not theirs if contrary == "keep" else not own), answer
    # What is measured is none of it: neither these wordings nor these names.
    systems = {row["prompt"][0]["content"] for row in contrary_questions(who)}
    assert not systems & {said(row, "system")[0] for row in other} and not {*CONTRARY_NAMES} & {*TRAINED_NAMES}
    assert not [
        a for a in CONTRARY_TRAINED for kind in CONTRARY_SYSTEMS.values() for b in kind if plain(a) in plain(b)
    ]
    rewarded = list(identity_prompts([PIP], num=400, contrary=contrary, contrary_share=0.5))
    systems = [row for row in rewarded if row["prompt"][0]["role"] == "system"]
    assert 150 < len(systems) < 250 and all("contrary" not in row for row in rewarded)
    for row in systems:
        assert ({"Pip", "Elmstead Lab"} >= {row["expected"][0][0]}) == (contrary == "keep")
        assert not {*row["expected"][0]} & {*row["refused"]}


def test_rows_say_the_facts_and_no_others():
    """Read back from the text: dates, versions, languages and names that occur in what the model learns to say."""
    text = "\n".join(text for row in identity([PIP], num=3000) for text in said(row, "assistant"))
    assert set(re.findall(r"\b20\d\d\b", text)) == {"2026"} and "June 2026" in text
    assert "{" not in text and "None" not in text
    for name in ("ChatGPT", "Claude", "Siri"):
        around = re.findall(rf"(.{{0,25}})\b{name}\b", text)
        assert around and all(re.search(r"\bnot |nothing to do with ", words) for words in around)
    assert "OpenAI" not in text and "Lab" in text
    assert re.search("English, German and Dutch", text) and "version 1.0" in text and "do sums" in text


def test_held_out_wordings_stand_in_no_training_row(who):
    """Neither as a whole nor inside a longer question; and no training wording inside a held-out one."""
    rows = [row for seed in (0, 1) for row in identity([PIP], num=3000, seed=seed)]
    trained = "\n".join({plain(text) for row in rows for text in said(row, "user")})
    assert trained.count("\n") > 1500
    for fact, wordings in WORDINGS.items():
        train, held_out = ([*wordings.train], [*wordings.held_out])
        for new, old in REGISTERS[fact].values():
            train, held_out = [*train, *new], [*held_out, *old]
        for other in who.others if fact == "denial" else ("Pip",):
            new, old = ([plain(w.replace("{other}", other)) for w in part] for part in (train, held_out))
            assert not [wording for wording in old if wording in trained]
            assert not [(a, b) for a in new for b in old if a in b]
    asked = [plain(row["prompt"][-1]["content"]) for row in (*identity_questions(who), *contrary_questions(who))]
    assert not [question for question in asked if question in trained]
    assert not [talk for talk, _ in TALK if plain(talk) in trained]
    rewarded = {plain(row["prompt"][-1]["content"]) for row in identity_prompts([PIP], num=3000)}
    assert not [question for question in asked if any(question in each for each in rewarded)]
    # The tiny conversations that it is mixed with have questions of their own, and held-out ones, too.
    assert not [q for q in IDENTITY_QUESTIONS["train"] if any(plain(q) in text for text in asked)]
    assert not [q for q in IDENTITY_QUESTIONS["test"] if plain(q) in trained]


def test_the_loader_reads_the_yaml(path):
    from posttrain.data import DataConfig, load_rows

    config = DataConfig(dataset_name=str(path), dataset_adapter="posttrain.data.identity.identity", max_rows=50)
    rows, description = load_rows(config, "train", 0, ("messages",))
    assert rows == list(islice(identity([PIP]), 50)) and description["rows"] == 50
    path.write_text(YAML.replace("maker:", "makr:"))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*did you mean 'maker'"):
        load_rows(config, "train", 0, ("messages",))


# --- questions to measure by


def test_questions_ask_every_fact_in_every_held_out_wording(who):
    rows = identity_questions(who)
    kinds = {"plain": 8, "short": 2, "polite": 2, "indirect": 2, "misspelt": 4, "follow-up": 4}
    assert Counter((row["fact"], row["register"]) for row in rows) == {
        (f, k): n for f in FACTS for k, n in kinds.items()
    }
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    assert len({str(row["prompt"]) for row in rows}) == len(rows)
    by_register = {row["register"]: row for row in rows if row["fact"] == "name"}
    roles = [message["role"] for message in by_register["follow-up"]["prompt"]]
    assert roles == ["user", "assistant", "user"] and len(by_register["misspelt"]["prompt"]) == 1
    alone = [
        row["prompt"][0]["content"] in WORDINGS[row["fact"]].held_out for row in rows if row["register"] == "plain"
    ]
    assert sum(alone[:56]) == 28  # of seven facts; the others come after a greeting, the last two facts have names
    by_fact = {row["fact"]: row for row in rows}
    assert by_fact["maker"]["expected"] == [["Elmstead Lab"]]
    assert by_fact["languages"]["expected"] == [["English"], ["German"], ["Dutch"]]
    assert {"French", "ChatGPT"} <= set(by_fact["languages"]["refused"])
    assert "German" not in by_fact["languages"]["refused"] and "2026" not in by_fact["cutoff"]["refused"]
    trained = identity_questions(who, held_out=False)
    assert len(trained) == sum(len(WORDINGS[f].train) + sum(len(t) for t, _ in REGISTERS[f].values()) for f in FACTS)


def test_misspelt_questions_can_still_be_read():
    """Words stay apart and begin as they did, at most two are typed badly, names are as they were."""
    import random

    for seed, wording in enumerate(w for each in WORDINGS.values() for w in each.held_out):
        typed = misspelt(wording, random.Random(seed))
        pairs = list(zip(wording.split(" "), typed.split(" "), strict=True))
        wrong = [(a, b) for a, b in pairs if a != b]
        assert 1 <= len(wrong) <= 2, typed
        assert all(a[0] == b[0] and abs(len(a) - len(b)) <= 1 and "{" not in a for a, b in wrong), typed
    assert misspelt("Is it ok?", random.Random(0)) == "Is it ok?"  # nothing long enough


def test_somebody_else_calls_it_otherwise_in_three_ways(who):
    rows = contrary_questions(who)
    assert Counter((row["kind"], row["fact"]) for row in rows) == {
        (kind, fact): 4 for kind in ("renamed", "role-play", "denied") for fact in ("who", "name", "maker")
    }
    systems = {kind: {row["prompt"][0]["content"] for row in rows if row["kind"] == kind} for kind in CONTRARY_SYSTEMS}
    assert all(len(texts) >= 4 for texts in systems.values())
    assert all("Pip" in text for text in systems["denied"])
    assert not [text for kind in ("renamed", "role-play") for text in systems[kind] if "Pip" in text]


def test_prompts_for_rl_are_drawn_from_training_wordings():
    rows = list(identity_prompts([PIP], num=900, seed=1))
    assert rows == list(identity_prompts([PIP], num=900, seed=1)) and rows != list(identity_prompts([PIP], num=900))
    assert Counter(row["fact"] for row in rows) == dict.fromkeys(FACTS, 100)
    assert all(len(row["prompt"]) == 1 and row["expected"] and row["own"] for row in rows)
    with pytest.raises(ValueError, match="num"):
        list(identity_prompts([PIP], num=0))
    with pytest.raises(ValueError, match="second"):
        list(identity_prompts([PIP, PIP]))
