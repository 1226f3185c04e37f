"""DeepSpeed ZeRO-3 on two real processes (gloo): the updates, checkpoints and weights are those of one process.

Run: pytest tests/test_zero.py, with deepspeed installed. It launches itself again, as two processes, by the shipped
Accelerate file; the oracle is plain torch on a whole model in the same process, as in tests/test_sharding.py.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import test_sharding
import torch
from recipe_runs import ENV, argv, call, log, manifest
from rl_helpers import tiny_llama, tiny_tokenizer
from test_rl_processes import SCRIPT
from test_sharding import (
    RATE,
    ROOT,
    ROWS,
    SomeLogps,
    assert_both_ended,
    launch_sections,
    llama,
    on_each_process,
    plain_steps,
    resume,
    steps,
    stops,
    updater_of,
    weights,
)
from torch import nn

from posttrain.errors import entry
from posttrain.models import save_pair

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
    left = {key for name, part in policy.named_modules() for key in set(vars(part)) - fresh[name]}
    assert not left, left  # of DeepSpeed nothing stays behind
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
    saved = copy.deepcopy(optimizer.state_dict())
    state = {place: saved["state"][i] for place, i in enumerate(order)}
    kept = {
        "state": state,
        "param_groups": updater.state()["optimizer"].get("param_groups", saved["param_groups"] * 2),
    }
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


# --- the tests


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder, what the processes said) of the sections in fp32, which share a launch, and of bf16."""
    folder, in_fp32 = tmp_path_factory.mktemp("split"), [name for name in SECTIONS if name != "bf16"]
    return folder, launch_sections(CONFIG, __file__, folder, in_fp32, ["bf16"])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_two_split_processes_are_one(launched, section):
    assert_both_ended(launched, section, "DeepSpeed ZeRO-3")


@needs_deepspeed
@pytest.mark.slow
def test_a_split_checkpoint_goes_on_in_one_process(launched):
    test_sharding.test_a_sharded_checkpoint_goes_on_in_one_process(launched)


@needs_deepspeed
@pytest.mark.slow
def test_ppo_updates_policy_and_critic_as_one_process_does(tmp_path):
    """The same experience in two processes, whose completions have very different lengths."""
    whole = "[sharding.unshard(u.model) for u in (trainer.policy_updater, trainer.critic_updater)]"
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace("models = [policy]", f"from posttrain import sharding\n{whole}\nmodels = [policy]")
    )
    assert whole in script.read_text()
    done = call([*LAUNCH, script, tmp_path / "two", "ppo", "{}"])
    assert done.returncode == 0, done.stderr[-3000:]
    done = call([sys.executable, script, tmp_path / "one", "ppo", "{}"])
    assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("one.rank-0", "two.rank-0", "two.rank-1")
    )
    assert first["world"] == 2 and first["sums"] == second["sums"]
    assert first["sums"] == pytest.approx(one["sums"], rel=1e-4, abs=1e-3)
    for found, expected in zip(first["numbers"], one["numbers"], strict=True):
        for key in ("loss", "grad_norm", "value_loss", "value_grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key


@needs_deepspeed
@pytest.mark.slow
def test_grpo_stopped_and_resumed_is_the_same_run(tmp_path):
    """End to end by the shipped file; the checkpoint, made of slices, brings back every bit."""
    from safetensors.torch import load_file

    chain, model, tokenizer = tmp_path / "chain", tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save_pair(model, tokenizer, chain / "sft")
    settings = {"max_steps": 6, "warmup_steps": 0, "beta": 0.05, "max_mismatch": 1.001}

    def command(name):
        return list(map(str, [*LAUNCH, *argv("grpo", chain, tmp_path / name, **settings)]))

    with subprocess.Popen(command("cut"), cwd=ROOT, env={**os.environ, **ENV}, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not (tmp_path / "cut/log.jsonl").is_file():
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
    assert list((tmp_path / "cut/checkpoints").glob("step-0000000[1-5]"))
    for name in ("cut", "straight"):
        done = call(command(name))
        assert done.returncode == 0, done.stderr[-3000:]
        assert manifest(tmp_path / name)["machine"]["processes"].endswith("ZeRO-3: parameters in 2 shards")
    cut, straight = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "straight"))
    start = load_file(chain / "sft" / "model.safetensors")
    assert all(torch.equal(cut[name], weight) for name, weight in straight.items())
    assert any((weight - start[name]).abs().max() > 1e-4 for name, weight in straight.items())
    numbers = [[line["grad_norm"] for line in log(tmp_path / name)] for name in ("cut", "straight")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 6
    for line in (tmp_path / "straight/log.jsonl").read_text().splitlines():
        assert json.loads(line)["mfu"] > 0  # a split parameter has no numbers; what is counted is the whole


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "zero_stage: found 2, expected 3"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device: found cpu, expected none"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true", "zero3_init_flag: found true, expected false"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file: found ds.json"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "the recipe's max_grad_norm decides"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(monkeypatch, variable, value, words):
    from posttrain import processes
    from posttrain.errors import UserError

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert processes.asked() == "zero3"
    with pytest.raises(UserError, match="sft: no DeepSpeed ZeRO-3 here"):
        processes.refuse_shards("sft", "TRL's Trainer")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        processes.asked()


def test_accelerate_is_not_told_of_deepspeed(monkeypatch):
    from posttrain import processes, zero

    monkeypatch.delenv(zero.OURS, raising=False)
    zero.keep_from_accelerate()
    assert processes.asked() == "ddp"
    monkeypatch.setenv(zero.OURS, "")  # so that it is gone afterwards
    monkeypatch.delenv(zero.OURS)
    monkeypatch.setenv(zero.LAUNCHED, "true")
    zero.keep_from_accelerate()
    assert zero.LAUNCHED not in os.environ and processes.asked() == "zero3"


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_deepspeed_the_way_to_it_is_named():
    from posttrain import zero
    from posttrain.errors import UserError

    with pytest.raises(UserError, match=r"not installed: pip install 'posttrain\[zero\]'"):
        zero.split(nn.Linear(1, 1), [], None, 1.0)


if __name__ == "__main__":
    entry(lambda: on_each_process(SECTIONS, *sys.argv[1:]))  # leaves the group as the recipes do
