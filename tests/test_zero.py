"""DeepSpeed ZeRO-3 on two real processes (gloo): the updates, checkpoints and weights are those of one process.

Run: pytest tests/test_zero.py, with deepspeed installed. It launches itself again, as two processes, by the shipped
Accelerate file; the oracle is plain torch on a whole model in the same process, as in tests/test_sharding.py.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_sharding import RATE, ROOT, ROWS, SomeLogps, llama, plain_steps, resume, steps, stops, updater_of, weights
from torch import nn

CONFIG = ROOT / "recipes/accelerate/deepspeed_zero3.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--num_processes", 2]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


class Odd(nn.Module):
    """A scalar head with a bias: parameters of 33 and of 1 number, which no two processes halve."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.head = nn.Linear(50, 33), nn.Linear(33, 1)

    def forward(self, rows):
        return self.head(torch.tanh(self.layer(nn.functional.one_hot(rows, 50).float()))).square().sum()


# --- what each of the two processes runs


def updates(accelerator, folder):
    from posttrain.sharding import full

    for tied in (True, False):
        alone, model = llama(tied), llama(tied, seed=accelerator.process_index)  # starts from the first process
        updater = updater_of(model, accelerator)
        for found, expected in zip(steps(updater, 3), plain_steps(alone, 3), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for (name, part), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(part), whole.detach(), atol=1e-5, rtol=1e-4, msg=name)
            assert part.numel() == 0 and part.ds_tensor.numel() == (whole.numel() + 1) // 2, name
        moments = [v["exp_avg"] for v in updater.optimizer.optimizer.state.values()]
        assert sum(m.numel() for m in moments) == sum((p.numel() + 1) // 2 for p in alone.parameters())


def two(accelerator, folder):
    """Policy and critic in turn, as PPO has them; the critic's sizes are odd, and some numbers are not trained."""
    from posttrain import sharding
    from posttrain.training import OptimConfig, Updater

    rank, policy, critic, alone = accelerator.process_index, llama(), Odd(), Odd()
    critic.layer.weight.requires_grad_(False)
    alone.layer.weight.requires_grad_(False)
    first = updater_of(policy, accelerator)
    config = OptimConfig(learning_rate=RATE, warmup_steps=0, max_grad_norm=0.5, weight_decay=0.1)
    second = Updater(critic, accelerator, config, 10, 3e-3, {"head.bias": 0.2})
    groups = [
        {"params": [alone.head.weight], "lr": 3e-3, "weight_decay": 0.1},
        {"params": [alone.layer.bias], "lr": 3e-3}, {"params": [alone.head.bias], "lr": 0.2},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    expected = plain_steps(llama(), 3)
    for step in range(3):
        with sharding.gathered(first.model), sharding.gathered(second.model), torch.no_grad():
            for _ in range(1 + rank):  # as many forwards as each likes
                torch.testing.assert_close(second.model(ROWS), alone(ROWS))
        assert steps(first, 1)[0] == pytest.approx(expected[step], rel=1e-5)
        found = second.step([ROWS[:2], ROWS[2:3]] if rank == 0 else [ROWS[3:]], second.model, lambda: "")
        optimizer.zero_grad()
        loss = alone(ROWS)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizer.step()
        assert (found["loss"], found["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    for (name, part), whole in zip(critic.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(sharding.full(part), whole.detach(), atol=1e-6, rtol=1e-5, msg=name)
    fresh = {name: set(vars(part)) for name, part in llama().named_modules()}
    for updater, model in ((first, policy), (second, critic)):
        assert sharding.unshard(updater.model).training is not None and not sharding.is_sharded(model)
    assert {name: set(vars(part)) for name, part in policy.named_modules()} == fresh  # nothing is left behind
    torch.testing.assert_close(critic(ROWS), alone(ROWS))


def bf16(accelerator, folder):
    """Arithmetic in bf16 by autocast, as one process has it; parameters, gradients and moments stay fp32."""
    alone, model = llama(), llama()
    updater, module = updater_of(model, accelerator), SomeLogps(alone)
    found, plain = steps(updater, 2), plain_steps(llama(), 2)
    assert all(a == pytest.approx(b, rel=2e-2) and a != b for a, b in zip(found, plain, strict=True))
    assert {p.ds_tensor.dtype for p in model.parameters()} == {torch.float32}
    assert updater.model(ROWS).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert found[0][0] == pytest.approx((module(ROWS) / 42).item(), rel=1e-4)


def exchange(accelerator, folder):
    """On from one process's checkpoint, without the steps of a parameter, and one that DeepSpeed cannot take."""
    from posttrain import sharding
    from posttrain.errors import UserError

    alone, model = llama(), llama(seed=1)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):
        (SomeLogps(alone)(ROWS) / 42).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    updater = updater_of(model, accelerator)
    matrices = [i for i, p in enumerate(alone.parameters()) if p.ndim > 1]
    order = matrices + [i for i, p in enumerate(alone.parameters()) if p.ndim <= 1]
    saved = optimizer.state_dict()
    state = {place: saved["state"][i] for place, i in enumerate(order)}
    kept = {"state": state, "param_groups": updater.state()["optimizer"].get("param_groups", saved["param_groups"] * 2)}
    sharding.load_full_state(model, alone.state_dict())
    updater.load_state({"optimizer": kept, "updates": 2})
    numbers = steps(updater, 1)[0]
    loss = SomeLogps(alone)(ROWS) / 42
    loss.backward()
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    optimizer.step()
    assert numbers == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    for part, whole in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(sharding.full(part), whole.detach(), atol=1e-6, rtol=1e-5)
    state[0] = {**state[0], "step": torch.tensor(9.0)}
    with pytest.raises(UserError, match=r"made \[2.0, 9.0\] steps"):
        updater.load_state({"optimizer": kept, "updates": 2})


SECTIONS = {part.__name__: part for part in (updates, resume, stops, weights, two, exchange, bf16)}


def on_each_process(folder: str, *sections: str) -> None:
    from posttrain import sharding, stage

    process = sharding.processes()
    accelerator = stage.accelerator(bf16=sections == ("bf16",))
    for section in sections:
        SECTIONS[section](accelerator, folder)
        Path(f"{folder}/{section}-{process.process_index}").write_text(sharding.describe(process))
    accelerator.end_training()


if __name__ == "__main__":
    on_each_process(*sys.argv[1:])
