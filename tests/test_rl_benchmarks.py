"""The RL benchmarks in their smallest size, so that they cannot rot: their figures follow from what they count.

Run: pytest tests/test_rl_benchmarks.py     (PPO's peer, TRL 1.12, only with POSTTRAIN_TRL112=FOLDER)
"""

import json
import os
import statistics
import sys
from pathlib import Path

import pytest
from recipe_runs import ROOT, call

pytestmark = pytest.mark.slow
FOLDER = ROOT / "tests" / "benchmarks"
SIZE = ["--hidden_size", 32, "--layers", 1, "--max_completion_length", 8, "--rows", 16, "--steps", 1, "--rounds", 2]
TRL112 = os.environ.get("POSTTRAIN_TRL112")


def run(name: str, out: Path, *flags) -> tuple[dict, str]:
    done = call([sys.executable, FOLDER / f"{name}.py", *SIZE, *flags, "--out", out])
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def check(found: dict, text: str, kinds: set[str], completions: int, limit: int) -> None:
    """What holds of every benchmark: kinds, counts, and figures that follow from the steps' own numbers."""
    assert found["trainers"].keys() == kinds and len(found["rounds"]) == 2
    for kind, trainer in found["trainers"].items():
        assert len(trainer["rewards"]) == 3  # one step to warm up, one in each round
        assert completions <= trainer["completion tokens a step"] <= completions * limit, kind
        assert trainer["memory"]["peak memory"] >= trainer["memory"]["memory before"] > 100
        steps = [step for each in found["rounds"] for step in each[kind]]
        for clock in ("wall", "cpu"):
            whole = statistics.median(sum(step[clock].values()) for step in steps)
            assert trainer["step seconds"][clock] == pytest.approx(whole)
            assert min(step[clock]["generate"] for step in steps) > 0 < min(step[clock]["update"] for step in steps)
        assert f"| {kind} |" in text
    prompts = {trainer["prompt tokens a step"] for trainer in found["trainers"].values()}
    assert len(prompts) == 1  # all took the same prompts
    for pair, ratios in found["ours over"].items():
        one, other = pair.split(" / ")
        speeds = [
            [each[kind][0]["tokens"] / sum(each[kind][0]["wall"].values()) for each in found["rounds"]]
            for kind in (one, other)
        ]
        expected = statistics.median(a / b for a, b in zip(*speeds, strict=True))
        assert ratios["wall"]["step"]["median"] == pytest.approx(expected)


def test_grpo_beside_trl_runs_and_counts(tmp_path):
    kinds = {"ours, transformers", "TRL tuned, generate"}
    flags = ["--num_prompts", 2, "--num_generations", 4, "--kinds", *sorted(kinds)]
    found, text = run("grpo_vs_trl", tmp_path / "grpo", *flags)
    check(found, text, kinds, completions=8, limit=8)
    assert found["ours over"].keys() == {"ours, transformers / TRL tuned, generate"} and found["left out"] == {}


def test_ppo_beside_trl_112_runs_and_counts_or_says_how_to_get_it(tmp_path):
    ours = {"ours, transformers"}
    peer = ["--trl112", TRL112] if TRL112 else []
    flags = ["--num_prompts", 4, "--kinds", *sorted(ours), "TRL tuned", *peer]
    found, text = run("ppo_vs_trl", tmp_path / "ppo", *flags)
    check(found, text, ours | ({"TRL tuned"} if TRL112 else set()), completions=4, limit=8)
    if not TRL112:
        assert "pip install" in found["left out"]["TRL tuned"] and "TRL tuned did not run" in text
        pytest.skip("ours ran; TRL 1.12 is not here: POSTTRAIN_TRL112=FOLDER runs it, too")


def test_a_trainer_that_fails_ends_the_comparison_with_its_log(tmp_path):
    script, flags = FOLDER / "grpo_vs_trl.py", ["--kinds", "ours, transformers", "--num_generations", 1]
    done = call([sys.executable, script, *SIZE, *flags, "--out", tmp_path / "grpo"])
    assert done.returncode != 0 and "num_generations: found 1" in done.stderr
    assert not (tmp_path / "grpo.json").exists()
