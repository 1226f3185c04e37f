"""The parts of the report that reckon: curves, time and cost, reward against KL, two runs side by side.

Run: pytest tests/test_report_parts.py
"""

import json
import math
import shutil
from xml.etree import ElementTree

import pytest
from test_report import HOSTILE, Page, assert_inert, gain, measured, put

from posttrain import cli, curves, over_optimization, report_diff
from posttrain.errors import UserError
from posttrain.over_optimization import Judged, best_of_study, study
from posttrain.report import write_picture, write_report
from posttrain.report_cost import costs
from posttrain.report_read import Stage, read_run

SHARES = {"share/generate": 0.5, "share/update": 0.3}
RL_LOG = [
    {"step": s, "time": 10.0 + 2 * s, "loss": -0.1 / s, "reward": 0.1 * s, "reward/reward model": 0.1 * s,
     "kl": (s / 10) ** 2, "completion_length": 20.0 + s, "entropy": 1 / s, "tokens_per_second": 100.0 + s,
     "zero_signal_groups": 0.25, "cut_share": 0.0, **SHARES}
    for s in range(1, 21)
]  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def put_ppo(run, judge_after: float, **more):
    """A PPO stage whose reward model's score rises from 0 to 2, and whose judge ends at `judge_after` from 1."""
    metrics = {
        "reward model, before": measured(0.0, 0.1), "reward model": measured(2.0, 0.1),
        "taste, before": measured(1.0, 0.1), "taste": measured(judge_after, 0.1),
        "KL to the start": measured(4.0, 0.2, unit="nats"), "reply length, before": measured(20.0, 1.0),
        "reply length": measured(40.0, 1.0),
    }  # fmt: skip
    config = {"eval_reward_funcs": ["taste"], "learning_rate": 1e-4}
    put(run, "ppo", {"policy": "sft", "reward": "reward"}, metrics=metrics, config=config, wall_time_s=60.0, **more)
    write_lines(run / "ppo" / "log.jsonl", RL_LOG)


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "one"
    put(run, "sft", {})
    put(run, "reward", {"policy": "sft"})
    put_ppo(run, 0.5)
    return run


# ---- curves ---------------------------------------------------------------------------------------------------------


def test_main_curves_come_first_with_units_and_held_out_figures(run):
    ppo = read_run(run)[1][-1]
    drawn, _ = curves.panels(ppo.log, ppo.kind, ppo.manifest["metrics"])
    assert [each.name for each in drawn if each.main] == ["loss", "reward", "kl", "completion_length", "entropy"]
    assert [each.main for each in drawn][:5] == [True] * 5 and "reward/reward model" not in [p.name for p in drawn]
    by_name = {each.name: each for each in drawn}
    assert by_name["completion_length"].held_out == [(0.0, 20.0, 19.0, 21.0), (20, 40.0, 39.0, 41.0)]
    assert by_name["reward"].held_out == [(0.0, 0.0, -0.1, 0.1), (20, 2.0, 1.9, 2.1)]
    assert by_name["kl"].unit == "nats a reply" and by_name["kl"].held_out == [(20, 4.0, 3.8, 4.2)]


def test_below_the_steps_stand_tokens_and_time():
    log = [{"step": s, "tokens": 1000 * s, "time": 60 + 6 * s} for s in (10, 20, 30)]
    (tokens, at_tokens), (time, at_time) = curves.clock(log)
    assert (tokens, time) == ("tokens", "time")
    assert [at_tokens(s) for s in (10, 15, 40)] == ["10.0k", "15.0k", "40.0k"]  # on the line through both neighbours
    assert [at_time(s) for s in (0, 10, 15)] == ["1m00", "2m00", "2m30"]
    picture = ElementTree.fromstring(
        curves.curves(curves.Panel("loss", lines={"loss": [(10, 2.0), (30, 1.0)]}), curves.clock(log))
    )
    said = [text.text for text in picture.iter("text")]
    assert {"step", "tokens", "time", "20", "20.0k", "3m00"} <= set(said)


def test_the_running_mean_is_the_mean_of_its_window():
    points = [(step, float(step % 7) ** 2) for step in range(50)]
    for (step, found), reach in zip(curves.running_mean(points, 9), [0, 1, 2, 3, *[4] * 42, 3, 2, 1, 0], strict=True):
        assert found == pytest.approx(sum(v for _, v in points[step - reach : step + reach + 1]) / (2 * reach + 1))


# ---- time and cost --------------------------------------------------------------------------------------------------


def test_time_is_divided_between_measuring_and_the_parts_of_a_step(run):
    manifest = {"wall_time_s": 60.0, "tokens": 500, "machine": {"world_size": 4, "device": "H100"}, "stage": "grpo"}
    each, total = costs([Stage("grpo", "finished", manifest, log=RL_LOG), Stage("sft", "not started")], price=3.0)
    shares = {key: share for key, _, share in each[0].parts}
    # step 1 ended at 12 s and each took 2 s: 10 s before them, 40 s of steps, 10 s after them
    assert shares == pytest.approx(
        {"before": 10 / 60, "generate": 20 / 60, "update": 12 / 60, "other": 8 / 60, "after": 10 / 60}
    )
    assert each[0].hours == pytest.approx(4 * 60 / 3600) and each[0].dollars == pytest.approx(0.2)
    assert each[0].rate == 111.0 and each[1].hours is None and total.dollars == pytest.approx(0.2)
    words = Page(write_report(run, price=3.0)).words
    assert "at $3 a device-hour" in words and "Cost" in words and "generate 33 %, update 20 %" in words
    assert "Give --price" in Page(write_report(run)).words


# ---- reward against KL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "warns", "said"),
    [
        (
            0.5,
            True,
            "Over-optimization: reward model rises, 0.00 to 2.00, while taste falls, 1.00 to 0.50, at a KL of 4 nats",
        ),
        (1.5, False, "they rise together, no sign of over-optimization"),
        (0.87, False, "taste does not change clearly"),  # 0.13 is less than hypot(0.1, 0.1)
        (0.85, True, "Over-optimization"),  # 0.15 is more
    ],
)
def test_a_proxy_that_rises_while_the_judge_falls_is_told(run, after, warns, said):
    put_ppo(run, after)
    found = study(read_run(run)[1][-1])
    assert found.warns == warns and said in found.said
    page = Page(write_report(run))
    assert said in page.words and any("warns" in attrs.get("class", "").split() for _, attrs in page.tags) == warns


def test_a_change_is_judged_by_both_half_widths():
    assert Judged("x", measured(1.0, 3.0), measured(5.9, 4.0)).direction == 0  # hypot(3, 4) = 5
    assert Judged("x", measured(1.0, 3.0), measured(6.1, 4.0)).direction == 1


def test_best_of_n_stands_beside_ppo_and_names_its_peak(run):
    (run / "reward" / "bestof").mkdir()
    ns = [1, 2, 4, 8, 16, 32, 64]
    d = [math.sqrt(math.log(n) - (n - 1) / n) for n in ns]
    points = [
        {"n": n, "kl": x * x, "reward model": measured(x, 0.01), "taste": measured(x * (2 - 1.5 * x), 0.01)}
        for n, x in zip(ns, d, strict=True)
    ]  # Gao et al.'s R = d (a - b d): the highest of these d is nearest to a / 2b = 2/3, that of n = 4
    (run / "reward" / "bestof" / "bestof.json").write_text(json.dumps({"curve": points}))
    _, reward, ppo = read_run(run)[1]
    (found,) = best_of_study(reward)
    assert found.warns and "taste is highest at n = 4 and falls after it" in found.said
    assert "taste, best of n" in study(ppo, reward).picture and "best of n" not in study(ppo).picture
    assert Page(write_report(run)).words.count("taste, best of n") == 2
    points[3]["taste"]["value"] = None
    (run / "reward" / "bestof" / "bestof.json").write_text(json.dumps({"curve": points}))
    with pytest.raises(UserError, match=r"bestof\.json: expected a curve"):
        write_report(run)


def test_without_a_judge_a_rising_reward_shows_little(run):
    ppo = read_run(run)[1][-1]
    ppo.manifest["config"] = {}
    assert "No judge was measured" in study(ppo).said and not study(ppo).warns
    ppo.manifest = {}
    assert (
        study(ppo).said
        == "reward model rises in training at a KL of 4 nats a reply. A judge is measured when the stage has finished."
    )
    ppo.log = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}]
    assert study(ppo) is None  # GRPO without a KL term
    assert over_optimization.binned([(x, 2 * x) for x in range(48)])[0] == (0.5, 1.0)


def test_a_stage_that_runs_is_read_from_what_it_was_started_with(run):
    (run / "grpo").mkdir()
    write_lines(run / "grpo" / "log.jsonl", RL_LOG)
    begun = {"stage": "grpo", "config": {"learning_rate": 0.0625}, "parents": {"policy": {"path": str(run / "sft")}}}
    (run / "grpo" / "run.json").write_text(json.dumps(begun))
    stage = next(each for each in read_run(run)[1] if each.name == "grpo")
    assert stage.parents == [("policy", "sft", True)] and stage.config == {"learning_rate": 0.0625}
    words = Page(write_report(run)).words
    assert "A judge is measured when the stage has finished" in words and "0.0625" in words


# ---- rollouts and evaluations ---------------------------------------------------------------------------------------


def test_rollouts_are_folded_marked_and_compared(run):
    put(run, "grpo", {"policy": "sft"})
    write_lines(run / "grpo" / "log.jsonl", RL_LOG)
    rows = [
        {"step": s, "prompt": f"p{s}", "completion": f"c{s} " + "long " * 200 * (s == 1), "reward": 1.0,
         "rewards": {"correct": 1.0, "short": 0.25}, "advantage": 0.0, "tokens": 9, "stop": "stop"}
        for s in (1, 20)
    ]  # fmt: skip
    for name in ("grpo", "ppo"):
        write_lines(run / name / "rollouts.jsonl", rows)
    page = Page(write_report(run))
    assert page.words.count("zero-variance group, or just its mean") == 2  # a critic's advantage of 0 says nothing
    groups = [{**row, "group_rewards": rewards} for row, rewards in zip(rows, ([1.0, 1.0], [0.0, 2.0]), strict=True)]
    write_lines(run / "grpo" / "rollouts.jsonl", groups)  # the second got just its group's mean
    assert Page(write_report(run)).words.count("no signal: zero-variance group") == 1
    assert page.words.count("all of it") == 2 and "short 0.25" in page.words and "9 tokens, ended" in page.words
    assert "reward 0.1 2" in page.words and "length 21 tokens 40 tokens" in page.words  # step 1, step 20
    assert "zero-variance groups 25.0 % 25.0 %" in page.words


def test_evaluations_of_the_stages_stand_side_by_side(run):
    for name, value in (("sft", 0.25), ("ppo", 0.5)):
        (run / name / "evals").mkdir()
        told = {"metrics": {"pass@1": measured(value, 0.05, unit="%", n=9), HOSTILE: measured(1, 0.5, unit=HOSTILE)},
                "settings": {"seed": 7, HOSTILE: HOSTILE}, "command": f"posttrain eval {name} {HOSTILE}",
                "changes": {"pass@1": measured(25.0, 5.0, unit="points", against=HOSTILE)} if name == "ppo" else {},
                "conclusions": [HOSTILE],
                "samples": [{"prompt": HOSTILE, "reply": HOSTILE, HOSTILE: HOSTILE}]}  # fmt: skip
        (run / name / "evals" / "math.json").write_text(json.dumps(told))
    page = Page(write_report(run))
    assert_inert(page)
    assert (
        "25.0 % [20.0, 30.0]" in page.words and "50.0 % [45.0, 55.0] +25.0 [20.0, 30.0] points against" in page.words
    )
    assert "1 sample of the evaluation" in page.words and "posttrain eval sft" in page.words
    (run / "sft" / "evals" / "math.json").write_text('{"metrics": {"pass@1": {"value": "0.5"}}}')
    with pytest.raises(UserError, match=r"sft/evals/math\.json: metrics\['pass@1'\] is .* evaluate again"):
        write_report(run)


def test_rows_left_out_are_told_by_reason(run):
    data = [{"name": "d", "skipped": {"malformed": 3, "too_long": 12}, "duplicates": {"exact": 5}, "sha256": "e" * 64,
             "overlap": {"dropped_eval": 2, "dropped_train": 0, "same_text": 9}, "rows": 10}]  # fmt: skip
    put(run, "sft", {}, data=data)
    assert "too_long 12 exact 5 malformed 3 in both sets 2" in Page(write_report(run)).words


# ---- two runs -------------------------------------------------------------------------------------------------------


def compared(a, b):
    return report_diff.compare("a", read_run(a)[1], "b", read_run(b)[1])


def test_a_copy_is_equal_and_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "two")
    found = compared(run, tmp_path / "two")
    assert found.equal and "are equal" in found.summary and "the same weights, bit by bit" in found.summary
    assert report_diff.lines(found) == [f"against b: {found.summary}"]
    assert "one and two are equal" in Page(write_report(run, against=tmp_path / "two")).words


def test_what_differs_is_named(run, tmp_path):
    other = tmp_path / "two"
    put(other, "sft", {}, versions={"torch": "2.14.0"}, config={"learning_rate": 0.5, "report_to": ["wandb"]},
        data=[{"name": "tiny", "config": "documents", "split": "train", "rows": 9, "sha256": "e" * 64}],
        metrics={"eval/pass@1": measured(0.56, 0.024, unit="%"), "vocab_size": {"value": 1024},
                 "extra": measured(1, 1)},
        files={"model.safetensors": {"sha256": "c" * 64, "bytes": 1}}, gains=[gain("gain of sft", False)])  # fmt: skip
    put(other, "reward", {"policy": "sft"}, versions={"torch": "2.14.0"})
    put(other, "grpo", {"policy": "sft"})
    found = {stage.name: stage for stage in compared(run, other).stages}
    assert found["ppo"].only == "a" and found["grpo"].only == "b" and found["sft"].weights is False
    rows = {(heading, what): (a, b) for heading, what, a, b in found["sft"].rows}
    assert rows == {
        ("config", "learning_rate"): ("0.00123", "0.5"),
        ("data", "tiny documents train"): ("12345 rows, " + "d" * 12, "9 rows, " + "e" * 12),
        ("gain", "gain of sft"): ("shown", "not shown"),
    }
    assert found["sft"].lacking == [("extra", "b")] and found["reward"].rows == []  # its parent is its own run's sft
    assert compared(run, other).shared == [("version", "torch", "2.13.0", "2.14.0", ["sft", "reward"])]
    told = "\n".join(report_diff.lines(compared(run, other)))
    assert "sft: config learning_rate: 0.00123 -> 0.5" in told and "ppo: only in a" in told
    page = Page(write_report(run, against=other))
    assert_inert(page)
    assert "0.00123" in page.words and "not clearly different" in page.words and "Only in one." in page.words


def test_a_difference_is_judged_by_both_half_widths():
    def verdict(value):
        return report_diff.Figure("x", "", measured(1.0, 3.0), measured(value, 4.0)).verdict

    assert [verdict(value) for value in (1.0, 5.9, 6.1, -4.1)] == [
        "equal",
        "not clearly different",
        "differs",
        "differs",
    ]
    no_interval = report_diff.Figure("x", "", {"value": 1.0}, {"value": 2.0})
    assert no_interval.verdict == "no interval" and no_interval.change == {"value": 1.0, "low": None, "high": None}


# ---- the verb and the picture ---------------------------------------------------------------------------------------


def test_the_picture_of_the_chain_is_a_file_of_its_own(run, tmp_path):
    put(run, "odd", {"policy": "sft"}, gains=[gain('<script>"x"</script>')])
    file = write_picture(run, tmp_path / "chain.svg")
    tree = ElementTree.parse(file).getroot()
    assert {tag.tag.removeprefix("{http://www.w3.org/2000/svg}") for tag in tree.iter()} <= {
        "svg", "style", "rect", "title", "path", "text", "g", "circle"}  # fmt: skip
    style = next(tag.text for tag in tree.iter() if tag.tag.endswith("style"))
    assert "prefers-color-scheme: dark" in style and "url(" not in style and "@import" not in style
    names = [tag.text for tag in tree.iter() if tag.get("class") == "name"]
    assert names == ["sft", "odd", "reward", "ppo"] and "53 → 92 %" in [tag.text for tag in tree.iter()]


def test_the_verb(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "two")
    argv = f"report {run} --against {tmp_path}/two --price 2 --picture {tmp_path}/c.svg".split()
    assert cli.command(argv) == 0 and (tmp_path / "c.svg").is_file()
    printed = capsys.readouterr().out
    assert "against two: one and two are equal" in printed and f"report  {run}/report.html" in printed
    for wrong, said in (
        ("--price=-1", "--price"),
        ("--picture=c.png", "SVG"),
        (f"--against={tmp_path}/no", "no such run"),
    ):
        with pytest.raises(UserError, match=said):
            cli.command(["report", str(run), wrong])
    with pytest.raises(UserError, match="no stage in it|name the folder of its run"):
        cli.command(["report", str(run / "sft")])
