"""Muon with AdamW as one optimizer: what it does to a matrix, that it is torch's two side by side, its state; spikes.

Run: pytest tests/test_optimizers.py
"""

import copy
import math

import pytest
import torch
from conftest import new_llama
from transformers import GPT2Config, GPT2LMHeadModel

from posttrain import stage
from posttrain.errors import UserError
from posttrain.optimizers import MuonWithAdamW, make_optimizer, parameter_groups
from posttrain.pretrain import PretrainOptim
from posttrain.spikes import FIRST, PATIENCE, SpikeGuard
from posttrain.training import Updater, schedule


def muon(model, rate=0.01, **keys):
    return make_optimizer(model, PretrainOptim(rate, optim="muon", **keys), rate)


def backward(model, seed=0):
    ids = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def test_each_parameter_is_in_one_group_and_only_the_layers_matrices_are_muons(tokenizer):
    for model in (new_llama(tokenizer), gpt2()):
        groups = parameter_groups(model, 1.0, 0.1, {}, muon=True)
        listed = [p for group in groups for p in group["params"]]
        assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
        names = {id(p): name for name, p in model.named_parameters()}
        taken = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
        expected = {
            name for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)
        }
        assert taken == expected and len(taken) >= 8
        assert {g["weight_decay"] for g in groups if g["muon"]} == {0.1}
        assert all(g["weight_decay"] == (0.1 if p.ndim > 1 else 0) for g in groups for p in g["params"])


def test_a_matrix_moves_by_an_orthogonal_one_of_adamws_size(fresh_model):
    """The update's singular values lie around rate x 0.2 sqrt(max side), whatever those of the gradient are: the five
    Newton-Schulz steps leave them between 0.6 and 1.3 or so (Jordan et al. 2024). Embeddings move as Adam's do."""
    before = copy.deepcopy(fresh_model.state_dict())
    optimizer = muon(fresh_model, rate=0.01)
    backward(fresh_model)
    optimizer.step()
    for name, parameter in fresh_model.named_parameters():
        change = before[name] - parameter.detach()
        if parameter.ndim == 2 and ".layers." in name:
            values = torch.linalg.svdvals(change) / (0.01 * 0.2 * math.sqrt(max(parameter.shape)))
            strong = torch.linalg.svdvals(parameter.grad) > 0.05 * torch.linalg.svdvals(parameter.grad).max()
            assert values[: int(strong.sum())].min() > 0.5 and values.max() < 1.4, name
            assert (change * parameter.grad).sum() > 0, name
    moved = before["model.embed_tokens.weight"] - fresh_model.model.embed_tokens.weight.detach()
    grad = fresh_model.model.embed_tokens.weight.grad
    large = grad.abs() > 1e-4
    torch.testing.assert_close(moved[large], 0.01 * grad[large].sign(), rtol=1e-3, atol=1e-6)


def test_it_is_torchs_muon_and_torchs_adamw_side_by_side(fresh_model):
    other = copy.deepcopy(fresh_model)
    one = muon(fresh_model, weight_decay=0.1)
    inside = [p for name, p in other.named_parameters() if ".layers." in name and p.ndim == 2]
    tables = [p for name, p in other.named_parameters() if ".layers." not in name and p.ndim == 2]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    two = [
        torch.optim.Muon(inside, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.01,
            betas=(0.9, 0.95),
        ),
    ]
    for seed in range(4):
        for model in (fresh_model, other):
            backward(model, seed)
        one.step()
        for optimizer in two:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(fresh_model.parameters(), other.parameters(), strict=True))


def test_its_state_goes_on_where_it_was(fresh_model):
    other = copy.deepcopy(fresh_model)
    first = muon(fresh_model)
    for seed in range(2):
        backward(fresh_model, seed)
        first.step()
    second = muon(other)
    other.load_state_dict(fresh_model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 4):
        for model, optimizer in ((fresh_model, first), (other, second)):
            backward(model, seed)
            optimizer.param_groups[0]["lr"] = 0.003  # as a schedule does
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(fresh_model.parameters(), other.parameters(), strict=True))
    assert {tuple(sorted(values)) for values in second.state.values()} == {
        ("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step"),
    }  # fmt: skip


def test_a_model_without_layers_has_nothing_for_muon():
    with pytest.raises(UserError, match="optim: muon, but the model's layers have no matrices"):
        make_optimizer(torch.nn.Linear(4, 4), PretrainOptim(0.1, optim="muon"), 0.1)
    assert isinstance(muon(gpt2()), MuonWithAdamW)


def test_the_rate_falls_to_its_floor():
    cosine = [schedule("cosine", step, 110, 10, min_ratio=0.1) for step in range(110)]
    assert cosine[10] == 1 and cosine[60] == pytest.approx(0.55) and 0.1 < cosine[109] < 0.102
    wsd = [schedule("wsd", step, 100, 0, decay_share=0.2) for step in range(100)]
    assert wsd[:80] == [1] * 80 and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)


# ---- spikes ---------------------------------------------------------------------------------------------------------


def calm(guard: SpikeGuard, steps: int = FIRST) -> None:
    for number in range(steps):
        assert not guard.refuses(2.0 + 0.1 * (-1) ** number, 1.0 + 0.05 * (-1) ** number)


def test_a_step_is_refused_from_the_width_on():
    guard = SpikeGuard(6.0)
    calm(guard)
    deviation = 0.1 * math.sqrt(FIRST / (FIRST - 1))  # of +-0.1, as a sample
    assert not guard.refuses(2.0 + 5.9 * deviation, 1.0)
    guard = SpikeGuard(6.0)
    calm(guard)
    assert guard.refuses(2.0 + 6.1 * deviation, 1.0) and guard.refuses(2.0, 1.4)
    calm(guard, 4)  # the refused ones are not remembered
    assert guard.refuses(2.0 + 6.1 * deviation, 1.0)


def test_falling_losses_early_steps_and_a_width_of_none_refuse_nothing():
    guard, off = SpikeGuard(6.0), SpikeGuard(0.0)
    assert not any(guard.refuses(loss, 1.0) for loss in (1.0, 50.0, 3.0))
    assert not any(SpikeGuard(6.0).refuses(10.0 - 0.05 * step, 1.0) for step in range(150))
    assert not any(off.refuses(loss, 1.0) for loss in [1.0] * 40 + [1e9])


def test_spikes_without_end_stop_the_run():
    guard = SpikeGuard(6.0)
    calm(guard)
    for _ in range(PATIENCE):
        assert guard.refuses(9.0, 1.0)
    with pytest.raises(UserError, match="17 steps on end were skipped .*loss 9.* Lower learning_rate"):
        guard.refuses(9.0, 1.0)


def test_a_guard_goes_on_where_it_was():
    first, second = SpikeGuard(6.0), SpikeGuard(6.0)
    calm(first)
    first.refuses(9.0, 1.0)
    second.load_state(first.state())
    assert second.state() == first.state() and second.refuses(9.0, 1.0)


@pytest.mark.usefixtures("restored_signals")
def test_a_refused_step_counts_and_changes_no_weight(fresh_model):
    updater = Updater(fresh_model, stage.accelerator(False), PretrainOptim(0.01, warmup_steps=0), 10)
    ids = torch.arange(16)[None]

    def step(refuses):
        before = copy.deepcopy(fresh_model.state_dict())
        found = updater.step([ids], lambda ids: updater.model(input_ids=ids, labels=ids).loss, lambda: "-", refuses)
        return found, all(torch.equal(before[k], v) for k, v in fresh_model.state_dict().items())

    taken, same = step(lambda loss, norm: False)
    assert taken["skipped"] == 0 and not same
    skipped, same = step(lambda loss, norm: (loss, norm) == (pytest.approx(loss), pytest.approx(norm)))
    assert skipped["skipped"] == 1 and same and updater.updates == 2
    moments = {values["step"].item() for values in updater.optimizer.state.values()}
    assert moments == {1.0}
