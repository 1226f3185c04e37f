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
from posttrain.chat import encode_chat, end_of_turn_id
from posttrain.errors import UserError
from posttrain.packing import best_fit
from posttrain.progress import Progress
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


def encode_rows(tokenizer, rows: list[dict], max_length: int, max_truncated: float) -> list[dict]:
    """[{"input_ids", "labels", "row"}]; labels are -100 where the assistant did not write. Checks what would fail
    in silence: UserError where nothing is supervised, an end of turn is not, or too many rows are cut."""
    end, encoded, cut = end_of_turn_id(tokenizer), [], 0
    for index, row in enumerate(rows):
        try:
            chat = encode_chat(tokenizer, row["messages"])
        except UserError as error:
            raise UserError(f"row {index}: {error}") from error
        supervised = [i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m]
        replies = sum(m["role"] == "assistant" for m in row["messages"])
        if supervised.count(end) < replies or not replies:
            raise UserError(
                f"row {index}: {replies} assistant turns, but {supervised.count(end)} supervised end tokens "
                f"{tokenizer.convert_ids_to_tokens(end)!r}: the template must put each turn's content and end token "
                "inside {% generation %}, and every row needs an assistant turn"
            )
        labels = [i if m else -100 for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True)]
        cut += len(labels) > max_length
        ids, labels = chat.input_ids[:max_length], labels[:max_length]
        labels[0] = -100  # in a packed row the token before it belongs to another conversation
        if any(label != -100 for label in labels):
            encoded.append({"input_ids": ids, "labels": labels, "row": index})
    if cut > max_truncated * len(rows):
        raise UserError(
            f"{cut} of {len(rows)} conversations are longer than max_length {max_length} and would lose their end; "
            f"raise max_length, shorten the rows, or allow it with max_truncated (now {max_truncated})"
        )
    if not encoded:
        raise UserError(f"no reply begins within max_length {max_length} tokens of its conversation: raise max_length")
    return encoded


def pack_rows(encoded: list[dict], width: int, pad_id: int) -> list[dict]:
    """Rows of exactly `width` tokens: {"input_ids", "position_ids", "labels", "rows"}; see posttrain/packing.py."""
    packed = []
    for members in best_fit([len(e["input_ids"]) for e in encoded], width):
        row = {"input_ids": [], "position_ids": [], "labels": [], "rows": [encoded[i]["row"] for i in members]}
        for member in members:
            row["input_ids"] += encoded[member]["input_ids"]
            row["labels"] += encoded[member]["labels"]
            row["position_ids"] += range(len(encoded[member]["input_ids"]))
        rest = width - len(row["input_ids"])
        row["input_ids"] += [pad_id] * rest
        row["labels"] += [-100] * rest
        row["position_ids"] += range(rest)
        packed.append(row)
    return packed


def collate(rows: list[dict]) -> dict:
    """Tensors (B, width), and `rows` (B, most conversations in a row; -1 where fewer) to name them in an error."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids", "labels")}
    most = max(len(row["rows"]) for row in rows)
    batch["rows"] = torch.tensor([row["rows"] + [-1] * (most - len(row["rows"])) for row in rows])
    return batch


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
