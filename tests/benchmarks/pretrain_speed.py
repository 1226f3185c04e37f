"""Pretraining's speed: our step beside a plain loop, the data's share of it, two processes, and MFU on a GPU.

In: nothing; models get random weights, tokens are the tiny world's. Out: a table, and with `--out` a .md and a .json.

    python tests/benchmarks/pretrain_speed.py --out tests/benchmarks/results/pretrain_speed            # CPU
    python tests/benchmarks/pretrain_speed.py mfu --out tests/benchmarks/results/pretrain_speed_gpu    # one GPU

- step: `posttrain.pretrain.pretrain` on a transformers GPT-2 against a loop in the manner of nanoGPT on a GPT-2 in
  plain torch (pretrain_speed_plain.py): equal weights, tokens, batch, dtype, optimizer, clipping. Before any timing
  both must give the same loss and gradients. "plain" is nanoGPT's default on a CPU; "plain, tuned" adds torch.compile
  and fused AdamW. Each trainer keeps its process; they take turns (A B A B) and stand still meanwhile. All have the
  environment that `import posttrain` sets (OpenMP waits passively).
- loader: seconds to read a step's chunks from shards on disk, beside those that the step takes.
- processes: the step on one process and on two over gloo, a thread each, the same batch in all.
- mfu: arithmetic that a step needs over what the GPU could do, by its measured matmul rate (pretrain_speed_gpu.py).
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from pretrain_speed_setup import SHARD_TOKENS, SIZES, prepare, random_shards, require_equal
from pretrain_speed_tables import markdown
from pretrain_speed_worker import in_turns
from rl_tables import CLOCKS, command

from posttrain.checkpoint import write_json
from posttrain.environment import usable_cores
from posttrain.pretrain import Chunks
from posttrain.shards import TokenShards
from posttrain.throughput import model_flops

PARTS = ("step", "loader", "processes", "mfu")
KINDS = {
    "ours": {"kind": "ours"},
    "ours, compiled": {"kind": "ours", "compile": True},
    "plain": {"kind": "plain"},
    "plain, tuned": {"kind": "plain", "compile": True, "fused": True},
    "ours, a Llama": {"kind": "ours", "model": "llama"},
}
PAIRS = (("ours", "plain"), ("ours, compiled", "plain, tuned"))
# GPT-2 124M as the loader's part assumes it: weights that multiply, layers, width, chunks of a step, their length.
GPT2 = {"parameters": 123_532_032, "layers": 12, "width": 768, "batch": 512, "length": 1024}
H200, GOAL = 790e12, 0.4  # measured bf16 FLOP/s; the goal of MFU at this size


def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    if "mfu" in options.parts and not torch.cuda.is_available():
        print("mfu: there is no GPU (torch.cuda.is_available() is False): nothing is measured, nothing written")
        return
    result = {"date": date.today().isoformat(), "command": command(), "machine": machine()}
    result["settings"] = {key: value for key, value in vars(options).items() if key != "out"}
    if "mfu" in options.parts:
        from pretrain_speed_gpu import mfu_part

        result["mfu"] = mfu_part()
    if "step" in options.parts:
        result["step"] = [step(*case.split("-"), options) for case in options.cases]
    if "loader" in options.parts:
        result["loader"] = loader(options)
    if "processes" in options.parts:
        result["processes"] = processes(options)
    text = markdown(result)
    print(text)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(f"{options.out}.json"), result)
        Path(f"{options.out}.md").write_text(text, encoding="utf-8")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none = all but mfu")
    cases = [f"{size}-{dtype}" for size in SIZES for dtype in ("fp32", "bf16")]
    each.add_argument("--cases", nargs="+", choices=cases, default=["tiny-fp32", "tiny-bf16", "small-fp32"])
    each.add_argument("--size", choices=SIZES, default="tiny", help="processes: of its model")
    each.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    each.add_argument("--rounds", type=int, default=5)
    each.add_argument("--tokens", type=int, default=10 * SHARD_TOKENS, help="loader: how many its shards hold")
    each.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that others use, too")
    each.add_argument("--out", help="where the result goes, without .json and .md")
    options = each.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        each.error(f"PART: found {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    options.parts = options.parts or [part for part in PARTS if part != "mfu"]
    return options


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"device": gpu or f"{platform.machine()} CPU", "cores": usable_cores(), "threads": torch.get_num_threads()}
    return facts | {"torch": torch.__version__}


def settings_of(size: str) -> dict:
    *_, length, batch, steps = SIZES[size]
    return {"length": length, "batch": batch, "micro_batch": batch, "steps": steps}


def spread(rounds: list[dict], one: str, other: str, clock: str) -> dict:
    """How many times as fast `one` is as `other`: the median of rounds, the lowest, the highest."""
    values = [each[other][clock] / each[one][clock] for each in rounds]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compared(rounds: list[dict], ends: dict, settings: dict, pairs) -> dict:
    """Tokens a second by kind and clock, ratios of pairs, and what the trainers said at their end."""
    each_step = settings["batch"] * settings["length"]
    tokens = each_step * settings["steps"]
    speeds = {
        kind: {clock: tokens / statistics.median(each[kind][clock] for each in rounds) for clock in CLOCKS}
        for kind in ends
    }
    ratios = {
        f"{one} / {other}": {clock: spread(rounds, one, other, clock) for clock in CLOCKS}
        for one, other in pairs
        if one in ends and other in ends
    }
    return {
        "tokens a step": each_step,
        "tokens per second": speeds,
        "ratios": ratios,
        "rounds": rounds,
        "trainers": ends,
    }


def step(size: str, dtype: str, options) -> dict:
    """All kinds of trainers at one size and dtype."""
    settings = settings_of(size) | {"bf16": dtype == "bf16"}
    with tempfile.TemporaryDirectory() as folder:
        prepare(size, Path(folder))
        equal = require_equal(Path(folder), size)
        kinds = {kind: KINDS[kind] for kind in options.kinds}
        rounds, ends = in_turns(kinds, Path(folder), options.rounds, settings)
    return {"size": size, "dtype": dtype, "equal": equal} | compared(rounds, ends, settings, PAIRS)


def processes(options) -> dict:
    """One process and two of a thread each."""
    size = options.size
    settings = settings_of(size) | {"kind": "ours", "threads": 1}
    settings["micro_batch"] = settings["batch"] // 2  # both take the same
    with tempfile.TemporaryDirectory() as folder:
        prepare(size, Path(folder))
        kinds = {"two processes": {"processes": 2}, "one process": {}}
        rounds, ends = in_turns(kinds, Path(folder), options.rounds, settings)
    return {"size": size} | compared(rounds, ends, settings, [tuple(kinds)])


def loader(options) -> dict:
    """Seconds to read the chunks of a step of GPT-2 124M from shards on disk, beside the seconds that the step would
    take on one H200 at the goal's rate."""
    batch, length = GPT2["batch"], GPT2["length"]
    flops = model_flops(GPT2["parameters"], GPT2["layers"], GPT2["width"], batch * length, length, "training")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        random_shards(tokens, options.tokens, 50257)
        chunks = Chunks(TokenShards(tokens), length, batch, seed=0)
        began = time.perf_counter()
        chunks.indices(0)  # shuffles the epoch
        found = {"shuffle": time.perf_counter() - began, "chunks": chunks.count, "H200 step": flops / (H200 * GOAL)}
        seconds = {"disk": [], "memory": []}
        for number in range(options.rounds):
            forget(tokens)
            chunks = Chunks(TokenShards(tokens), length, batch, seed=0)  # the last one's maps hold what they have read
            for source in seconds:  # the second time the same chunks are in memory
                seconds[source].append(read_seconds(chunks, number))
    found |= {source: statistics.median(values) for source, values in seconds.items()}
    return found | {"batch": batch, "length": length, "rate": H200, "goal": GOAL}


def read_seconds(chunks: Chunks, step: int) -> float:
    began = time.perf_counter()
    chunks.read(step)
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its memory (Linux), so that they are read from the disk."""
    for path in folder.glob("*.bin"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main()
