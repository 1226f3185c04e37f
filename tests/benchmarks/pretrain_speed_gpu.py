"""The part of pretrain_speed.py for one GPU: MFU at GPT-2's 124M and at a Llama of depth 22 (0.6B), bf16, compiled.

In: a CUDA device. Out: for each model, trainer and micro-batch tokens a second, MFU and memory: ours with Liger's
kernels and without, and the plain loop at 124M. The result goes to a file of its own:

    python tests/benchmarks/pretrain_speed.py mfu --out tests/benchmarks/results/pretrain_speed_gpu

The limit is the GPU's matmul rate as measured here, on random numbers (a GPU that multiplies ones draws less power and
clocks higher). Tokens are random too: nothing is learned from them, and they cost the same. Each run has a process of
its own; one that runs out of memory is reported as such.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from pretrain_speed_setup import random_shards
from pretrain_speed_worker import in_turns
from transformers.utils.logging import disable_progress_bar

from posttrain.models import save_pair
from posttrain.shapes import ShapeConfig, make_model
from posttrain.throughput import listed_peak, model_flops, non_embedding_parameters
from posttrain.tokenizer import train_tokenizer

LENGTH, BATCH = 1024, 64
COMMON = {"max_position_embeddings": LENGTH, "vocab_multiple": 50304}  # which pads any tokenizer to that vocabulary
MODELS = {
    "GPT-2 124M": ShapeConfig(768, 3072, 12, 12, model_type="gpt2", **COMMON),
    "Llama, depth 22": ShapeConfig(depth=22, **COMMON),
}
FAST = {"bf16": True, "compile": True, "fused": True}
TRAINERS = {
    "ours, Liger": {"kind": "ours", "liger": "true", **FAST},
    "ours": {"kind": "ours", "liger": "false", **FAST},
    "plain, tuned": {"kind": "plain", **FAST},
}


def mfu_part(models=MODELS, trainers=TRAINERS, micro_batches=(16, 32), length=LENGTH, rate=None) -> dict:
    """Runs of all models, trainers (the plain one knows GPT-2 alone) and micro-batches. `rate`: FLOP/s of the device
    in matrix products; none = measured."""
    rate, listed = rate or matmul_rate(), listed_peak(device_name())
    runs = []
    for name, shape in models.items():
        with tempfile.TemporaryDirectory() as folder:
            flops = prepare(shape, length, Path(folder))
            for trainer, settings in trainers.items():
                if settings["kind"] == "plain" and shape.model_type != "gpt2":
                    continue
                for micro in micro_batches:
                    found = measure(settings | {"micro_batch": micro, "length": length}, Path(folder))
                    runs.append({"model": name, "trainer": trainer, "micro batch": micro, **flops, **found})
                    print(runs[-1], file=sys.stderr, flush=True)
    for run in runs:
        if "tokens per second" in run:
            used = run["tokens per second"] * run["FLOPs a token"]
            run |= {"MFU of measured": used / rate, "MFU of listed": used / listed if listed else None}
    return {"matmul rate": rate, "listed peak": listed, "length": length, "batch": BATCH, "runs": runs}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def prepare(shape: ShapeConfig, length: int, work: Path) -> dict:
    """gpt2/ (of whatever type), tokens/ and held/ in `work`; what the model costs."""
    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["abc"], vocab_size=261)
    model = make_model(shape, tokenizer)
    save_pair(model, tokenizer, work / "gpt2")
    for name, tokens in (("tokens", 10_000_000), ("held", 4 * length)):
        random_shards(work / name, tokens, model.config.vocab_size)
    multiplying, width = non_embedding_parameters(model), shape.head * shape.num_attention_heads
    flops = model_flops(multiplying, shape.num_hidden_layers, width, 1, length, "training")
    return {"parameters": model.num_parameters(), "FLOPs a token": flops}


def measure(settings: dict, work: Path) -> dict:
    """Tokens a second of one trainer, median, lowest and highest of 5 turns; or that it did not fit."""
    settings = {"batch": BATCH, "steps": 3, "warmup": 5, **settings}
    try:
        rounds, ends = in_turns({"it": {}}, work, 5, settings)
    except SystemExit as error:
        if "out of memory" not in str(error):
            raise
        return {"failed": "out of memory"}
    tokens = settings["batch"] * settings["length"] * settings["steps"]
    speeds = [tokens / each["it"]["wall"] for each in rounds]
    found = {"tokens per second": statistics.median(speeds), "low": min(speeds), "high": max(speeds)}
    seconds = ends["it"]["data seconds a step"]
    share = seconds and seconds * found["tokens per second"] / (settings["batch"] * settings["length"])
    return found | {"peak memory": ends["it"]["peak memory"], "data share": share}


def matmul_rate(size: int = 8192, seconds: float = 3.0) -> float:
    """FLOP/s of bf16 matrix products of size x size, sustained: the median over stretches of 20 products."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rates, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        rates.append(20 * 2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates[1:])
