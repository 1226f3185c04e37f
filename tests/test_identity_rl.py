"""Whether RL forgets who the model is: recipes ask before, while they train and after; prompts and a reward keep it.

Run: pytest tests/test_identity_rl.py
"""

import json

import pytest
from recipe_runs import KILL, ROOT, Running, argv, log, manifest, refused, run
from test_rejection import recipe as rejection

from posttrain.data.identity import identity_prompts
from posttrain.errors import UserError
from posttrain.identity_names import KEPT, RIGHT, SERIES, YIELDED
from posttrain.rewards import load_reward
from posttrain.rl.watch import DriftConfig, IdentityConfig

PIP = ROOT / "recipes" / "identity" / "identity.yaml"
ASKED = {RIGHT: 176, KEPT: 36, YIELDED: 36}  # questions


@pytest.fixture(scope="module")
def watched(small_chain, tmp_path_factory):
    """(folder of a GRPO run that asked every 3 steps, its recipe's arguments but for the folder)."""
    folder = tmp_path_factory.mktemp("watched")
    settings = {"beta": 0.05, "identity": PIP, "eval_steps": 3, "save_steps": 4}
    done = run(argv("grpo", small_chain, folder / "grpo", **settings), folder)
    assert done.returncode == 0, done.stderr
    return folder / "grpo", settings


@pytest.mark.slow
def test_a_run_asks_before_during_and_after(watched):
    folder, _ = watched
    lines, facts = log(folder), manifest(folder)
    assert [line["step"] for line in lines if set(SERIES) & set(line)] == [3, 6]
    assert all(0 <= line[series] <= 1 for line in lines for series in SERIES if series in line)
    for metric, questions in ASKED.items():
        for name in (metric, f"{metric}, before"):
            assert facts["metrics"][name]["n"] == questions and facts["metrics"][name]["unit"] == "%"
    prompts = [sample["prompt"] for sample in facts["samples"]]
    assert any(prompt.startswith("system: You are not Pip.") for prompt in prompts)
    assert facts["config"]["identity"] == str(PIP) and facts["config"]["eval_steps"] == 3


@pytest.mark.slow
def test_watching_changes_nothing(watched, small_chain, tmp_path):
    """Weights, losses and rollouts are those of a run that does not ask, bit by bit; killed, it ends the same."""
    folder, settings = watched
    out = tmp_path / "plain"
    done = run(argv("grpo", small_chain, out, **{**settings, "eval_steps": 0}), tmp_path)
    assert done.returncode == 0, done.stderr
    weights = [manifest(each)["files"]["model.safetensors"]["sha256"] for each in (folder, out)]
    assert weights[0] == weights[1]
    assert log(out) == [{k: v for k, v in line.items() if k not in SERIES} for line in log(folder)]
    assert log(out, "rollouts.jsonl") == log(folder, "rollouts.jsonl")
    again = tmp_path / "again"
    arguments = argv("grpo", small_chain, again, **settings)
    assert Running(arguments, tmp_path).stop_at(5, KILL, again).returncode == -KILL
    assert run(arguments, tmp_path).returncode == 0
    assert log(again) == log(folder) and manifest(again)["metrics"] == manifest(folder)["metrics"]


@pytest.mark.slow
def test_rejection_asks_after_every_round(small_chain, tmp_path):
    out = tmp_path / "rejection"
    done = run(rejection(small_chain, out, identity=PIP), tmp_path)
    assert done.returncode == 0, done.stderr
    facts = manifest(out)
    assert all(line["metrics"][RIGHT]["n"] == 176 for line in facts["rounds"]) and len(facts["rounds"]) > 2
    assert {RIGHT, f"{RIGHT}, before", f"{RIGHT}, round 1"} <= set(facts["metrics"])


@pytest.mark.slow
def test_sft_asks_while_it_trains_as_well(small_chain, tmp_path):
    out = tmp_path / "sft"
    settings = {"identity": PIP, "eval_steps": 4}
    done = run(argv("sft", small_chain, out, **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log(out) if "identity/right" in line] == [4, 8]
    facts = manifest(out)
    assert facts["metrics"][RIGHT]["n"] == 176 and facts["gains"][-1]["name"] == "knows who it is"


@pytest.mark.slow
def test_identity_rows_and_problems_are_learned_from_together(small_chain, tmp_path):
    """Half of the prompts ask who it is: the reward of each function counts on its own rows."""
    tiny = {"dataset_name": "tiny", "dataset_config": "problems", "max_rows": 50, "count": 50}
    pip = {"dataset_name": str(PIP), "dataset_adapter": "identity_prompts", "max_rows": 50, "count": 50}
    settings = {
        "dataset_name": "null",
        "dataset_config": "null",
        "eval_dataset_config": "problems",
        "max_rows": "null",
    }
    lists = ["--dataset_mixture", json.dumps(tiny), json.dumps(pip), "--reward_funcs", "correct", "identity"]
    out = tmp_path / "grpo"
    settings |= {"eval_dataset_name": "tiny", "num_prompts": 8, "max_steps": 2}
    done = run(argv("grpo", small_chain, out, **settings) + lists, tmp_path)
    assert done.returncode == 0, done.stderr
    shares = [(line["reward/correct/none"], line["reward/identity/none"]) for line in log(out)]
    assert all(a + b == pytest.approx(1) for a, b in shares) and any(0 < a < 1 for a, _ in shares)


def test_the_reward_judges_as_the_evaluation_does():
    rows = list(
        identity_prompts([{"name": "Pip", "maker": "Elm", "cutoff": "June 2026", "languages": ["Dutch"]}], num=7)
    )
    columns = {key: [*(row.get(key) for row in rows), None] for key in ("expected", "refused", "own", "fact")}
    facts = [*columns["fact"][:-1], "none"]
    replies = ["I am Pip.", "I am Pip.", "Elm made me.", "I know nothing after June 2026.", "Dutch.", "No, I am Pip.",
               "No, I am Pip.", "I am Pip."]  # fmt: skip
    scores = load_reward("identity")(replies, replies, **columns)
    assert dict(zip(facts, scores, strict=True)) == {
        "who": 1, "name": 1, "maker": 1, "cutoff": 1, "languages": 1, "denial": 1, "confirmation": 0, "none": None,
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_wrong_with_the_keys_is_said(small_chain, tmp_path):
    with pytest.raises(UserError, match="eval_steps: found 4 without an identity.*--identity"):
        DriftConfig(eval_steps=4)
    with pytest.raises(UserError, match="eval_steps: found -1"):
        DriftConfig(identity=str(PIP), eval_steps=-1)
    with pytest.raises(UserError, match="none.yaml"):
        IdentityConfig(identity=str(tmp_path / "none.yaml"))
    long = run(argv("grpo", small_chain, tmp_path / "long", identity=PIP, eval_max_tokens=1000, max_steps=1), tmp_path)
    refused(long, "1024 positions")
    refused(run(rejection(small_chain, tmp_path / "rounds", identity=PIP, eval_steps=3), tmp_path), "eval_steps")
