"""The peer of pretrain_speed.py: a plain training loop in the manner of nanoGPT, written for this comparison.

In: GPT-2 weights of transformers and a file of uint16 tokens. Out: the same model in plain torch, and a loop that does
what nanoGPT's does: windows at random places of a memory map, the next batch read while the step runs, autocast, AdamW
whose vectors do not decay, clipping, warm-up and cosine. It logs a loss every 10 steps and has nothing else to do: no
check of numbers, no checkpoint, no resume, no fixed order of data. Imported by pretrain_speed_worker.py.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_EVERY = 10


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm (GPT-2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, dim=2)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 with its head tied to the embeddings, in plain torch."""

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given inputs (B, T)."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.tokens(inputs) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Ends of names: ours here, transformers' there. Its Conv1D has matrices the other way round.
NAMES = {
    "norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2", "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}  # fmt: skip
TOP = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
CONV1D = {"qkv", "out", "up", "down"}


def twin(name: str, named: dict[str, Tensor]) -> Tensor:
    """The tensor of transformers' GPT-2 (`named`) that stands for parameter `name` of `PlainGPT`, in its layout."""
    *path, module, kind = name.split(".")
    there = ".".join(["h", path[1], NAMES[module]]) if path else TOP[module]
    found = named[f"transformer.{there}.{kind}"]
    return found.t() if kind == "weight" and module in CONV1D else found


def plain_copy(model) -> PlainGPT:
    """The weights of a transformers GPT-2 in a `PlainGPT`."""
    config, named = model.config, dict(model.named_parameters())
    plain = PlainGPT(config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(twin(name, named))
    return plain


class RandomWindows:
    """Batches of `length` tokens, and those one further, from random places of a file of uint16 tokens."""

    def __init__(self, file: Path, length: int, batch: int, device: torch.device):
        self.file, self.length, self.batch, self.device = file, length, batch, device
        self.places = torch.Generator().manual_seed(0)

    def take(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each (batch, length)."""
        tokens = np.memmap(self.file, dtype="<u2", mode="r")
        starts = torch.randint(len(tokens) - self.length, (self.batch,), generator=self.places).tolist()
        windows = np.stack([tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)
        both = torch.from_numpy(windows)
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def adamw(model: nn.Module, rate: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def rate_at(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: PlainGPT, file: Path, settings: dict, device: torch.device, after_step) -> None:
    """As many steps as all turns have; `after_step()` is called after each."""
    micro, total = settings["micro_batch"], sum(settings["turns"])
    pieces = settings["batch"] // micro
    data = RandomWindows(file, settings["length"], micro, device)
    cast = torch.autocast(device.type, torch.bfloat16) if settings["bf16"] else nullcontext()
    optimizer = adamw(model, settings["learning_rate"], settings["weight_decay"], settings["fused"])
    loss_of = torch.compile(model) if settings["compile"] else model
    inputs, targets = data.take()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, total, settings["learning_rate"], settings["lr_warmup"])
        for _ in range(pieces):
            with cast:
                loss = loss_of(inputs, targets) / pieces
            inputs, targets = data.take()  # while a GPU still works on the loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {loss.item() * pieces:.4f}", flush=True)
        after_step()
