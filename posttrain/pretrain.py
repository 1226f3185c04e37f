"""Pretraining: tokens to a base model that continues text.

In: token shards, a model with random weights or any checkpoint. Out: the model trained on chunks of fixed length,
drawn in a seeded order from the one row of tokens that all texts make, an end-of-text token before each. Launched by
`accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml`.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from posttrain import liger, memory, processes, sharding
from posttrain.args import arg, at_least, one_of
from posttrain.errors import UserError
from posttrain.layouts import common_layout, head_size
from posttrain.models import require_positions
from posttrain.order import taken_indices
from posttrain.progress import Progress
from posttrain.shards import TokenShards
from posttrain.spikes import SpikeGuard
from posttrain.throughput import mfu, model_flops, non_embedding_parameters, peak_flops, peak_memory_gb
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state

AUTO = ("auto", "true", "false")


@dataclass
class PretrainConfig:
    """Pretraining: tokens and batches"""

    tokenizer_path: str | None = arg(None, help="folder of the tokenizer's stage, or any tokenizer")
    model_name_or_path: str | None = arg(None, help="go on from this checkpoint and its tokenizer; none = new weights")
    max_steps: int | None = arg(None, help="optimizer steps; none = 400, or what depth gives")
    sequence_length: int = arg(256, help="tokens of a chunk")
    batch_size: int | None = arg(None, help="chunks of a step, over all processes; none = 16, or what depth gives")
    micro_batch_size: int = arg(16, help="chunks of one forward and backward; memory, not mathematics")
    cross_document_attention: bool = arg(True, help="whether tokens see earlier documents of their chunk")
    attn_implementation: str = arg("sdpa", help="attention of transformers: sdpa, eager, flash_attention_2, ...")
    compile: bool = arg(False, help="torch.compile the forward and backward: slower to start, then faster")
    gradient_checkpointing: bool | str = arg("auto", help="recompute activations: auto where memory asks; true, false")
    use_liger_kernel: bool | str = arg("auto", help="Liger's fused kernels: auto, where there is a GPU; true; false")
    liger_kernel_config: dict = arg({}, help="which of them, as transformers names them, e.g. {rms_norm: false}")
    shards_dir: str | None = arg(None, help="where tokens stay for other runs; none = in output_dir, while it trains")
    shard_workers: int | None = arg(None, help="processes that tokenize; none = one a core")
    skip_spikes: float = arg(0.0, help="skip steps so many standard deviations above the last 128, e.g. 6; 0 = none")
    eval_steps: int = arg(0, help="bits per byte of held-out text and samples every so many steps; 0 = at the end")
    sample_prompts: list[str] = arg([], help="texts that samples continue; none = how two held-out texts begin")
    sample_tokens: int = arg(48, help="tokens of a sample")

    def __post_init__(self):
        at_least(self, max_steps=1, sequence_length=2, batch_size=1, micro_batch_size=1, shard_workers=1)
        at_least(self, skip_spikes=0, eval_steps=0, sample_tokens=1)
        self.gradient_checkpointing = str(self.gradient_checkpointing).lower()
        self.use_liger_kernel = str(self.use_liger_kernel).lower()
        one_of(self, gradient_checkpointing=AUTO, use_liger_kernel=AUTO)
        if self.tokenizer_path is None and self.model_name_or_path is None:
            raise UserError("tokenizer_path: required and not given, nor a model_name_or_path to take it from")
        if self.tokenizer_path is not None and self.model_name_or_path is not None:
            raise UserError("tokenizer_path: with model_name_or_path it must not be set: the model has its tokenizer")

    @property
    def parents(self) -> dict[str, str]:
        """What the stage starts from, by role."""
        if self.model_name_or_path is not None:
            return {"model": self.model_name_or_path}
        return {"tokenizer": self.tokenizer_path}


@dataclass
class PretrainOptim(OptimConfig):
    """Optimizer: AdamW or Muon, warm-up, schedule, clipping"""

    learning_rate: float | None = arg(None, help="peak learning rate; none = 1e-3, or what depth gives")
    optim: str = arg("adamw", help="adamw; or muon for the layers' matrices, with AdamW for the rest")
    lr_decay_share: float = arg(0.3, help="wsd: share of the steps in which the rate falls")
    min_lr_ratio: float = arg(0.0, help="share of the peak that the rate ends at")

    def __post_init__(self):
        super().__post_init__()
        from posttrain.optimizers import OPTIMIZERS

        one_of(self, optim=OPTIMIZERS)
        for key in ("lr_decay_share", "min_lr_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected a share, 0 to 1")


class ChunkLoss(nn.Module):
    """Summed next-token cross-entropy of chunks (B, S), in nats; a module so that DDP can wrap it.

    end: the end-of-text token that begins each document, where documents are not to see each other; else None.
    """

    def __init__(self, model, end: int | None = None, by_liger: bool = False):
        super().__init__()
        self.model, self.end, self.by_liger = model, end, by_liger

    def forward(self, chunks: Tensor) -> Tensor:
        inputs = {"input_ids": chunks, "use_cache": False}
        if self.end is not None:
            inputs["position_ids"] = document_positions(chunks, self.end)
        if self.by_liger:
            hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1]
            return liger.head_loss(self.model, hidden.flatten(0, 1), chunks[:, 1:].flatten())
        # The last token of a chunk has nothing to predict. Leaving its logits out would copy all the others.
        targets = nn.functional.pad(chunks[:, 1:], (0, 1), value=-100)
        logits = self.model(**inputs).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def document_positions(chunks: Tensor, end: int) -> Tensor:
    """(B, S) places of tokens in their documents: from 0 at each `end` token. transformers keeps tokens of different
    documents apart where positions begin again; the first document of a chunk may lack its beginning."""
    places = torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
    return places - torch.where(chunks == end, places, 0).cummax(1).values


def make_loss(stage, model, end: int, config: PretrainConfig, bf16: bool, optim: str = "adamw") -> ChunkLoss:
    """The module that is trained, as the config wants it: kernels, isolation of documents, activations kept or not,
    compiled. UserError where the model cannot keep documents apart, or Liger is asked for and cannot run."""
    require_positions(model, "sequence_length", config.sequence_length)
    by_liger = liger.takes_liger(config.use_liger_kernel, stage)
    if recomputes(stage, model, config, bf16, optim, by_liger):  # before Liger, which memory's trace cannot run
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not config.cross_document_attention:
        common_layout([model], config.sequence_length, ("packed",))  # proves it on the model itself
    if by_liger:
        liger.patch(model, config.liger_kernel_config)
    loss = ChunkLoss(model, None if config.cross_document_attention else end, by_liger)
    if config.compile:
        loss.compile()
    return loss


def recomputes(stage, model, config: PretrainConfig, bf16: bool, optim: str, by_liger: bool) -> bool:
    """Whether activations are computed again in the backward: as asked, or where memory would not hold them."""
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing == "true"
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    room = memory.device_memory(model.device) + own  # the weights, which are needed, are there already
    enough, need = memory.fits(
        model.config, min(config.micro_batch_size, config.batch_size), config.sequence_length, device_bytes=room,
        bf16=bf16, optim=optim, world=int(os.environ.get("WORLD_SIZE", "1")), spread=processes.asked(),
        fused_loss=by_liger,
    )  # fmt: skip
    if not enough:
        needed = need.peak / 2**30
        stage.note(f"gradient checkpointing: {needed:.1f} GiB are needed without it, {room / 2**30:.1f} are free")
    # All processes alike: shards are fetched again in the backward, by all or by none.
    return bool(reduce(torch.tensor(float(not enough), device=model.device)) > 0)


class Meter:
    """Tokens a second, MFU and the share of time that data takes, since the last reading."""

    def __init__(self, model, device, bf16: bool, length: int, world: int):
        config = model.config.get_text_config()
        width = head_size(config) * config.num_attention_heads
        self.flops_a_token = model_flops(
            non_embedding_parameters(model), config.num_hidden_layers, width, 1, length, "training"
        )
        self.peak = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
        self.world = world
        self._begin()

    def _begin(self) -> None:
        self.began, self.tokens, self.data_seconds = time.perf_counter(), 0, 0.0

    def numbers(self) -> dict[str, float]:
        seconds, tokens, data = time.perf_counter() - self.began, self.tokens, self.data_seconds
        self._begin()
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": mfu(self.flops_a_token * tokens, seconds, self.peak, self.world),
            "share/data": data / seconds,
            "memory_gb": peak_memory_gb(),
        }


class Chunks:
    """The chunks of each step: which, by the seed and the step alone, and their tokens, for one process of `world`."""

    def __init__(self, tokens: TokenShards, length: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.rank, self.world, self.count = rank, world, tokens.num_chunks(length)

    def indices(self, step: int) -> list[int]:
        """Places, in the row of chunks, of those that this process takes in 0-based `step`."""
        return taken_indices(step * self.batch, self.batch, self.count, self.seed)[self.rank :: self.world]

    def read(self, step: int) -> tuple[list[int], Tensor]:
        """(`indices` of 0-based `step`, their tokens (len(indices), S) on the CPU)."""
        indices = self.indices(step)
        return indices, torch.stack([torch.from_numpy(self.tokens.chunk(index, self.length)) for index in indices])

    def position(self, step: int) -> dict[str, int]:
        """Where the data stands after `step` steps: chunks taken, whole passes, the place in the seeded order."""
        taken = step * self.batch
        epoch, place = divmod(taken, self.count)
        return {"tokens": taken * self.length, "chunks": taken, "epoch": epoch, "place": place}


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """On a GPU the copy goes on while Python does."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def pretrain(
    stage, accelerator, model, tokens: TokenShards, config: PretrainConfig, optim: OptimConfig, watch=None
) -> dict[str, int]:
    """Train `model` in place; returns the position in the data. Resumes from the stage's checkpoint bit for bit.

    `watch(step)` is called every `eval_steps` steps, on the main process, with the model whole and in eval mode.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    require_multiple(config, "batch_size", world)
    chunks = Chunks(tokens, config.sequence_length, config.batch_size, stage.config["seed"], rank, world)
    loss = make_loss(stage, model, tokens.eos_token_id, config, optim.bf16, optim.optim)
    meter = Meter(model, accelerator.device, optim.bf16, config.sequence_length, world)
    model.train()
    updater, guard, step = Updater(loss, accelerator, optim, config.max_steps), SpikeGuard(config.skip_spikes), 0
    if stage.resume_folder is not None:
        step = _resume(stage.resume_folder, model, updater, guard)
    predicted = config.batch_size * (config.sequence_length - 1)
    progress = Progress(stage.name, config.max_steps, initial=step)
    with stage.running(), ThreadPoolExecutor(1) as reader:  # a cold disk takes a fifth of a GPU's step
        ahead = reader.submit(chunks.read, step)
        while step < config.max_steps and not stage.stopping:
            began = time.perf_counter()
            indices, rows = ahead.result()
            ahead = reader.submit(chunks.read, step + 1)
            batches = to_device(rows, accelerator.device).split(config.micro_batch_size)
            meter.data_seconds += time.perf_counter() - began

            def share(batch):
                return updater.model(batch) / predicted

            def names(indices=indices) -> str:
                return "chunks " + ", ".join(map(str, indices[:8]))

            numbers = updater.step(batches, share, names, guard.refuses if config.skip_spikes else None)
            if numbers.get("skipped"):
                stage.note(f"step {step + 1} skipped: loss {numbers['loss']:.4g}, gradient norm "
                           f"{numbers['grad_norm']:.4g}; {names()}")  # fmt: skip
            step += 1
            meter.tokens += config.batch_size * config.sequence_length
            progress.update(loss=numbers["loss"])
            if step % stage.config["logging_steps"] == 0 or step == config.max_steps or numbers.get("skipped"):
                stage.log(step, **numbers, tokens=chunks.position(step)["tokens"], **meter.numbers())
            if config.eval_steps and step % config.eval_steps == 0 and watch is not None:
                _look(updater, model, watch, stage, step)
            if stage.due(step, config.max_steps):
                _save(stage, step, model, updater, guard, chunks.position(step))
    progress.close()
    sharding.unshard(updater.model)
    return chunks.position(step)


def _look(updater: Updater, model, watch, stage, step: int) -> None:
    model.eval()
    with sharding.gathered(updater.model):
        if stage.main:
            watch(step)
    model.train()


def _resume(folder, model, updater: Updater, guard: SpikeGuard) -> int:
    """Set everything to a checkpoint; returns its step."""
    from safetensors.torch import load_file

    sharding.load_full_state(model, load_file(folder / "model.safetensors"))
    state = read_state(folder)
    updater.load_state(state["updater"])
    guard.load_state(state["guard"])
    return state["step"]


def _save(stage, step: int, model, updater: Updater, guard: SpikeGuard, position: dict[str, int]) -> None:
    weights, parts = sharding.full_state(model), {"updater": updater.state(), "guard": guard.state(), "step": step}

    def write(folder) -> None:
        model.save_pretrained(folder, state_dict=weights)
        write_state(folder, **parts)

    stage.save(step, write, position=position)
