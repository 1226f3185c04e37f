"""Two processes: really two, and the same result as one.

Run: pytest tests/test_processes.py
"""

import json
import sys

import pytest
from recipe_runs import argv, call, log, manifest, run

pytestmark = pytest.mark.slow
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip

# Runs the recipe, and writes down what each process holds when its training is over.
WATCHED = """
import hashlib, json, os, runpy, sys
from posttrain.rl.trainer import RLTrainer

train = RLTrainer.train

def train_and_tell(self):
    train(self)
    digest = hashlib.sha256()
    for parameter in self.policy.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    first = self.collect().rollouts.prompt_ids[0]
    facts = {"weights": digest.hexdigest(), "prompt": first, "world": self.accelerator.num_processes}
    with open(f"{self.stage.output_dir}.rank-{self.accelerator.process_index}", "w") as file:
        json.dump(facts, file)

RLTrainer.train = train_and_tell
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two(*command, **env):
    return call([*TWO, *command], **{"ACCELERATE_USE_CPU": "true", **env})


@pytest.mark.parametrize("stage", ["pretrain", "reward"])
def test_two_processes_train_as_one(small_chain, tmp_path, stage):
    """Each takes half of a batch; sums in another order differ in the last bits."""
    from safetensors.torch import load_file

    # AdamW divides by the gradient's size: where a gradient is all but 0, the last bits decide its step. Few steps at
    # a low rate keep that below the bound; a missing half would move weights by 1e-4, a wrong share the grad_norm.
    settings = {"max_steps": 3, "learning_rate": 1e-4, "warmup_steps": 0}
    done = two(*argv(stage, small_chain, tmp_path / "two", **settings))
    assert done.returncode == 0, done.stderr
    assert run(argv(stage, small_chain, tmp_path / "one", **settings), tmp_path).returncode == 0
    assert manifest(tmp_path / "two")["machine"]["world_size"] == 2
    assert manifest(tmp_path / "one")["machine"]["world_size"] == 1
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(small_chain / "sft" / "model.safetensors")
    for name, weights in both[0].items():
        assert (weights - both[1][name]).abs().max() < 1e-5, name
        if stage == "reward" and name in start:
            assert (weights - start[name]).abs().max() > 1e-4, name
    lines = [log(tmp_path / name) for name in ("one", "two")]
    for one, other in zip(*lines, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert manifest(tmp_path / "one")["tokens"] == manifest(tmp_path / "two")["tokens"]
    # Only one of them writes and speaks.
    assert done.stdout.count("rankings to learn from") == (stage == "reward")


def test_two_processes_of_grpo_share_the_prompts_and_hold_the_same_weights(small_chain, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    out = tmp_path / "grpo"
    done = two(script, *argv("grpo", small_chain, out, max_steps=3, use_vllm="auto"))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"grpo.rank-{rank}").read_text()) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["prompt"] != ranks[1]["prompt"]
    found = manifest(out)
    assert found["machine"]["world_size"] == 2 and "one process only" in done.stdout
    assert [line["step"] for line in log(out)] == [1, 2, 3] and any(line["grad_norm"] > 0 for line in log(out))
    weights = {manifest(folder)["files"]["model.safetensors"]["sha256"] for folder in (out, small_chain / "sft")}
    assert len(weights) == 2


@pytest.mark.parametrize("use_peft", ["false", "true"])
def test_two_processes_of_sft_train_as_one(small_chain, tmp_path, use_peft):
    """Two rows each are the four rows of one; the mean is over the tokens of all."""
    settings = {"max_steps": 3, "warmup_steps": 0, "use_peft": use_peft, "loss_dataset_split": "test", "eval_steps": 2}
    done = two(*argv("sft", small_chain, tmp_path / "two", per_device_train_batch_size=2, **settings))
    assert done.returncode == 0, done.stderr
    alone = run(argv("sft", small_chain, tmp_path / "one", per_device_train_batch_size=4, **settings), tmp_path)
    assert alone.returncode == 0, alone.stderr
    one, other = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert (one["machine"]["world_size"], other["machine"]["world_size"]) == (1, 2)
    assert one["tokens"] == other["tokens"] == 3 * 4 * 320
    for key in ("loss", "grad_norm", "held_out_loss"):
        lines = [[line[key] for line in log(tmp_path / name) if key in line] for name in ("one", "two")]
        assert len(lines[0]) == (1 if key == "held_out_loss" else 3) and lines[1] == pytest.approx(lines[0], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused(small_chain, tmp_path):
    done = two(*argv("pretrain", small_chain, tmp_path / "out", batch_size=3))
    assert done.returncode != 0 and "batch_size: found 3, expected a multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "out" / "stage.json").exists()


def test_two_processes_that_would_each_train_alone_are_refused(small_chain, tmp_path):
    done = two(*argv("pretrain", small_chain, tmp_path / "out"), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0 and "error: 2 processes were launched, but Accelerate runs 1" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr and not (tmp_path / "out").exists()
