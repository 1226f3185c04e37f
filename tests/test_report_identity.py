"""Who the models of a run say they are, in the report: the table along the chain, curves over steps and KL.

Run: pytest tests/test_report_identity.py
"""

import json

import pytest
from test_report import Page, assert_inert, gain, measured, put

from posttrain.identity_names import KEPT, RIGHT, YIELDED
from posttrain.report import gains_table, read_run, write_report
from posttrain.report_identity import by_question, drift, table


def share(value: float) -> dict:
    return measured(value, 0.05, n=176, unit="%")


def put_asked(run, name: str, roles: dict, before: tuple, after: tuple, gains: list[dict], mark: str) -> None:
    """A stage that was asked: (right, kept, yields) before and after; `mark` is what "before" is called there."""
    names = (RIGHT, KEPT, YIELDED)
    metrics = {metric: share(value) for metric, value in zip(names, after, strict=True)}
    metrics |= {f"{metric}, {mark}": share(value) for metric, value in zip(names, before, strict=True)}
    metrics |= {f"{RIGHT}, misspelt": share(0.5), f"{RIGHT}, misspelt, {mark}": share(0.25), "loss": {"value": 1.0}}
    put(run, name, roles, metrics=metrics, gains=gains)


def put_watched(run, name: str, roles: dict) -> None:
    """A stage in which right replies fell, with what it was asked while it trained."""
    gains = [
        gain("keeps who it is", False, change=measured(-0.4, 0.06)),
        gain("keeps to it when called otherwise", True),
    ]
    put_asked(run, name, roles, (0.8, 0.7, 0.0), (0.4, 0.6, 0.2), gains, "before")
    lines = [{"step": step, "reward": step / 10, "kl": step / 4} for step in range(1, 17)]
    for step, right in ((4, 0.7), (8, 0.35), (12, 0.5), (16, 0.45)):
        lines[step - 1] |= {"identity/right": right, "identity/kept": 0.6, "identity/yields": 0.1}
    (run / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "identity"
    learned = gain("knows who it is", True)
    put_asked(run, "sft", {}, (0.3, 0.2, 0.1), (0.8, 0.7, 0.0), [gain("replies that end"), learned], "base")
    put_watched(run, "ppo", {"policy": "sft"})
    put(run, "grpo", {"policy": "sft"})
    return run


def test_the_table_goes_along_the_chain(run):
    sft, ppo = table(read_run(run)[1])
    assert [stage.name for stage, _ in (sft, ppo)] == ["sft", "ppo"]  # grpo was not asked
    assert [(row["before"]["value"], row["after"]["value"]) for row in ppo[1]] == [(0.8, 0.4), (0.7, 0.6), (0.0, 0.2)]
    assert [row["before"]["value"] for row in sft[1]] == [0.3, 0.2, 0.1]
    assert [row["verdict"] for row in sft[1]] == [("learned", True, ""), None, None]
    assert [row["verdict"] for row in ppo[1]] == [
        ("fell", False, "-40.0 [-46.0, -34.0] points"),
        ("kept", True, ""),
        None,
    ]
    columns, rows = by_question(read_run(run)[1])
    assert columns == ["before sft", "sft", "ppo"]
    assert [(name, [cell["value"] for cell in cells]) for name, cells in rows] == [
        ("right, misspelt", [0.25, 0.5, 0.5])
    ]


def test_drift_is_drawn_over_steps_and_over_the_kl(run):
    stages = {stage.name: stage for stage in read_run(run)[1]}
    assert drift(stages["sft"]) is None and drift(stages["grpo"]) is None
    found = drift(stages["ppo"])
    assert found.warns and [caption for caption, _ in found.pictures] == ["over the steps", "by how far it has moved"]
    assert "right about itself 80.0 % before, 40.0 % after; lowest 35.0 % at step 8" in found.said
    steps = str(found.pictures[0][1])
    # Three lines; of each the figures at both ends, which have whiskers, and what was asked at 4, 8 and 12 between.
    assert steps.count('class="whisker') == 6 and steps.count('class="dot') == 15
    assert steps.count('class="line') == 6 and "√KL" not in steps and "√KL" in str(found.pictures[1][1])


def test_a_stage_that_still_runs_shows_what_it_has_asked(run):
    (run / "ppo" / "stage.json").unlink()
    stages = {stage.name: stage for stage in read_run(run)[1]}
    found = drift(stages["ppo"])
    assert not found.warns and "right about itself, lowest 35.0 % at step 8" in found.said
    assert str(found.pictures[0][1]).count('class="dot') == 12
    assert [stage.name for stage, _ in table(list(stages.values()))] == ["sft"]
    assert_inert(Page(write_report(run)))


def test_the_page_has_it_and_draws_it_once(run):
    page = Page(write_report(run))
    assert_inert(page)
    assert "#identity" in [attrs.get("href") for _, attrs in page.tags]
    for text in (
        "Who it says it is",
        "right about itself 80.0 %",
        "keeps to it when called otherwise",
        "fell",
        "learned",
    ):
        assert text in page.words
    assert "identity/right" not in page.words
    assert "keeps who it is" in gains_table(run)
    for name in ("sft", "ppo"):
        put(run, name, {})
    (run / "ppo" / "log.jsonl").write_text("")
    assert "Who it says it is" not in Page(write_report(run)).words
