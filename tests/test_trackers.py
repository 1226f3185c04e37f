"""Trackers: what a run logs is really in them, secrets are not, and one that is missing is named at the start.

Run: pytest tests/test_trackers.py
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain import trackers
from posttrain.errors import UserError
from posttrain.stage import StageConfig

RUN = """
import sys
from dataclasses import dataclass, field
from posttrain import stage
from posttrain.stage import StageConfig

@dataclass
class Judge:
    judge_api_key: str = "sk-hidden-1"
    reward_options: dict = field(default_factory=lambda: {"judge": {"api_key": "sk-hidden-2", "model": "judge-1"}})
    max_tokens: int = 77

own = StageConfig(sys.argv[1], report_to=[sys.argv[2]], run_name=sys.argv[3], tracker_project="trials", save_steps=2)
run = stage.start("grpo", (own, Judge()), parents={}, data=[])
first = 3 if run.resume_folder else 1
for step in range(first, first + 3):
    run.log(step, loss=1 / step, **{"reward/math": 0.25})
    if run.due(step, 9):
        run.save(step, lambda folder: (folder / "weights").write_text("w"))
if first == 1:
    sys.exit("killed after step 3")
run.finish(lambda folder: (folder / "weights").write_text("w"), metrics={})
"""


def installed(name: str):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


def run_twice(tmp_path: Path, tracker: str) -> Path:
    """Three steps, a stop after the checkpoint of step 2, and steps 3 to 5 of the resumed run."""
    out, root = tmp_path / "tiny" / "grpo", str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}
    path = os.pathsep.join([root, *filter(None, sys.path)])
    env |= {"WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    for code in (1, 0):
        command = [sys.executable, "-c", RUN, str(out), tracker, "my run"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5] and json.loads((out / "stage.json").read_text())["status"] == "finished"
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name not in ("stage.json", "config.yaml", "run.json"):
            assert b"sk-hidden" not in file.read_bytes(), file
    return out


@installed("tensorboard")
@pytest.mark.slow
def test_tensorboard_draws_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_twice(tmp_path, "tensorboard") / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "reward/math"}
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_tokens: 77" in text and "judge_api_key: (not shown)" in text and "stage: grpo" in text
    assert "reward_options.judge.model: judge-1" in text


@installed("trackio")
@pytest.mark.slow
def test_trackio_keeps_the_run_in_its_own_folder(tmp_path):
    run_twice(tmp_path, "trackio")
    question = ["get", "metric", "--project", "trials", "--run", "my run", "--metric", "loss", "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-m", "trackio.cli", *question], env=env, capture_output=True, text=True, check=True
    )
    losses = {value["step"]: value["value"] for value in json.loads(done.stdout)["values"]}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 6)}


@installed("wandb")
@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path):
    out = run_twice(tmp_path, "wandb")
    runs = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (out / trackers.RUN_ID).read_text()
    assert len(runs) == 2 and {file.name for file in runs} == {f"run-{run_id}.wandb"}
    assert all(b"reward/math" in file.read_bytes() for file in runs)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch):
    from posttrain import stage

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'posttrain\[wandb\]'"):
        stage.start("toy", (StageConfig(str(tmp_path / "out"), report_to=["wandb"]),), parents={}, data=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["wandbb"], ["none", "wandb"], ["all"]])
def test_names_that_are_unknown(names):
    with pytest.raises(UserError, match="report_to: found .*, expected none, or some of trackio, wandb, tensorboard"):
        StageConfig("out", report_to=names)


def test_none_is_none():
    assert trackers.chosen([]) == trackers.chosen(["none"]) == []
    assert trackers.chosen(["wandb", "trackio", "wandb"]) == ["wandb", "trackio"]


def test_what_counts_as_a_secret():
    config = {"api_key": "a", "HF_TOKEN": "b", "password": "c", "eos_token_id": 3, "max_tokens": 4, "key": None}
    kept = trackers.without_secrets({**config, "options": {"secret": "d", "steps": [1, 2]}})
    assert [kept[key] for key in ("api_key", "HF_TOKEN", "password", "options.secret")] == ["(not shown)"] * 4
    assert (kept["eos_token_id"], kept["max_tokens"], kept["options.steps"]) == (3, 4, "[1, 2]")


def test_keys_of_trackers_do_not_make_another_run():
    from posttrain.stage import differences

    a, b = {"report_to": ["none"], "run_name": None, "seed": 0}, {"report_to": ["wandb"], "run_name": "x", "seed": 0}
    assert differences(a, b) == [] and differences(a, {**b, "seed": 1}) == ["seed: 0 -> 1"]
