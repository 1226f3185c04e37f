"""Losses, against closed forms, hand-computed cases and the loss code of TRL 1.16's GRPO trainer itself."""

import math

import pytest
import torch
from rl_helpers import (
    assert_same_gradients,
    gradients_of,
    make_trainer,
    plain_logps,
    signals_restored,
    tiny_llama,
    tiny_tokenizer,
)

from posttrain.rl.config import RLConfig
from posttrain.rl.losses import clipped_policy_loss, clipped_value_loss, kl_estimates, sequence_weights
from posttrain.rl.types import Completion, Experience, Rollouts


@pytest.mark.parametrize(
    ("mu", "kind", "bias", "spread"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.002, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.00),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.70),
    ],
)
def test_bias_and_spread_of_the_kl_estimators(mu, kind, bias, spread):
    """Schulman's table (joschu.net/blog/kl-approx.html): samples of N(0, 1), reference N(mu, 1), in units of the KL.

    The expectation is taken by quadrature, so the figures are exact and not drawn.
    """
    x = torch.linspace(-14, 14, 28_001, dtype=torch.float64)
    logp, ref = -0.5 * x**2, -0.5 * (x - mu) ** 2
    weights = logp.exp() / logp.exp().sum()
    values, true = kl_estimates(logp, ref, kind), 0.5 * mu**2
    mean = (weights * values).sum()
    std = (weights * (values - mean) ** 2).sum().sqrt()
    assert (mean / true - 1).item() == pytest.approx(bias, abs=1e-3)
    assert (std / true).item() == pytest.approx(spread, abs=6e-3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.0, 0.0, 0.0, 0.0]),
        ("k2", [-0.0626, -0.1540, 0.3443, -0.1277]),  # gradient of KL(policy, reference)
        ("k3", [0.0090, -0.2300, 0.3040, -0.0830]),  # gradient of KL(reference, policy)
    ],
)
def test_expected_gradients_of_the_kl_estimators(kind, expected):
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], requires_grad=True)
    logps, ref = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor([0.0, 0.4, -0.3, 0.2]), 0)
    (logps.detach().exp() * kl_estimates(logps, ref, kind)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor(expected), atol=6e-5, rtol=0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_of_equal_policies_are_zero(kind):
    logps = torch.tensor([-0.1, -5.0, -30.0])
    assert kl_estimates(logps, logps, kind).abs().max() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "loss", "clipped"),
    [
        (1.0, 2.0, 0.2, -2.0, 0),
        (1.5, 1.0, 0.2, -1.2, 1),  # already more likely by more than 20 %: no more gain
        (1.5, -1.0, 0.2, 1.5, 0),  # but a bad token may still be pushed down
        (0.5, 1.0, 0.2, -0.5, 0),
        (0.5, -1.0, 0.2, 0.8, 1),
        (1.25, 1.0, 0.28, -1.25, 0),  # DAPO's clip-higher
        (1.25, 1.0, 0.2, -1.2, 1),
        (1.5, 0.0, 0.2, 0.0, 0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, high, loss, clipped):
    logps = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    found, was_clipped = clipped_policy_loss(logps, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2, high)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert was_clipped.tolist() == [clipped]
    assert logps.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-6)


def test_clipped_value_loss_equals_the_published_formula():
    """TRL 1.12's PPO: 0.5 * max((v - R)^2, (clamp(v, old - c, old + c) - R)^2), recomputed here."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 500, generator=generator)
    clamped = torch.clamp(values, old - 0.2, old + 0.2)
    expected = 0.5 * torch.max(torch.square(values - returns), torch.square(clamped - returns))
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), expected)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (0.1, 0.5 * 0.9**2, -0.9),
        (0.5, 0.5 * 0.8**2, 0.0),  # moved further than 0.2 towards the return: cut
        (-0.5, 0.5 * 1.5**2, -1.5),  # moved away from it: not cut
    ],
)
def test_clipped_value_loss_by_hand(value, loss, gradient):
    values = torch.tensor([value], requires_grad=True)
    found = clipped_value_loss(values, torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_sequence_weights_are_the_means_they_are_named_for():
    lengths, losses = [1, 4, 10], [torch.tensor([2.0]), torch.arange(4.0), torch.linspace(-1, 3, 10)]

    def weighted(kind):
        weights = sequence_weights(kind, torch.tensor(lengths), 15, 3, 20)
        return sum((w * loss).sum().item() for w, loss in zip(weights, losses, strict=True))

    assert weighted("grpo") == pytest.approx(torch.stack([loss.mean() for loss in losses]).mean().item())
    assert weighted("dapo") == pytest.approx(torch.cat(losses).mean().item())
    assert weighted("dr_grpo") == pytest.approx(torch.cat(losses).sum().item() / (3 * 20))


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_sequence_weights_of_two_processes_sum_to_one(kind):
    first, second = torch.tensor([1, 900]), torch.tensor([7, 40])
    sums = [(sequence_weights(kind, part, 948, 4, 1000) * part).sum().item() for part in (first, second)]
    assert sum(sums) == pytest.approx(1.0)


def test_dr_grpo_weight_does_not_depend_on_any_length():
    short = sequence_weights("dr_grpo", torch.tensor([1, 5]), 6, 2, 100)
    long = sequence_weights("dr_grpo", torch.tensor([90, 5]), 95, 2, 100)
    assert short.tolist() == long.tolist() == pytest.approx([1 / 200] * 2)


def experience_of(policy, temperature: float) -> Experience:
    """Six completions of 1 to 12 tokens in two groups, with off-policy and reference log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 5, 12, 3, 8, 2]
    prompts = [[10, 11, 12]] * 3 + [[20, 21, 22, 23, 24, 25, 26]] * 3
    ids = [torch.randint(30, 200, (n,), generator=generator).tolist() for n in lengths]
    logps = [plain_logps(policy, p, c, temperature) for p, c in zip(prompts, ids, strict=True)]
    old = [x + 0.3 * torch.randn(len(x), generator=generator) for x in logps]
    reference = [x + 0.5 * torch.randn(len(x), generator=generator) for x in logps]
    completions = [Completion(c, o.tolist(), "length") for c, o in zip(ids, old, strict=True)]
    rollouts = Rollouts([{"row": i // 3} for i in range(6)], prompts, completions, 3)
    experience = Experience(rollouts, torch.zeros(6), {}, old, reference)
    scores = torch.tensor([1.3, -0.2, -1.1, 0.7, -0.9, 0.2])
    experience.advantages = [a.expand(n) for a, n in zip(scores, lengths, strict=True)]
    return experience


def trl_loss_and_gradients(policy, experience, folder, **config):
    """Loss and gradients by `GRPOTrainer._compute_loss` of TRL 1.16, on left-padded prompts, right-padded replies."""
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder), num_generations=3, per_device_train_batch_size=6, max_completion_length=16,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **config,
    )  # fmt: skip
    trainer = GRPOTrainer(
        policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.model.eval()
    rollouts = experience.rollouts
    ids = [torch.tensor(c.ids) for c in rollouts.completions]
    prompts = [torch.tensor(p) for p in rollouts.prompt_ids]

    def right(pieces):
        return pad_sequence(pieces, batch_first=True)

    inputs = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        "completion_ids": right(ids),
        "completion_mask": right([torch.ones_like(c) for c in ids]),
        "advantages": torch.stack([a[0] for a in experience.advantages]),
        "old_per_token_logps": right(experience.old_logps),
        "ref_per_token_logps": right(experience.ref_logps),
        "num_items_in_batch": torch.tensor(sum(rollouts.lengths)),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("loss_type", "beta", "epsilon_high"), [("grpo", 0.1, 0.2), ("dapo", 0.0, 0.28), ("dr_grpo", 0.04, 0.2)]
)
def test_step_equals_trl(tmp_path, loss_type, beta, epsilon_high):
    """One update of ours has the loss and the gradient of TRL's own code: clip, KL, weights, temperature, packing."""
    from transformers import AutoModelForCausalLM

    tiny_llama(seed=1).save_pretrained(tmp_path / "model")  # TRL loads its reference model by the policy's path
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    experience = experience_of(policy, temperature=0.8)
    loss, expected = trl_loss_and_gradients(
        policy, experience, tmp_path / "trl", loss_type=loss_type, beta=beta, epsilon_high=epsilon_high,
        epsilon=0.2, temperature=0.8, use_bias_correction_kl=False,  # the KL of the GRPO paper
    )  # fmt: skip
    config = RLConfig(
        num_prompts=2, num_generations=3, max_completion_length=16, loss_type=loss_type, beta=beta,
        epsilon_high=epsilon_high, temperature=0.8, max_tokens_per_microbatch=20, max_mismatch=10.0,
    )  # fmt: skip
    with signals_restored():
        trainer = make_trainer(tmp_path / "ours", policy, [], config)
        with gradients_of(policy) as found:
            numbers = trainer.update(experience)
    assert numbers["loss"] == pytest.approx(loss, abs=1e-5)
    assert_same_gradients(found, expected)


def test_dr_grpo_gradient_of_a_token_does_not_depend_on_the_length_of_its_completion(tmp_path):
    """A causal LM's first tokens do not see later ones: with no advantage after them, more tokens change nothing."""
    config = RLConfig(
        num_prompts=1, num_generations=2, max_completion_length=16, loss_type="dr_grpo", max_mismatch=1e9
    )
    gradients = []
    for extra in (0, 9):
        policy = tiny_llama(seed=1)
        replies = [[40, 41, 42] + [50] * extra, [60, 61]]
        logps = [plain_logps(policy, [10, 11], ids) for ids in replies]
        completions = [Completion(ids, x.tolist(), "length") for ids, x in zip(replies, logps, strict=True)]
        experience = Experience(Rollouts([{}] * 2, [[10, 11]] * 2, completions, 2), torch.zeros(2), {}, logps)
        experience.advantages = [torch.tensor([1.0] * 3 + [0.0] * extra), torch.tensor([-1.0] * 2)]
        with signals_restored(), gradients_of(policy) as found:
            make_trainer(tmp_path / str(extra), policy, [], config).update(experience)
        gradients.append(found)
    assert_same_gradients(gradients[1], gradients[0])


def test_an_unknown_estimator_or_loss_type_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimates(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="bnpo"):
        sequence_weights("bnpo", torch.tensor([1]), 1, 1, 1)
