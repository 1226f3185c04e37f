"""The reward model's benchmarks in their smallest size, so that they cannot rot.

Run: pytest tests/test_reward_benchmarks.py
"""

import json
import sys

import pytest
from recipe_runs import ROOT, call
from rl_helpers import tiny_llama, tiny_tokenizer

from posttrain.models import save_pair

pytestmark = pytest.mark.slow


def test_the_comparison_with_trl_runs_and_counts(tmp_path):
    script, out = ROOT / "tests" / "benchmarks" / "reward_vs_trl.py", tmp_path / "found.json"
    size = ["--rows", 24, "--steps", 2, "--repeats", 1, "--batch_size", 4, "--hidden_size", 32, "--layers", 1]
    done = call([sys.executable, script, *size, "--evaluate", "--out", out])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found["tokens per second"]) == set(found["held out"]) == {"ours", "TRL tuned", "TRL default"}
    for kind in ("TRL tuned", "TRL default"):
        ratio = found["tokens per second"]["ours"] / found["tokens per second"][kind]
        assert found["ours over"][kind]["median"] == pytest.approx(ratio)
    assert found["tokens that stand once a ranking"] < 1 and "| ours |" in done.stdout


def test_the_study_of_overoptimization_runs_and_writes_what_it_finds(tmp_path):
    script = ROOT / "tests" / "benchmarks" / "overoptimization.py"
    size = ["--sizes", 20, 40, "--n", 4, "--prompts", 4, "--max_steps", 2, "--max_tokens", 8]
    save_pair(tiny_llama(), tiny_tokenizer(), tmp_path / "chat")
    folders = ["--model", tmp_path / "chat", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    done = call([sys.executable, script, *folders, *size])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "overoptimization.json").read_text())
    assert [model["rankings"] for model in found["models"]] == [20, 40]
    for model in found["models"]:
        assert [point["n"] for point in model["curve"]] == [1, 2, 4] and model["steps"] == 2
        ideal = [point["tiny_utility"]["value"] for point in found["picked by the judge itself"]]
        picked = [point["tiny_utility"]["value"] for point in model["curve"]]
        assert picked[0] == pytest.approx(ideal[0]) and all(a <= b + 1e-9 for a, b in zip(picked, ideal, strict=True))
    table = (tmp_path / "out" / "overoptimization.md").read_text()
    assert "| 20 | 2 |" in table and "| 40 | 2 |" in table and "--sizes 20 40" in table
    assert (tmp_path / "out" / "overoptimization.svg").read_text().count("dashed") >= 4
