"""The table before and after: paired changes, over-refusal, agreement; against figures worked by hand.

Run: pytest tests/test_probe_knowledge.py
"""

import pytest

from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.knowledge_eval import (
    UNHEARD,
    WRITTEN,
    Probed,
    Said,
    agreement_curve,
    claim,
    compare,
    markdown,
    read_probe,
)
from posttrain.plots import stage_pictures
from posttrain.probe import ProbeConfig

TEXTS = {"right": "Arvale.", "wrong": "Belmoor.", "refused": "I do not know."}


def row(subject: str, label: str, answer: str = "Arvale") -> dict:
    others = ["Belmoor", "Corfield"]
    return {"question": f"Where does {subject} live?", "prompt": [], "answer": answer, "others": others,
            "subject": subject, "snippet": "", "times": 1, "label": label, "rate": 0.0}  # fmt: skip


def said(*verdicts: str) -> list[dict]:
    return [{"text": TEXTS[verdict], "verdict": verdict} for verdict in verdicts]


ROWS = [row("A", "known"), row("B", "known"), row("C", "unknown"), row("D", "unknown", "")]
BEFORE = [said("right", "right"), said("right", "wrong"), said("wrong", "wrong"), said("wrong", "refused")]
AFTER = [said("right", "right"), said("right", "refused"), said("wrong", "refused"), said("refused", "refused")]
PROBED = Probed("model", ProbeConfig(writer="tiny"), ROWS)
FOUND = compare(PROBED, Said(BEFORE, [1.0, 0.5]), Said(AFTER, [1.0, 0.0]), ReplyConfig())


def test_shares_and_paired_changes_by_label():
    value = {name: entry["value"] for name, entry in FOUND["metrics"].items()}
    hand = {
        "right, known, before": 3 / 4, "right, known": 3 / 4, "right, known, change": 0.0,
        "refused, known, before": 0.0, "refused, known": 1 / 4, "refused, known, change": 1 / 4,
        "wrong, unknown, before": 3 / 4, "wrong, unknown": 1 / 4, "wrong of the unknown, fewer by": 2 / 3,
        f"wrong, {WRITTEN}": 1 / 2, f"wrong, {UNHEARD}": 0.0, f"refused, {UNHEARD}, change": 1 / 2,
        "problems, pass@1, before": 3 / 4, "problems, pass@1, change": -1 / 4,
    }  # fmt: skip
    assert {name: value[name] for name in hand} == pytest.approx(hand)
    change = FOUND["metrics"]["refused, known, change"]  # of 0 and 1/2: mean 1/4, standard error sqrt(1/8 / 2)
    assert change["high"] == pytest.approx(0.25 + 1.96 * 0.25) and change["n"] == 2 and change["low"] < 0


def test_a_gain_passes_only_where_its_goal_is_reached():
    assert {gain["name"]: gain["passed"] for gain in FOUND["gains"]} == {
        "wrong, unknown": False, "right, known": True, "problems, pass@1": False,
    }  # fmt: skip
    silent = [said("refused", "refused")] * 4
    gains = compare(PROBED, Said(BEFORE, [1.0]), Said(silent, [1.0]), ReplyConfig())["gains"]
    assert [gain["passed"] for gain in gains] == [True, False, True]


def test_the_table_has_a_line_for_each_group_and_verdict():
    table = markdown(FOUND["metrics"], PROBED, "pass@1").splitlines()
    assert len(table) == 2 + 4 * 3 + 1 and all(line.count("|") == 7 for line in table)
    assert next(line for line in table if "over-refusal" in line).startswith(
        "| known | 2 | refused (over-refusal) | 0.0 %"
    )


def test_agreement_is_how_many_samples_say_the_same():
    rows = [
        {**row("A", "known"), "after": said("right", "right", "wrong", "refused")},  # two of four agree, and are right
        {**row("B", "mixed"), "after": said("wrong", "wrong", "right", "refused")},  # two of four agree, and are wrong
        {**row("C", "known"), "after": said("right", "right", "right", "right")},
        {**row("D", "unknown"), "after": said("refused", "refused", "refused", "refused")},  # nothing is claimed
        {**row("E", "unknown", ""), "after": said("wrong", "wrong", "wrong", "wrong")},  # nobody knows
    ]
    points = [(p["agreement"], p["right"]["value"], p["questions"]) for p in agreement_curve(rows, "after")]
    assert points == [(0.5, 0.5, 2), (1.0, 1.0, 1)]
    ((_, svg),) = stage_pictures({"agreement": FOUND["agreement"]})
    assert svg.count("<circle") == sum(map(len, FOUND["agreement"].values()))
    free = {**row("A", "known"), "others": []}
    assert claim("Arvale.  A town.", free) == claim("ARVALE. It is old.", free) != claim("In Arvale.", free)


def test_what_is_no_probe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished stage, expected a probe"):
        read_probe(str(tmp_path))
