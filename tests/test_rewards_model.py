"""The reward model by name: its scores with and without shared prompts, from its manifest, and of whose tokenizer."""

import json
import random

import pytest
import torch
from rl_helpers import tiny_llama, tiny_scorer, tiny_tokenizer

from posttrain import stage
from posttrain.errors import UserError
from posttrain.rewards import load_rewards
from posttrain.rewards.calls import run_rewards
from posttrain.rewards.model import RewardModelScore
from posttrain.rewards.model_by_name import model_reward, reward_parents
from posttrain.rl.config import RLConfig


def some_groups(seed: int = 0):
    """(prompt_ids, completion_ids) of 5 prompts with 1 to 6 completions; some begin alike or are equal."""
    rng = random.Random(seed)
    prompts, completions = [], []
    for size in (1, 4, 6, 2, 3):
        prompt = [rng.randrange(250) for _ in range(rng.randrange(3, 90))]
        own = [[rng.randrange(250) for _ in range(rng.randrange(1, 40))] for _ in range(size)]
        own[-1] = own[0] + [7, 8] if size > 2 else own[-1]
        prompts += [prompt] * size
        completions += own
    return prompts, completions


def one_by_one(model, prompts, completions):
    """Scores from transformers' own forward of one sequence at a time, read at its last token."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state
            scores.append(model.score(hidden[0, -1]).item())
    return scores


def stage_folder(path, **figures):
    tiny_scorer().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    manifest = {"status": "finished", "metrics": {key: {"value": value} for key, value in figures.items()}}
    (path / "stage.json").write_text(json.dumps(manifest))
    return str(path)


def test_sharing_the_prompt_changes_no_score():
    model, (prompts, completions) = tiny_scorer(), some_groups()
    expected = one_by_one(model, prompts, completions)
    assert max(expected) - min(expected) > 1
    layouts = []
    for share in (False, True):
        score = RewardModelScore(model, share_prompt=share)
        layouts.append(score.layout.name)
        found = score(["?"] * len(prompts), None, completions, prompt_ids=prompts)
        assert found == pytest.approx(expected, abs=1e-4)
    assert layouts == ["packed", "prefix"]


def test_by_name_with_options(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = stage_folder(tmp_path / "reward", **{"score mean": 0.5, "score std": 2.0})
    prompts, completions = some_groups()
    raw = torch.tensor(one_by_one(tiny_scorer(), prompts, completions))
    batch = {"prompts": prompts, "completions": [""] * len(prompts), "completion_ids": completions}
    loaded = len(model_reward.loaded)
    for options, expected in {
        (): ((raw - 0.5) / 2).clamp(-5, 5),
        (("clip", 0.1),): ((raw - 0.5) / 2).clamp(-0.1, 0.1),
        (("normalize", False), ("clip", 100.0)): raw,
        (("clip", 100.0),): (raw - 0.5) / 2,
    }.items():
        rewards = load_rewards(["model"], [], {"model": {"path": path, **dict(options)}})
        found = run_rewards(rewards, {**batch, "prompt_ids": prompts, "path": prompts}, [0] * len(prompts), timeout=60)
        assert found["model"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert len(model_reward.loaded) == loaded + 2  # as they are, and normalised


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = stage_folder(tmp_path / "reward")
    batch = {"prompts": ["?"], "completions": [""], "completion_ids": [[1]], "prompt_ids": [[2]]}
    (reward,) = load_rewards(["model"], [], {"model": {"path": path}})
    with pytest.raises(UserError, match="mean and std .*normalize: false"):
        run_rewards([reward], batch, [0])
    (reward,) = load_rewards(["model"], [], {"model": {"path": path, "normalize": False}})
    with pytest.raises(UserError, match="has 514 tokens, but the reward model's context has 512"):
        run_rewards([reward], {**batch, "completion_ids": [[1] * 513]}, [0])
    for wrong in ({"path": 3}, {"path": path, "clip": "a"}, {"path": path, "normalize": "no"}):
        with pytest.raises(UserError, match=f"model: {list(wrong)[-1]}: found"):
            load_rewards(["model"], [], {"model": wrong})


def test_another_tokenizer_is_refused_as_a_parent(tmp_path):
    path = stage_folder(tmp_path / "reward")
    policy = tmp_path / "policy"
    tiny_llama().save_pretrained(policy)
    tiny_tokenizer().save_pretrained(policy)
    options = {"model": {"path": path}}
    assert reward_parents(RLConfig(reward_funcs=["correct"], reward_options=options)) == {}
    parents = {
        "policy": str(policy),
        **reward_parents(RLConfig(reward_funcs=["correct", "model"], reward_options=options)),
    }
    assert stage.describe_parents(parents)["reward"]["path"] == path
    changed = json.loads((policy / "tokenizer.json").read_text())
    changed["added_tokens"].pop()
    (policy / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="different tokenizers"):
        stage.describe_parents(parents)
    with pytest.raises(UserError, match="reward model needs its folder"):
        reward_parents(RLConfig(reward_funcs=["model"]))
