"""PPO and GRPO recipes with the settings that make another run of them: adapters, tools, critics, other algorithms.

Run: pytest tests/test_rl_recipes.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from recipe_runs import ENV, ROOT, argv, call, log, manifest, run

pytestmark = pytest.mark.slow


def finished(stage, chain, out, tmp_path, **settings):
    done = run(argv(stage, chain, out, **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("grpo", {"use_peft": "true", "beta": 0.01, "lora_r": 4, "learning_rate": 1e-2}),
        ("ppo", {"use_peft": "true", "critic": "trunk", "learning_rate": 1e-2}),
        ("ppo", {"critic": "policy", "kl_in": "loss", "offload": "true", "whiten_rewards": "true"}),
        ("grpo", {"rollout_ahead": 1, "dynamic_sampling": 0, "loss_type": "gspo", "layout": "packed"}),
        ("grpo", {"advantage": "rloo", "beta": 0.05, "kl_target": 0.1, "dynamic_sampling": 2}),
    ],
    ids=["grpo lora", "ppo lora trunk", "ppo policy", "grpo ahead", "rloo"],
)
def test_settings_run_whole_and_leave_a_plain_checkpoint(small_chain, tmp_path, stage, settings):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    finished(stage, small_chain, out, tmp_path, **settings)
    lines, facts = log(out), manifest(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert any(line["grad_norm"] > 0 for line in lines)
    assert facts["config"]["output_dir"] == str(out)
    start, end = (load_file(folder / "model.safetensors") for folder in (small_chain / "sft", out))
    assert start.keys() == end.keys() and any((start[name] != end[name]).any() for name in start)
    assert (out / "adapter").is_dir() == ("use_peft" in settings)


def test_a_tool_is_told_of_called_and_its_answer_is_not_learned(small_chain, tmp_path):
    """SFT with the tools' template first; the model here is too small to call anything, so the prompt is what shows:
    the tools stand in it, and the run ends as any other."""
    template = ROOT / "chat_templates" / "chatml_tools.jinja"
    sft = tmp_path / "sft"
    finished("sft", small_chain, sft, tmp_path, chat_template_path=template)
    out = tmp_path / "out"
    settings = {"model_name_or_path": sft, "tools": "recipe_runs.add", "max_steps": 2}
    finished("grpo", small_chain, out, tmp_path, **settings)
    first = json.loads((out / "rollouts.jsonl").read_text().splitlines()[0])
    assert '"name": "add"' in first["prompt"] and "Adds two numbers" in first["prompt"]


def test_tools_need_a_template_that_can_render_them(small_chain, tmp_path):
    done = run(argv("grpo", small_chain, tmp_path / "out", tools="calculator"), tmp_path)
    assert done.returncode == 2 and "chatml_tools" in done.stderr


def test_an_unknown_tool_and_a_contradiction_are_named_by_the_dry_run_and_the_run(small_chain, tmp_path):
    for settings, words in (
        ({"tools": "calcluator"}, "calculator"),
        ({"advantage": "gae"}, "recipes/ppo.py"),
        ({"reward_funcs": "correct", "reward_options": "{correct: {speed: 1}}"}, "speed"),
    ):
        done = run(argv("grpo", small_chain, tmp_path / "out", **settings), tmp_path)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def launcher(config: str) -> list:
    command = ["--config_file", ROOT / "recipes" / "accelerate" / config, "--num_processes", "2"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *command]


def two(config: str, stage: str, chain, out, **settings):
    return call([*launcher(config), *argv(stage, chain, out, **settings)], ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("ppo", {}), ("grpo", {"use_peft": "true", "beta": 0.01, "learning_rate": 1e-2})],
    ids=["ppo", "grpo lora"],
)
def test_sharded_networks_learn_as_whole_ones(small_chain, tmp_path, stage, settings):
    """Two processes with DDP and with FSDP2: the same completions, and weights that differ in their last bits."""
    from safetensors.torch import load_file

    weights, lines = {}, {}
    for config in ("two_cpu_processes.yaml", "fsdp2.yaml"):
        out = tmp_path / config
        done = two(config, stage, small_chain, out, max_steps=3, save_steps=2, warmup_steps=0, **settings)
        assert done.returncode == 0, done.stderr
        sharding = "FSDP2: parameters in 2 shards" if config == "fsdp2.yaml" else "DDP: a whole model each"
        assert f"2 processes on cpu (gloo), {sharding}" in done.stdout
        weights[config], lines[config] = load_file(out / "model.safetensors"), log(out)
    whole, sharded = weights.values()
    start = load_file(small_chain / "sft" / "model.safetensors")
    moved = max((sharded[name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3
    for name, expected in whole.items():
        assert (sharded[name] - expected).abs().max() < 0.02 * moved, name
    for one, other in zip(*lines.values(), strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2, abs=1e-6)


def test_a_sharded_run_goes_on_from_its_checkpoint(small_chain, tmp_path):
    """A run of GRPO that SIGTERM stops after some steps and one that nothing stops."""
    settings = {"max_steps": 12, "warmup_steps": 0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert two("fsdp2.yaml", "grpo", small_chain, whole, **settings).returncode == 0
    process = subprocess.Popen(
        [*launcher("fsdp2.yaml"), *argv("grpo", small_chain, stopped, **settings)],
        env={**os.environ, **ENV, "ACCELERATE_USE_CPU": "true"}, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (stopped / "log.jsonl").is_file() or (stopped / "log.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (stopped / "stage.json").exists()
    done = two("fsdp2.yaml", "grpo", small_chain, stopped, **settings)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert log(whole) == log(stopped)
