"""OASST adapters: hand-made trees with the rows they must give, malformed trees, and facts of the real exports."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from posttrain.data.bad_rows import BadRows
from posttrain.data.oasst import oasst_conversations, oasst_rankings
from posttrain.errors import UserError


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
FORMS = {
    "flat": TREE,
    "children first": TREE[::-1],
    "nested": nest(TREE),
    "under tree": [{"message_tree_id": row["message_tree_id"], "tree": row["prompt"]} for row in nest(TREE)],
    # The first exports of 2023: the root in a list, its parent's id the string "None".
    "under replies": [{"message_tree_id": "p1", "replies": [{**nest(TREE)[0]["prompt"], "parent_id": "None"}]}],
    "the root a row": [nest(TREE)[0]["prompt"]],
}
EACH_FORM = pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)


def short(conversation: dict) -> list[str]:
    assert [turn["role"] for turn in conversation["messages"]] == ["user", "assistant"] * (
        len(conversation["messages"]) // 2
    )
    return [turn["content"] for turn in conversation["messages"]]


@EACH_FORM
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


def ids(rows, **options) -> list[str]:
    return [row["message_id"] for row in oasst_conversations(rows, **options)]


def test_filters_of_conversations():
    assert ids(TREE) == ["a3", "a2"]
    assert ids(TREE, synthetic=True) == ["a3", "a2", "a6"]
    assert ids(TREE, deleted=True) == ["a3", "a4", "a7"]
    assert ids(TREE, review_result="any") == ["a3", "a2", "a5"]
    approved = [{**m, "review_result": m["message_id"] not in ("p3", "a2") or None} for m in TREE]
    assert ids(approved, review_result="approved") == ["a1", "a5"]
    assert ids(approved) == ["a3", "a2", "a5"]


@pytest.mark.parametrize("labels", ["flat", "nested"])
def test_quality_is_asked_of_replies(labels):
    """p1's own quality is low, which does not matter; a2 has no label of that name, a5 none at all."""

    def label(**values) -> dict:
        if labels == "nested":
            return {name: {"value": value, "count": 3} for name, value in values.items()}
        return {"name": list(values), "value": list(values.values()), "count": [3] * len(values)}

    rows = [
        message("p1", None, labels=label(quality=0.1, toxicity=0.9)),
        message("a1", "p1", labels=label(toxicity=0.0, quality=0.75)),
        message("a2", "p1", labels=label(toxicity=0.9)),
        message("a3", "p1", labels=label(quality=0.5)),
        message("a4", "p1", labels=label(quality=None)),
        message("a5", "p1", labels=None),
    ]
    assert ids(rows) == ["a1", "a2", "a3", "a4", "a5"]
    assert ids(rows, quality=0.5) == ["a1", "a3"]
    assert ids(rows, quality=0.75) == ["a1"]
    assert ids(rows, quality=0.76) == []


# p1 ┬ a1 (rank 1) ┬ p2 ┬ a4 (unranked)
#    │             │    └ a5 (rank 0)
#    │             └ p3 ── a6
#    ├ a2 (unranked)
#    └ a3 (rank 0) ── p4 ┬ a7 (rank 1)
#                        └ a8 (rank 0)
FORK = [
    *(message("p1", None), message("a1", "p1", rank=1), message("a2", "p1"), message("a3", "p1", rank=0)),
    *(message("p2", "a1"), message("p3", "a1"), message("p4", "a3")),
    *(message("a4", "p2"), message("a5", "p2", rank=0), message("a6", "p3")),
    *(message("a7", "p4", rank=1), message("a8", "p4", rank=0)),
]


def test_top_k_and_caps_keep_the_best_ranked():
    assert ids(FORK) == ["a4", "a5", "a6", "a2", "a7", "a8"]
    assert ids(FORK, top_k=1) == ids(FORK, best_only=True) == ["a8"]
    assert ids(FORK, top_k=2) == ["a4", "a5", "a6", "a7", "a8"]
    # Best first: a3-a8, a3-a7, a1-a5, a1-a4 and a1-a6 (both unranked, as they come), a2; they come out as in the rows.
    in_order = ["a4", "a5", "a6", "a2", "a7", "a8"]
    for most in range(1, 8):
        kept = ["a8", "a7", "a5", "a4", "a6", "a2"][:most]
        assert ids(FORK, max_per_tree=most) == [name for name in in_order if name in kept]
    two = [*FORK, message("p9", None), message("a9", "p9")]
    assert ids(two, max_per_tree=1) == ["a8", "a9"]


def test_filters_of_rankings():
    def ranked(**options) -> list[str]:
        (row,) = oasst_rankings(TREE, **options)
        return [completion[0]["content"] for completion in row["completions"]]

    assert ranked() == ["A2", "A1", "A5"]
    assert ranked(deleted=True) == ["A2", "A7", "A1", "A5"]
    approved = [{**m, "review_result": True} for m in TREE[:1]] + TREE[1:]
    assert list(oasst_rankings(TREE, review_result="approved")) == []  # nobody reviewed the prompt
    assert len(list(oasst_rankings(approved, review_result="approved"))) == 1
    machine = [{**m, "synthetic": m["message_id"] in ("a1", "a6")} for m in TREE]
    assert list(oasst_rankings(machine)) == list(oasst_rankings(TREE))
    (row,) = oasst_rankings(machine, synthetic=False)
    assert [completion[0]["content"] for completion in row["completions"]] == ["A2", "A5"]


@pytest.mark.parametrize(
    "options, error",
    [
        ({"top_k": 0}, "top_k=0"),
        ({"max_per_tree": 0}, "max_per_tree=0"),
        ({"best_only": True, "top_k": 2}, "best_only and top_k=2"),
        ({"quality": 70}, "quality=70; expected 0 to 1"),
        ({"review_result": True}, "review_result=True; expected one of any, not_rejected, approved"),
        ({"orphans": "drop"}, "orphans='drop'"),
    ],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        list(oasst_conversations(TREE, **options))


def test_best_only_takes_the_first_where_nobody_is_ranked():
    rows = [message("p1", None), message("a1", "p1"), message("a2", "p1")]
    assert [row["message_id"] for row in oasst_conversations(rows, best_only=True)] == ["a1"]


@EACH_FORM
def test_rankings_close_gaps_and_keep_ties(rows):
    (row,) = oasst_rankings(rows)
    assert row["prompt"] == [{"role": "user", "content": "P1"}]
    assert row["ranks"] == [0, 1, 1]  # were 0, 2, 2; the deleted reply held 1
    assert row["message_id"] == "p1"
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
    "duplicate id": ([message("p8", None), message("p8", None)], "p8.*twice", "duplicate_id"),
    "cycle": ([message("a8", "p9"), message("p9", "a8")], "a8.*cycle", "cycle"),
    "own parent": ([message("p7", "p7")], "p7.*same role", "repeated_role"),
    "same role": ([message("p7", None), message("p8", "p7")], "p8.*same role", "repeated_role"),
    "root is a reply": ([message("a8", None)], "a8.*starts with", "wrong_role"),
    "unknown role": ([message("p7", None, role="system")], "p7.*'system'", "wrong_role"),
    "no text": ([message("p7", None, text=None)], "p7.*'text'", "missing_column"),
    "text is a list": ([message("p7", None, text=["Hi"])], "p7.*'text'", "wrong_type"),
    "rank is a float": ([message("p7", None), message("a8", "p7", rank=1.5)], "a8.*rank 1.5", "wrong_type"),
    "rank is a bool": ([message("p7", None), message("a8", "p7", rank=True)], "a8.*rank True", "wrong_type"),
    "parent is a number": ([message("p7", 7)], "p7.*parent_id 7", "wrong_type"),
    "other columns": ([{"question": "?"}], "row 0.*'message_id' is None.*question", "missing_column"),
    "no lang": ([{k: v for k, v in message("p7", None).items() if k != "lang"}], "p7.*lang=None", "missing_column"),
    "nested under another": (
        [{"prompt": {**message("p7", None), "replies": [message("a8", "p8")]}}],
        "a8.*parent_id p8.*under p7",
        "missing_parent",
    ),
    "replies are texts": ([{"prompt": {**message("p7", None), "replies": ["Hi"]}}], "found 'Hi'", "wrong_type"),
    "replies are a text": ([{"prompt": {**message("p7", None), "replies": "Hi"}}], "p7.*replies", "wrong_type"),
}


@pytest.mark.parametrize("adapter", [oasst_conversations, oasst_rankings])
@pytest.mark.parametrize("rows, error, reason", MALFORMED.values(), ids=MALFORMED)
def test_malformed_trees_are_refused_by_name_or_counted(adapter, rows, error, reason):
    with pytest.raises(ValueError, match=error):
        list(adapter(rows))
    with pytest.raises(UserError, match=error):
        list(adapter(rows, bad=BadRows("stop")))
    bad = BadRows("skip")
    assert list(adapter(TREE + rows, bad=bad)) == list(adapter(TREE))
    assert bad.counts == {reason: 1}


def test_what_stands_below_a_bad_message_goes_with_it_and_is_counted_once(caplog):
    below = [message("p8", None, role="bot"), message("a8", "p8"), message("p9", "a8"), message("a9", "p9")]
    for rows in (below, below[::-1], nest(below)):
        bad = BadRows("skip")
        assert list(oasst_conversations(TREE + rows, bad=bad)) == list(oasst_conversations(TREE))
        assert bad.counts == {"wrong_role": 1}
    assert "left out 3 of 14 messages at or below bad ones" in caplog.text


def test_each_cycle_is_counted_once():
    """Two rings of four, with a branch below the first that comes before it in the file."""
    rows = [message("a9", "p8"), message("p8", "a1x")]
    for x in "xy":
        names = [f"a1{x}", f"p1{x}", f"a2{x}", f"p2{x}"]
        rows += [message(name, names[i - 1]) for i, name in enumerate(names)]
    bad = BadRows("skip")
    assert list(oasst_conversations(TREE + rows, bad=bad)) == list(oasst_conversations(TREE))
    assert bad.counts == {"cycle": 2}


def test_a_tree_given_twice_comes_out_once():
    bad = BadRows("skip")
    assert list(oasst_conversations(nest(TREE) * 2, bad=bad)) == list(oasst_conversations(TREE))
    assert bad.counts == {"duplicate_id": 1}  # of the root, and all of the tree with it


@pytest.mark.parametrize("adapter", [oasst_conversations, oasst_rankings])
def test_missing_parents_are_counted_or_refused(adapter, caplog):
    orphans = [message("a8", "p9", rank=0), message("a9", "p9", rank=1), message("p8", "a8")]
    assert list(adapter(TREE + orphans)) == list(adapter(TREE))
    assert "left out 3 of 14 messages: 2 whose parent is missing" in caplog.text
    for policy in ("stop", "skip"):  # real exports have them: both policies leave them out, and count them
        bad = BadRows(policy)
        assert list(adapter(TREE + orphans, bad=bad)) == list(adapter(TREE))
        assert bad.counts == {"missing_parent": 2} and "a8" in bad.first["missing_parent"]
    with pytest.raises(ValueError, match="a8.*parent p9"):
        list(adapter(TREE + orphans, orphans="stop"))
    with pytest.raises(UserError, match="a8.*parent p9"):
        list(adapter(TREE + orphans, orphans="stop", bad=BadRows("stop")))
    bad = BadRows("skip")
    assert list(adapter(TREE + orphans, orphans="stop", bad=bad)) == list(adapter(TREE))
    assert bad.counts == {"missing_parent": 2}


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
