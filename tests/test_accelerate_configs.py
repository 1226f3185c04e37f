"""The shipped Accelerate files: each starts what it says, by a real `accelerate launch`, and the log says it.

Run: pytest tests/test_accelerate_configs.py
"""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from recipe_runs import ENV, ROOT, SMALL, call, log, manifest

FOLDER = ROOT / "recipes" / "accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
STEPS = {**SMALL["pretrain"], "max_steps": 2, "max_rows": 40, "eval_max_rows": 4}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("tokenizer")
    request.getfixturevalue("base_tokenizer").save_pretrained(folder)
    return folder


def pretrain(out, tokenizer_path, **changes) -> list[str]:
    settings = {**STEPS, "tokenizer_path": tokenizer_path, "output_dir": out, **changes}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["recipes/pretrain.py", "--config", "recipes/tiny/pretrain.yaml", *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "count", "said"),
    [
        ("one_process", 1, "one process on cpu"),
        ("two_cpu_processes", 2, "2 processes on cpu (gloo), DDP: a whole model each"),
        ("fsdp2", 2, "2 processes on cpu (gloo), FSDP2: parameters in 2 shards"),
        pytest.param(
            "deepspeed_zero3",
            2,
            "2 processes on cpu (gloo), DeepSpeed ZeRO-3: parameters in 2 shards",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
        ),
    ],
)
def test_a_stage_says_what_it_runs_on(tmp_path, tokenizer_path, config, count, said):
    own = ["--num_processes", 2] if config in ("fsdp2", "deepspeed_zero3") else []
    out = tmp_path / "out"
    done = call([*LAUNCH, "--config_file", FOLDER / f"{config}.yaml", *own, *pretrain(out, tokenizer_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"pretrain: {said}\n") == 1
    machine = manifest(out)["machine"]
    assert (machine["world_size"], machine["processes"]) == (count, said)
    assert [line["step"] for line in log(out)] == [1, 2]
    assert (out / "model.safetensors").stat().st_size > 20_000


SAY = """
from posttrain import processes
from posttrain.errors import entry

def main():
    process = processes.join()
    print(process.process_index, processes.describe(process))

entry(main)
"""


@pytest.fixture
def say(tmp_path):
    (tmp_path / "say.py").write_text(SAY)
    return tmp_path / "say.py"


@pytest.mark.slow
def test_two_machines(say):
    """Two launchers on this one, each with its rank, meet at one port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def command(rank):
        keys = ["--num_processes", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        return [*LAUNCH, "--config_file", FOLDER / "two_nodes.yaml", *keys, "--main_process_port", port, say]

    other = subprocess.Popen(
        list(map(str, command(1))), env={**os.environ, **ENV}, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    first = call(command(0))
    said = first.stdout + other.communicate(timeout=120)[0]
    for rank in (0, 1):
        assert f"{rank} 2 processes on 2 machines on cpu (gloo), FSDP2: parameters in 2 shards" in said, first.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cpu", "--num_processes", 2], ("several processes were asked for", "two_cpu_processes.yaml")),
        (["--config_file", FOLDER / "fsdp2.yaml", "--num_processes", 1], ("there is one process",)),
        (["--use_fsdp", "--num_processes", 2, "--num_machines", 1], ("fsdp_version: found 1, expected 2",)),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(say, flags, words):
    done = call([*LAUNCH, *flags, "--main_process_port", 0, say])
    assert done.returncode != 0 and all(word in done.stdout + done.stderr for word in words), done.stderr[-2000:]
    assert "processes on" not in done.stdout and "one process on" not in done.stdout


STOPPED = """
import os, signal, sys, time
from posttrain import stage
from posttrain.errors import entry

def main():
    run = stage.start("toy", (stage.StageConfig(sys.argv[1]),), parents={}, data=[])
    rank, step = int(os.environ["RANK"]), 0
    with run.running():
        while step < 100 and not run.stopping:
            step += 1
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.due(step, 100):
                run.save(step, lambda folder: (folder / "w").write_text("w"))
                print(f"[{rank} left at {step}]", flush=True)

entry(main)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    """Else the one that goes on waits forever for the other's gradients."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    launch = [*LAUNCH, "--config_file", FOLDER / "two_cpu_processes.yaml"]
    done = call([*launch, tmp_path / "stopped.py", tmp_path / "out"])
    assert done.returncode != 0 and all(f"[{rank} left at 3]" in done.stdout for rank in (0, 1)), done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]


def test_another_precision_than_the_recipe_says_is_refused(monkeypatch):
    from posttrain import stage
    from posttrain.errors import UserError

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="Accelerate's file says fp16, the recipe bf16: False"):
        stage.accelerator(False)


def test_every_file_names_its_command_and_leaves_precision_to_the_recipe():
    files = sorted(FOLDER.glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        text = file.read_text()
        assert f"accelerate launch --config_file recipes/accelerate/{file.name}" in text, file
        assert yaml.safe_load(text)["mixed_precision"] == "no", file
        assert f"{file.name}" in (FOLDER / "README.md").read_text(), file
