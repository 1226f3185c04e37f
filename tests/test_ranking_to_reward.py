"""The walk-through of examples/ranking_to_reward in small: votes, a reward model from them, PPO with it, votes again.

Run: pytest tests/test_ranking_to_reward.py
"""

import json
import math
import random
import shutil
import sys

import pytest
import recipe_runs as runs

from examples.ranking_to_reward.labeller import places_of
from posttrain.board.votes import Item
from posttrain.cli import command

EXAMPLE = runs.ROOT / "examples" / "ranking_to_reward"


def labelled(run, *options) -> None:
    script = [sys.executable, EXAMPLE / "labeller.py", run, "--replies", "2", "--rows", "14", *options]
    done = runs.call(script)
    assert done.returncode == 0, done.stderr
    assert "14 votes stand in" in done.stdout


def recipe(name: str, folder, **settings) -> dict:
    """A recipe with the example's config, made small; its manifest."""
    settings = {**runs.SMALL[name], **settings}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    arguments = [str(runs.ROOT / "recipes" / f"{name}.py"), "--config", str(EXAMPLE / f"{name}.yaml"), *flags]
    done = runs.run(arguments, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs.manifest(settings["output_dir"])


@pytest.mark.slow
def test_votes_become_a_reward_model_and_ppo_learns_from_it(small_chain, tmp_path, capsys):
    run = tmp_path / "run"
    for stage in ("tokenizer", "sft"):
        shutil.copytree(small_chain / stage, run / stage)
    labelled(run)
    rows = [json.loads(line) for line in (run / "votes" / "votes.jsonl").read_text().splitlines()]
    assert all(row["models"] == ["sft", "sft"] and len(row["completions"]) == 2 for row in rows)
    reward = recipe(
        "reward", tmp_path, output_dir=run / "ranked_reward", model_name_or_path=run / "sft",
        dataset_name=run / "votes" / "votes.jsonl", eval_steps=4, validation_share=0.3,
    )  # fmt: skip
    used = sum(source["rows"] for source in reward["data"])  # to learn from and held out
    assert used == len(rows) and reward["data"][0]["name"].endswith("votes.jsonl")
    ppo = recipe(
        "ppo", tmp_path, output_dir=run / "ranked_ppo", model_name_or_path=run / "sft",
        reward_model_path=run / "ranked_reward",
    )  # fmt: skip
    assert "tiny_utility" in json.dumps(ppo["metrics"])
    labelled(run, "--stages", "sft", "ranked_ppo", "--split", "test", "--votes", tmp_path / "again")
    assert command(["ratings", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "sft" in said and "ranked_ppo" in said and "14 votes" in said


def test_the_simulated_labeller_draws_from_plackett_luce():
    """A right and kind answer has utility 2.7, a wrong one 0: at temperature 0.5 it wins with odds exp(5.4)."""
    row = {"kind": "sum", "answer": "4"}
    item = Item([], [("sft", "The answer is 5."), ("sft", "It is 0."), ("sft", "The answer is 5.")])
    places = [places_of(item, row, random.Random(seed)) for seed in range(2000)]
    assert all(first == last for first, _, last in places)  # the same words are tied
    assert abs(sum(first == 0 for first, *_ in places) / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)  # equally useless
    item = Item([], [("sft", "The answer is 4."), ("sft", "The answer is 4. Happy to help!")])
    share = sum(places_of(item, row, random.Random(seed)) == [1, 0] for seed in range(2000)) / 2000
    assert abs(share - 1 / (1 + math.exp(-0.7 / 0.5))) < 4 * math.sqrt(0.16 / 2000)
