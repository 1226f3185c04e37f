"""How long a sync of weights takes, from a trainer to `posttrain serve`: through a process group and through memory.

In: sizes of Llamas with random weights. Out: a table of ms and GB/s by way and size, and JSON with `--out`.

    python tests/benchmarks/weight_sync.py                                      # CPU: gloo
    python tests/benchmarks/weight_sync.py --sizes 1B 8B --trainer_gpu 0 --server_gpus 1 2    # NCCL, tensor parallel

A server is started for each size; the ways take turns with it, each with a sync to warm up (it forms the group) and
`--syncs` timed ones. The median counts. A sync is all that a trainer waits for: packing, the way, vLLM's reload, and
the answer. Trainer and server have the same dtype.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "tiny": (64, 96, 2, 2, 1, 261),
    "30M": (512, 1536, 6, 8, 4, 16384),
    "150M": (768, 3072, 12, 12, 4, 32768),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
WAYS = ("group", "memory")


def main(argv: list[str] | None = None) -> dict:
    options = parser().parse_args(argv)
    rows = [row for size in options.sizes for row in measure(size, options)]
    result = {"device": device_name(options), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["tiny", "30M", "150M"])
    each.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    each.add_argument("--syncs", type=int, default=5, help="timed ones of each way and size")
    each.add_argument("--dtype", default="float32" if not torch.cuda.is_available() else "bfloat16")
    each.add_argument("--trainer_gpu", type=int, help="number of a GPU; default: CPU")
    each.add_argument("--server_gpus", nargs="+", type=int, default=[], help="GPUs of the server, other ones")
    each.add_argument("--out", help="JSON")
    return each


def measure(size: str, options) -> list[dict]:
    """A row for each way."""
    from posttrain.rl.rollout import EngineConfig, VLLMServerEngine

    model = make_model(size, getattr(torch, options.dtype))
    if options.trainer_gpu is not None:
        model = model.to(f"cuda:{options.trainer_gpu}")
    bytes_each = sum(p.nbytes for p in model.parameters())
    rows, patience = [], 600 if options.server_gpus else 200  # seconds for the server to be up
    with tempfile.TemporaryDirectory() as folder:
        process, port = serve(model, Path(folder), options)
        try:
            for way in options.ways:
                keys = {"vllm_server_port": port, "vllm_sync": way, "vllm_server_timeout": patience}
                engine = VLLMServerEngine(EngineConfig(use_vllm="server", **keys), model, 256, note=quiet)
                times = [timed(lambda engine=engine: engine.sync_weights(model)) for _ in range(options.syncs + 1)][1:]
                ms = statistics.median(times)
                backend = engine.name.rpartition(" through ")[2]
                speed = {"GB": bytes_each / 1e9, "ms": ms, "GB/s": bytes_each / 1e6 / ms, "each ms": times}
                rows.append({"size": size, "way": way, "backend": backend, **speed})
                print(json.dumps(rows[-1]), flush=True)
        finally:
            process.terminate()
            process.wait(60)
    return rows


def make_model(size: str, dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def serve(model, folder: Path, options) -> tuple[subprocess.Popen, int]:
    """`posttrain serve` of that model, still on its way up, and its port."""
    from posttrain.tokenizer import train_tokenizer

    model.save_pretrained(folder)
    train_tokenizer(["abc"], vocab_size=261).save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "posttrain.cli", "serve", str(folder), "--port", str(port)]
    words += ["--dtype", options.dtype, "--max_model_len", "256", "--vllm_kv_cache_gb", "0.25"]
    words += ["--vllm_tensor_parallel_size", str(max(1, len(options.server_gpus)))]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, options.server_gpus))} if options.server_gpus else {}
    log = open(folder / "log", "w")  # noqa: SIM115 (the server's)
    return subprocess.Popen(words, env={**os.environ, **visible, "PYTHONPATH": path}, stdout=log, stderr=log), port


def timed(call) -> float:
    """ms."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def quiet(text: str) -> None:
    """The engine's notes are not wanted."""


def device_name(options) -> str:
    if options.trainer_gpu is None:
        return platform.machine() + " CPU"
    return torch.cuda.get_device_name(options.trainer_gpu)


def table(result: dict) -> str:
    lines = [f"{result['device']}, {result['cores']} cores, torch {result['torch']}", ""]
    lines += ["| model | way | over | GB | ms | GB/s |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        figures = f"{row['GB']:.4f} | {row['ms']:.1f} | {row['GB/s']:.2f}"
        lines.append(f"| {row['size']} | {row['way']} | {row['backend']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
