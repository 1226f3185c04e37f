"""The recipes of recipes/tiny as users run them, with settings so small that a stage trains in a second.

In: a stage's name, the folder of a small chain, changed settings. Out: finished processes with code, stdout, stderr.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "grpo")
TRAINED = STAGES[1:]
# One attention head of 32: vLLM on CPU has no kernel for heads of 16.
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
    "max_position_embeddings": 1024,
}  # fmt: skip
REPLIES = {"eval_max_rows": 6, "eval_num_generations": 2, "eval_max_tokens": 8, "use_vllm": "false"}
STEPS = {"max_steps": 8, "logging_steps": 1, "save_steps": 0, "warmup_steps": 2}
SMALL = {
    "tokenizer": {"max_rows": 300, "eval_max_rows": 20, "vocab_size": 400},
    "pretrain": {
        "max_rows": 300, "eval_max_rows": 20, "sequence_length": 64, "batch_size": 4, "bf16": "false",
        **SHAPE, **STEPS,
    },
    "sft": {
        "max_rows": 100, "max_length": 320, "per_device_train_batch_size": 2, "bf16": "false", **REPLIES, **STEPS,
    },
    "reward": {"max_rows": 100, "eval_max_rows": 20, "batch_size": 4, "bf16": "false", **STEPS},
    "ppo": {"max_rows": 100, "num_prompts": 4, "max_completion_length": 8, **REPLIES, **STEPS},
    "grpo": {
        "max_rows": 100, "num_prompts": 4, "num_generations": 4, "max_completion_length": 8,
        "reward_funcs": "recipe_runs.vowels", **REPLIES, **STEPS,
    },
}  # fmt: skip
PARENTS = {
    "tokenizer": {},
    "pretrain": {"tokenizer_path": "tokenizer"},
    "sft": {"model_name_or_path": "pretrain"},
    "reward": {"model_name_or_path": "sft"},
    "ppo": {"model_name_or_path": "sft", "reward_model_path": "reward"},
    "grpo": {"model_name_or_path": "sft"},
}
ENV = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "HF_HUB_OFFLINE": "1",  # a name that is not here fails at once
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # equal bits are promised on a CPU
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]


def vowels(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward that varies between the replies of an untrained model, which no problem's answer does."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: one
        b: the other
    """
    return str(a + b)


def call(command: list, *, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **ENV, **env}, capture_output=True, text=True
    )


def posttrain(*arguments, **env) -> subprocess.CompletedProcess:
    return call([sys.executable, "-m", "posttrain.cli", *arguments], **env)


def small_settings() -> list[str]:
    """SMALL as `--set` of `posttrain run`."""
    return [
        word
        for name, keys in SMALL.items()
        for key, value in keys.items()
        for word in ("--set", f"{name}.{key}={value}")
    ]


def argv(stage: str, chain: Path, out: Path, **changes) -> list[str]:
    """A recipe with its flags: recipes/tiny's config, made small, its parents from `chain`, then `changes`."""
    parents = {key: chain / parent for key, parent in PARENTS[stage].items()}
    settings = {**SMALL[stage], **parents, "output_dir": out, **changes}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [str(ROOT / "recipes" / f"{stage}.py"), "--config", str(ROOT / f"recipes/tiny/{stage}.yaml"), *flags]


class Running:
    """A recipe in a process of its own, started warm (see warm_recipes.py)."""

    def __init__(self, arguments: list[str], folder: Path, **env):
        self.argv = list(map(str, arguments))
        number = len(list(folder.glob("*.out")))
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        self.pid = ask_warm(argv=self.argv, env=env, out=str(self.out), err=str(self.err))

    def finish(self) -> subprocess.CompletedProcess:
        code = ask_warm(wait=self.pid)
        return subprocess.CompletedProcess(self.argv, code, self.out.read_text(), self.err.read_text())

    def stop_at(self, step: int, number: int, output_dir: Path) -> subprocess.CompletedProcess:
        """Send signal `number` as soon as log.jsonl has `step`."""
        log = output_dir / "log.jsonl"
        while True:
            if log.is_file() and log.read_bytes().count(b"\n") >= step:
                os.killpg(self.pid, number)
                return self.finish()
            if os.stat(f"/proc/{self.pid}") and _ended(self.pid):
                done = self.finish()
                raise AssertionError(f"ended with {done.returncode} before step {step}: {done.stderr}")
            time.sleep(0.005)


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def run(arguments: list[str], folder: Path, **env) -> subprocess.CompletedProcess:
    return Running(arguments, folder, **env).finish()


def ask_warm(**request) -> int:
    process = warm_process()
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@cache
def warm_process() -> subprocess.Popen:
    """Ends by itself when this process does: its stdin closes."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "warm_recipes.py")],
        cwd=ROOT, env={**os.environ, **ENV}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def manifest(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """Lines of a JSONL file without what is timed."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    timed = ("time", "tokens_per_second", "share/", "mfu", "memory_gb")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def result(folder: Path) -> dict:
    """All of a finished stage that must not depend on where, when and in how many goes it ran."""
    found = manifest(folder)
    kept = {key: found[key] for key in ("files", "metrics", "gains", "samples", "tokens")}
    rollouts = log(folder, "rollouts.jsonl") if (folder / "rollouts.jsonl").is_file() else []
    return {**kept, "log": log(folder), "rollouts": rollouts}


def refused(done: subprocess.CompletedProcess, *words: str) -> str:
    """Check that a run ended with a short error that has these words, and return it."""
    said = done.stdout + done.stderr
    assert done.returncode == 2, (done.returncode, said)
    assert "Traceback" not in said, said
    error = said[said.rindex("error: ") :]
    assert len(error) < 1000, error
    for word in words:
        assert word in error, (word, error)
    return error


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
