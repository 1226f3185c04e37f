"""Supervised fine-tuning on conversations, on TRL's `SFTTrainer`: assistant tokens alone are learned, rows are packed.

In: rows with `messages`, a tokenizer with a template, a base or chat model. Out: the model trained in place.
Launched by `accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml`.

Rows are encoded by `chat.encode_chat` and packed by `packing.best_fit` rather than by TRL, whose packing flattens a
batch to one row unless FlashAttention is there: on a CPU its attention then grows with the square of the batch.
"""

import os
import shutil
from dataclasses import dataclass
from functools import partial

import torch

from posttrain.args import arg, at_least
from posttrain.doctor import read_log
from posttrain.errors import UserError
from posttrain.liger import takes_liger
from posttrain.processes import refuse_shards
from posttrain.progress import Progress
from posttrain.sft_rows import collate, pack_rows, single_rows
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
    max_length: int = arg(256, help="tokens of a packed row, and of a conversation")
    too_long: str = arg("cut", help="longer conversations: cut at their end, or leave_out")
    max_truncated: float = arg(0.05, help="refuse to train where a larger share of conversations is too long")
    max_steps: int = arg(400, help="optimizer steps")
    per_device_train_batch_size: int = arg(16, help="packed rows of one forward and backward on each process")
    gradient_accumulation_steps: int = arg(1, help="forwards and backwards of one optimizer step")
    gradient_checkpointing: bool = arg(False, help="recompute activations in the backward: less memory, more time")
    stream_buffer: int = arg(1000, help="streaming: conversations shuffled and packed together")
    packing: bool = arg(True, help="several conversations a row, isolated; false: one a row, padded")
    neftune_noise_alpha: float | None = arg(
        None, help="NEFTune (2310.05914): noise of alpha / sqrt(tokens of a row x width) on the embeddings, e.g. 5"
    )
    use_liger_kernel: str = arg("auto", help="Liger's fused kernels: auto, where there is a GPU; true; false")
    liger_kernel_config: dict = arg({}, help="which of them, as transformers names them, e.g. {rms_norm: false}")

    def __post_init__(self):
        refuse_shards("sft", "TRL's Trainer saves whole models only")
        self.use_liger_kernel = str(self.use_liger_kernel).lower()
        if self.use_liger_kernel not in ("auto", "true", "false"):
            raise UserError(f"use_liger_kernel: found {self.use_liger_kernel!r}, expected auto, true or false")
        if self.too_long not in ("cut", "leave_out"):
            raise UserError(f"too_long: found {self.too_long!r}, expected cut or leave_out")
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha <= 0:
            raise UserError(f"neftune_noise_alpha: found {self.neftune_noise_alpha}, expected null or more than 0")
        at_least(self, max_length=2, max_steps=1, stream_buffer=1)
        at_least(self, per_device_train_batch_size=1, gradient_accumulation_steps=1)


def trainer_arguments(stage, config: SFTConfig, optim: OptimConfig):
    """Our keys as TRL names them. It neither saves nor reports by itself: the stage does."""
    import trl

    kind, options = TRAINER_SCHEDULES[optim.lr_scheduler_type]
    if "num_decay_steps" in options:
        options = {**options, "num_decay_steps": round(options["num_decay_steps"] * config.max_steps)}
    return trl.SFTConfig(
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
        include_num_input_tokens_seen="all",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        neftune_noise_alpha=config.neftune_noise_alpha,
        use_liger_kernel=takes_liger(config.use_liger_kernel, stage),
        liger_kernel_config=config.liger_kernel_config or None,
    )


def make_trainer(stage, model, tokenizer, encoded, config: SFTConfig, optim: OptimConfig, eval_steps=0, evaluate=None):
    """TRL's trainer over a list or a stream of our rows, with the stage's checkpoints, log and stop.

    `evaluate(step)` gives numbers for the log every `eval_steps` steps, on the main process.
    """
    import datasets
    import trl

    class Trainer(trl.SFTTrainer):
        """Takes the row numbers out of the batch, so that a stop can name them."""

        def compute_loss(self, model, inputs, **kwargs):
            watch.rows.append(inputs.pop("rows"))
            return super().compute_loss(model, inputs, **kwargs)

    watch = make_watch(stage, config, eval_steps, evaluate)
    pad_id = tokenizer.pad_token_id or 0
    if isinstance(encoded, list):
        rows = pack_rows(encoded, config.max_length, pad_id) if config.packing else single_rows(encoded)
        dataset = datasets.Dataset.from_list(rows)
    else:
        dataset = encoded.dataset()
    trainer = Trainer(
        model=model, args=trainer_arguments(stage, config, optim), train_dataset=dataset, processing_class=tokenizer,
        data_collator=partial(collate, pad_id=pad_id), callbacks=[watch],
    )  # fmt: skip
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def make_watch(stage, config: SFTConfig, eval_steps: int = 0, evaluate=None):
    """The callback that ties Hugging Face's loop to the stage: log, progress, atomic checkpoints, stops."""
    from transformers import TrainerCallback

    def _is_due(step: int) -> bool:
        return eval_steps > 0 and step > 0 and step % eval_steps == 0

    class Watch(TrainerCallback):
        rows: list[torch.Tensor] = []  # of the micro-batches since the last update
        progress: Progress | None = None

        def on_train_begin(self, args, state, control, **_):
            self.progress = Progress(stage.name, config.max_steps, initial=state.global_step)
            if stage.main and _is_due(state.global_step) and not measured(stage, state.global_step):
                self._measure(state.global_step)  # a signal came first, and a stop does not wait for it

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
            if stage.main and _is_due(state.global_step) and not stage.stopping:
                self._measure(state.global_step)
            control.should_training_stop |= stage.stopping
            control.should_save |= stage.due(state.global_step, config.max_steps)

        def _measure(self, step: int) -> None:
            numbers = evaluate(step)
            stage.log(step, **numbers)
            self.progress.update(0, **numbers)

        def on_log(self, args, state, control, logs=None, **_):
            numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float))}
            if "loss" in numbers:
                # TRL's num_tokens counts one row of a batch and starts again at 0 in a resumed run; this one does not.
                kept = {k: v for k, v in numbers.items() if k != "epoch" and not k.startswith(("num_", "train_"))}
                stage.log(state.global_step, **kept, tokens=state.num_input_tokens_seen)
                self.progress.update(0, loss=numbers["loss"])

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                written = f"{args.output_dir}/checkpoint-{state.global_step}"
                stage.save(state.global_step, lambda folder: _move(written, folder))

    return Watch()


def measured(stage, step: int) -> bool:
    """Whether the log has what `evaluate` found after this step: a line without a loss."""
    return any(row["step"] == step and "loss" not in row for row in read_log(stage.output_dir / "log.jsonl"))


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
    return trainer.state.num_input_tokens_seen
