"""The RL loop whole: bandits that GRPO and PPO must learn, gradients free of bookkeeping, bad input."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from rl_helpers import (
    BANDIT,
    assert_same_gradients,
    flat_llama,
    frozen,
    gradients_of,
    likes_a,
    logged,
    make_trainer,
    perturb,
    plain_logps,
    settings,
    tiny_llama,
    tiny_scorer,
    tiny_tokenizer,
)

from posttrain.errors import UserError
from posttrain.rl.config import PPOConfig
from posttrain.rl.rollout import HFEngine
from posttrain.rl.types import Completion, Experience, Rollouts
from posttrain.training import OptimConfig

pytestmark = pytest.mark.usefixtures("restored_signals")


def zero_critic(seed: int = 1):
    critic = tiny_scorer(seed, initializer_range=0.02)
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def make_ppo(folder, policy, config, rewards=None, **kwargs):
    """A PPO trainer: reference = the policy as it is now, critic with a head of zeros."""
    ppo = kwargs.pop("ppo", None) or PPOConfig(reward_model_path="none", critic_learning_rate=1e-2)
    return make_trainer(
        folder, policy, rewards or [("likes a", likes_a, 1.0)], config, reference=frozen(policy),
        critic=zero_critic(), ppo=ppo, **kwargs,
    )  # fmt: skip


def scored(trainer, rollouts):
    return trainer.score(trainer.reward(rollouts))


def test_grpo_learns_a_bandit(tmp_path):
    config = settings(max_steps=25, **BANDIT)
    trainer = make_trainer(tmp_path / "out", flat_llama(), [("likes a", likes_a, 1.0)], config)
    trainer.train()
    lines = logged(trainer)
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert lines[0]["reward"] < 0.1 and lines[-1]["reward"] > 0.8
    assert all(line["mismatch"] < 1.001 and line["clip_ratio"] == 0 for line in lines)  # on policy, in fp32
    rollouts = [json.loads(x) for x in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts[-1]["completion"].count("a") >= 3
    assert rollouts[-1]["tokens"] == 4 and rollouts[-1]["stop"] == "length"


def test_ppo_learns_a_bandit(tmp_path):
    config = settings(max_steps=25, beta=0.01, num_iterations=2, num_minibatches=2, **BANDIT)
    trainer = make_ppo(tmp_path / "out", flat_llama(), config)
    trainer.train()
    lines = logged(trainer)
    assert lines[0]["reward"] < 0.1 and lines[-1]["reward"] > 0.8
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4) and lines[-1]["kl"] > 1
    assert lines[-1]["explained_variance"] > 0.2
    assert lines[-1]["value_loss"] < lines[0]["value_loss"] + 1


def rollouts_of(policy, lengths: list[int], n: int, *, temperature: float = 1.0) -> Rollouts:
    """Random completions with the policy's own log-probabilities, as if it had sampled them."""
    generator = torch.Generator().manual_seed(8)
    prompts = [torch.randint(5, 250, (3 + 2 * (i // n),), generator=generator).tolist() for i in range(len(lengths))]
    prompts = [prompts[i - i % n] for i in range(len(lengths))]
    ids = [torch.randint(5, 250, (size,), generator=generator).tolist() for size in lengths]
    logps = [plain_logps(policy, p, c, temperature).tolist() for p, c in zip(prompts, ids, strict=True)]
    completions = [Completion(c, x, "length") for c, x in zip(ids, logps, strict=True)]
    return Rollouts([{"row": i // n, "prompt": "p"} for i in range(len(lengths))], prompts, completions, n)


LENGTHS = [1, 90, 7, 300, 2, 30, 55, 1]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_grpo_gradient_does_not_depend_on_micro_batches(tmp_path, loss_type):
    gradients, losses = [], []
    for max_tokens in (1, 100, 100_000):
        policy = tiny_llama(seed=3)
        config = settings(
            num_prompts=2, num_generations=4, max_completion_length=300, loss_type=loss_type,
            max_tokens_per_microbatch=max_tokens,
        )  # fmt: skip
        trainer = make_trainer(tmp_path / str(max_tokens), policy, [], config)
        experience = Experience(rollouts_of(policy, LENGTHS, 4), torch.arange(8.0) % 3, {}, [])
        experience.old_logps = [torch.tensor(c.logps) for c in experience.rollouts.completions]
        trainer.add_advantages(experience)
        with gradients_of(policy) as found:
            losses.append(trainer.update(experience)["loss"])
        gradients.append(found)
    for found, loss in zip(gradients[1:], losses[1:], strict=True):
        assert_same_gradients(found, gradients[0])
        assert loss == pytest.approx(losses[0], abs=1e-5)


def test_ppo_gradients_do_not_depend_on_micro_batches(tmp_path):
    gradients = []
    for max_tokens in (1, 100, 100_000):
        policy = tiny_llama(seed=3)
        config = settings(
            num_prompts=2, num_generations=4, max_completion_length=300, beta=0.1, max_tokens_per_microbatch=max_tokens
        )
        score = [("score", lambda completion_ids, **_: [float(len(c) % 3) for c in completion_ids], 1.0)]
        trainer = make_ppo(tmp_path / str(max_tokens), policy, config, score)
        perturb(trainer.critic, 0.05)
        experience = scored(trainer, rollouts_of(policy, LENGTHS, 4))
        trainer.add_advantages(experience)
        with gradients_of(policy) as found, gradients_of(trainer.critic) as of_critic:
            trainer.update(experience)
        gradients.append((found, of_critic))
    for found, of_critic in gradients[1:]:
        assert_same_gradients(found, gradients[0][0])
        assert_same_gradients(of_critic, gradients[0][1])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_groups_of_equal_rewards_have_no_gradient(tmp_path, beta):
    """Not one weight moves: with a KL term neither, as long as the policy is its reference."""
    policy = tiny_llama(seed=3)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    config = settings(max_steps=1, beta=beta, kl_estimator="k2", **BANDIT)
    constant = [("constant", lambda completions, **_: [0.1] * len(completions), 1.0)]
    trainer = make_trainer(tmp_path / "out", policy, constant, config, reference=frozen(policy))
    with gradients_of(policy) as found:
        trainer.train()
    [line] = logged(trainer)
    assert line["zero_signal_groups"] == 1
    assert max(g.abs().max().item() for g in found.values()) < (1e-6 if beta else 1e-30)
    if beta == 0:
        assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_rows_without_signal_count_in_the_denominator(tmp_path):
    """Leaving rows of zero advantage out of the forward is exact: the gradient is that of a step that keeps them."""
    gradients = []
    for tiny in (0.0, 1e-12):
        policy = tiny_llama(seed=3)
        config = settings(num_prompts=2, num_generations=4, max_completion_length=300)
        trainer = make_trainer(tmp_path / str(tiny), policy, [], config)
        rollouts = rollouts_of(policy, LENGTHS, 4)
        experience = Experience(rollouts, torch.zeros(8), {}, [torch.tensor(c.logps) for c in rollouts.completions])
        scores = [1.0, -1.0, 0.5, -0.5, tiny, tiny, tiny, tiny]
        experience.advantages = [torch.full((n,), a) for a, n in zip(scores, LENGTHS, strict=True)]
        with gradients_of(policy) as found:
            trainer.update(experience)
        gradients.append(found)
    assert_same_gradients(gradients[0], gradients[1])


def test_dropout_is_off(tmp_path):
    """A policy handed over in training mode, with dropout: its log-probabilities still equal the engine's."""
    policy = flat_llama(attention_dropout=0.5).train()
    trainer = make_trainer(tmp_path / "out", policy, [("likes a", likes_a, 1.0)], settings(max_steps=1, **BANDIT))
    trainer.train()
    assert logged(trainer)[0]["mismatch"] < 1.0001


def test_ppo_advantages_are_whitened_and_returns_are_not(tmp_path):
    """gamma = lambda = 1: returns are the sums to go of score and KL penalty; whitened means mean 0, variance 1."""
    policy = tiny_llama(seed=3)
    score = [("score", lambda completion_ids, **_: [float(len(c)) for c in completion_ids], 1.0)]
    ppo = PPOConfig(reward_model_path="none", lam=1.0)
    config = settings(num_prompts=2, num_generations=4, max_completion_length=300, beta=0.1)
    trainer = make_ppo(tmp_path / "out", policy, config, score, ppo=ppo)
    perturb(trainer.reference.model, 0.02)
    rollouts = rollouts_of(policy, LENGTHS, 4)
    experience = scored(trainer, rollouts)
    trainer.add_advantages(experience)
    flat = torch.cat(experience.advantages)
    assert flat.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert flat.var().item() == pytest.approx(1.0, abs=1e-4)
    for i, (prompt, c) in enumerate(zip(rollouts.prompt_ids, rollouts.completions, strict=True)):
        gap = torch.tensor(c.logps) - plain_logps(trainer.reference.model, prompt, c.ids)
        to_go = len(c.ids) - 0.1 * gap.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(experience.returns[i], to_go, atol=1e-3, rtol=1e-4)
        assert experience.values[i].abs().max() == 0  # the critic's head is zero at first


def test_a_cut_completion_scores_exactly_the_penalty_less(tmp_path):
    policy = tiny_llama(seed=3)
    rollouts = rollouts_of(policy, [3, 3, 3, 3], 2)
    rollouts.completions[1].stop = rollouts.completions[2].stop = "stop"
    config = settings(num_prompts=2, num_generations=2, missing_eos_penalty=0.75)
    rewards = [
        ("r", lambda completions, **_: [1.0, 2.0, 3.0, None], 2.0),
        ("s", lambda **_: [0.5, None, 0.5, 1.0], 1.0),
    ]
    found = make_trainer(tmp_path / "out", policy, rewards, config).reward(rollouts).rewards
    assert found.tolist() == [2.5 - 0.75, 4.0, 6.5, 1.0 - 0.75]


def test_reward_functions_get_the_rows_columns_and_not_in_place_of_the_samples(tmp_path):
    """Rankings used as prompts have `completions` of their own: what is scored is what was sampled."""
    policy, seen = tiny_llama(seed=3), {}

    def reward(prompts, completions, completion_ids, answer, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [0.0] * len(prompts)

    rollouts = rollouts_of(policy, [3, 3], 2)
    rollouts.rows = [{"prompt": "p", "answer": "5", "completions": ["data"], "completion_ids": [1]}] * 2
    rollouts.completions[0].ids = tiny_tokenizer()("ab")["input_ids"] + [tiny_tokenizer().eos_token_id]
    config = settings(num_prompts=1, num_generations=2)
    make_trainer(tmp_path / "out", policy, [("reward", reward, 1.0)], config).reward(rollouts)
    assert seen["prompts"] == ["p", "p"] and seen["answer"] == ["5", "5"]
    assert seen["completions"][0] == "ab"
    assert seen["completion_ids"] == [c.ids for c in rollouts.completions]


def raising(**_):
    raise KeyError("solution")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raising, ["raised KeyError", "solution"]),
        (lambda completions, **_: [0.0] * (len(completions) - 1), ["31 values", "32 completions"]),
        (lambda completions, **_: None, ["NoneType"]),
        (lambda completions, **_: [0.0] * 9 + [float("inf")] * 23, ["inf", "row "]),
        (lambda completions, **_: [0.0] * 9 + [float("nan")] * 23, ["nan", "row "]),
        (lambda completions, **_: ["good"] * 32, ["'good'", "row "]),
        (lambda completions, **_: [None] * 32, ["all returned None", "row "]),
    ],
    ids=["raises", "short", "nothing", "inf", "nan", "text", "none"],
)
def test_a_bad_reward_function_is_named(tmp_path, function, words):
    config = settings(max_steps=1, **BANDIT)
    trainer = make_trainer(tmp_path / "out", tiny_llama(), [("my_reward", function, 1.0)], config)
    with pytest.raises(UserError) as error:
        trainer.train()
    for word in ["my_reward", *words]:
        assert word in str(error.value)


def test_the_row_of_a_bad_value_is_the_data_sets(tmp_path):
    policy = tiny_llama()
    rollouts = rollouts_of(policy, [3] * 4, 2)
    rollouts.rows = [{"prompt": "p", "row": row} for row in (70, 70, 81, 81)]
    config = settings(num_prompts=2, num_generations=2)
    for value in (float("inf"), None):
        reward = [("mine", lambda value=value, **_: [0.0, 0.0, value, 0.0], 1.0)]
        with pytest.raises(UserError, match="mine.*row 81|row 81.*mine"):
            make_trainer(tmp_path / str(value), policy, reward, config).reward(rollouts)


class StaleEngine(HFEngine):
    """An engine that weights never reach."""

    def sync_weights(self, model):
        pass


def test_an_engine_of_other_weights_is_found_out(tmp_path):
    policy = tiny_llama()
    other = deepcopy(policy)
    perturb(other, 0.1)
    engine = StaleEngine(other, tiny_tokenizer().pad_token_id)
    reward = [("likes low ids", lambda completion_ids, **_: [float(c[0] % 2) for c in completion_ids], 1.0)]
    trainer = make_trainer(tmp_path / "out", policy, reward, settings(max_steps=1, **BANDIT), engine=engine)
    with pytest.raises(UserError, match="step 1: .*the trainer disagree.*max_mismatch is 1.05"):
        trainer.train()


def test_max_kl_stops_the_run(tmp_path):
    config = settings(max_steps=25, max_kl=0.5, **BANDIT)
    trainer = make_ppo(tmp_path / "out", flat_llama(), config)
    trainer.train()
    lines = logged(trainer)
    assert len(lines) < 25
    assert lines[-1]["kl"] > 0.5 and all(line["kl"] <= 0.5 for line in lines[:-1])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_resumed_run_ends_bit_equal(tmp_path, kind):
    """Four steps at once, then again from the checkpoint that they left after two."""
    config = settings(max_steps=4, num_iterations=2, num_minibatches=2, beta=0.02, **BANDIT)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=3, lr_scheduler_type="linear")
    ends = []
    for _ in range(2):
        policy = flat_llama()
        parts = {"optim": optim, "stage_keys": {"save_steps": 2, "save_total_limit": 2}}
        if kind == "ppo":
            trainer = make_ppo(tmp_path / "out", policy, config, **parts)
        else:
            reward = [("likes a", likes_a, 1.0)]
            trainer = make_trainer(tmp_path / "out", policy, reward, config, reference=frozen(policy), **parts)
        assert trainer.step == 2 * len(ends)
        trainer.train()
        models = [policy] if trainer.critic is None else [policy, trainer.critic]
        ends.append([p.detach().clone() for model in models for p in model.parameters()])
        assert [line["step"] for line in logged(trainer)] == [1, 2, 3, 4]
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004", ignore_errors=True)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_generations": 1}, "num_generations: found 1"),
        ({"num_minibatches": 5}, "num_minibatches: found 5 for 4 prompts"),
    ],
)
def test_settings_that_give_no_step_are_refused(tmp_path, keys, words):
    config = settings(max_steps=1, **{**BANDIT, **keys})
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path / "out", flat_llama(), [("likes a", likes_a, 1.0)], config).train()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss_type": "grop"}, "loss_type: found 'grop'"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"scale_rewards": "all"}, "scale_rewards"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: found 2 for 1"),
    ],
)
def test_settings_out_of_range_name_their_key(keys, words):
    with pytest.raises(UserError, match=words):
        settings(**keys)
