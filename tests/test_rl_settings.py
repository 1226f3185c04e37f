"""Every setting of the loop that makes another algorithm of it: each learns a bandit, and does what its name says."""

from copy import deepcopy

import pytest
import torch
from rl_helpers import (
    BANDIT,
    flat_llama,
    frozen,
    gradients_of,
    likes_a,
    logged,
    make_trainer,
    perturb,
    settings,
    tiny_llama,
    tiny_scorer,
    tiny_tokenizer,
)

from posttrain.errors import UserError
from posttrain.lora import LoraArgs, add_adapter
from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
from posttrain.rl.rollout import HFEngine
from posttrain.training import OptimConfig

pytestmark = pytest.mark.usefixtures("restored_signals")


REWARD = [("likes a", likes_a, 1.0)]


ALGORITHMS = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": False},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "gspo": {"loss_type": "gspo", "epsilon": 3e-3, "epsilon_high": 4e-3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "rloo": {"advantage": "rloo", "beta": 0.01},
    "reinforce++": {"advantage": "reinforce_pp", "beta": 0.01},
    "kl in the loss": {"beta": 0.02, "kl_estimator": "k3"},
    "dual clip, entropy": {"delta": 2.0, "entropy_coef": 1e-4},
    "old from the trainer": {"old_logps": "trainer", "num_minibatches": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_learns_a_bandit(tmp_path, name):
    policy = flat_llama()
    trainer = make_trainer(
        tmp_path / "out", policy, REWARD, settings(max_steps=25, **{**BANDIT, **ALGORITHMS[name]}),
        reference=frozen(policy) if "beta" in ALGORITHMS[name] else None,
    )  # fmt: skip
    trainer.train()
    lines = logged(trainer)
    assert lines[0]["reward"] < 0.1 and lines[-1]["reward"] > 0.7
    assert all(line["mismatch"] < 1.001 for line in lines)  # on policy, in fp32


@pytest.mark.parametrize("critic", ["own", "trunk"])
def test_ppo_with_either_critic_learns_a_bandit(tmp_path, critic):
    policy = flat_llama()
    network = torch.nn.Linear(64, 1, bias=False) if critic == "trunk" else tiny_scorer(initializer_range=0.02)
    torch.nn.init.zeros_(network.weight if critic == "trunk" else network.score.weight)
    kind = "trunk" if critic == "trunk" else "policy"
    ppo = PPOConfig(reward_model_path="none", critic=kind, critic_learning_rate=1e-2, critic_warmup_steps=1)
    config = settings(max_steps=25, beta=0.01, num_minibatches=2, **BANDIT)
    trainer = make_trainer(tmp_path / "out", policy, REWARD, config, reference=frozen(policy), critic=network, ppo=ppo)
    trainer.train()
    lines = logged(trainer)
    assert lines[0]["reward"] < 0.1 and lines[-1]["reward"] > 0.7
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4) == lines[1]["kl"]  # the first step trains the critic alone
    assert lines[2]["kl"] != pytest.approx(0.0, abs=1e-4) and lines[0]["value_loss"] > 0
    assert lines[-1]["explained_variance"] > 0.2


def even(prompts, completions, completion_ids, **columns) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / 4 for ids in completion_ids]


def test_an_adapters_reference_is_the_model_without_it(tmp_path):
    """LoRA: only adapters move, and the KL is that to the policy as it was, with no second model."""
    policy = tiny_llama(initializer_range=0.1)  # its embeddings, which no adapter moves, must tell tokens apart
    start = deepcopy(policy)
    wrapped = add_adapter(policy, LoraArgs(use_peft=True, lora_r=4))
    from posttrain.rl.models import Reference

    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
    trainer = make_trainer(
        tmp_path / "out", policy, [("even", even, 1.0)], settings(max_steps=12, beta=1e-3, **BANDIT), optim=optim,
        reference=Reference(policy, wrapped),
    )  # fmt: skip
    trainer.train()
    lines = logged(trainer)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4) and lines[-1]["kl"] > 0.5
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.15
    before = dict(start.named_parameters())
    for name, parameter in policy.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    experience = trainer.score(trainer.collect())
    frozen_model = frozen(start)
    how = (trainer.layout, 1.0, 8192, "cpu")
    for mine, expected in zip(experience.ref_logps, frozen_model.logps(experience.rollouts, *how), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def own_weights(policy) -> HFEngine:
    """An engine with a copy of the weights, as vLLM has, so that it may sample while the policy trains."""

    class Copying(HFEngine):
        concurrent = True

        def sync_weights(self, model):
            self.model = deepcopy(model)

    return Copying(deepcopy(policy), tiny_tokenizer().pad_token_id)


def test_one_step_ahead_samples_with_the_weights_before(tmp_path):
    """The first two steps' completions both come from the first weights; the ratio is that to them, and it learns."""
    policy = flat_llama()
    trainer = make_trainer(
        tmp_path / "out", policy, REWARD, settings(max_steps=25, rollout_ahead=1, **BANDIT), engine=own_weights(policy)
    )
    trainer.train()
    lines = logged(trainer)
    assert lines[0]["staleness"] < 1.001 and lines[1]["staleness"] > 1.001  # one step off from the second on
    assert all(line["mismatch"] < 1.001 for line in lines)  # engine and trainer agree all the same
    assert lines[0]["ratio"] == pytest.approx(1.0, abs=1e-4) and lines[-1]["reward"] > 0.7


@pytest.mark.parametrize("copying", [False, True], ids=["generate", "own weights"])
def test_a_run_with_rollouts_in_flight_resumes_bit_equal(tmp_path, copying):
    import shutil

    ends = []
    for _ in range(2):
        policy = flat_llama()
        trainer = make_trainer(
            tmp_path / "out", policy, REWARD, settings(max_steps=4, rollout_ahead=1, **BANDIT),
            engine=own_weights(policy) if copying else None,
            stage_keys={"save_steps": 2, "save_total_limit": 2},
        )  # fmt: skip
        assert trainer.step == 2 * len(ends) and trainer.collector.waiting == bool(ends)
        trainer.train()
        ends.append([p.detach().clone() for p in policy.parameters()])
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004", ignore_errors=True)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def rare(prompts, completions, completion_ids, **columns) -> list[float]:
    """Right in one of 16: most groups of two have nothing to compare."""
    return [float(ids[0] % 16 == 0) for ids in completion_ids]


def test_dynamic_sampling_takes_groups_with_signal(tmp_path):
    config = settings(max_steps=2, dynamic_sampling=6, num_prompts=4, num_generations=4, max_completion_length=2)
    plain = settings(max_steps=2, num_prompts=4, num_generations=4, max_completion_length=2)
    found = []
    for folder, chosen in (("dynamic", config), ("plain", plain)):
        trainer = make_trainer(tmp_path / folder, flat_llama(), [("rare", rare, 1.0)], chosen)
        trainer.train()
        found.append(logged(trainer))
    dynamic, usual = found
    assert sum(line["zero_signal_groups"] for line in dynamic) < sum(line["zero_signal_groups"] for line in usual)
    assert dynamic[0]["zero_signal_groups"] == 0 and dynamic[0]["sampled_groups"] > 1
    assert "sampled_groups" not in usual[0]


def test_adaptive_beta_rises_where_the_kl_is_above_its_target(tmp_path):
    policy = flat_llama()
    config = settings(max_steps=8, beta=0.01, kl_target=1e-3, kl_horizon=32, **BANDIT)
    trainer = make_trainer(tmp_path / "out", policy, REWARD, config, reference=frozen(policy))
    trainer.train()
    betas = [line["beta"] for line in logged(trainer)]
    # KL 0 at first: -20 %; then above the target: +20 % each step (32 completions a step over a horizon of 32)
    assert betas[0] == 0.01 and betas[1] == pytest.approx(0.008) and betas[-1] == pytest.approx(betas[-2] * 1.2)


def test_cut_completions_teach_nothing_where_masked(tmp_path):
    policy = flat_llama()
    trainer = make_trainer(
        tmp_path / "out", policy, REWARD, settings(max_steps=1, mask_truncated_completions=True, **BANDIT),
        stage_keys={"seed": 3},
    )  # fmt: skip
    with gradients_of(policy) as found:
        trainer.train()
    assert logged(trainer)[0]["cut_share"] == 1 and logged(trainer)[0]["reward_std"] > 0
    assert all(not gradient.any() for gradient in found.values())


def test_the_trainers_own_old_log_probabilities_measure_the_engine(tmp_path):
    """An engine at slightly other weights: importance weights are truncated at the cap, the clip is on policy."""
    policy = flat_llama()
    other = deepcopy(policy)
    perturb(other, 0.01)

    class Stale(HFEngine):
        def sync_weights(self, model):
            pass

    config = settings(max_steps=1, max_mismatch=9.0, old_logps="trainer", vllm_importance_sampling_cap=1.0, **BANDIT)
    engine = Stale(other, tiny_tokenizer().pad_token_id)
    trainer = make_trainer(tmp_path / "out", policy, REWARD, config, engine=engine)
    trainer.train()
    [line] = logged(trainer)
    assert line["ratio"] == pytest.approx(1.0, abs=1e-4) and line["clip_ratio"] == 0
    assert line["mismatch"] > 1.01 and 0.2 < line["importance_truncated"] < 0.8


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss_type": "cispo"}, "epsilon_high: found None"),
        ({"advantage": "gae"}, "gae is recipes/ppo.py's"),
        ({"advantage": "reinforce_pp", "loss_type": "gspo"}, "importance_sampling_level"),
        ({"beta": 0.1}, "beta: found 0.1, but there is no reference"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path / "out", flat_llama(), REWARD, settings(max_steps=1, **{**BANDIT, **keys}))


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        (RLConfig, {"rollout_ahead": 2}, "rollout_ahead: found 2, expected 0 or 1"),
        (RLConfig, {"rollout_ahead": 1, "dynamic_sampling": 2}, "beside dynamic_sampling"),
        (RLConfig, {"layout": "wide"}, "layout: found 'wide', expected one of auto, prefix"),
        (RLConfig, {"max_mismatch": 1.0}, "max_mismatch: found 1.0"),
        (LossConfig, {"delta": 1.1}, "delta: found 1.1, expected more than 1 . epsilon_high, 1.2"),
        (LossConfig, {"delta": 2.0, "loss_type": "cispo"}, "delta: found 2.0, which cispo"),
        (LossConfig, {"kl_target": 1.0}, "kl_target: found a target with beta 0"),
        (LossConfig, {"vllm_importance_sampling_cap": 0.5}, "vllm_importance_sampling_cap: found 0.5"),
        (LossConfig, {"advantage": "gea"}, "advantage: found 'gea'"),
        (LossConfig, {"importance_sampling_level": "word"}, "importance_sampling_level: found 'word'"),
        (PPOConfig, {"reward_model_path": "x", "critic": "none"}, "critic: found 'none'"),
        (PPOConfig, {"reward_model_path": "x", "lam": 1.5}, "lam: found 1.5"),
    ],
)
def test_settings_out_of_range_name_their_key(kind, keys, words):
    with pytest.raises(UserError, match=words):
        kind(**keys)


def test_running_rewards_are_normalised_over_the_whole_run(tmp_path):
    """Rewards of 1,000 and 1,004: after two steps mean 0 and deviation 1 over all that came, the penalty on top."""
    trainer = make_trainer(
        tmp_path / "out", flat_llama(), REWARD, settings(max_steps=1, running_rewards=True, **BANDIT)
    )
    first, second = torch.tensor([1000.0, 1004.0, 1004.0, 1000.0]), torch.tensor([1000.0, 1000.0])
    trainer._normalized(first)
    found = trainer._normalized(second)
    every = torch.cat([first, second])
    expected = (second - every.mean()) / every.std()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
