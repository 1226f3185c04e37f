"""The reward recipe as users run it: two processes equal one, with early stopping, and adapters from end to end.

Run: pytest tests/test_reward_processes.py
"""

import sys

import pytest
from recipe_runs import argv, call, log, manifest, run
from rl_helpers import tiny_llama, tiny_tokenizer

from posttrain.models import save_pair

pytestmark = pytest.mark.slow
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
SETTINGS = {"max_rows": 60, "max_steps": 4, "learning_rate": 1e-4, "warmup_steps": 0, "eval_steps": 2}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chat model where a chain would have its own."""
    folder = tmp_path_factory.mktemp("chain")
    save_pair(tiny_llama(), tiny_tokenizer(), folder / "sft")
    return folder


def test_two_processes_train_and_stop_as_one(chain, tmp_path):
    """Few steps at a low rate: AdamW divides by the gradient's size, and sums in another order differ in last bits."""
    from safetensors.torch import load_file

    done = call([*TWO, *argv("reward", chain, tmp_path / "two", **SETTINGS)], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(argv("reward", chain, tmp_path / "one", **SETTINGS), tmp_path).returncode == 0
    one, two = (manifest(tmp_path / name) for name in ("one", "two"))
    assert (one["machine"]["world_size"], two["machine"]["world_size"]) == (1, 2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(chain / "sft" / "model.safetensors")
    for name, values in weights[0].items():
        assert (values - weights[1][name]).abs().max() < 1e-5, name
    assert (
        weights[0]["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 1e-4
    lines = [log(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert [("eval_loss" in line) for line in lines[0]] == [False, True, False, True]
    assert (one["best_step"], one["tokens"]) == (two["best_step"], two["tokens"])
    for name, value in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(value["value"], abs=1e-3), name


def test_an_adapter_is_trained_merged_and_described(chain, tmp_path):
    from transformers import AutoModelForSequenceClassification

    settings = {"use_peft": "true", "lora_r": 4, "learning_rate": 1e-2, "loss_type": "top1", "layout": "packed"}
    done = run(argv("reward", chain, tmp_path / "out", **{**SETTINGS, **settings}), tmp_path)
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "out")
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(
        found["files"]
    )
    assert found["config"]["lora_r"] == 4 and found["config"]["loss_type"] == "top1"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").score.weight.shape == (1, 64)
    expected = {
        "pair accuracy", "top-1", "kendall tau", "log-likelihood per ranking", "log-likelihood, gain over a guess",
        "calibration error", "correlation of score and length", "correlation of people's order and length",
        "score mean", "score std", "pair accuracy of the true utility",
    }  # fmt: skip
    assert set(found["metrics"]) == expected
    for name, value in found["metrics"].items():
        assert name == "score std" or value["low"] <= value["value"] <= value["high"], name
    assert found["reliability"] and found["by_length"] and found["best_step"] in (2, 4)
