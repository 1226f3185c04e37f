"""One trainer of pretrain_speed.py in a process of its own (or in two, by `accelerate launch`), and its handle.

In: settings as JSON in the first argument; among them `work`, a folder with models, tokens/ and held/. Out, on stdout:
a line of JSON after the steps that warm up and after each turn, {"steps": {"wall": s, "cpu": s}}, each answered by a
line on stdin; last a line with held-out loss and memory. Launched by pretrain_speed.py alone (`Trainer`, `in_turns`).
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from rl_bench import ROOT, Worker, memory
from rl_tables import CLOCKS
from transformers.utils.logging import disable_progress_bar

TWO = ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml"
DEFAULTS = {
    "model": "gpt2", "compile": False, "fused": False, "bf16": False, "liger": "auto", "processes": 1,
    "threads": None, "learning_rate": 1e-3, "lr_warmup": 5, "weight_decay": 0.1, "warmup": 3, "logging_steps": 10,
}  # fmt: skip


# --- outside


class Trainer(Worker):
    """A trainer with these settings; `turn` lets it make its next steps."""

    def __init__(self, name: str, settings: dict):
        self.kind, self.log = name, Path(f"{settings['out']}.log")
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(TWO)]
        words = [sys.executable, *(launch if settings["processes"] == 2 else []), __file__, json.dumps(settings)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if settings["threads"]:
            env["OMP_NUM_THREADS"] = str(settings["threads"])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
            )


def in_turns(trainers: dict[str, dict], work: Path, rounds: int, common: dict) -> tuple[list[dict], dict]:
    """(for each round, trainer -> seconds of its turn by clock; trainer -> what it said at its end). `trainers`: name
    -> its settings beside `common`, which has kind, length, batch, micro_batch and steps (of a turn)."""
    with ExitStack() as stack:
        running, found = [], []
        for number, (name, own) in enumerate(trainers.items()):
            settings = {**DEFAULTS, **common, **own, "work": str(work), "out": str(work / f"out-{number}")}
            settings["turns"] = [settings["warmup"], *[settings["steps"]] * rounds]
            running.append(Trainer(name, settings))
            stack.callback(running[-1].close)
        for each in running:  # they start side by side
            each.warm()
        for number in range(rounds):
            found.append({each.kind: each.turn(settings["steps"]) for each in running})
            said = ", ".join(f"{name} {spent['wall']:.2f} s" for name, spent in found[-1].items())
            print(f"round {number + 1}: {said}", file=sys.stderr, flush=True)
        return found, {each.kind: each.finish() for each in running}


# --- inside


class Turns:
    """Counts steps; at the end of a turn reports what it took and waits for the next. Silent in all processes but the
    first: the others wait for that one in their next collective."""

    def __init__(self, lengths: list[int], speaks: bool):
        self.lengths, self.speaks, self.left = lengths[1:], speaks, lengths[0]
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self._start()

    def _start(self) -> None:
        self.began = {clock: now() for clock, now in CLOCKS.items()}

    def step(self) -> None:
        """A step is over."""
        self.left -= 1
        if self.left or not self.speaks:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.say({"steps": {clock: now() - self.began[clock] for clock, now in CLOCKS.items()}})
        sys.stdin.readline()
        self.left = self.lengths.pop(0) if self.lengths else 0
        self._start()

    def say(self, found: dict) -> None:
        print(json.dumps(found), file=self.out, flush=True)


def ours(settings: dict, work: Path, turns: Turns):
    """`posttrain.pretrain.pretrain` as recipes/pretrain.py calls it.

    Returns the trained model's loss of chunks, in nats a token, and the seconds a step that its data took.
    """
    from posttrain import stage
    from posttrain.models import ModelConfig, load_causal_lm
    from posttrain.pretrain import ChunkLoss, PretrainConfig, PretrainOptim, pretrain
    from posttrain.shards import TokenShards

    config = PretrainConfig(
        tokenizer_path=str(work / settings["model"]), max_steps=sum(settings["turns"]),
        sequence_length=settings["length"], batch_size=settings["batch"], micro_batch_size=settings["micro_batch"],
        compile=settings["compile"], use_liger_kernel=settings["liger"],
    )  # fmt: skip
    optim = PretrainOptim(
        learning_rate=settings["learning_rate"], lr_scheduler_type="cosine", warmup_steps=settings["lr_warmup"],
        weight_decay=settings["weight_decay"], min_lr_ratio=0.1, bf16=settings["bf16"],
    )  # fmt: skip
    keys = stage.StageConfig(settings["out"], logging_steps=settings["logging_steps"])
    held = stage.start("pretrain", (keys, config, optim), parents={}, data=[])
    accelerator = stage.accelerator(optim.bf16)
    model = load_causal_lm(ModelConfig(str(work / settings["model"]))).to(accelerator.device)
    due = held.due

    def after_step(step: int, last: int) -> bool:
        turns.step()
        return due(step, last)

    held.due = after_step  # the loop asks it at the end of every step
    pretrain(held, accelerator, model, TokenShards(work / "tokens"), config, optim)
    whole = ChunkLoss(model.eval())
    return lambda chunks: float(whole(chunks)) / chunks[:, 1:].numel(), data_seconds(Path(settings["out"]))


def data_seconds(out: Path) -> float:
    """Seconds a step that the loop's meter counted for data. The meter's clock runs while a trainer waits for its
    turn; share x time undoes that."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines]
    seconds = [
        line["share/data"] * (now - before) / line["tokens_per_second"]
        for line, before, now in zip(lines, [0, *tokens], tokens, strict=False)
    ]
    return sum(seconds) / lines[-1]["step"]


def plain(settings: dict, work: Path, turns: Turns):
    """The plain loop from the same weights, on the same tokens. Returns as `ours`; it does not time its data."""
    from pretrain_speed_plain import plain_copy, train

    from posttrain.models import ModelConfig, load_causal_lm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = plain_copy(load_causal_lm(ModelConfig(str(work / settings["model"])))).to(device)
    train(model, work / "tokens" / "shard-00000.bin", settings, device, turns.step)
    return lambda chunks: float(model.eval()(chunks[:, :-1], chunks[:, 1:])), None


def main() -> None:
    settings = json.loads(sys.argv[1])
    work, first = Path(settings["work"]), os.environ.get("RANK", "0") == "0"
    turns = Turns(settings["turns"], first)
    torch.manual_seed(0)
    disable_progress_bar()
    loss_of, data = {"ours": ours, "plain": plain}[settings["kind"]](settings, work, turns)
    if first:
        from pretrain_speed_setup import sample_chunks

        chunks = sample_chunks(work / "held", settings["length"], 32)
        with torch.no_grad():
            loss = loss_of(chunks.to("cuda" if torch.cuda.is_available() else "cpu"))
        turns.say({"held-out loss": loss, "peak memory": memory("VmHWM"), "data seconds a step": data})


if __name__ == "__main__":
    main()
