"""Pretraining: texts to a base model that continues text.

In: rows with `text`, a tokenizer, a model. Out: the model trained on fixed-length chunks of all texts, one end-of-text
token before each text. Launched by `accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml`.
"""

from dataclasses import dataclass

import torch
from torch import nn

from posttrain.args import arg, at_least
from posttrain.errors import UserError
from posttrain.models import require_positions
from posttrain.order import shuffled_indices
from posttrain.progress import Progress
from posttrain.sharding import full_state, load_full_state, unshard
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state


@dataclass
class PretrainConfig:
    """Pretraining: tokens and batches"""

    tokenizer_path: str = arg(help="folder of the tokenizer's stage, or any tokenizer")
    max_steps: int = arg(400, help="optimizer steps")
    sequence_length: int = arg(256, help="tokens of a chunk")
    batch_size: int = arg(16, help="chunks of a step, over all processes")
    micro_batch_size: int = arg(16, help="chunks of one forward and backward; memory, not mathematics")

    def __post_init__(self):
        at_least(self, max_steps=1, sequence_length=2, batch_size=1, micro_batch_size=1)


class ChunkLoss(nn.Module):
    """Summed next-token cross-entropy of chunks (B, S), in nats; a module so that DDP can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=chunks, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), chunks[:, 1:].flatten(), reduction="sum")


def make_chunks(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """All texts as one stream, each after an end-of-text token, cut into (N, length); the rest is left out."""
    stream = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.eos_token_id, *ids]
    count = len(stream) // length
    if count == 0:
        raise UserError(f"the texts have {len(stream)} tokens, fewer than one chunk: lower sequence_length ({length})")
    return torch.tensor(stream[: count * length]).view(count, length)


def pretrain(stage, accelerator, model, chunks: torch.Tensor, config: PretrainConfig, optim: OptimConfig) -> int:
    """Train `model` in place; returns the number of tokens seen. Resumes from the stage's checkpoint bit for bit."""
    require_positions(model, "sequence_length", config.sequence_length)
    model.train()
    updater = Updater(ChunkLoss(model), accelerator, optim, config.max_steps)
    step, rank, world = 0, accelerator.process_index, accelerator.num_processes
    require_multiple(config, "batch_size", world)
    if stage.resume_folder is not None:
        from safetensors.torch import load_file

        load_full_state(model, load_file(stage.resume_folder / "model.safetensors"))
        state = read_state(stage.resume_folder)
        updater.load_state(state["updater"])
        step = state["step"]
    tokens_a_step = config.batch_size * config.sequence_length
    predicted = config.batch_size * (config.sequence_length - 1)
    progress = Progress(stage.name, config.max_steps, initial=step)
    with stage.running():
        while step < config.max_steps and not stage.stopping:
            indices = shuffled_indices(step, config.batch_size, len(chunks), stage.config["seed"])[rank::world]
            batches = chunks[indices].to(accelerator.device).split(config.micro_batch_size)

            def share(batch):
                return updater.model(batch) / predicted

            def rows(indices=indices) -> str:
                return "chunks " + ", ".join(map(str, indices[:8]))

            numbers = updater.step(batches, share, rows)
            step += 1
            progress.update(loss=numbers["loss"])
            if step % stage.config["logging_steps"] == 0 or step == config.max_steps:
                stage.log(step, **numbers, tokens=step * tokens_a_step)
            if stage.due(step, config.max_steps):
                weights, parts = full_state(model), {"updater": updater.state(), "step": step}
                stage.save(step, lambda folder, kept=(weights, parts): _write(folder, model, *kept))
    progress.close()
    unshard(updater.model)
    return step * tokens_a_step


def _write(folder, model, weights: dict, parts: dict) -> None:
    model.save_pretrained(folder, state_dict=weights)
    write_state(folder, **parts)
