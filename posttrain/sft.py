"""Supervised fine-tuning on conversations, on TRL's `SFTTrainer`: assistant tokens alone are learned, rows are packed.

In: rows with `messages`, a tokenizer with a template, a base or chat model. Out: the model trained in place.
Launched by `accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml`.

Rows are encoded by `chat.encode_chat` and packed by `packing.best_fit` rather than by TRL, whose packing flattens a
batch to one row unless FlashAttention is there: on a CPU its attention then grows with the square of the batch.
"""

import os
import shutil
from dataclasses import dataclass

import torch

from posttrain.args import arg, at_least
from posttrain.errors import UserError
from posttrain.progress import Progress
from posttrain.sft_rows import collate, pack_rows
from posttrain.training import OptimConfig

TRAINER_SCHEDULES = {
    "constant": ("constant_with_warmup", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 0.3, "min_lr_ratio": 0.0}),
}


@dataclass
class SFTConfig:
    """SFT: template, batches"""

    chat_template_path: str | None = arg(None, help="template to train with; none = the tokenizer's own")
    max_length: int = arg(256, help="tokens of a packed row; longer conversations are cut at their end")
    max_truncated: float = arg(0.05, help="refuse to train where a larger share of conversations would be cut")
    max_steps: int = arg(400, help="optimizer steps")
    per_device_train_batch_size: int = arg(16, help="packed rows of one forward and backward on each process")
    gradient_accumulation_steps: int = arg(1, help="forwards and backwards of one optimizer step")
    gradient_checkpointing: bool = arg(False, help="recompute activations in the backward: less memory, more time")

    def __post_init__(self):
        at_least(self, max_length=2, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1)


def make_trainer(stage, model, tokenizer, encoded: list[dict], config: SFTConfig, optim: OptimConfig):
    """TRL's trainer over our packed rows, with the stage's checkpoints, log and stop."""
    import datasets
    import trl

    kind, options = TRAINER_SCHEDULES[optim.lr_scheduler_type]
    if "num_decay_steps" in options:
        options = {**options, "num_decay_steps": round(options["num_decay_steps"] * config.max_steps)}
    arguments = trl.SFTConfig(
        output_dir=str(stage.output_dir / "checkpoints" / ".trainer"),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        adam_beta2=optim.adam_beta2,
        max_grad_norm=optim.max_grad_norm,
        bf16=optim.bf16,
        seed=stage.config["seed"],
        data_seed=stage.config["seed"],
        logging_steps=stage.config["logging_steps"],
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",  # the callback says when, as in every stage
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
    )

    class Trainer(trl.SFTTrainer):
        """Takes the row numbers out of the batch, so that a stop can name them."""

        def compute_loss(self, model, inputs, **kwargs):
            watch.rows.append(inputs.pop("rows"))
            return super().compute_loss(model, inputs, **kwargs)

    watch = make_watch(stage, config)
    packed = datasets.Dataset.from_list(pack_rows(encoded, config.max_length, tokenizer.pad_token_id or 0))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=packed, data_collator=collate, processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def make_watch(stage, config: SFTConfig):
    """The callback that ties Hugging Face's loop to the stage: log, progress, atomic checkpoints, stops."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        rows: list[torch.Tensor] = []  # of the micro-batches since the last update
        progress: Progress | None = None

        def on_train_begin(self, args, state, control, **_):
            self.progress = Progress(stage.name, config.max_steps, initial=state.global_step)

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            if not torch.stack(norms).sum().isfinite():
                found = sorted({row for rows in self.rows for row in rows.flatten().tolist()} - {-1})
                raise UserError(
                    f"update {state.global_step + 1}: the gradient is not finite; stopped before the update. "
                    f"Rows: {', '.join(map(str, found[:8]))}. Lower learning_rate or look at these rows"
                )
            self.rows.clear()

        def on_step_end(self, args, state, control, **_):
            self.progress.update()
            control.should_training_stop |= stage.stopping
            control.should_save |= stage.due(state.global_step, config.max_steps)

        def on_log(self, args, state, control, logs=None, **_):
            numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float))}
            if "loss" in numbers:
                # TRL's own num_tokens counts one row of a batch and starts again at 0 in a resumed run.
                kept = {k: v for k, v in numbers.items() if k not in ("epoch", "num_tokens")}
                stage.log(state.global_step, **kept, tokens=state.global_step * tokens_a_step(args, config.max_length))
                self.progress.update(0, loss=numbers["loss"])

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                written = f"{args.output_dir}/checkpoint-{state.global_step}"
                stage.save(state.global_step, lambda folder: _move(written, folder))

    return Watch()


def _move(source: str, folder) -> None:
    """The Trainer writes in place; its files reach a checkpoint only here, where they are flushed and hashed."""
    for name in os.listdir(source):
        os.replace(os.path.join(source, name), folder / name)
    shutil.rmtree(source)


def train(trainer, stage) -> int:
    """Train (or go on from the stage's checkpoint); returns the tokens of all forwards."""
    resume = str(stage.resume_folder) if stage.resume_folder is not None else None
    try:
        with stage.running():
            trainer.train(resume_from_checkpoint=resume)
    finally:
        if stage.main:  # a full disk leaves half of what the Trainer writes in place
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return trainer.state.global_step * tokens_a_step(trainer.args, len(trainer.train_dataset[0]["input_ids"]))


def tokens_a_step(arguments, width: int) -> int:
    """Tokens of one optimizer step over all processes, padding included; packed rows have `width` tokens."""
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return rows * width
