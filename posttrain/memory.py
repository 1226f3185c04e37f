"""How many bytes a training step needs, part by part, before anything is allocated. No GPU needed.

In: a transformers config, the tokens of a micro-batch, how the model is trained. Out: `Memory`, bytes a process.

    need = estimate(config, micro_batch=8, length=1024, bf16=True)
    print(need.peak, need.parts())
    enough, need = fits(config, 8, 1024, bf16=True, device_bytes=device_memory("cuda"))

Weights, gradients and optimizer states are counted (Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054, section 3.1).
What a forward and a backward hold is not a formula but a trace: the model is built and run on torch's fake tensors,
which have shapes and no data, and every storage is counted from its birth to its death. So it is right for whatever
the model's code keeps. Kernels are torch's own (flash attention, no fusion): torch.compile and Liger's need less.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

# Both live in modules with an underscore and have no other name; torch's documentation imports them like this (2.13).
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.errors import UserError

# Room left for what no count of tensors sees: the allocator's gaps, the device's context, the workspaces of libraries.
MARGIN = 0.1
OPTIMIZERS = ("adamw", "muon")
SPREADS = ("ddp", "fsdp2", "zero3")


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs, by part. Gradients are counted whole, as with several micro-batches a step."""

    weights: int
    gradients: int
    optimizer: int  # AdamW: two moments; Muon: one of each hidden matrix
    exchange: int  # between processes: DDP's buckets; of shards, the layers gathered at a time and their gradients
    copies: int  # bf16 copies of fp32 weights, which autocast keeps until the backward
    activations: int  # what the forward keeps for the backward, and what both hold for a moment
    logits: int  # logits, their log-softmax, their gradient
    update: int  # the optimizer's temporaries, when activations and logits are gone

    @property
    def peak(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """What is held at the peak, by name: the update's temporaries, or the micro-batch where that is more."""
        parts = asdict(self)
        passing = ("copies", "activations", "logits")
        gone = ("update",) if sum(parts[name] for name in passing) >= self.update else passing
        return {name: size for name, size in parts.items() if name not in gone}


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the next tokens of ids (B, S), in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def estimate(
    model_config, micro_batch: int, length: int, *, bf16: bool = False, optim: str = "adamw", world: int = 1,
    spread: str = "ddp", checkpointing: bool = False, fused_loss: bool = False, dtype: str = "float32",
) -> Memory:  # fmt: skip
    """Memory of training a causal LM of this config on micro-batches (micro_batch, length), a process.

    bf16: autocast over weights of `dtype`. spread: ddp (a whole model on each of `world` processes), fsdp2 or zero3
    (shards). checkpointing: transformers' gradient checkpointing, a layer at a time. fused_loss: Liger's, which makes
    logits in pieces. Takes about a second. UserError for a length that the model has no positions for, and for a model
    whose code cannot run without data.
    """
    room = getattr(model_config, "max_position_embeddings", None)
    if room is not None and length > room:
        raise UserError(f"length: found {length} tokens, but the model's context has {room} positions")

    def build() -> nn.Module:
        from transformers import AutoModelForCausalLM

        # In shards the layers that are gathered have the dtype of the arithmetic; nothing is left to copy.
        held = "bfloat16" if bf16 and spread == "fsdp2" else dtype
        return AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, held))

    def forward(model: nn.Module) -> torch.Tensor:
        ids = torch.zeros(micro_batch, length, dtype=torch.long)
        if fused_loss:
            return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum()
        return next_token_loss(model, ids)

    text = model_config.get_text_config()
    need = footprint(
        build, forward, text.vocab_size, bf16=bf16, optim=optim, world=world, spread=spread,
        checkpointing=checkpointing, stored=getattr(torch, dtype).itemsize,
    )  # fmt: skip
    if not fused_loss:
        return need
    size = 2 if bf16 else getattr(torch, dtype).itemsize
    return replace(need, logits=_fused_logits(micro_batch * length, text.hidden_size, text.vocab_size, size))


def _fused_logits(tokens: int, width: int, vocabulary: int, size: int) -> int:
    """Liger's loss cuts the tokens into pieces whose logits have about as many numbers as the hidden states have, up
    to twice that, and makes both gradients in the forward (Hsu et al. 2024, arXiv 2410.10989, section 3.2)."""
    return size * (2 * tokens * width + tokens * width) + 4 * vocabulary * width


def fits(model_config, micro_batch: int, length: int, *, device_bytes: int, **how) -> tuple[bool, Memory]:
    """Whether such a step fits into `device_bytes` with `MARGIN` to spare, and what it needs. `how`: as `estimate`."""
    need = estimate(model_config, micro_batch, length, **how)
    return need.peak <= (1 - MARGIN) * device_bytes, need


def footprint(
    build: Callable[[], nn.Module], forward: Callable[[nn.Module], torch.Tensor], vocabulary: int, *,
    bf16: bool = False, optim: str = "adamw", world: int = 1, spread: str = "ddp", checkpointing: bool = False,
    stored: int = 4,
) -> Memory:  # fmt: skip
    """Memory of one step of any model: `build` makes it, `forward` runs it on a micro-batch and returns the loss; both
    run on fake tensors, so they may look at shapes but at no value.

    vocabulary: width of the logits. stored: bytes of a weight where it is kept.
    """
    for key, found, known in (("optim", optim, OPTIMIZERS), ("spread", spread, SPREADS)):
        if found not in known:
            raise UserError(f"{key}: found {found!r}, expected one of {', '.join(known)}")
    with FakeTensorMode():
        model = build()
        model.train()
        if checkpointing:
            part = next(part for part in model.modules() if hasattr(part, "gradient_checkpointing_enable"))
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            tracker = _trace(model, forward, vocabulary, bf16)
        except (RuntimeError, NotImplementedError) as error:  # what fake tensors raise where code asks for a value
            raise UserError(
                f"memory of {type(model).__name__}: its code cannot run without data, so nothing can be counted "
                f"({str(error).splitlines()[0][:200]}); say gradient_checkpointing true or false yourself"
            ) from error
    trained = [p for p in model.parameters() if p.requires_grad]
    total, learned = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    parts = world if spread != "ddp" else 1
    moments = 2 * learned if optim == "adamw" else 2 * learned - sum(p.numel() for p in _hidden_matrices(model))
    return Memory(
        weights=-(-total * stored // parts),
        gradients=-(-learned * stored // parts),
        optimizer=-(-moments * stored // parts),
        exchange=_exchange(model, world, spread, learned * stored),
        update=-(-learned * stored // parts),
        **tracker.at_peak,
    )


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the decoder layers, which Muon is for; embeddings and head are AdamW's (Jordan et al. 2024)."""
    from posttrain.sharding import blocks

    inside = {id(p): p for block in blocks(model) for p in block.parameters()}
    return [p for p in inside.values() if p.ndim == 2 and p.requires_grad]


def _exchange(model: nn.Module, world: int, spread: str, gradients: int) -> int:
    """DDP copies gradients into buckets. Of shards, a layer and the next one are whole at a time, and the rest
    (embeddings, head) all along, each with its gradient, and once more in fp32 to be reduced."""
    if world == 1:
        return 0
    if spread == "ddp":
        return gradients
    from posttrain.sharding import blocks

    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks(model)]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    layer, rest = max(sizes, default=0), whole - sum(sizes)
    width = next(model.parameters()).element_size()
    return rest + 2 * layer + (rest + layer) + (rest + layer) * 4 // width


# ---- the trace ------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, forward: Callable, vocabulary: int, bf16: bool) -> "_Storages":
    """One forward and backward under the counter. Gradients exist before it, as in a step's later micro-batches."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    tracker = _Storages(model, vocabulary)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(model)
        loss.backward()
    return tracker


class _Storages(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes while it lives; those of the model are known.

    at_peak: bytes by kind at the moment when their sum was highest.
    """

    def __init__(self, model: nn.Module, vocabulary: int):
        super().__init__()
        self.vocabulary, self.live = vocabulary, {}
        self.now = {"copies": 0, "activations": 0, "logits": 0}
        self.at_peak, self.most = dict(self.now), 0
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        copies = operation is torch.ops.aten._to_copy.default and _key(args[0]) in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, copies)
        return out

    def _see(self, tensor: torch.Tensor, copies: bool) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.live or key in self.known:
            return
        logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        kind = "copies" if copies else "logits" if logits else "activations"
        self.live[key] = (kind, storage.nbytes())
        self.now[kind] += storage.nbytes()
        if (total := sum(self.now.values())) > self.most:
            self.most, self.at_peak = total, dict(self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        kind, size = self.live.pop(key)
        self.now[kind] -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- the device -----------------------------------------------------------------------------------------------------


def device_memory(device: torch.device | str) -> int:
    """Bytes free on a device: of a GPU what its driver says, with what torch has cached; of a CPU the main memory that
    is available, or what the process's control group may still take, where that is less."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        raise UserError(f"device: found {device.type}, but free memory is known for cuda and cpu alone")
    return min(_available(), *_group_room())


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_room(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What control groups still give, version 2 or 1; [a huge number] where none limits."""
    rooms = [1 << 62]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound, taken = (root / limit).read_text().strip(), (root / used).read_text().strip()
        except OSError:
            continue
        if bound != "max":
            rooms.append(max(0, int(bound) - int(taken)))
    return rooms
