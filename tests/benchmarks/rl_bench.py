"""What both RL benchmarks share: trainers in processes of their own that take turns, clocks, flags.

In: a script with kinds of trainers, each a function that trains and calls `Gate.step` after every step. Out: JSON and
markdown with step times and their parts, tokens a second, memory and the reward curve.

Each trainer keeps its process, model and optimizer through all rounds and waits while the others run (A B A B): no
figure holds an import, a compilation or another trainer's memory, and the curve and the speed are one run's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch
from rl_tables import CLOCKS, rate, summary

from posttrain.chat import set_template
from posttrain.data import DataConfig, load_rows
from posttrain.evals import prompt_ids
from posttrain.models import ModelConfig, load_tokenizer, save_pair
from posttrain.order import taken_indices
from posttrain.rl.rollout import vllm_obstacle
from posttrain.shapes import ShapeConfig, make_model
from posttrain.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
SEED = 0


# --- in a trainer's process


class Gate:
    """Clocks of one trainer's parts; after its share of steps it reports them and waits for its next turn."""

    def __init__(self, warmup: int):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self.left, self.steps, self.part = warmup, [], "other"
        self._reset()

    def _reset(self) -> None:
        self.spent = {clock: defaultdict(float) for clock in CLOCKS}
        self.last = {clock: now() for clock, now in CLOCKS.items()}

    def enter(self, part: str) -> str:
        """What runs from now on belongs to `part`; returns the part that ran until now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for clock, now in CLOCKS.items():
            moment = now()
            self.spent[clock][self.part] += moment - self.last[clock]
            self.last[clock] = moment
        before, self.part = self.part, part
        return before

    def timed(self, function, part: str):
        """`function`, whose time belongs to `part`, but for what is timed inside it."""

        def call(*args, **kwargs):
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return call

    def time(self, owner, **parts: str) -> None:
        """Time methods of an object, or functions of a module: name = part."""
        for name, part in parts.items():
            setattr(owner, name, self.timed(getattr(owner, name), part))

    def step(self, *, tokens: int, prompt_tokens: int, reward: float) -> None:
        """A step is over: `tokens` of its completions, none of them padding."""
        self.enter(self.part)
        spent = {clock: dict(parts) for clock, parts in self.spent.items()}
        self.steps.append({"tokens": tokens, "prompt_tokens": prompt_tokens, "reward": reward, **spent})
        self.left -= 1
        if self.left == 0:
            self._report({"steps": self.steps})
            self.left, self.steps = int(sys.stdin.readline() or 0), []
        self._reset()

    def _report(self, found: dict) -> None:
        print(json.dumps(found), file=self.out, flush=True)

    def close(self, before: float) -> None:
        """Training is over; `before`: memory before it, in MB."""
        self._report({"memory before": before, "peak memory": memory("VmHWM")})


def memory(key: str) -> float:
    """MB of this process (VmRSS now, VmHWM at most); on a GPU the most that torch held there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def serve(options, build) -> None:
    """Run one trainer: `build(options, gate)` gives the function that trains."""
    torch.manual_seed(0)
    gate = Gate(options.warmup)
    train = build(options, gate)
    before = memory("VmRSS")
    gate._reset()
    if options.profile:
        with_profile(train, Path(options.profile) / f"{options.worker.replace(' ', '_')}.txt")
    else:
        train()
    gate.close(before)


def with_profile(train, file: Path) -> None:
    """Run `train`; the functions that took most CPU time go to `file`, warm-up included."""
    import cProfile
    import pstats

    profile = cProfile.Profile(time.process_time)
    profile.runcall(train)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for order in ("tottime", "cumulative"):
            pstats.Stats(profile, stream=out).strip_dirs().sort_stats(order).print_stats(40)


def our_training(trainer, gate: Gate):
    """The `train` of our loop, its parts timed."""
    log = trainer.log

    def logged(experience, *rest):
        log(experience, *rest)
        rollouts = experience.rollouts
        scores = [value for values in experience.rewards_by_name.values() for value in values]
        tokens = sum(rollouts.lengths)
        prompt_tokens = rollouts.num_tokens - tokens
        gate.step(tokens=tokens, prompt_tokens=prompt_tokens, reward=statistics.fmean(scores))

    trainer.log = logged
    gate.time(trainer, _sync="sync", reward="reward", score="score", add_advantages="score", update="update")
    gate.time(trainer.collector, begin="generate", take="generate")
    return trainer.train


def total_steps(options) -> int:
    return options.warmup + options.rounds * options.steps


def load_prompts(options, kind: str, tokenizer) -> list[dict]:
    """The tiny world's rows with `prompt_ids`, for our loop."""
    rows, _ = load_rows(DataConfig("tiny", dataset_config=kind, max_rows=options.rows), "train", 0, ("prompt",))
    return [{**row, "prompt_ids": prompt_ids(tokenizer, row), "row": i} for i, row in enumerate(rows)]


def prompts_in_order(options, kind: str, tokenizer) -> list[dict]:
    """The same rows as our loop takes them, step after step, for a peer that goes from the first to the last."""
    rows, count = load_prompts(options, kind, tokenizer), options.num_prompts * total_steps(options)
    return [rows[i] for i in taken_indices(0, count, len(rows), SEED)]


def even_tokens(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward for models that were trained on nothing: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


# --- in the process that compares


class Worker:
    """A trainer in a process of its own: `turn(steps)` lets it make so many."""

    def __init__(self, script: str, argv: list[str], kind: str, folder: Path):
        self.kind, self.log = kind, folder / f"{kind.replace(' ', '_')}.log"
        command = [sys.executable, script, *argv, "--worker", kind, "--work", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            tail = "".join(self.log.read_text().splitlines(keepends=True)[-25:])
            sys.exit(f"{self.kind} ended with code {self.process.wait()}; the end of its log:\n{tail}")
        return json.loads(line)

    def warm(self) -> list[dict]:
        return self._read()["steps"]

    def turn(self, steps: int) -> list[dict]:
        print(steps, file=self.process.stdin, flush=True)
        return self._read()["steps"]

    def finish(self) -> dict:
        print(0, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Nothing of it is left behind, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def compare(script: str, argv: list[str], options, kinds: list[str], left_out: dict[str, str]) -> dict:
    """Rounds of all `kinds` in turns. `left_out`: kind -> why it does not run here."""
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        prepare(options, Path(work))
        workers, warm = [], {}
        for kind in kinds:
            workers.append(Worker(script, argv, kind, Path(work)))
            stack.callback(workers[-1].close)
            warm[kind] = workers[-1].warm()
        rounds: list[dict] = []
        for number in range(options.rounds):
            rounds.append({worker.kind: worker.turn(options.steps) for worker in workers})
            speeds = {kind: round(rate(steps, options.clock)) for kind, steps in rounds[-1].items()}
            print(f"round {number + 1}, completion tokens/s ({options.clock}): {json.dumps(speeds)}", flush=True)
        memories = {worker.kind: worker.finish() for worker in workers}
    return summary(options, kinds, warm, rounds, memories) | {"left out": left_out}


def prepare(options, work: Path) -> None:
    """Without a model given, one of random weights in `work`."""
    if options.model is None:
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["abc"], vocab_size=261)
        shape = ShapeConfig(options.hidden_size, 3 * options.hidden_size, options.layers, options.hidden_size // 32)
        model = make_model(shape, tokenizer)
        set_template(tokenizer, model, str(ROOT / "chat_templates/chatml.jinja"))
        save_pair(model, tokenizer, work / "model")


def model_of(options) -> ModelConfig:
    return ModelConfig(options.model or str(Path(options.work) / "model"), dtype=options.dtype)


def tokenizer_of(options):
    return load_tokenizer(model_of(options).model_name_or_path)


def without_vllm(options) -> dict[str, str]:
    """Kinds that sample by vLLM -> why it cannot be had here."""
    from transformers import AutoConfig, LlamaConfig

    shape = LlamaConfig(hidden_size=options.hidden_size, num_attention_heads=options.hidden_size // 32)
    obstacle = vllm_obstacle(AutoConfig.from_pretrained(options.model) if options.model else shape)
    return {kind: obstacle for kind in options.kinds if "vLLM" in kind and obstacle}


def peer_version(folder: str | None) -> str:
    """TRL's version in a folder that pip installed it to."""
    names = [path.name for path in Path(folder or ".").glob("trl-*.dist-info")]
    return names[0].removeprefix("trl-").removesuffix(".dist-info") if names else "not there"


def parser(text: str) -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--model", help="a chat model of the tiny world; default: a Llama of --hidden_size and --layers")
    each.add_argument("--hidden_size", type=int, default=128)
    each.add_argument("--layers", type=int, default=4)
    each.add_argument("--rows", type=int, default=1000)
    each.add_argument("--learning_rate", type=float, default=1e-4)
    each.add_argument("--steps", type=int, default=2, help="of each trainer in a round")
    each.add_argument("--rounds", type=int, default=5)
    each.add_argument("--warmup", type=int, default=1, help="steps before the first round")
    each.add_argument("--dtype", default="float32", help="of the weights")
    each.add_argument("--bf16", action="store_true", help="autocast, for ours and for TRL tuned")
    each.add_argument("--max_tokens", type=int, default=8192, help="ours: tokens of a micro-batch")
    each.add_argument("--clock", choices=CLOCKS, default="wall" if torch.cuda.is_available() else "cpu")
    each.add_argument(
        "--profile", metavar="FOLDER", help="write each trainer's cProfile there (its times are inflated)"
    )
    each.add_argument("--out", help="where the result goes, without .json and .md")
    each.add_argument("--worker", help=argparse.SUPPRESS)
    each.add_argument("--work", help=argparse.SUPPRESS)
    return each
