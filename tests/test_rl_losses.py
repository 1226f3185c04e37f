"""Losses, against closed forms, hand-computed cases and the loss code of TRL 1.16's GRPO trainer itself."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracles.trl_1_16_grpo import make_trl, trl_loss, trl_step
from rl_helpers import (
    assert_same_gradients,
    frozen,
    gradients_of,
    make_trainer,
    plain_logps,
    settings,
    signals_restored,
    tiny_llama,
)

from posttrain.rl.kl import kl_loss
from posttrain.rl.losses import (
    LOSS_TYPES,
    clipped_value_loss,
    policy_loss,
    sequence_weights,
    token_total,
)
from posttrain.rl.types import Completion, Experience, Rollouts

LENGTHS = [1, 5, 12, 3, 8, 2]


def ppo_loss(logps, old_logps, advantages, **keys):
    """Of one sequence, clipped at 0.2 unless said otherwise."""
    return policy_loss(logps, old_logps, advantages, [len(logps)], **{"low": 0.2, "high": 0.2, **keys})


@pytest.mark.parametrize(
    ("ratio", "advantage", "keys", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, {}, -2.0, -2.0, 0),
        (1.5, 1.0, {}, -1.2, 0.0, 1),  # already more likely by more than 20 %: no more gain
        (1.5, -1.0, {}, 1.5, 1.5, 0),  # but a bad token may still be pushed down
        (0.5, 1.0, {}, -0.5, -0.5, 0),
        (0.5, -1.0, {}, 0.8, 0.0, 1),
        (1.25, 1.0, {"high": 0.28}, -1.25, -1.25, 0),  # DAPO's clip-higher
        (1.25, 1.0, {"high": 0.2}, -1.2, 0.0, 1),
        (1.5, 0.0, {}, 0.0, 0.0, 0),
        (4.0, -1.0, {"delta": 3.0}, 3.0, 0.0, 1),  # dual clip: however likely, pushed down no more
        (2.5, -1.0, {"delta": 3.0}, 2.5, 2.5, 0),
        (4.0, 1.0, {"delta": 3.0}, -1.2, 0.0, 1),  # and it leaves good tokens as they are
        (4.0, -1.0, {"cap": 2.0}, 2.0, 2.0, 0),  # the ratio as importance weight, truncated: coefficient 2
        (1.5, -1.0, {"cap": 2.0}, 1.5, 1.5, 0),
    ],
)
def test_policy_loss_of_one_token_by_hand(ratio, advantage, keys, loss, gradient, clipped):
    logps = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    found = ppo_loss(logps, torch.tensor([-3.0]), torch.tensor([advantage]), **keys)
    found.loss.sum().backward()
    assert found.loss.item() == pytest.approx(loss, abs=1e-6)
    assert logps.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert found.ratio.item() == pytest.approx(ratio)
    assert (found.clipped.item(), found.truncated.item()) == (clipped, float(ratio > keys.get("cap", 9)))


@pytest.mark.parametrize(("ratio", "gradient"), [(0.5, -1.0), (3.0, -6.0), (9.0, -10.0)])
def test_cispo_keeps_the_gradient_of_a_clipped_token(ratio, gradient):
    """-min(r, 5) A grad log pi with A = 2; a `cap` below its bound takes the bound's place."""
    for cap, expected in ((math.inf, gradient), (4.0, max(gradient, -8.0))):
        logps = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
        found = ppo_loss(logps, torch.tensor([-3.0]), torch.tensor([2.0]), high=5.0, loss_type="cispo", cap=cap)
        found.loss.sum().backward()
        assert logps.grad.item() == pytest.approx(expected, rel=1e-5)
        assert found.clipped.item() == float(ratio > 5)


def test_gspo_of_two_sequences_by_hand():
    """Ratios are geometric means, 2 and 1 / 2: the clip sees those, whatever a single token's ratio."""
    logps = torch.tensor([math.log(8.0), math.log(0.5), math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([-1.0, -1.0, 1.0])
    found = policy_loss(logps, torch.zeros(3), advantages, [2, 1], low=0.1, high=0.1, loss_type="gspo")
    torch.testing.assert_close(found.ratio, torch.tensor([2.0, 2.0, 0.5]))
    torch.testing.assert_close(found.loss, torch.tensor([2.0, 2.0, -0.5]))
    found.loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([2.0, 2.0, -0.5]))  # 2 tokens x 1/2 of the mean x ratio 2


def test_truncation_is_the_same_with_and_without_a_pass_for_old_log_probabilities():
    """At first pi = pi_old: min(pi_old / mu, cap) beside a ratio of 1, or the ratio pi / mu itself, truncated."""
    engine, trainer, advantages = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).double()
    gradients = []
    for keys in ({"old": engine}, {"old": trainer, "behaviour_logps": engine}):
        logps = trainer.clone().requires_grad_()
        found = ppo_loss(logps, keys.pop("old"), advantages, low=1.0, high=1e9, cap=2.0, **keys)
        (gradient,) = torch.autograd.grad(found.loss.sum(), logps)
        gradients.append(gradient)
        assert torch.equal(found.truncated.bool(), trainer - engine > math.log(2.0))
    torch.testing.assert_close(gradients[0], -(trainer - engine).exp().clamp(max=2.0) * advantages)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_groups_of_equal_rewards_have_a_gradient_of_exactly_zero(loss_type):
    logps, zeros = torch.linspace(-1, 2, 7, requires_grad=True), torch.zeros(7)
    found = policy_loss(logps, zeros, zeros, [3, 4], low=0.2, high=1.2, loss_type=loss_type, delta=1.1)
    found.loss.sum().backward()
    assert logps.grad.tolist() == [0.0] * 7 and found.clipped.sum() == 0


reals = st.floats(-3, 3, width=32)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(st.tuples(reals, reals, reals), min_size=1, max_size=8), st.sampled_from(LOSS_TYPES),
    st.sampled_from([None, 3.0]), st.floats(1, 3), st.data(),
)  # fmt: skip
def test_what_holds_for_every_loss(rows, loss_type, delta, cap, data):
    """Shares are 0 or 1; no token pulls against its advantage; sequences do not touch each other."""
    logps, old, advantages = torch.tensor(rows).T.clone()
    cut = data.draw(st.integers(0, len(rows)))
    sizes = [cut, len(rows) - cut]
    if loss_type == "gspo":
        advantages = torch.cat([a[:1].expand(len(a)) for a in advantages.split(sizes)])
    keys = {"low": 0.2, "high": 1.2, "loss_type": loss_type, "delta": delta, "cap": cap}
    logps.requires_grad_()
    found = policy_loss(logps, old, advantages, sizes, **keys)
    found.loss.sum().backward()
    assert set(found.clipped.tolist()) | set(found.truncated.tolist()) <= {0.0, 1.0}
    assert (logps.grad * advantages <= 0).all()
    parts = (x.detach().split(sizes) for x in (logps, old, advantages))
    alone = [policy_loss(*part, [len(part[0])], **keys).loss for part in zip(*parts, strict=True) if len(part[0])]
    assert torch.equal(torch.cat(alone), found.loss.detach())


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

    def weighted(kind, total=15, counts=None):
        weights = sequence_weights(kind, torch.tensor(lengths), total, 3, 20, counts)
        return sum((w * loss).sum().item() for w, loss in zip(weights, losses, strict=True))

    for kind in ("grpo", "gspo"):
        assert weighted(kind) == pytest.approx(torch.stack([loss.mean() for loss in losses]).mean().item())
    for kind in ("bnpo", "dapo", "cispo"):
        assert weighted(kind) == pytest.approx(torch.cat(losses).mean().item())
    assert weighted("dr_grpo") == pytest.approx(torch.cat(losses).sum().item() / (3 * 20))
    without_second = torch.tensor([1.0, 0.0, 1.0])
    assert weighted("grpo", 11, without_second) == pytest.approx((losses[0].mean() + losses[2].mean()).item() / 3)
    assert weighted("dapo", 11, without_second) == pytest.approx(torch.cat(losses[::2]).mean().item())


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 900), min_size=1, max_size=12), st.integers(0, 12), st.sampled_from(LOSS_TYPES)
)
def test_sequence_weights_of_two_processes_sum_to_one(lengths, cut, kind):
    """dr_grpo's to the share of the room that is used."""
    total, parts = sum(lengths), [torch.tensor(part, dtype=torch.long) for part in (lengths[:cut], lengths[cut:])]
    found = sum((sequence_weights(kind, part, total, len(lengths), 1000) * part).sum().item() for part in parts)
    assert found == pytest.approx(total / (1000 * len(lengths)) if kind == "dr_grpo" else 1.0, rel=1e-5)


def test_dr_grpo_weight_does_not_depend_on_any_length():
    short = sequence_weights("dr_grpo", torch.tensor([1, 5]), 6, 2, 100)
    long = sequence_weights("dr_grpo", torch.tensor([90, 5]), 95, 2, 100)
    assert short.tolist() == long.tolist() == pytest.approx([1 / 200] * 2)


def test_what_is_unknown_is_refused():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="loss_type: found 'sapo', expected one of grpo, dr_grpo"):
        sequence_weights("sapo", torch.tensor([1]), 1, 1, 1)
    with pytest.raises(ValueError, match="loss_type: found 'sapo'"):
        ppo_loss(one, one, one, loss_type="sapo")
    with pytest.raises(ValueError, match="importance_sampling_level: found 'word', expected one of token, sequence"):
        ppo_loss(one, one, one, level="word")
    with pytest.raises(ValueError, match="epsilon_high: found 0.2; for cispo it bounds the ratio"):
        ppo_loss(one, one, one, loss_type="cispo")


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    return make_trl(tmp_path_factory.mktemp("trl"))


def random_tokens(lengths: list[int], seed: int = 0) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities of four policies that drifted apart, float64, and one advantage a sequence."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n, scale):
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    logps = [draw(n, 1.0) - 3 for n in lengths]
    drifted = {
        key: [x + draw(len(x), scale) for x in logps] for key, scale in (("old", 0.5), ("engine", 0.7), ("ref", 0.5))
    }
    return {"logps": logps, **drifted, "advantages": [draw(1, 1.0).expand(n) for n in lengths]}


def our_loss(tokens: dict, keys: dict, total: float | None = None, counts=None) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of the log-probabilities, by the functions under test."""
    lengths = [len(x) for x in tokens["logps"]]
    flat = {key: torch.cat(pieces) for key, pieces in tokens.items()}
    logps, keys = flat["logps"].requires_grad_(), dict(keys)
    beta, correct, engine = keys.pop("beta", 0.0), keys.pop("use_bias_correction_kl", True), keys.pop("engine", False)
    if engine:
        keys |= {"behaviour_logps": flat["engine"]}
    terms = policy_loss(logps, flat["old"], flat["advantages"], lengths, **keys)
    each = terms.loss + beta * kl_loss(logps, flat["ref"], "k3", terms.ratio, correct)
    total, sizes = sum(lengths) if total is None else total, torch.tensor(lengths)
    weights = sequence_weights(keys["loss_type"], sizes.double(), total, len(lengths), 16, counts)
    loss = (each * weights.double().repeat_interleave(sizes)).sum()
    loss.backward()
    return loss.item(), logps.grad.split(lengths)


BASE = {"loss_type": "dapo", "low": 0.2, "high": 0.2}
VARIANTS = {
    **{kind: {"loss_type": kind, "high": 2.5 if kind == "cispo" else 0.2} for kind in LOSS_TYPES},
    "clip_higher": {"high": 0.28},
    "asymmetric": {"low": 0.1, "high": 0.4, "loss_type": "grpo"},
    "delta": {"delta": 1.6, "loss_type": "bnpo"},
    "sequence_level": {"level": "sequence"},
    "sequence_level_delta": {"level": "sequence", "delta": 1.3, "low": 0.05, "high": 0.05, "loss_type": "dr_grpo"},
    "sequence_level_cispo": {"level": "sequence", "loss_type": "cispo", "high": 1.1},
    "kl": {"beta": 0.1},
    "kl_of_the_paper": {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "kl_of_gspo": {"beta": 0.1, "loss_type": "gspo"},
    "kl_of_cispo": {"beta": 0.1, "loss_type": "cispo", "high": 2.5},
    **{f"truncated_{kind}": {"loss_type": kind, "high": 1.5, "cap": 2.0, "engine": True} for kind in LOSS_TYPES},
    "truncated_kl_delta": {"beta": 0.2, "cap": 1.5, "engine": True, "delta": 1.6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_trl(trl, variant):
    keys, tokens = BASE | VARIANTS[variant], random_tokens(LENGTHS)
    expected, gradients = trl_loss(trl, tokens, keys)
    found, ours = our_loss(tokens, keys)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_truncated_completions_left_out_equal_trl(trl, loss_type):
    """mask_truncated_completions: TRL empties the mask of the third and the last completion."""
    keys, tokens = BASE | {"loss_type": loss_type, "high": 1.5}, random_tokens(LENGTHS)
    counts = torch.tensor([1, 1, 0, 1, 1, 0])
    kept = sum(n for n, count in zip(LENGTHS, counts, strict=True) if count)
    expected, gradients = trl_loss(trl, tokens, keys, counts=counts, num_items=kept)
    found, ours = our_loss(tokens, keys, total=kept, counts=counts)
    assert found == pytest.approx(expected, rel=1e-6)
    assert ours[2].abs().sum() == ours[5].abs().sum() == 0
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_minibatches_and_accumulation_are_weighted_as_trl_weights_them(trl, loss_type):
    """Four forwards of six rows a generation, two to an optimizer step: TRL's losses add up to ours of twelve rows.

    But for bnpo, whose means TRL takes forward by forward: there the optimizer step is one forward.
    """
    forwards = [random_tokens([n + k for n in LENGTHS], seed=k) for k in range(4)]
    of_batch = sum(len(x) for tokens in forwards for x in tokens["logps"])
    accumulated = 1 if loss_type == "bnpo" else 2
    keys = BASE | {"loss_type": loss_type, "high": 1.5}
    steps = {"gradient_accumulation": accumulated, "steps_per_generation": 4, "num_items": of_batch}
    expected = [trl_loss(trl, tokens, keys, **steps) for tokens in forwards[:accumulated]]
    minibatch = {key: [x for tokens in forwards[:accumulated] for x in tokens[key]] for key in forwards[0]}
    of_minibatch = sum(map(len, minibatch["logps"]))
    total = token_total(loss_type, of_minibatch, of_batch, 4 // accumulated)
    found, ours = our_loss(minibatch, keys, total=total)
    assert found == pytest.approx(sum(loss for loss, _ in expected), rel=1e-6)
    theirs = [gradient for _, gradients in expected for gradient in gradients]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def experience_of(policy, temperature: float) -> Experience:
    """Six completions of 1 to 12 tokens in two groups, with off-policy and reference log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    prompts = [[10, 11, 12]] * 3 + [[20, 21, 22, 23, 24, 25, 26]] * 3
    ids = [torch.randint(30, 200, (n,), generator=generator).tolist() for n in LENGTHS]
    logps = [plain_logps(policy, p, c, temperature) for p, c in zip(prompts, ids, strict=True)]
    old = [x + 0.3 * torch.randn(len(x), generator=generator) for x in logps]
    reference = [x + 0.5 * torch.randn(len(x), generator=generator) for x in logps]
    completions = [Completion(c, o.tolist(), "length") for c, o in zip(ids, old, strict=True)]
    rollouts = Rollouts([{"row": i // 3} for i in range(6)], prompts, completions, 3)
    scores = torch.tensor([1.3, -0.2, -1.1, 0.7, -0.9, 0.2])
    advantages = [a.expand(n) for a, n in zip(scores, LENGTHS, strict=True)]
    return Experience(rollouts, torch.zeros(6), {}, old, ref_logps=reference, advantages=advantages)


@pytest.mark.parametrize(
    "keys",
    [
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},  # the KL of the GRPO paper
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"loss_type": "dr_grpo", "beta": 0.04, "delta": 1.5},
        {"loss_type": "gspo"},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ],
    ids=lambda keys: keys["loss_type"],
)
def test_step_equals_trl(tmp_path, keys):
    """One update of ours has the loss and the gradient of TRL's own code: clip, KL, weights, temperature, layout."""
    from transformers import AutoModelForCausalLM

    tiny_llama(seed=1).save_pretrained(tmp_path / "model")  # TRL loads its reference model by the policy's path
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    experience = experience_of(policy, temperature=0.8)
    as_gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    theirs = as_gspo if keys["loss_type"] == "gspo" else keys
    loss, expected = trl_step(policy, experience, tmp_path / "trl", epsilon=0.2, temperature=0.8, **theirs)
    config = settings(
        num_prompts=2, num_generations=3, max_completion_length=16, epsilon=0.2, temperature=0.8,
        max_tokens_per_microbatch=20, max_mismatch=10.0, vllm_importance_sampling_cap=math.inf, **keys,
    )  # fmt: skip
    with signals_restored():
        reference = frozen(policy) if "beta" in keys else None
        trainer = make_trainer(tmp_path / "ours", policy, [], config, reference=reference)
        with gradients_of(policy) as found:
            numbers = trainer.update(experience)
    assert numbers["loss"] == pytest.approx(loss, abs=1e-5)
    assert_same_gradients(found, expected)


def test_dr_grpo_gradient_of_a_token_does_not_depend_on_the_length_of_its_completion(tmp_path):
    """A causal LM's first tokens do not see later ones: with no advantage after them, more tokens change nothing."""
    config = settings(
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
