"""A chain at several seeds: the gains averaged, their intervals against a t distribution integrated here."""

import json
import math
from pathlib import Path

import pytest

from posttrain import chain, checkpoint, seeds
from posttrain.errors import UserError


def write_stage(folder: Path, *gains: dict) -> Path:
    folder.mkdir(parents=True)
    checkpoint.write_json(folder / "stage.json", {"stage": folder.name, "status": "finished", "gains": list(gains)})
    return folder


def gain(before: float, after: float, name: str = "pass@1", passed: bool = True) -> dict:
    sides = {"before": {"label": "SFT", "value": before}, "after": {"label": "GRPO", "value": after}}
    return {"name": name, "unit": "%", "better": "higher", "passed": passed, **sides}


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 10, 15, 30, 100])
def test_t_quantile_leaves_two_and_a_half_percent_above_it(freedom):
    # Simpson's rule over Student's density; its share between 0 and the quantile is 0.475.
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    steps, end = 4000, seeds.t_quantile(freedom)
    density = [scale * (1 + (end * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    area = end / steps / 3 * (density[0] + density[-1] + 4 * sum(density[1::2]) + 2 * sum(density[2:-1:2]))
    assert area == pytest.approx(0.475, abs=2e-6)


def test_gains_of_three_seeds_become_means_with_intervals_and_pairs_stay_pairs(tmp_path):
    pairs = {0: (0.50, 0.80), 1: (0.60, 0.90), 2: (0.40, 0.85)}
    for seed, (before, after) in pairs.items():
        write_stage(tmp_path / str(seed) / "tokenizer")
        write_stage(tmp_path / str(seed) / "grpo", gain(before, after, passed=seed != 2))
    (result,) = seeds.aggregate({seed: tmp_path / str(seed) for seed in pairs}, ["tokenizer", "grpo"])
    assert (result["stage"], result["name"], result["unit"]) == ("grpo", "pass@1", "%")
    assert result["before"]["values"] == [0.5, 0.6, 0.4] and result["before"]["mean"] == pytest.approx(0.5)
    # Changes 0.3, 0.3, 0.45: mean 0.35, standard deviation 0.0866, t(2) = 4.3027, half width 0.2151.
    change = [result["change"][key] for key in ("mean", "low", "high")]
    assert change == pytest.approx([0.35, 0.1349, 0.5651], abs=1e-4)
    assert result["passed"] == [True, True, False]
    shown = seeds.table([result], [0, 1, 2])
    assert "grpo: pass@1, goal reached at 2 of 3 seeds" in shown
    assert "35.0 % [13.5, 56.5]" in shown and "GRPO: 80.0 %, 90.0 %, 85.0 %" in shown


def test_one_seed_has_no_interval(tmp_path):
    write_stage(tmp_path / "grpo", gain(0.5, 0.8))
    (result,) = seeds.aggregate({0: tmp_path}, ["grpo"])
    assert result["change"]["low"] is None
    assert "30.0 %  " in seeds.table([result], [0])


def test_a_missing_stage_or_gain_is_named(tmp_path):
    write_stage(tmp_path / "0" / "grpo", gain(0.5, 0.8))
    runs = {0: tmp_path / "0", 1: tmp_path / "1"}
    with pytest.raises(UserError, match="1/grpo"):
        seeds.aggregate(runs, ["grpo"])
    write_stage(tmp_path / "1" / "grpo", gain(0.5, 0.8, name="another"))
    with pytest.raises(UserError, match="pass@1"):
        seeds.aggregate(runs, ["grpo"])


RECIPE = """
import sys
from dataclasses import dataclass
from pathlib import Path
from posttrain import args, checkpoint
from posttrain.args import arg

@dataclass
class Config:
    output_dir: str = arg()
    seed: int = arg(0)
    overwrite: bool = arg(False)

ARGS = (Config,)

if __name__ == "__main__":
    (config,) = args.parse(ARGS)
    Path(config.output_dir).mkdir(parents=True)
    side = {"label": "", "value": float(config.seed), "low": None, "high": None}
    gain = {"name": "toy", "unit": "", "better": "higher", "passed": True, "goal": "", "before": side, "after": side}
    manifest = {"stage": "toy", "status": "finished", "parents": {}, "config": args.resolved(config), "gains": [gain]}
    checkpoint.write_json(Path(config.output_dir) / "stage.json", manifest)
"""


def test_a_chain_runs_once_a_seed_into_folders_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipes/mini").mkdir(parents=True)
    Path("recipes/toy.py").write_text(RECIPE)
    Path("recipes/mini/chain.yaml").write_text("out: runs/mini\nstages: [toy]\n")
    Path("recipes/mini/toy.yaml").write_text("output_dir: runs/mini/toy\n")
    assert seeds.run("recipes/mini", [3, 5]) == 0
    stored = json.loads(Path("runs/mini/gains.json").read_text())
    assert stored["seeds"] == [3, 5] and stored["gains"][0]["after"]["values"] == [3.0, 5.0]
    assert Path("runs/mini/seed-3/report.html").is_file()
    assert chain.run("recipes/mini", "runs/mini/seed-5", overrides=["seed=5"]) == 0
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="twice"):
        seeds.run("recipes/mini", [3, 3])


def test_one_stage_of_a_chain_at_several_seeds(tmp_path, monkeypatch):
    """The stages that no seed has run yet have no gains to average."""
    monkeypatch.chdir(tmp_path)
    Path("recipes/mini").mkdir(parents=True)
    Path("recipes/toy.py").write_text(RECIPE)
    Path("recipes/later.py").write_text(RECIPE)
    Path("recipes/mini/chain.yaml").write_text("out: runs/mini\nstages: [toy, later]\n")
    for name in ("toy", "later"):
        Path(f"recipes/mini/{name}.yaml").write_text(f"output_dir: runs/mini/{name}\n")
    assert seeds.run("recipes/mini", [3, 5], only="toy") == 0
    stored = json.loads(Path("runs/mini/gains.json").read_text())
    assert [gain["stage"] for gain in stored["gains"]] == ["toy"]
