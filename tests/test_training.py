"""The shared update: gradients, stops, schedules, resume bit for bit; the floor and the measure of base models.

Run: pytest tests/test_training.py
"""

import errno
import math
import os
import pickle
import random
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import REPOSITORY
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from posttrain import stage
from posttrain.base_evals import ByteTrigram, bits_per_byte
from posttrain.errors import UserError
from posttrain.order import shuffled_indices
from posttrain.packing import pack
from posttrain.training import OptimConfig, Updater, read_state, schedule, write_state

LENGTHS = [2, 900, 31, 3, 257, 64, 5, 128]


def sequences(vocabulary):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]


def last_gradients(model):
    """A dict that holds each parameter's gradient as it is after the latest backward."""
    found = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    return found


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 4, 1]])
def test_the_gradient_does_not_depend_on_the_micro_batches(tokenizer, fresh_model, sizes):
    rows = sequences(len(tokenizer))
    total = sum(n - 1 for n in LENGTHS)
    loss = 0.0  # one row at a time, nothing packed: the mean over all predicted tokens
    for row in rows:
        logits = fresh_model(torch.tensor([row])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    expected = torch.autograd.grad(loss / total, list(fresh_model.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))

    def share(members):
        packed = pack(members, 1024)
        logits = updater.model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
        flat, parts = logits.flatten(0, 1), []
        for start, row in zip(packed.starts, members, strict=True):
            target = torch.tensor(row[1:])
            parts.append(torch.nn.functional.cross_entropy(flat[start : start + len(target)], target, reduction="sum"))
        return sum(parts) / total

    gradients = last_gradients(fresh_model)
    updater = Updater(fresh_model, stage.accelerator(False), OptimConfig(warmup_steps=0, max_grad_norm=1e9), 10)
    parts = torch.tensor(range(8)).split(sizes)
    numbers = updater.step([[rows[i] for i in part] for part in parts], share, lambda: "")
    for (name, _), gradient in zip(fresh_model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
    assert numbers == pytest.approx({"loss": loss.item() / total, "grad_norm": norm, "learning_rate": 1e-3}, rel=1e-4)


TWO_PROCESSES = """
import copy, json, sys
import accelerate, torch
from posttrain.errors import entry
from posttrain.training import OptimConfig, Updater

class Squares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, rows):
        return self.layer(rows).square().sum()

torch.manual_seed(0)
rows, model = torch.randn(12, 8), Squares()
alone, expected = copy.deepcopy(model), []
optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
process = accelerate.Accelerator(cpu=True)
updater = Updater(model, process, OptimConfig(warmup_steps=0, max_grad_norm=1e9), 5)
mine = rows[process.process_index :: process.num_processes]
for size in (2, 6):  # three micro-batches on each process, then one
    loss = alone(rows) / 12
    optimizer.zero_grad()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in alone.parameters()]).norm()
    optimizer.step()
    numbers = updater.step(mine.split(size), lambda b: updater.model(b) / 12, lambda: "")
    found = torch.tensor([numbers["loss"], numbers["grad_norm"]])
    torch.testing.assert_close(found, torch.stack([loss, norm]).detach())
    for found, single in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, single, atol=1e-6, rtol=1e-5)
open(f"{sys.argv[1]}/{process.process_index}-of-{process.num_processes}", "w").close()
entry(lambda: 0)  # leaves the group as the recipes do; Python's own exit aborts now and then
"""


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    script = tmp_path / "squares.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*-of-*")} == {"0-of-2", "1-of-2"}


def small_updater(**keys):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    return Updater(model, stage.accelerator(False), OptimConfig(**keys), 20)


def squares(updater):
    return lambda batch: updater.model(batch).square().mean()


def weights(updater):
    return [p.detach().clone() for p in updater.model.parameters()]


def test_one_update_is_adamw_on_the_clipped_gradient():
    updater = small_updater(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.05)
    updater.model.eval()
    twin = [torch.nn.Parameter(p) for p in weights(updater)]
    batch = torch.randn(16, 4)
    hidden = batch @ twin[0].T + twin[1]
    (hidden @ twin[2].T + twin[3]).square().mean().backward()
    norm = torch.cat([p.grad.flatten() for p in twin]).norm()
    for p in twin:
        p.grad *= 0.05 / (norm + 1e-6)
        decay = 0.1 if p.ndim > 1 else 0.0
        # The first AdamW step from zero moments: m / sqrt(v) is g / |g|. Warm-up of 2: half the learning rate.
        p.data = p.data * (1 - 0.005 * decay) - 0.005 * p.grad / (p.grad.abs() + 1e-8)
    numbers = updater.step([batch], squares(updater), lambda: "")
    assert numbers["grad_norm"] == pytest.approx(norm.item()) and norm > 0.05 and numbers["learning_rate"] == 0.005
    for found, expected in zip(weights(updater), twin, strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)


def test_parts_of_a_model_have_learning_rates_of_their_own():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)})
    config = OptimConfig(learning_rate=0.01, warmup_steps=2)
    updater = Updater(model, stage.accelerator(False), config, 20, learning_rates={"head.": 0.04})
    before = weights(updater)

    def share(rows):
        return updater.model["head"](updater.model["trunk"](rows)).square().mean()

    numbers = updater.step([torch.randn(16, 4)], share, lambda: "")
    # AdamW's first step is the learning rate times the gradient's sign; warm-up of 2: half of it.
    moved = [(new - old).abs().max().item() for new, old in zip(weights(updater), before, strict=True)]
    assert moved == pytest.approx([0.005, 0.005, 0.02, 0.02], rel=1e-3) and numbers["learning_rate"] == 0.005
    with pytest.raises(UserError, match="no trained parameter's name begins with 'value'"):
        Updater(model, stage.accelerator(False), config, 20, learning_rates={"value": 0.1})


@pytest.mark.parametrize(
    ("loss_of", "words"),
    [
        (lambda u: lambda batch: u.model(batch).mean() * float("nan"), "loss nan"),
        (lambda u: lambda batch: u.model(batch).mean() + float("inf"), "loss inf"),
        # sqrt has an infinite slope at 0, where its value is finite
        (lambda u: lambda batch: (u.model(batch) * 0).square().sum().sqrt(), "gradient norm nan"),
    ],
)
def test_a_number_that_is_not_finite_stops_before_the_update(loss_of, words):
    updater = small_updater()
    good = [torch.ones(2, 4)]
    updater.step(good, squares(updater), lambda: "")
    before = weights(updater), updater.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(UserError, match=f"update 2: .*{words}.*Rows: chunks 3, 5") as refused:
        updater.step([*good, *good], loss_of(updater), lambda: "chunks 3, 5")
    assert "stopped before it" in str(refused.value) and updater.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before[0], weights(updater), strict=True))
    assert torch.equal(before[1], updater.optimizer.state_dict()["state"][0]["exp_avg"])
    updater.model.eval()
    assert math.isfinite(updater.step(good, squares(updater), lambda: "")["grad_norm"])  # nothing of it is left over


def test_schedules():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    after = range(5, 40)
    for kind, reference in (
        ("linear", get_linear_schedule_with_warmup(optimizer, 5, 40)),
        ("cosine", get_cosine_schedule_with_warmup(optimizer, 5, 40)),
        ("wsd", get_wsd_schedule(optimizer, 5, 12, 40, decay_type="linear")),
    ):
        expected = [reference.lr_lambdas[0](step) for step in after]
        assert [schedule(kind, step, 40, 5) for step in after] == pytest.approx(expected), kind
    for kind in ("constant", "linear", "cosine", "wsd"):
        assert [schedule(kind, step, 40, 5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert all(0 < schedule(kind, step, 9, 0) <= 1 for step in range(9))
    assert [schedule("constant", step, 40, 0) for step in (0, 39)] == [1.0, 1.0]
    assert [schedule("wsd", step, 10, 0) for step in (6, 7, 8, 9)] == pytest.approx([1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("key", "value"), [("lr_scheduler_type", "cosin"), ("learning_rate", 0.0), ("max_grad_norm", float("nan"))]
)
def test_settings_out_of_range(key, value):
    with pytest.raises(UserError, match=f"{key}: found {value!r}, expected"):
        OptimConfig(**{key: value})


def test_n_steps_and_n_steps_are_2n_steps(tmp_path):
    batches = torch.randn(8, 16, 4)
    straight = small_updater(lr_scheduler_type="cosine")
    for batch in batches[:4]:
        straight.step([batch], squares(straight), lambda: "")
    write_state(tmp_path, updater=straight.state(), step=4)
    middle = weights(straight)
    for batch in batches[4:]:
        straight.step([batch], squares(straight), lambda: "")

    resumed = small_updater(lr_scheduler_type="cosine")
    resumed.model.load_state_dict(dict(zip(resumed.model.state_dict(), middle, strict=True)))
    state = read_state(tmp_path)  # dropout takes up where it was
    resumed.load_state(state["updater"])
    assert state["step"] == resumed.updates == 4
    for batch in batches[4:]:
        resumed.step([batch], squares(resumed), lambda: "")
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def test_all_random_generators_are_restored(tmp_path):
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), numpy.random.standard_normal()  # both keep a second number for the next call
    write_state(tmp_path, step=1)

    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.standard_normal(), torch.rand(1).item()

    expected = draw()
    draw()
    read_state(tmp_path)
    assert draw() == expected


def test_state_that_is_missing_or_has_no_room(tmp_path):
    with pytest.raises(UserError, match="training_state.pt is missing"):
        read_state(tmp_path)
    (tmp_path / "training_state.pt").symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        write_state(tmp_path, weights=torch.zeros(100_000))
    assert full.value.errno == errno.ENOSPC


def test_state_never_runs_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"rng": Hostile()}, tmp_path / "training_state.pt")
    with pytest.raises(pickle.UnpicklingError, match="posix.mkdir"):
        read_state(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_rows_come_once_before_any_comes_again():
    taken = [i for step in range(30) for i in shuffled_indices(step, 7, 10, seed=0)]
    epochs = [taken[start : start + 10] for start in range(0, 210, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 21
    assert taken[:70] == shuffled_indices(0, 70, 10, seed=0) != shuffled_indices(0, 70, 10, seed=1)
    assert sorted(shuffled_indices(0, 25, 5, seed=0)) == sorted(list(range(5)) * 5)  # a step larger than the data


def test_the_trigram_model_sums_to_one_over_bytes():
    model = ByteTrigram(["Sum: 12+34. Result: 46.", "Tom found a hat. Ünicode.", ""])
    for context in (b"", b"S", b"Su", b"Qu", b"QQ", b". ", b"6.", b"\xc3", bytes([0, 255])):
        assert sum(model.probability(context, byte) for byte in range(256)) == pytest.approx(1)
        assert min(model.probability(context, byte) for byte in range(256)) > 0


def test_the_trigram_model_by_hand():
    """Witten-Bell: p(b | c) = (n(cb) + kinds(c) p(b | shorter c)) / (n(c) + kinds(c))."""
    model = ByteTrigram(["abab"])
    a, b = b"ab"
    p_a = p_b = (2 + 2 / 256) / (4 + 2)
    assert model.probability(b"", a) == pytest.approx(p_a)
    assert model.probability(b"a", b) == pytest.approx((2 + p_b) / 3)  # "a" was followed twice, by one kind
    assert model.probability(b"b", a) == pytest.approx((1 + p_a) / 2)
    assert model.probability(b"ab", a) == pytest.approx((1 + (1 + p_a) / 2) / 2)
    assert model.probability(b"zb", a) == model.probability(b"b", a)  # a context not seen: the shorter one
    bits = -math.log2(p_a) - math.log2((2 + p_b) / 3)
    assert model.bits_per_byte(["ab"])["value"] == pytest.approx(bits / 2)
    assert ByteTrigram([]).bits_per_byte(["any"])["value"] == pytest.approx(8)


@torch.no_grad()
def test_bits_per_byte_is_the_loss_of_transformers(model, tokenizer):
    """Windows of 10 tokens: the first begins with the begin token, each later one predicts the next 9 or fewer tokens;
    all before them in the window are context."""
    texts = ["Sum: 12+34. Result: 46.", "Tom found a hat by the river. It was a good day. 🙂", ""]
    bits = 0.0
    for text in texts[:2]:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for start in range(1, len(ids), 9):
            stop = min(start + 9, len(ids))
            row = torch.tensor([ids[max(0, stop - 10) : stop]])
            labels = row.clone()
            labels[:, : -(stop - start)] = -100
            bits += model(row, labels=labels).loss.item() * (stop - start) / math.log(2)
    found = bits_per_byte(model, tokenizer, texts, max_length=10)
    assert found["value"] == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)
    assert found["n"] == 2 and found["unit"] == "bits/byte"
