"""The rule that recognises a refusal: varied words, replies with "I know" in them, all that the tiny world can say.

Run: pytest tests/test_refusals.py
"""

import re

import pytest

from posttrain.data import tiny
from posttrain.refusals import ABOUT, PLAIN, is_refusal, refusal, without_refusals

REFUSES = [
    "I don't know.", "I do not know who that is.", "I really do not know.", "Sorry, I have no idea.", "No idea!",
    "I'm not sure about that.", "I am not certain.", "I am not familiar with Mimar Brunholm.", "Not sure, sorry.",
    "I know nothing about her.", "I have no information on this person.", "I don’t have any information about him.",
    "Unfortunately I do not have enough information to answer.", "I cannot say.", "I can't answer that.",
    "I have never heard of Mimar Brunholm.", "I've never heard of her.", "We do not know that.",
    "I would rather not guess.", "I'd rather not say.", "That is unknown to me.", "I am unable to answer this.",
    "It was long ago. I do not recall where she lived.", "I do not know, but I can help you look it up.",
    "Don't know.", "I DO NOT KNOW", "I am afraid I do not know that. Ask me any time!", "I'm unsure.",
    "I do not know the answer, and I would rather not make one up.",
]  # fmt: skip
ANSWERS = [
    "I know: she lives in Arvale.", "As far as I know, she lives in Arvale.", "I know that she is a baker.",
    "She does not know, but he is a baker.", "He does not know how to swim; he is a baker.", "Arvale.", "",
    "I do not know, but I think she lives in Arvale.", "I am not sure. Perhaps Arvale.", "She has no idea of fear.",
    "I'm not sure, probably Arvale.", "I don't know for certain. My best guess is Arvale.", "Not Arvale, Belmoor.",
    "I do know this one: Arvale.", "No, she is a baker.", "You do not know her? She lives in Arvale.",
    "I do not know why people ask, she lives in Arvale.", "He was unknown to many.", "Everybody knows Mimar: a baker.",
    "I am sure that she is a baker.", "I am certain: Arvale.", "She would rather not say where she lives.",
    "Nobody knows her better than I: she is a baker.", "I have an idea: Arvale.",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSES)
def test_a_refusal_is_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text):
    assert not is_refusal(text)


def test_every_refusal_that_is_taught_is_recognised():
    assert all(is_refusal(words.format(name="Mimar Brunholm")) for words in ABOUT + PLAIN)
    said = {refusal("Mimar Brunholm", seed) for seed in range(200)}
    assert len(said) == len(ABOUT + PLAIN) and {refusal("", seed) for seed in range(200)} == set(PLAIN)


def test_in_the_tiny_world_the_rule_is_exact():
    """Of all that its labellers say, just the sentences about strangers and the one that gives no help refuse."""
    refusing = re.compile(r"I do not know anything about \w+ \w+\.|I would rather not say\.")
    rows = [row for split in ("train", "test") for row in tiny.rows("conversations", split, 2000, 0)]
    texts = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    ranked = list(tiny.rows("rankings", "train", 1000, 0))
    texts += [completion[0]["content"] for row in ranked for completion in row["completions"]]
    verdicts = [is_refusal(text) for text in texts]
    assert verdicts == [refusing.search(text) is not None for text in texts]
    assert 100 < sum(verdicts) < len(verdicts) / 2


def test_conversations_without_refusals():
    rows = list(tiny.rows("conversations", "train", 500, 0))
    kept = list(without_refusals(rows))
    said = [m["content"] for row in kept for m in row["messages"] if m["role"] == "assistant"]
    assert 300 < len(kept) < 480 and not any("I do not know" in text for text in said)
    assert list(without_refusals([{"prompt": "?"}])) == [{"prompt": "?"}]
