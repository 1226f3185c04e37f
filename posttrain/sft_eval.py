"""What SFT is measured by: replies before and after, the loss on held-out conversations, samples while it trains.

In: the model in training, its engine, held-out prompts and conversations. Out: metrics and gains with 95 % intervals,
`held_out_loss` in log.jsonl and replies in samples.jsonl every `eval_steps` steps.
"""

from dataclasses import dataclass, replace

import torch

from posttrain import evals
from posttrain.args import arg, at_least
from posttrain.chat import stop_ids
from posttrain.data import DataConfig, load_rows, origin
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.intervals import gain, measured_ratio
from posttrain.packing import by_tokens, pack
from posttrain.rl.logprobs import TokenLogps
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.sft_rows import encode_rows


@dataclass
class WatchConfig:
    """Held-out conversations: the loss on rows that are not learned from, and replies while training"""

    eval_steps: int = arg(0, help="measure and sample every so many steps; 0 only before and after")
    loss_dataset_name: str | None = arg(None, help="conversations for the held-out loss; none = dataset_name")
    loss_dataset_split: str | None = arg(
        None, help="their split or slice, such as validation or train[-200:]; none = no held-out loss"
    )
    loss_max_rows: int | None = arg(200, help="use so many of them")

    def __post_init__(self):
        at_least(self, eval_steps=0, loss_max_rows=1)
        if self.loss_dataset_name is not None and self.loss_dataset_split is None:
            raise UserError("loss_dataset_name: needs loss_dataset_split, too; for example --loss_dataset_split test")

    def source(self, data: DataConfig) -> DataConfig:
        name = self.loss_dataset_name or data.dataset_name
        return replace(data, dataset_name=name, max_rows=self.loss_max_rows)


def load_all(data: DataConfig, held_out: evals.EvalConfig, config: WatchConfig, seed: int):
    """(conversations to learn from, held-out prompts, conversations for the held-out loss, their descriptions).

    Held-out conversations that begin with a training row's first user turn are left out. UserError where none is left.
    """
    rows, test, sources = evals.load_both(data, held_out, seed, ("messages",), ("prompt",))
    if config.loss_dataset_split is None:
        return rows, test, [], sources
    found, description = load_rows(config.source(data), config.loss_dataset_split, seed, ("messages",))
    seen = {origin(row) for row in rows}
    unseen = [row for row in found if origin(row) not in seen]
    if not unseen:
        raise UserError(
            f"loss_dataset_split: all {len(found)} conversations of {description['split']!r} begin as training "
            "rows do: name another split, or slices such as --dataset_train_split train[:-200] with train[-200:]"
        )
    description |= {"rows": len(unseen), "dropped_as_seen": len(found) - len(unseen)}
    return rows, test, unseen, [*sources, description]


@torch.no_grad()
def supervised_losses(model, encoded: list[dict], max_tokens: int = 8192) -> tuple[list[float], list[int]]:
    """(-log p in nats, tokens) of each conversation, summed over what the assistant wrote; rows of `encode_rows`."""
    was_training, scorer = model.training, TokenLogps(model)
    model.eval()
    sums, counts = [0.0] * len(encoded), [0] * len(encoded)
    for batch in by_tokens([len(row["input_ids"]) for row in encoded], max_tokens):
        sequences = [encoded[i]["input_ids"] for i in batch]
        packed = pack(sequences, max(map(len, sequences)))
        select, targets, sizes = [], [], []
        for index, start in zip(batch, packed.starts, strict=True):
            learned = [(start + i - 1, label) for i, label in enumerate(encoded[index]["labels"]) if label != -100]
            select += [place for place, _ in learned]
            targets += [label for _, label in learned]
            sizes.append(len(learned))
        packed = packed.to(model.device)
        chosen = torch.tensor(select, device=model.device), torch.tensor(targets, device=model.device)
        logps, _ = scorer(packed.input_ids, packed.position_ids, *chosen, 1.0)
        for index, piece in zip(batch, logps.cpu().split(sizes), strict=True):
            sums[index], counts[index] = -piece.sum().item(), len(piece)
    model.train(was_training)
    return sums, counts


class Watch:
    """Measures one model before (when made), during and after its training."""

    def __init__(
        self, run, model, tokenizer, test: list[dict], unseen: list[dict], replies: ReplyConfig,
        engines: EngineConfig, max_length: int,
    ):  # fmt: skip
        self.run, self.model, self.tokenizer, self.replies = run, model, tokenizer, replies
        sizes = [evals.prompt_size(tokenizer, row) for row in test]
        self.test, length = evals.fit_prompts(run, model, test, sizes, replies.eval_max_tokens + 1)
        self.unseen = encode_rows(tokenizer, unseen, max_length, 1.0) if unseen else []
        self.engine = make_engine(engines, model, tokenizer, length, run)
        self.stops = stop_ids(tokenizer)
        self.metrics, self.samples = evals.measure_base(self.engine, tokenizer, self.test, replies, self.stops)
        self.losses = supervised_losses(model, self.unseen) if unseen else None

    def during(self, step: int) -> dict[str, float]:
        """Numbers for the log; a reply to each of the first prompts goes into samples.jsonl. Leaves no trace in
        training: its random numbers are its own."""
        numbers = {}
        with torch.random.fork_rng():
            self.engine.sync_weights(self.model)
            once = replace(self.replies, eval_num_generations=1)
            rows = self.test[: self.replies.eval_num_samples]
            if rows:
                rollouts = evals.sample_replies(self.engine, self.tokenizer, rows, once, self.stops)
                found = evals.judge(rollouts, self.tokenizer, self.replies.eval_reward_funcs)
                numbers |= {f"sampled/{name}": figure["value"] for name, figure in found.items()}
                samples = evals.rollouts_as_samples(rollouts, self.tokenizer, len(rows))
                self.run.append("samples.jsonl", [{"step": step, **sample} for sample in samples])
            if self.unseen:
                sums, counts = supervised_losses(self.model, self.unseen)
                numbers["held_out_loss"] = sum(sums) / sum(counts)
        return numbers

    def after(self) -> tuple[dict, list[dict], list[dict]]:
        """(metrics, gains, samples) of base and trained model."""
        self.engine.sync_weights(self.model)
        after, samples = evals.measure_replies(self.engine, self.tokenizer, self.test, self.replies, self.stops)
        gains = evals.sft_gains(self.metrics, after, self.replies.eval_reward_funcs, self.test)
        metrics = {**{f"{name}, base": value for name, value in self.metrics.items()}, **after}
        if self.losses is not None:
            trained = supervised_losses(self.model, self.unseen)
            metrics |= {"held-out loss, base": _per_token(*self.losses), "held-out loss": _per_token(*trained)}
            gains.append(loss_gain(self.losses, trained))
        return metrics, gains, evals.merge_samples({"base": self.samples, "sft": samples})


def _per_token(sums: list[float], counts: list[int]) -> dict:
    return measured_ratio(sums, counts, "nats a token")


def loss_gain(before: tuple, after: tuple) -> dict:
    """The held-out loss falls on the same conversations: the 95 % interval of the paired change lies below 0."""
    (old, counts), (new, _) = before, after
    change = measured_ratio([b - a for a, b in zip(old, new, strict=True)], counts, "nats a token")
    return gain(
        "held-out loss", _per_token(*before), _per_token(*after), labels=("base", "SFT"),
        goal="lower; paired interval below 0", passed=change["high"] < 0, better="lower",
    )  # fmt: skip
