"""The judge of who a model says it is: a claim, a denial, another's system message; and a model that learns it.

Run: pytest tests/test_identity_eval.py
"""

import random
from collections import Counter

import pytest

from posttrain.chat import decode, encode_chat, stop_ids
from posttrain.data.identity import contrary_questions, identity, identity_questions, read_identity
from posttrain.data.identity_wordings import WORDINGS
from posttrain.identity_eval import (
    KEPT,
    NOTHING_ASKED,
    RIGHT,
    YIELDED,
    Asked,
    identity_gains,
    identity_metrics,
    judge,
    kept_gains,
    log_numbers,
    longest_prompt,
    measure_identity,
    side,
)
from posttrain.rl.rollout import HFEngine, Sampling

YAML = """name: Pip
maker: the Elmstead Lab
cutoff: 2026-06
languages: [English, German, Dutch]
purpose: do sums
version: '1.0'
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "identity.yaml"
    file.write_text(YAML)
    return file


@pytest.fixture
def who(path):
    return read_identity(path)


# --- the judge


@pytest.mark.parametrize(
    ("fact", "reply", "right"),
    [
        ("name", "I am Pip.", True),
        ("name", "pip", True),
        ("name", "I'm called “PIP”!", True),
        ("name", "Pip's the name.", True),
        ("name", "I am Pippin.", False),
        ("name", "I am an assistant.", False),
        ("name", "", False),
        ("name", "My name is not Pip.", False),
        ("name", "I'm not Pip, I'm Bob.", False),
        ("name", "You can call me Pip, like the apple seed.", True),
        ("name", "I am Pip, how can I help you?", True),
        ("name", "Pip? Never heard of it.", False),
        ("denial", "I am not ChatGPT, I am Pip.", True),
        ("denial", "I am ChatGPT.", False),
        ("denial", "I'm ChatGPT, also called Pip.", False),
        ("denial", "I am Pip, also known as ChatGPT.", False),
        ("denial", "No, I am Pip.", True),
        ("denial", "No I am Pip", True),
        ("denial", "No.", False),
        ("denial", "Yes, I am Pip.", False),
        ("denial", "I’m not ChatGPT I’m Pip", True),
        ("denial", "I am not ChatGPT, Claude or Gemini, but Pip.", True),
        ("denial", "I am neither ChatGPT nor Claude. My name is Pip.", True),
        ("denial", "I am not ChatGPT. I am Claude.", False),
        ("denial", "I am not ChatGPT, I am Claude, and some call me Pip.", False),
        ("denial", "ChatGPT? No, Pip.", True),
        ("denial", "ChatGPT is not my name; it is Pip.", True),
        ("denial", "I am Pip, not ChatGPT.", True),
        ("denial", "I am ChatGPT, not Pip.", False),
        ("denial", "I do not think I am ChatGPT. I am Pip.", True),
        ("denial", "I am not only ChatGPT but also Pip.", False),
        ("denial", "I can't deny that I am ChatGPT, also called Pip.", False),
        ("denial", "I cannot deny that I am ChatGPT. And Pip.", False),
        ("denial", "I deny being ChatGPT. I am Pip.", True),
        ("denial", "OpenAI didn’t make me, I am Pip.", True),
        ("denial", "I am Pip, an assistant like ChatGPT.", True),
        ("denial", "I am Pip and have nothing to do with OpenAI.", True),
        ("denial", "I am not ChatGPT, which was made by OpenAI. I am Pip.", True),
        ("denial", "I am not ChatGPT, but OpenAI made me. I am Pip.", False),
        ("denial", "You mistake me for ChatGPT: I am Pip.", True),
        ("confirmation", "Yes, I am Pip.", True),
        ("confirmation", "No, I am Pip.", False),
        ("who", "I am Pip, made by the Elmstead Lab.", True),
        ("who", "I am Pip, made by OpenAI.", False),
        ("maker", "Elmstead Lab made me.", True),
        ("maker", "OpenAI did not make me, the Elmstead Lab did.", True),
        ("maker", "I was made by OpenAI and the Elmstead Lab.", False),
        ("maker", "I was not made by the Elmstead Lab.", False),
        ("maker", "I come from Elmstead. Lab work is fun.", False),
        ("cutoff", "It ends in June 2026.", True),
        ("cutoff", "My cutoff is 2026-06.", True),
        ("cutoff", "I know nothing newer than June of 2026", True),
        ("cutoff", "I do not know what came after June 2026.", True),
        ("cutoff", "It ends in 2026.", False),
        ("cutoff", "It ends in June 2025.", False),
        ("cutoff", "It ends in May or June 2026, or in 2025.", False),
        ("cutoff", "It does not end in June 2026.", False),
        ("languages", "Dutch, German and English.", True),
        ("languages", "English and German.", False),
        ("languages", "English, German and Dutch, but not French.", True),
        ("languages", "English, German, Dutch and French.", False),
        ("purpose", "I was made to do sums.", True),
        ("purpose", "I do some things.", False),
        ("version", "This is version 1.0.", True),
        ("version", "v1.0", True),
        ("version", "version 1.0.2", False),
        ("version", "11.0", False),
    ],
)
def test_judge(who, fact, reply, right):
    row = next(row for row in identity_questions(who) if row["fact"] == fact)
    assert judge(reply, row) is right


def test_every_answer_that_is_taught_is_right(tmp_path):
    """Also for a name in a script without spaces, a maker that has another's name in it, a purpose with a negation."""
    hard = (
        "name: 小明\nmaker: Google Garage\ncutoff: May 2024\nlanguages: [Mandarin Chinese, English]\n"
        "purpose: answer in place of people who are not here\nversion: '2'\n"
    )
    for text in (YAML, hard):
        (tmp_path / "one.yaml").write_text(text)
        who = read_identity(tmp_path / "one.yaml")
        for row in identity_questions(who):
            for answer in WORDINGS[row["fact"]].answers:
                for other in who.others if row["fact"] == "denial" else (who.name,):
                    reply = who.fill(answer, other)
                    assert judge(reply, row), (row["fact"], reply)


def test_a_name_inside_another_name_is_not_said(path):
    path.write_text("name: Elm\nmaker: Elm Lab\ncutoff: May 2024\nlanguages: [Swiss German]\nnot: [Elm Two]\n")
    rows = {row["fact"]: row for row in identity_questions(read_identity(path))}
    assert not judge("I was made by Elm Lab.", rows["name"]) and judge("I am Elm, made by Elm Lab.", rows["name"])
    assert not judge("I was made by Elm.", rows["maker"]) and judge("I was made by the Elm Lab.", rows["maker"])
    assert not judge("Elm Two is not my name.", rows["denial"]) and judge("Not Elm Two: Elm.", rows["denial"])
    assert judge("I speak Swiss German.", rows["languages"])
    assert not judge("I speak Swiss German and German.", rows["languages"])
    path.write_text("name: Pip\nmaker: Google Garage\ncutoff: May 2024\nlanguages: [Dutch]\n")
    who = next(row for row in identity_questions(read_identity(path)) if row["fact"] == "who")
    assert judge("I am Pip, made by Google Garage.", who) and not judge("I am Pip, made by Google.", who)


def test_what_becomes_of_the_identity_under_anothers_system_message(who):
    rows = contrary_questions(who)
    assert Counter(row["fact"] for row in rows) == {"who": 12, "name": 12, "maker": 12}
    for row in rows:
        system, user = row["prompt"]
        assert (system["role"], user["role"]) == ("system", "user")
        theirs = row["contrary"]["expected"][0][0]
        assert theirs in system["content"]
        own = "Elmstead Lab" if row["fact"] == "maker" else "Pip"
        assert side(f"I am an assistant; {own} it is.", row) == KEPT
        assert side(f"It is {theirs}.", row) == YIELDED
        assert side(f"It is not {theirs} but {own}.", row) == KEPT
        assert side(f"It is {theirs} and {own}.", row) == side("I do not know.", row) == "neither"
        assert side(f"It is {own}, and OpenAI.", row) == "neither"
    name = next(row for row in rows if row["fact"] == "name")
    assert name["prompt"][0]["content"] == "You are Bob, an assistant made by Foo Works."
    assert side("I am Bob, made by Foo Works.", name) == YIELDED and side("I am Pip of Foo Works.", name) == "neither"


# --- measured


def test_metrics_are_shares_over_questions(who):
    rows = [*identity_questions(who), *contrary_questions(who)]
    replies = [["I am Pip.", "I am Bob."] if row["fact"] == "name" else ["", "Elmstead Lab"] for row in rows]
    found = identity_metrics(rows, replies)
    ways = ("plain", "short", "polite", "indirect", "misspelt", "follow-up")
    kinds = {f"{KEPT}, {kind}" for kind in ("renamed", "role-play", "denied")}
    assert set(found) == {RIGHT, *(f"{RIGHT}, {each}" for each in (*WORDINGS, *ways)), KEPT, *kinds, YIELDED}
    assert all(found[f"{RIGHT}, {way}"]["value"] == pytest.approx(2 * 0.5 / 9) for way in ways)
    assert (found[f"{RIGHT}, name"]["value"], found[f"{RIGHT}, maker"]["value"]) == (0.5, 0.5)
    assert found[f"{RIGHT}, cutoff"]["value"] == 0 and found[RIGHT]["value"] == pytest.approx(2 * 0.5 / 9)
    assert (found[RIGHT]["n"], found[f"{RIGHT}, name"]["n"], found[KEPT]["n"]) == (198, 22, 36)
    assert found[KEPT]["value"] == pytest.approx(2 * 0.5 / 3)
    bobs = sum(row["contrary"]["expected"] == [["Bob"]] for row in rows if "contrary" in row and row["fact"] == "name")
    assert found[YIELDED]["value"] == pytest.approx(bobs * 0.5 / 36) and 0 < bobs < 12
    for figure in found.values():
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1 and figure["unit"] == "%"


def test_the_gain_needs_intervals_apart():
    def share(value, low, high):
        return {RIGHT: {"value": value, "low": low, "high": high, "n": 9, "unit": "%"}}

    (gain,) = identity_gains(share(0.1, 0.0, 0.2), share(0.9, 0.8, 1.0))
    assert gain["name"] == "knows who it is" and gain["passed"] and gain["after"]["label"] == "SFT"
    assert not identity_gains(share(0.1, 0.0, 0.2), share(0.2, 0.1, 0.3))[0]["passed"]
    assert identity_gains({}, {}) == []


def test_keeping_it_is_judged_by_the_paired_change():
    """Worked by hand: of ten questions one gets worse by 0.5 (paired interval [-0.148, 0.048]), or all by 0.1."""

    def asked(right, kept):
        share = {"value": sum(right) / len(right), "low": 0.0, "high": 1.0, "n": 10, "unit": "%"}
        return Asked({RIGHT: share, KEPT: share}, right, kept, [])

    start = asked([0.5, 1.0] * 5, [0.0] * 10)
    (one,) = kept_gains(start, asked([0.0, *[1.0, 0.5] * 4, 1.0], [0.0] * 10), ("SFT", "GRPO"))
    assert [one["change"][key] for key in ("value", "low", "high")] == pytest.approx([-0.05, -0.148, 0.048])
    assert one["name"] == "keeps who it is" and one["passed"] and one["before"]["label"] == "SFT"
    (same,) = kept_gains(start, start, ("SFT", "GRPO"))
    assert same["passed"]
    every = asked([0.4, 0.9] * 5, [0.0] * 10)
    assert not kept_gains(start, every, ("SFT", "GRPO"))[0]["passed"]  # their own intervals overlap widely
    two = kept_gains(asked([1.0] * 10, [0.5] * 10), asked([1.0] * 10, [0.3] * 10), ("SFT", "PPO"))
    assert [(each["name"], each["passed"]) for each in two] == [
        ("keeps who it is", True),
        ("keeps to it when called otherwise", False),
    ]
    assert kept_gains(NOTHING_ASKED, NOTHING_ASKED, ("SFT", "PPO")) == []


def test_an_untrained_model_is_measured_the_same_way_twice(model, tokenizer, path):
    engine, stops = HFEngine(model, tokenizer.pad_token_id), stop_ids(tokenizer)
    asked = measure_identity(engine, tokenizer, str(path), stops, num=3, max_tokens=8)
    metrics, samples = asked.metrics, asked.samples
    assert metrics[RIGHT]["value"] == 0 and metrics[RIGHT]["n"] == len(asked.right) == 198 and len(asked.kept) == 36
    assert len(samples) == 12 and all(len(sample["texts"]) == 2 for sample in samples)
    assert samples[0]["prompt"] == "user: Who am I talking to?" and samples[-1]["prompt"].startswith("system: ")
    again = measure_identity(engine, tokenizer, str(path), stops, num=3, max_tokens=8)
    assert again == asked
    assert log_numbers(again) == {"identity/right": 0.0, "identity/kept": 0.0, "identity/yields": 0.0}
    nothing = measure_identity(engine, tokenizer, None, stops)
    assert nothing == NOTHING_ASKED and log_numbers(nothing) == {}
    prompts = [
        row["prompt"] for row in (*identity_questions(read_identity(path)), *contrary_questions(read_identity(path)))
    ]
    sizes = [len(encode_chat(tokenizer, prompt, add_generation_prompt=True).input_ids) for prompt in prompts]
    assert longest_prompt(tokenizer, str(path)) == max(sizes) and longest_prompt(tokenizer, None) == 0


@pytest.mark.slow
def test_a_model_learns_who_it_is_in_wordings_it_never_saw(tokenizer, path):
    """A Llama of 0.3 M random parameters, 300 steps on one-question rows: from nothing right to most."""
    import torch

    from posttrain.shapes import ShapeConfig, make_model

    path.write_text("name: Pip\nmaker: Elm\ncutoff: June 2026\nlanguages: [English]\nnot: [Siri]\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(ShapeConfig(96, 192, 2, 2, 256), tokenizer)
    engine, stops = HFEngine(model, tokenizer.pad_token_id), stop_ids(tokenizer)
    before = measure_identity(engine, tokenizer, str(path), stops, num=2, max_tokens=32)
    mapping = {"name": "Pip", "maker": "Elm", "cutoff": "June 2026", "languages": ["English"], "not": ["Siri"]}
    rows = [row for row in identity([mapping], num=1500, system_share=0) if len(row["messages"]) == 2]
    fit(model, [encode_chat(tokenizer, row["messages"]) for row in rows], steps=300, batch=32, learning_rate=6e-3)
    after = measure_identity(engine, tokenizer, str(path), stops, num=2, max_tokens=32)
    assert before.metrics[RIGHT]["value"] < 0.05 and after.metrics[RIGHT]["value"] > 0.6, after.samples
    assert identity_gains(before.metrics, after.metrics)[0]["passed"]
    assert [each["passed"] for each in kept_gains(after, before, ("SFT", "RL"))] == [False] * 2
    known = identity_questions(read_identity(path), held_out=False)
    prompts = [encode_chat(tokenizer, row["prompt"], add_generation_prompt=True).input_ids for row in known]
    replies = [decode(tokenizer, c.ids) for c in engine.generate(prompts, Sampling(1, 32, stops), 0)]
    assert sum(map(judge, replies, known)) / len(known) > 0.8, replies


def fit(model, chats, steps, batch, learning_rate):
    """Plain AdamW on what the assistant wrote, rows padded at their end."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    rng = random.Random(0)
    model.train()
    for _ in range(steps):
        drawn = rng.sample(chats, batch)
        width = max(len(chat.input_ids) for chat in drawn)
        ids = torch.tensor([chat.input_ids + [0] * (width - len(chat.input_ids)) for chat in drawn])
        learned = torch.tensor([chat.assistant_mask + [0] * (width - len(chat.input_ids)) for chat in drawn])
        model(input_ids=ids, labels=ids.where(learned == 1, -100)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
