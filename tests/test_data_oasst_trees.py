"""OASST adapters on random forests and on the real exports, against a count of another kind: from each reply upwards.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_data_oasst_trees.py
"""

import json
import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.bad_rows import BadRows
from posttrain.data.oasst import oasst_conversations, oasst_rankings

OPTIONS = {"lang": "en", "review_result": "not_rejected", "deleted": False, "synthetic": False, "quality": None}


def alive(message: dict, o: dict) -> bool:
    return (
        message["text"].strip() != ""
        and (o["lang"] is None or message["lang"] == o["lang"])
        and not (message["deleted"] and not o["deleted"])
        and not (message["synthetic"] and not o["synthetic"])
    )


def sound(message: dict, o: dict) -> bool:
    allowed = {"any": [True, False, None], "not_rejected": [True, None], "approved": [True]}[o["review_result"]]
    if o["quality"] is not None and message["role"] == "assistant":
        labels = message["labels"] or {"name": [], "value": []}
        values = [v for n, v in zip(labels["name"], labels["value"], strict=True) if n == "quality"]
        if values in ([], [None]) or values[0] < o["quality"]:
            return False
    return alive(message, o) and message["review_result"] in allowed


def chains(messages: list[dict]) -> list[list[dict]]:
    """For each message the way down to it from its root, found by walking up; none where a parent is missing."""
    by_id = {message["message_id"]: message for message in messages}
    found = []
    for message in messages:
        chain = [message]
        while chain[0]["parent_id"] in by_id:
            chain.insert(0, by_id[chain[0]["parent_id"]])
        if chain[0]["parent_id"] is None:
            found.append(chain)
    return found


def expected_ids(messages: list[dict], top_k=None, max_per_tree=None, **options) -> list[str]:
    """Ids of the last messages of the conversations, in order: sound chains that end in a reply and go on in none."""
    o = {**OPTIONS, **options}
    place = {message["message_id"]: i for i, message in enumerate(messages)}
    beside = defaultdict(list)
    for message in messages:
        if message["role"] == "assistant" and sound(message, o):
            beside[message["parent_id"]].append(message)

    def rank(message: dict) -> float:
        return math.inf if message["rank"] is None else message["rank"]

    def followed(message: dict) -> bool:
        better = sorted(beside[message["parent_id"]], key=lambda m: (rank(m), place[m["message_id"]]))
        return message["role"] == "prompter" or message in better[: top_k or len(better)]

    whole = [chain for chain in chains(messages) if all(sound(m, o) and followed(m) for m in chain)]
    replies = [chain for chain in whole if chain[-1]["role"] == "assistant"]
    inner = {m["message_id"] for chain in replies for m in chain[:-1]}
    ends = [chain for chain in replies if chain[-1]["message_id"] not in inner]
    ends.sort(key=lambda chain: [place[m["message_id"]] for m in chain])
    if max_per_tree:
        trees = defaultdict(list)
        for chain in ends:
            trees[chain[0]["message_id"]].append(chain)
        best = [sorted(t, key=lambda c: [rank(m) for m in c[1::2]])[:max_per_tree] for t in trees.values()]
        kept = [chain for tree in best for chain in tree]
        ends = [chain for chain in ends if chain in kept]
    return [chain[-1]["message_id"] for chain in ends]


def expected_rankings(messages: list[dict], **options) -> dict[str, list[tuple[int, str]]]:
    """For each prompt's id its ranked replies (rank, text), of two and more."""
    o = {**OPTIONS, "synthetic": True, **options}
    groups = defaultdict(list)
    for *context, reply in chains(messages):
        ranked = reply["role"] == "assistant" and reply["rank"] is not None
        if ranked and alive(reply, o) and all(sound(m, o) for m in context):
            groups[context[-1]["message_id"]].append((reply["rank"], reply["text"]))
    return {prompt: sorted(group) for prompt, group in groups.items() if len(group) >= 2}


def nested(messages: list[dict]) -> list[dict]:
    """The trees of flat messages; labels become a dict, null keys go."""
    replies = defaultdict(list)
    for message in messages:
        replies[message["parent_id"]].append(message)

    def node(message: dict) -> dict:
        out = {key: value for key, value in message.items() if value is not None}
        if message["labels"]:
            pairs = zip(message["labels"]["name"], message["labels"]["value"], strict=True)
            out["labels"] = {name: {"value": value, "count": 3} for name, value in pairs}
        return {**out, "replies": [node(reply) for reply in replies[message["message_id"]]]}

    return [{"message_tree_id": root["message_id"], "prompt": node(root)} for root in replies[None]]


@st.composite
def forests(draw) -> list[dict]:
    messages: list[dict] = []
    for i in range(draw(st.integers(1, 14))):
        parent = draw(st.none() | st.sampled_from(messages)) if messages else None
        value = draw(st.sampled_from([None, 0.2, 0.5, 0.8]))
        messages.append(
            {
                "message_id": f"m{i}",
                "parent_id": parent and parent["message_id"],
                "role": "assistant" if parent and parent["role"] == "prompter" else "prompter",
                "text": draw(st.sampled_from([f"text {i}"] * 9 + [" "])),
                "lang": draw(st.sampled_from(["en", "en", "en", "en", "de"])),
                "rank": draw(st.sampled_from([None, 0, 1, 2, 5])),
                "deleted": draw(st.sampled_from([False] * 6 + [True])),
                "synthetic": draw(st.sampled_from([False] * 6 + [True])),
                "review_result": draw(st.sampled_from([True, True, True, None, False])),
                "labels": draw(st.none() | st.just({"name": ["spam", "quality"], "value": [0.0, value]})),
            }
        )
    return messages


FILTERS = {
    "lang": st.sampled_from(["en", "de", None]),
    "review_result": st.sampled_from(["any", "not_rejected", "approved"]),
    "deleted": st.booleans(),
    "synthetic": st.booleans(),
}
MORE = {
    "quality": st.sampled_from([0.5, 0.8]),
    "top_k": st.integers(1, 3),
    "max_per_tree": st.integers(1, 3),
}


@settings(max_examples=300, deadline=None)
@given(forests(), st.fixed_dictionaries({}, optional={**FILTERS, **MORE}))
def test_conversations_of_random_forests(messages, options):
    expected = expected_ids(messages, **options)
    rows = list(oasst_conversations(messages, **options))
    assert [row["message_id"] for row in rows] == expected
    assert list(oasst_conversations(nested(messages), **options)) == rows
    for row in rows:
        texts = next([m["text"] for m in c] for c in chains(messages) if c[-1]["message_id"] == row["message_id"])
        roles = ["user", "assistant"] * (len(texts) // 2)
        assert row["messages"] == [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


@settings(max_examples=50, deadline=None)
@given(forests())
def test_without_filters_every_leaf_comes_out_once(messages):
    """Leaves counted by their lack of children; a prompter's leaf counts for the reply above it, if that has none."""
    messages = [{**m, "text": m["text"].strip() or "some"} for m in messages]
    rows = list(oasst_conversations(messages, lang=None, review_result="any", deleted=True, synthetic=True))
    parents = {m["parent_id"] for m in messages}
    leaves = {m["message_id"] for m in messages if m["role"] == "assistant" and m["message_id"] not in parents}
    got = [row["message_id"] for row in rows]
    assert len(set(got)) == len(got) and leaves <= set(got)
    for name in set(got) - leaves:  # all its prompts are unanswered
        prompts = {m["message_id"] for m in messages if m["parent_id"] == name}
        assert not prompts & parents


@settings(max_examples=200, deadline=None)
@given(forests(), st.fixed_dictionaries({}, optional=FILTERS))
def test_rankings_of_random_forests(messages, options):
    expected = expected_rankings(messages, **options)
    for form in (messages, nested(messages), messages[::-1]):
        rows = {row["message_id"]: row for row in oasst_rankings(form, **options)}
        assert rows.keys() == expected.keys()
        for name, row in rows.items():
            ranks = [rank for rank, _ in expected[name]]
            assert row["ranks"] == [sorted(set(ranks)).index(rank) for rank in ranks]
            texts = [completion[0]["content"] for completion in row["completions"]]
            assert sorted(zip(row["ranks"], texts, strict=True)) == sorted(
                zip(row["ranks"], [text for _, text in expected[name]], strict=True)
            )
            assert row["prompt"][-1]["role"] == "user"


@st.composite
def tangles(draw) -> list[dict]:
    """Messages with parents, roles and ids as they come: cycles, orphans, repeated roles, duplicates."""
    names = st.sampled_from("abcdefgh")
    return [
        {
            "message_id": draw(st.sampled_from([name] * 5 + ["a", None])),
            "parent_id": draw(st.none() | st.sampled_from([*"abcdefgh", "lost"])),
            "role": draw(st.sampled_from(["prompter", "assistant"] * 4 + ["bot"])),
            "text": f"text {i}",
            "lang": "en",
            "rank": draw(st.sampled_from([None, 0, 1, 2, 0.5])) if i % 3 == 0 else None,
        }
        for i, name in enumerate(draw(st.lists(names, min_size=1, max_size=10)))
    ]


@settings(max_examples=300, deadline=None)
@given(tangles(), st.sampled_from([oasst_conversations, oasst_rankings]))
def test_tangles_raise_or_are_counted_and_what_comes_out_is_real(messages, adapter):
    bad = BadRows("skip")
    rows = list(adapter(messages, bad=bad))
    parents = {(m["text"], p["text"]) for m in messages for p in messages if p["message_id"] == m["parent_id"]}
    for row in rows:
        turns = row["messages"] if adapter is oasst_conversations else row["prompt"]
        assert [turn["role"] for turn in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
        for above, below in zip(turns, turns[1:], strict=False):
            assert (below["content"], above["content"]) in parents
    faults = bad.counts - Counter(missing_parent=bad.counts["missing_parent"])
    if faults:
        with pytest.raises(ValueError):
            list(adapter(messages))
    else:
        assert list(adapter(messages)) == rows
    strict = BadRows("skip")
    assert list(adapter(messages, bad=strict, orphans="stop")) == rows and strict.counts == bad.counts


def real(name: str) -> list[dict]:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real OASST exports to read")
    return [json.loads(line) for line in (Path(folder) / "data" / name).open(encoding="utf-8")]


def flat(trees: list[dict]) -> list[dict]:
    """The messages of nested trees, with all keys."""
    found = []

    def walk(node: dict) -> None:
        found.append({"parent_id": None, "rank": None, "labels": None, **node})
        for reply in node["replies"]:
            walk(reply)

    for tree in trees:
        walk(tree["prompt"])
    return found


@pytest.mark.parametrize(
    "options, num_trees, num_flat",
    [
        ({}, 529, 436),
        ({"top_k": 1}, 97, 90),
        ({"top_k": 2}, 277, 252),
        ({"quality": 0.6}, 0, 214),
        ({"review_result": "any"}, 529, 449),
        ({"deleted": True}, 529, 444),
        ({"synthetic": True}, 546, 436),
        ({"max_per_tree": 2}, 190, 177),
    ],
    ids=str,
)
def test_real_conversations(options, num_trees, num_flat):
    trees, messages = real("oasst_en_100/en_100_tree.jsonl"), real("oasst1_en_messages/messages.jsonl")
    for rows, as_flat, num in ((trees, flat(trees), num_trees), (messages, messages, num_flat)):
        got = [row["message_id"] for row in oasst_conversations(rows, **options)]
        assert sorted(got) == sorted(expected_ids(as_flat, **options)) and len(got) == num


def test_real_rankings():
    trees, messages = real("oasst_en_100/en_100_tree.jsonl"), real("oasst1_en_messages/messages.jsonl")
    for rows, as_flat, num in ((trees, flat(trees), 212), (messages, messages, 197)):
        rankings = list(oasst_rankings(rows))
        expected = expected_rankings(as_flat)
        assert {row["message_id"]: len(row["ranks"]) for row in rankings} == {k: len(v) for k, v in expected.items()}
        assert len(rankings) == num
    sizes = Counter(len(row["ranks"]) for row in oasst_rankings(trees))
    assert (min(sizes), max(sizes)) == (2, 9) and sizes.total() == 212
