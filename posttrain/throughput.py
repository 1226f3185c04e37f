"""How well a device is used: arithmetic that a model needs, over what the device can do. Torch only.

In: a model's shape, tokens, seconds. Out: FLOPs, MFU (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B), peak
memory. Needed arithmetic alone counts: what is computed again to save memory does not raise the figure.

    flops = model_flops(non_embedding_parameters(model), layers, width, tokens, mean_length, "training")
    mfu(flops, seconds, peak_flops(device, torch.bfloat16))
"""

import resource
import sys
import time
from functools import cache

import torch

# Dense bf16 FLOP/s of the tensor cores (fp32 accumulation, no sparsity) as NVIDIA gives them: product data sheets of
# each data-centre card, the Ada and GA102 architecture white papers for RTX. Others are measured. The first name that
# is part of the device's name decides.
BF16_PEAKS = {
    "B200": 2250e12, "H200 NVL": 836e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H20": 148e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
    "RTX 6000 Ada": 364e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
EMBEDDINGS = ("embed_tokens.", "wte.", "wpe.", "embed_positions.", "word_embeddings.")


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s that `device` can reach in matrix products of `dtype`: from the table, else measured once (0.2 s)."""
    device = torch.device(device)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        listed = listed_peak(torch.cuda.get_device_name(device))
        if listed is not None:
            return listed
    return measured_peak(device.type, dtype)


def listed_peak(name: str) -> float | None:
    """The table's figure for a device's name; None where it is not listed."""
    words = name.replace("-", " ").split()
    for known, flops in BF16_PEAKS.items():
        parts = known.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return flops
    return None


@cache
def measured_peak(kind: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of square matrix products within `seconds`, after a warm-up, by as many threads as torch uses."""
    size = 8192 if kind == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=kind)
    best, began = 0.0, None
    while began is None or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        matrix @ matrix
        if kind == "cuda":
            torch.cuda.synchronize()
        rate = 2 * size**3 / (time.perf_counter() - start)
        if began is None:  # the first product also wakes threads and chooses kernels
            began = time.perf_counter()
        else:
            best = max(best, rate)
    return best or rate


def non_embedding_parameters(model) -> int:
    """Parameters that multiply every token: all but embedding tables; a head that is tied to one counts, as it
    multiplies. Works on sharded models, too (a shard knows the size of the whole)."""
    tied = bool(model.config.tie_word_embeddings) and model.get_output_embeddings() is not None
    named = list(model.named_parameters())
    tables = sum(p.numel() for name, p in named if any(part in name for part in EMBEDDINGS))
    head = model.get_output_embeddings().weight.numel() if tied else 0
    return sum(p.numel() for _, p in named) - tables + head


def model_flops(parameters: int, layers: int, width: int, tokens: int, mean_length: float, kind: str) -> float:
    """Arithmetic of `tokens` tokens: 2 N D for "forward", 6 N D for "training" (with backward), 4 N D for "adapter"
    (the backward through frozen weights needs no gradient of them); and that of attention.

    parameters: those that multiply (`non_embedding_parameters`). A token of a causal sequence of s sees s / 2 others
    on average; a score and its part in the sum cost 2 x 2 x width: 2 s x layers x width a token, three times that with
    backward. mean_length: s, weighted by tokens. ValueError for another `kind`.
    """
    passes = {"forward": (2, 1), "training": (6, 3), "adapter": (4, 3)}
    if kind not in passes:
        raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(passes)}")
    products, attention = passes[kind]
    return tokens * (products * parameters + attention * 2 * mean_length * layers * width)


def mfu(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """Share of what the devices could have computed in this time."""
    return flops / (seconds * peak * devices)


def peak_memory_gb() -> float:
    """Most memory held so far, in GiB: of the GPU that torch uses, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
