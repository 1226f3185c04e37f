"""What SFT is measured by: replies before and after, the loss on held-out conversations, samples while it trains.

In: the model in training, its engine, held-out prompts and conversations. Out: metrics and gains with 95 % intervals,
`held_out_loss` in log.jsonl and replies in samples.jsonl every `eval_steps` steps.
"""

from dataclasses import dataclass, replace

import torch

from posttrain import evals
from posttrain.args import arg, at_least
from posttrain.chat import stop_ids
from posttrain.data import DataConfig, check, load_rows, separate
from posttrain.data.identity import read_identity
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.identity_eval import identity_gains, log_numbers, longest_prompt, measure_identity
from posttrain.intervals import gain, measured_ratio
from posttrain.layouts import Layout
from posttrain.models import require_positions
from posttrain.rl.forward import rollout_logps
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.rl.types import Completion, Rollouts
from posttrain.sft_rows import encode_rows

CHAT_STAGES = ("sft", "ppo", "grpo")


@dataclass
class WatchConfig:
    """Held-out conversations: the loss on rows that are not learned from, and replies while training"""

    eval_steps: int = arg(0, help="measure and sample every so many steps; 0 only before and after")
    loss_dataset_name: str | None = arg(None, help="conversations for the held-out loss; none = dataset_name")
    loss_dataset_config: str | None = arg(None, help="none = dataset_config where the data set is the same")
    loss_dataset_adapter: str | None = arg(None, help="none = dataset_adapter where the data set is the same")
    loss_dataset_split: str | None = arg(
        None, help="their split or slice, such as validation or train[-200:]; none = no held-out loss"
    )
    loss_max_rows: int | None = arg(200, help="use so many of them")
    identity: str | None = arg(
        None, help="YAML of who the model is: asked before, after and every eval_steps steps, in held-out wordings"
    )

    def __post_init__(self):
        at_least(self, eval_steps=0, loss_max_rows=1)
        if self.loss_dataset_name is not None and self.loss_dataset_split is None:
            raise UserError("loss_dataset_name: needs loss_dataset_split, too; for example --loss_dataset_split test")
        if self.identity is not None:
            read_identity(self.identity)

    def source(self, data: DataConfig) -> DataConfig:
        """The data keys of the held-out loss: those of training where its own are not set."""
        if data.dataset_mixture and self.loss_dataset_name is None:
            raise UserError("loss_dataset_name: not set, and beside dataset_mixture the held-out loss needs a name")
        same = self.loss_dataset_name in (None, data.dataset_name)
        adapter = self.loss_dataset_adapter or (data.dataset_adapter if same else None)
        return replace(
            data,
            dataset_name=self.loss_dataset_name or data.dataset_name,
            dataset_config=self.loss_dataset_config or (data.dataset_config if same else None),
            dataset_adapter=adapter,
            dataset_adapter_options=data.dataset_adapter_options if adapter == data.dataset_adapter else {},
            dataset_revision=data.dataset_revision if same else None,
            dataset_mixture=[],
            max_rows=self.loss_max_rows,
            streaming=data.streaming and self.loss_max_rows is not None,
        )


def check_all(data: DataConfig, held_out: evals.EvalConfig, config: WatchConfig, seed: int, planned=()) -> None:
    """What a dry run can know of `load_all` in seconds. `planned`: folders of stages that come before."""
    evals.check_both(data, held_out, seed, ("messages",), ("prompt",), planned)
    if config.loss_dataset_split is not None:
        check(config.source(data), config.loss_dataset_split, seed, ("messages",))


def load_all(data: DataConfig, held_out: evals.EvalConfig, config: WatchConfig, seed: int):
    """(conversations to learn from, held-out prompts, conversations for the held-out loss, their descriptions).

    With `streaming` the first is a `Stream`, which leaves out what the held-out rows share with it: they are known
    before it is read, and it is not. Else the held-out rows are what gives way (see `on_leak`).
    """
    if data.streaming:
        return _load_streamed(data, held_out, config, seed)
    rows, test, sources = evals.load_both(data, held_out, seed, ("messages",), ("prompt",))
    if config.loss_dataset_split is None:
        return rows, test, [], sources
    found, description = load_rows(config.source(data), config.loss_dataset_split, seed, ("messages",))
    names = sources[0]["name"], description["name"]
    rows, unseen, overlap = separate(data, rows, found, names, "loss_dataset_split")
    sources[0] |= {"rows": len(rows)}
    return rows, test, unseen, [*sources, description | {"rows": len(unseen), "overlap": overlap}]


def _load_streamed(data: DataConfig, held_out: evals.EvalConfig, config: WatchConfig, seed: int):
    unseen, more, columns = [], [], ("messages",)
    if config.loss_dataset_split is not None:
        unseen, facts = load_rows(config.source(data), config.loss_dataset_split, seed, columns)
        more = [facts]
    stream, test, sources = evals.stream_both(data, held_out, seed, columns, ("prompt",), unseen)
    return stream, test, unseen, [*sources, *more]


def supervised_losses(
    model, encoded: list[dict], *, packing: bool = True, max_tokens: int = 8192
) -> tuple[list[float], list[int]]:
    """(-log p in nats, tokens) of each conversation, summed over what the assistant wrote; rows of `encode_rows`.
    Without `packing` they are padded: some models do not keep packed sequences apart."""
    was_training = model.training
    model.eval()
    conversations = [
        Completion(row["input_ids"][1:], [], "stop", [int(label != -100) for label in row["labels"][1:]])
        for row in encoded
    ]
    rollouts = Rollouts(encoded, [row["input_ids"][:1] for row in encoded], conversations, 1)
    layout = Layout("packed" if packing else "padded")
    logps = rollout_logps(model, rollouts, layout, temperature=1.0, max_tokens=max_tokens)
    model.train(was_training)
    return [-piece.sum().item() for piece in logps], [len(piece) for piece in logps]


def start_of(run, test: list[dict]) -> str:
    """What the trained model is held against: a parent that chats already, or a base model, with solved examples
    where the rows have some."""
    if run.config["chat_template_path"] is None or run.parents["policy"]["stage"] in CHAT_STAGES:
        return "parent"
    return "base, few-shot" if all("few_shot" in row for row in test) else "base"


class Watch:
    """Measures one model before (when made), during and after its training."""

    def __init__(
        self, run, model, tokenizer, test: list[dict], unseen: list[dict], replies: ReplyConfig,
        engines: EngineConfig, max_length: int, identity: str | None = None,
    ):  # fmt: skip
        self.run, self.model, self.tokenizer, self.replies = run, model, tokenizer, replies
        test = replies.told(test)
        sizes = [evals.prompt_size(tokenizer, row) for row in test]
        self.test, length = evals.fit_prompts(run, model, test, sizes, replies.eval_max_tokens + 1)
        self.identity = identity
        length = max(length, longest_prompt(tokenizer, identity) + replies.eval_max_tokens + 1)
        require_positions(model, "eval_max_tokens", length)
        self.unseen = encode_rows(tokenizer, unseen, max_length) if unseen else []
        self.engine = make_engine(engines, model, tokenizer, length, run)
        self.stops = stop_ids(tokenizer)
        self.start = start_of(run, self.test)
        self.metrics, self.samples = self._measure(chats=self.start == "parent")
        self.losses = self._losses() if unseen else None

    def _measure(self, chats: bool) -> tuple[dict, list[dict]]:
        """(metrics, samples) of the model as it is now, asked as a chat model or as a base model."""
        measure = evals.measure_replies if chats else evals.measure_base
        metrics, samples = measure(self.engine, self.tokenizer, self.test, self.replies, self.stops)
        n, size = self.replies.eval_num_generations, self.replies.eval_max_tokens
        asked = measure_identity(self.engine, self.tokenizer, self.identity, self.stops, n, size)
        return metrics | asked.metrics, samples + asked.samples

    def _losses(self) -> tuple[list[float], list[int]]:
        return supervised_losses(self.model, self.unseen, packing=self.run.config["packing"])

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
                found = evals.judge(rollouts, self.tokenizer, self.replies)
                numbers |= {f"sampled/{name}": figure["value"] for name, figure in found.items()}
                samples = evals.rollouts_as_samples(rollouts, self.tokenizer, len(rows))
                self.run.append("samples.jsonl", [{"step": step, **sample} for sample in samples])
            if self.identity is not None:
                size = self.replies.eval_max_tokens
                asked = measure_identity(self.engine, self.tokenizer, self.identity, self.stops, 1, size)
                numbers |= log_numbers(asked)
            if self.unseen:
                sums, counts = self._losses()
                numbers["held_out_loss"] = sum(sums) / sum(counts)
        return numbers

    def after(self) -> tuple[dict, list[dict], list[dict]]:
        """(metrics, gains, samples) of base and trained model."""
        self.engine.sync_weights(self.model)
        after, samples = self._measure(chats=True)
        gains = evals.sft_gains(self.metrics, after, self.replies.eval_reward_funcs, self.start)
        gains += identity_gains(self.metrics, after, (self.start.split(",")[0], "SFT"))
        metrics = {**{f"{name}, base": value for name, value in self.metrics.items()}, **after}
        if self.losses is not None:
            trained = self._losses()
            metrics |= {"held-out loss, base": _per_token(*self.losses), "held-out loss": _per_token(*trained)}
            gains.append(loss_gain(self.losses, trained, self.start.split(",")[0]))
        return metrics, gains, evals.merge_samples({"base": self.samples, "sft": samples})


def _per_token(sums: list[float], counts: list[int]) -> dict:
    return measured_ratio(sums, counts, "nats a token")


def loss_gain(before: tuple, after: tuple, start: str = "base") -> dict:
    """The held-out loss falls on the same conversations: the 95 % interval of the paired change lies below 0."""
    (old, counts), (new, _) = before, after
    change = measured_ratio([b - a for a, b in zip(old, new, strict=True)], counts, "nats a token")
    return gain(
        "held-out loss", _per_token(*before), _per_token(*after), labels=(start, "SFT"),
        goal="lower; paired interval below 0", passed=change["high"] < 0, better="lower",
    )  # fmt: skip
