"""Runs that are killed, stopped, damaged or go wrong: what is left behind, and that going on changes nothing.

Run: pytest tests/test_resume.py
"""

import json
import shutil
import sys

import pytest
from recipe_runs import INT, KILL, TERM, TRAINED, Running, argv, call, log, refused, result, run

pytestmark = pytest.mark.slow
# Steps enough for a signal to land well before the last one.
LONG = {
    "pretrain": {"max_steps": 60},
    "sft": {"max_steps": 40},
    "reward": {"max_steps": 40},
    "ppo": {"max_steps": 12},
    "grpo": {"max_steps": 12, "num_iterations": 2},
}
WAYS = [
    *((stage, KILL) for stage in TRAINED),
    *((stage, TERM) for stage in ("pretrain", "sft", "ppo")),
    *((stage, INT) for stage in ("sft", "reward", "grpo")),
]


def long(stage, chain, out, **changes):
    return argv(stage, chain, out, **{**LONG[stage], **changes})


@pytest.fixture(scope="module")
def uninterrupted(small_chain, tmp_path_factory):
    """stage -> what a run without any interruption gives, each stage run once."""
    folder, results = tmp_path_factory.mktemp("uninterrupted"), {}

    def get(stage: str) -> dict:
        if stage not in results:
            done = run(long(stage, small_chain, folder / stage), folder)
            assert done.returncode == 0, done.stderr
            results[stage] = result(folder / stage)
        return results[stage]

    return get


def interrupt(stage, chain, tmp_path, number, **changes):
    """Stop a run after a third of its steps: past a checkpoint for SIGKILL, without any for the others."""
    out, steps = tmp_path / stage, LONG[stage]["max_steps"]
    every = steps // 6 if number == KILL else 0
    arguments = long(stage, chain, out, save_steps=every, **changes)
    stopped = Running(arguments, tmp_path).stop_at(steps // 3 + 1, number, out)
    assert not (out / "stage.json").exists(), "it had finished before the signal came"
    return arguments, stopped


@pytest.mark.parametrize(("stage", "number"), WAYS, ids=[f"{stage}-{number.name}" for stage, number in WAYS])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(small_chain, tmp_path, uninterrupted, stage, number):
    arguments, stopped = interrupt(stage, small_chain, tmp_path, number)
    assert stopped.returncode == {KILL: -9, TERM: 143, INT: 130}[number], stopped.stderr
    assert "Traceback" not in stopped.stderr
    out = tmp_path / stage
    checkpoints = [path.name for path in sorted((out / "checkpoints").iterdir()) if not path.name.startswith(".")]
    assert len(checkpoints) == 1
    step = json.loads((out / "checkpoints" / checkpoints[0] / "checkpoint.json").read_text())["step"]
    if number == KILL:
        assert step % (LONG[stage]["max_steps"] // 6) == 0
    else:
        assert step == log(out)[-1]["step"], "the last step done is the one saved"
    again = run(arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming {out} at step {step}" in again.stdout
    assert result(out) == uninterrupted(stage)


@pytest.mark.vllm
def test_a_killed_run_that_samples_ahead_through_vllm_goes_on(small_chain, tmp_path):
    """The next step's completions are being sampled in the background when the process dies."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = {"use_vllm": "true", "rollout_ahead": 1, "num_iterations": 1}
    arguments, _ = interrupt("grpo", small_chain, tmp_path, KILL, **settings)
    again = run(arguments, tmp_path)
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    done = run(long("grpo", small_chain, tmp_path / "whole", **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "grpo") == result(tmp_path / "whole")


def test_python_itself_exits_143_on_sigterm(small_chain, tmp_path):
    """The same without the warm process of these tests: the recipe as a command, stopped from outside."""
    out = tmp_path / "pretrain"
    code = f"""
import os, signal, subprocess, sys, time
process = subprocess.Popen({[sys.executable, *long("pretrain", small_chain, out, max_steps=100000)]})
while not (os.path.exists({str(out / "log.jsonl")!r}) or process.poll() is not None):
    time.sleep(0.01)
process.send_signal(signal.SIGTERM)
sys.exit(process.wait())
"""
    done = call([sys.executable, "-c", code])
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    (saved,) = (out / "checkpoints").glob("*/checkpoint.json")
    assert json.loads(saved.read_text())["step"] == log(out)[-1]["step"]


@pytest.fixture(scope="module", params=["reward", "pretrain"])
def killed(request, small_chain, tmp_path_factory):
    """A stage that was killed; copied by each test that spoils it."""
    folder = tmp_path_factory.mktemp("killed")
    interrupt(request.param, small_chain, folder, KILL)
    return folder / request.param


@pytest.fixture
def half(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / killed.name)


def go_on(chain, out, tmp_path, **changes):
    every = LONG[out.name]["max_steps"] // 6
    return run(long(out.name, chain, out, save_steps=every, **changes), tmp_path)


def test_another_config_is_refused_with_a_diff(small_chain, half, tmp_path):
    done = go_on(small_chain, half, tmp_path, learning_rate=0.5)
    refused(done, "learning_rate: 0.00", "-> 0.5", "--overwrite true", str(half))
    assert go_on(small_chain, half, tmp_path, learning_rate=0.5, overwrite="true").returncode == 0


def test_another_parent_is_refused(small_chain, half, tmp_path):
    if half.name == "reward":
        refused(go_on(small_chain, half, tmp_path, model_name_or_path=small_chain / "grpo"), "parent policy:")
    else:
        refused(go_on(small_chain, half, tmp_path, tokenizer_path=small_chain / "sft"), "parent tokenizer:")


def test_other_data_is_refused(small_chain, half, tmp_path):
    refused(go_on(small_chain, half, tmp_path, dataset_seed=5), "data:", "dataset_seed: None -> 5")


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_a_flipped_byte_names_the_file(small_chain, half, tmp_path, name):
    (file,) = half.glob(f"checkpoints/*/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(go_on(small_chain, half, tmp_path), str(file), "damaged", f"remove {file.parent}")


def test_a_missing_optimizer_is_refused(small_chain, half, tmp_path):
    (file,) = half.glob("checkpoints/*/training_state.pt")
    file.unlink()
    refused(go_on(small_chain, half, tmp_path), str(file), "missing")


def test_a_torn_checkpoint_with_a_higher_number_is_never_taken(small_chain, half, tmp_path, uninterrupted):
    (last,) = half.glob("checkpoints/step-*")
    torn = shutil.copytree(last, half / "checkpoints" / "step-00000099")
    (torn / "checkpoint.json").unlink()
    (half / "checkpoints" / ".tmp-1").mkdir()
    done = go_on(small_chain, half, tmp_path)
    assert done.returncode == 0 and "at step 99" not in done.stdout, done.stderr
    assert result(half) == uninterrupted(half.name)


@pytest.mark.parametrize("stage", TRAINED)
def test_numbers_that_are_not_finite_stop_it_before_the_update(small_chain, tmp_path, stage):
    changes = {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1}
    done = run(argv(stage, small_chain, tmp_path / stage, **changes), tmp_path)
    error = refused(done, "update 2", "Lower learning_rate")
    assert "Rows: " in error and any(letter.isdigit() for letter in error.split("Rows: ")[1])
    assert not (tmp_path / stage / "stage.json").exists()
