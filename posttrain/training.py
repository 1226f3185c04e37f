"""The optimisation shared by pretraining, reward modelling and RL: one safe step, schedules, state.

In: a model, micro-batches and a function that gives each one's share of the step's loss. Out: an updated model and
numbers to log. A non-finite loss or gradient stops before the update and names the step and its rows.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from posttrain import processes, sharding, zero
from posttrain.args import arg, one_of
from posttrain.errors import UserError
from posttrain.optimizers import make_optimizer

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclass
class OptimConfig:
    """Optimizer: AdamW, warm-up, schedule, clipping"""

    learning_rate: float = arg(1e-3, help="peak learning rate")
    lr_scheduler_type: str = arg(
        "constant", help="after warm-up: constant, linear, cosine, or wsd (decay in the last 30 %)"
    )
    warmup_steps: int = arg(10, help="steps of linear warm-up")
    weight_decay: float = arg(0.0, help="decoupled weight decay on matrices")
    adam_beta2: float = arg(0.95, help="AdamW's second beta; the first is 0.9")
    max_grad_norm: float = arg(1.0, help="gradients are clipped to this norm")
    bf16: bool = arg(False, help="compute in bf16 with fp32 master weights (autocast)")

    # No keys here, but fields of pretraining's own config, which has its optimizer made from them.
    optim = "adamw"
    lr_decay_share = 0.3
    min_lr_ratio = 0.0

    def __post_init__(self):
        one_of(self, lr_scheduler_type=SCHEDULES)
        for key in ("learning_rate", "max_grad_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"{key}: found {value}, expected a number above 0")


def schedule(
    kind: str, step: int, total: int, warmup: int, *, decay_share: float = 0.3, min_ratio: float = 0.0
) -> float:
    """Factor on the learning rate at 0-based `step` of `total`. All but "constant" fall from 1 to `min_ratio`.

    wsd: warm-up, stable, then linear decay over the last `decay_share` of the steps (Hu et al. 2024, 2404.06395).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    falling = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "wsd": min(1.0, (total - step) / max(1.0, decay_share * total)),
    }[kind]
    return min_ratio + (1 - min_ratio) * falling


def require_multiple(config, key: str, world: int) -> None:
    """Check that every process gets as many rows of a step. UserError naming the key where it does not divide."""
    found = getattr(config, key)
    if found % world:
        raise UserError(f"{key}: found {found}, expected a multiple of the {world} processes")


class Updater:
    """One optimizer over one model on all processes: whole on each (DDP), or sharded where FSDP2 or DeepSpeed ZeRO-3
    was asked for. `model` is the prepared module: call it, never the bare one, in a loss.

    learning_rates: peak of parameters whose names begin so, e.g. {"value_head": 1e-4}; `learning_rate` for the rest.
    Whether dropout is on is the caller's choice: RL leaves the model in eval mode, since the engine has none either.
    """

    def __init__(
        self, model: nn.Module, accelerator, config: OptimConfig, total_steps: int, learning_rate=None,
        learning_rates: dict[str, float] | None = None,
    ):  # fmt: skip
        self.accelerator, self.config, self.total_steps, self.updates = accelerator, config, total_steps, 0
        self.peak = config.learning_rate if learning_rate is None else learning_rate
        how = processes.asked()
        self.sharded, self.by_deepspeed = how != "ddp", how == "zero3"
        self.padding = False  # whether `loss_of` runs only to keep step with processes that have more micro-batches
        if how == "fsdp2":
            sharding.shard(model, accelerator)
        if self.by_deepspeed and config.optim != "adamw":
            raise UserError(
                f"optim: {config.optim} needs whole matrices, ZeRO-3 flattens them: take fsdp2.yaml or ddp.yaml"
            )
        optimizer = make_optimizer(model, config, self.peak, learning_rates)
        groups = optimizer.param_groups
        self.peaks = [group["lr"] for group in groups]
        self.parameters = [list(group["params"]) for group in groups]
        # Accelerate prepares neither two models under FSDP2 nor any on CPUs; what it would add, `shard` has done.
        if self.by_deepspeed:
            self.model = sharding.shard_by_deepspeed(model, groups, optimizer, accelerator, config.max_grad_norm)
            self.optimizer = self.model.optimizer
        else:
            self.model, self.optimizer = (model, optimizer) if self.sharded else accelerator.prepare(model, optimizer)

    def step(
        self, micro_batches: Sequence, loss_of: Callable, name_rows: Callable[[], str], refuses: Callable | None = None
    ) -> dict[str, float]:
        """One optimizer step. `loss_of(micro_batch)` returns that micro-batch's share of the step's loss.

        The shares of all micro-batches of all processes add up to the loss, so the gradient does not depend on how
        rows fall into micro-batches or processes. The processes of a sharded model make equally many forwards: those
        with fewer micro-batches run their last one again at weight 0, and `padding` is True meanwhile.
        Where `refuses(loss, gradient norm)` is true, which it must be on all processes alike, the step counts but
        changes no weight, and `skipped` is 1. Raises UserError (no update made) on a non-finite number.
        """
        factor = schedule(
            self.config.lr_scheduler_type, self.updates, self.total_steps, self.config.warmup_steps,
            decay_share=self.config.lr_decay_share, min_ratio=self.config.min_lr_ratio,
        )  # fmt: skip
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        world, losses, count = self.accelerator.num_processes, [], len(micro_batches)
        forwards = self._most(count)
        for index in range(forwards):
            self.padding = index >= count
            with self._syncing(index == forwards - 1):
                loss = loss_of(micro_batches[min(index, count - 1)])
                if self.padding:
                    loss = loss * 0
                backward = self.model.backward if self.by_deepspeed else self.accelerator.backward
                backward(loss * world)  # gradients are averaged; shares are to be summed
            losses.append(loss.detach())
        self.padding = False
        total = self.accelerator.reduce(torch.stack(losses).sum(), "sum")
        norm = self._clip()
        if not (math.isfinite(total.item()) and math.isfinite(norm.item())):
            self.optimizer.zero_grad()
            raise UserError(
                f"update {self.updates + 1}: loss {total.item()}, gradient norm {norm.item()}; stopped before it. "
                f"Rows: {name_rows()}. Lower learning_rate or look at these rows"
            )
        numbers = {"loss": total.item(), "grad_norm": norm.item(), "learning_rate": self.peak * factor}
        if refuses is not None:
            numbers["skipped"] = float(refuses(numbers["loss"], numbers["grad_norm"]))
        if not numbers.get("skipped"):
            (self.model if self.by_deepspeed else self.optimizer).step()
        self.optimizer.zero_grad()
        self.updates += 1
        return numbers

    def _most(self, count: int) -> int:
        """Forwards of this step: of a sharded model as many as the process with most micro-batches makes."""
        if not self.sharded:
            return count
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max())

    @contextmanager
    def _syncing(self, last: bool):
        """Gradients travel between processes once a step, with its last micro-batch."""
        if self.by_deepspeed:  # where they travel with each micro-batch
            self.model.set_gradient_accumulation_boundary(last)
            yield
        elif self.sharded:
            self.model.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def _clip(self) -> torch.Tensor:
        """Clip the gradient; returns the norm of all of it, wherever its parts are, before."""
        if self.by_deepspeed:
            return zero.gradient_norm(self.model)  # its step clips
        if not self.sharded:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            return torch.as_tensor(norm)
        return sharding.full(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))

    def state(self) -> dict:
        """What a resumed run needs beside the weights. The main process has it; where sharded, all have to ask."""
        if self.by_deepspeed:
            optimizer = zero.optimizer_state(self.model, self.parameters)
        else:
            optimizer = sharding.optimizer_state(self.optimizer)
        return {"optimizer": optimizer, "updates": self.updates}

    def load_state(self, state: dict) -> None:
        """Take over what `state` gave, however many processes there were, sharded or not; each has all of it."""
        if self.by_deepspeed:
            zero.load_optimizer_state(self.model, self.parameters, state["optimizer"])
        else:
            sharding.load_optimizer_state(self.optimizer, state["optimizer"])
        self.updates = state["updates"]


def rng_state() -> dict:
    import random

    import numpy

    name, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.copy()), *rest),
    }


def set_rng_state(state: dict) -> None:
    import random

    import numpy

    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy(), *rest))


def write_state(folder, **parts) -> None:
    """Training state of a checkpoint, as one file that loads without unpickling code."""
    with open(folder / "training_state.pt", "wb") as file:  # given a path, torch hides a full disk's errno
        torch.save({**parts, "rng": rng_state()}, file)


def read_state(folder) -> dict:
    """The parts written by `write_state`; also restores the random generators. UserError where it is missing."""
    file = folder / "training_state.pt"
    if not file.is_file():
        raise UserError(f"{file} is missing: without it training would restart its optimizer; remove {folder}")
    state = torch.load(file, map_location="cpu", weights_only=True)
    set_rng_state(state.pop("rng"))
    return state
