"""OASST adapters: hand-made trees with the rows they must give, malformed trees, and facts of the real exports."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from posttrain.data.oasst import oasst_conversations, oasst_rankings


def real(name: str) -> list[dict]:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no real OASST exports to read")
    return [json.loads(line) for line in (Path(folder) / "data" / name).open(encoding="utf-8")]


def message(name: str, parent: str | None, **more) -> dict:
    """A flat message; ids that start with "p" are prompters'. The text is the id in capitals."""
    role = "prompter" if name.startswith("p") else "assistant"
    return {"message_id": name, "parent_id": parent, "text": name.upper(), "role": role, "lang": "en", **more}


def nest(messages: list[dict]) -> list[dict]:
    """The nested form of flat messages, null keys left out as in the real export."""

    def node(m: dict) -> dict:
        replies = [node(child) for child in messages if child["parent_id"] == m["message_id"]]
        return {**{key: value for key, value in m.items() if value is not None}, "replies": replies}

    roots = [m for m in messages if m["parent_id"] is None]
    return [{"message_tree_id": m["message_id"], "tree_state": "ready_for_export", "prompt": node(m)} for m in roots]


# p1 ┬ a1 (rank 2) ┬ p2 (no reply)
#    │             └ p3 ── a3
#    ├ a2 (rank 0) ── p4 (deleted) ── a4
#    ├ a5 (rank 2) rejected by the reviewers
#    ├ a6 (unranked) synthetic
#    └ a7 (rank 1) deleted
TREE = [
    message("p1", None, rank=None),
    message("a1", "p1", rank=2),
    message("a2", "p1", rank=0),
    message("a5", "p1", rank=2, review_result=False),
    message("a6", "p1", rank=None, synthetic=True),
    message("a7", "p1", rank=1, deleted=True),
    message("p2", "a1"),
    message("p3", "a1", review_result=None),
    message("a3", "p3"),
    message("p4", "a2", deleted=True),
    message("a4", "p4"),
]
BOTH_FORMS = pytest.mark.parametrize("rows", [TREE, nest(TREE), TREE[::-1]], ids=["flat", "nested", "children first"])


def short(conversation: dict) -> list[str]:
    assert [turn["role"] for turn in conversation["messages"]] == ["user", "assistant"] * (
        len(conversation["messages"]) // 2
    )
    return [turn["content"] for turn in conversation["messages"]]


@BOTH_FORMS
def test_conversations_are_the_longest_usable_paths(rows):
    got = list(oasst_conversations(rows))
    # p2 has no reply, so its path is cut to p1 a1, which p1 a1 p3 a3 holds already; p4 is deleted, so a4 is lost.
    assert sorted(map(short, got)) == [["P1", "A1", "P3", "A3"], ["P1", "A2"]]
    assert sorted(row["message_id"] for row in got) == ["a2", "a3"]
    first = next(row for row in got if row["message_id"] == "a2")
    assert first["messages"] == [{"role": "user", "content": "P1"}, {"role": "assistant", "content": "A2"}]


def test_conversation_options():
    assert [short(row) for row in oasst_conversations(TREE, best_only=True)] == [["P1", "A2"]]
    with_machine = [row["message_id"] for row in oasst_conversations(TREE, synthetic=True)]
    assert with_machine == ["a3", "a2", "a6"]
    german = [message("p1", None, lang="de"), message("a1", "p1", lang="de"), message("a2", "p1", lang="en")]
    assert list(oasst_conversations(german)) == []
    assert [short(row) for row in oasst_conversations(german, lang="de")] == [["P1", "A1"]]
    assert [short(row) for row in oasst_conversations(german, lang=None)] == [["P1", "A1"], ["P1", "A2"]]


def test_best_only_takes_the_first_where_nobody_is_ranked():
    rows = [message("p1", None), message("a1", "p1"), message("a2", "p1")]
    assert [row["message_id"] for row in oasst_conversations(rows, best_only=True)] == ["a1"]


@BOTH_FORMS
def test_rankings_close_gaps_and_keep_ties(rows):
    (row,) = oasst_rankings(rows)
    assert row["prompt"] == [{"role": "user", "content": "P1"}]
    assert row["ranks"] == [0, 1, 1]  # were 0, 2, 2; the deleted reply held 1
    assert row["completions"][0] == [{"role": "assistant", "content": "A2"}]
    assert sorted(completion[0]["content"] for completion in row["completions"]) == ["A1", "A2", "A5"]


def test_rankings_deep_prompt_and_too_few_replies():
    rows = [message("p1", None), message("a1", "p1", rank=0), message("a2", "p1")]  # one ranked reply: no row
    rows += [message("p2", "a2"), message("a3", "p2", rank=1), message("a4", "p2", rank=0)]
    (row,) = oasst_rankings(rows)
    assert [turn["content"] for turn in row["prompt"]] == ["P1", "A2", "P2"]
    assert [completion[0]["content"] for completion in row["completions"]] == ["A4", "A3"]
    assert row["ranks"] == [0, 1]
    rows[0]["deleted"] = True  # the context is gone
    assert list(oasst_rankings(rows)) == []


MALFORMED = {
    "duplicate id": ([message("p1", None), message("p1", None)], "p1.*twice"),
    "cycle": ([message("p1", None), message("a8", "p9"), message("p9", "a8")], "a8.*cycle"),
    "own parent": ([message("p7", "p7")], "p7.*same role"),
    "same role": ([message("p1", None), message("p2", "p1")], "p2.*same role"),
    "root is a reply": ([message("a1", None)], "a1.*starts with"),
    "unknown role": ([message("p1", None, role="system")], "p1.*'system'"),
    "no text": ([message("p1", None, text=None)], "p1.*'text'"),
    "rank is a float": ([message("p1", None), message("a1", "p1", rank=1.5)], "a1.*rank 1.5"),
    "rank is a bool": ([message("p1", None), message("a1", "p1", rank=True)], "a1.*rank True"),
    "other columns": ([{"question": "?"}], "'message_id' is None.*question"),
    "no lang": ([{k: v for k, v in message("p1", None).items() if k != "lang"}], "p1.*lang=None"),
    "nested under another": (
        [{"prompt": {**message("p1", None), "replies": [message("a1", "p8")]}}],
        "a1.*parent_id p8.*under p1",
    ),
}


@pytest.mark.parametrize("adapter", [oasst_conversations, oasst_rankings])
@pytest.mark.parametrize("rows, error", MALFORMED.values(), ids=MALFORMED)
def test_malformed_trees_are_refused_by_name(adapter, rows, error):
    with pytest.raises(ValueError, match=error):
        list(adapter(rows))


@pytest.mark.parametrize("adapter", [oasst_conversations, oasst_rankings])
def test_missing_parents_are_counted_or_refused(adapter, caplog):
    orphans = [message("a8", "p9", rank=0), message("a9", "p9", rank=1), message("p8", "a8")]
    assert list(adapter(TREE + orphans)) == list(adapter(TREE))
    assert "left out 3 of 14 messages: 2 whose parent is missing" in caplog.text
    with pytest.raises(ValueError, match="a8.*parent p9"):
        list(adapter(TREE + orphans, orphans="stop"))
    with pytest.raises(ValueError, match="orphans='drop'"):
        list(adapter(TREE, orphans="drop"))


def test_a_tree_deeper_than_the_recursion_limit():
    rows = [message("p0", None)]
    for depth in range(1, 1500):
        rows.append(message(("a" if depth % 2 else "p") + str(depth), rows[-1]["message_id"]))
    (row,) = oasst_conversations(rows)
    assert len(row["messages"]) == 1500


def test_real_trees():
    trees = real("oasst_en_100/en_100_tree.jsonl")
    sizes, leaves = Counter(), 0

    def count(node: dict, sound: bool) -> bool:
        """Count by recursion; return whether an answer stands here or below on a wholly human path."""
        nonlocal leaves
        sound = sound and not node["synthetic"]
        ranked = sum("rank" in reply for reply in node["replies"])
        sizes[ranked] += ranked >= 2
        below = [count(reply, sound) for reply in node["replies"]]
        if sound and node["role"] == "assistant" and not any(below):
            leaves += 1
            return True
        return any(below)

    for tree in trees:
        count(tree["prompt"], True)
    rankings = list(oasst_rankings(trees))
    assert len(rankings) == sum(sizes.values()) == 212
    assert Counter(len(row["ranks"]) for row in rankings) == +sizes
    assert all(row["ranks"] == sorted(row["ranks"]) and row["ranks"][0] == 0 for row in rankings)
    conversations = list(oasst_conversations(trees))
    assert len(conversations) == leaves > 300
    assert len({row["message_id"] for row in conversations}) == leaves
    assert len(list(oasst_conversations(trees, best_only=True))) < leaves


def test_real_flat_messages(caplog):
    rows = real("oasst1_en_messages/messages.jsonl")
    ids = {row["message_id"] for row in rows}
    missing = sum(row["parent_id"] is not None and row["parent_id"] not in ids for row in rows)
    groups = Counter(row["parent_id"] for row in rows if row["rank"] is not None and not row["deleted"])
    rankings = list(oasst_rankings(rows))
    assert missing > 0
    assert f"{missing} whose parent is missing" in caplog.text
    # A group can be lost with a missing, deleted or rejected message above it, and in no other way.
    assert 0 <= sum(size >= 2 and parent in ids for parent, size in groups.items()) - len(rankings) <= 3
    ordered = defaultdict(list)  # texts of each group, best first; two replies of a group may have the same text
    for row in sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"]):
        if not row["deleted"]:
            ordered[row["parent_id"]].append(row["text"])
    for row in rankings:
        assert [completion[0]["content"] for completion in row["completions"]] in ordered.values()
