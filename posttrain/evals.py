"""Measure replies: sample them from held-out prompts, judge them by reward functions, keep some for the report.

In: an engine and held-out rows with `prompt`. Out: metrics with 95 % intervals, and samples, as manifests store them.
Every sample's seed is fixed, so the same checkpoint gives the same figure.
"""

from dataclasses import dataclass, replace

from posttrain.args import arg, at_least
from posttrain.base_evals import sample_after_examples
from posttrain.chat import decode, encode_chat
from posttrain.data import DataConfig, EvalIndex, Stream, check, check_leaks, load_rows, separate, stream_rows
from posttrain.errors import UserError
from posttrain.intervals import clearly_higher, gain, measured, pass_at_k
from posttrain.rewards import load_rewards
from posttrain.rl.rollout import Sampling
from posttrain.rl.scoring import call_rewards
from posttrain.rl.tools import ToolEngine
from posttrain.rl.types import Rollouts
from posttrain.tool_calls import ToolLimits, limits_of
from posttrain.tools import check_tools, load_tools, with_tools

EVAL_SEED = 20_000  # apart from any training seed: the same problems are sampled the same way in every stage


@dataclass
class EvalConfig:
    """Evaluation: held-out rows and what is measured on them"""

    eval_dataset_name: str | None = arg(None, help="held-out rows; none = dataset_name")
    eval_dataset_config: str | None = arg(None, help="none = dataset_config")
    eval_dataset_split: str = arg("test", help="split, or a slice such as train[-100:]")
    eval_dataset_adapter: str | None = arg(None, help="none = dataset_adapter where the data set is the same")
    eval_dataset_adapter_options: dict = arg({}, help="its keywords; none = those of dataset_adapter, if it is that")
    eval_max_rows: int | None = arg(None, help="use so many rows")
    eval_goal: float = arg(0.0, help="gain the stage aims at; what it counts stands in the recipe's first lines")

    def __post_init__(self):
        at_least(self, eval_max_rows=1)


@dataclass
class ReplyConfig:
    """Replies: how they are sampled and judged in evaluation"""

    eval_reward_funcs: list[str] = arg(
        ["correct"], help="reward functions that judge replies; the first one is the gain's"
    )
    eval_reward_options: dict = arg({}, help="their keywords by name, as reward_options")
    eval_num_generations: int = arg(8, help="replies sampled for each held-out prompt, at temperature 1")
    eval_max_tokens: int = arg(64, help="replies are cut at so many tokens")
    eval_prefixes: dict = arg({}, help="label -> words that the reply is made to begin with (tokens to think)")
    eval_num_samples: int = arg(6, help="prompts whose replies are stored for the report")
    eval_tools: list[str] | None = arg(None, help="tools that replies may call; none: those of training, if any")
    eval_tool_options: dict = arg({}, help="their keywords by name, as tool_options")
    max_tool_calls: int = arg(4, help="calls in one reply, trained on or measured; a further one is not answered")
    max_tool_tokens: int = arg(256, help="tokens of a tool's answer; what is longer is cut")
    tool_timeout: float = arg(30.0, help="seconds that a tool has for one answer")

    def __post_init__(self):
        at_least(self, eval_num_generations=1, eval_max_tokens=1, eval_num_samples=0)
        ToolLimits(**self.tool_limits)
        try:
            check_tools(self.eval_tools or [], self.eval_tool_options)
        except UserError as error:
            raise UserError(f"eval_{error}") from error

    @property
    def tool_limits(self) -> dict:
        return limits_of(self)

    def told(self, rows: list[dict]) -> list[dict]:
        """Held-out rows whose prompts tell the model of eval_tools, where they are set; [] takes tools away."""
        if self.eval_tools is None:
            return rows
        bare = [{key: value for key, value in row.items() if key != "tools"} for row in rows]
        return with_tools(bare, self.eval_tools, self.eval_tool_options)

    def engine(self, engine, tokenizer):
        """The engine with eval_tools in place of any that it has; as it is where they are not set."""
        if self.eval_tools is None:
            return engine
        inner = engine.engine if isinstance(engine, ToolEngine) else engine
        if not self.eval_tools:
            return inner
        tools = load_tools(self.eval_tools, self.eval_tool_options)
        return ToolEngine(inner, tools, tokenizer, **self.tool_limits)


def eval_data(data: DataConfig, config: EvalConfig) -> DataConfig:
    """The data keys of the evaluation: those of training where the evaluation's own are not set. A mixture is only
    trained on, so beside one the held-out rows need a name of their own (UserError)."""
    if data.dataset_mixture and config.eval_dataset_name is None:
        raise UserError("eval_dataset_name: not set, and beside dataset_mixture the held-out rows need a name")
    same = config.eval_dataset_name in (None, data.dataset_name)
    adapter = config.eval_dataset_adapter or (data.dataset_adapter if same else None)
    inherited = data.dataset_adapter_options if adapter == data.dataset_adapter else {}
    return replace(
        data,
        dataset_name=config.eval_dataset_name or data.dataset_name,
        dataset_config=config.eval_dataset_config or (data.dataset_config if same else None),
        dataset_adapter=adapter,
        dataset_adapter_options=config.eval_dataset_adapter_options or inherited,
        dataset_revision=data.dataset_revision if same else None,
        dataset_mixture=[],
        max_rows=config.eval_max_rows,
        streaming=data.streaming and config.eval_max_rows is not None,
    )


def check_both(data: DataConfig, config: EvalConfig, seed: int, columns, eval_columns=None, planned=()) -> None:
    """What a dry run can know of `load_both` in seconds. `planned`: folders of stages that come before."""
    check(data, data.dataset_train_split, seed, columns, planned)
    check(eval_data(data, config), config.eval_dataset_split, seed, eval_columns or columns)


def load_both(data: DataConfig, config: EvalConfig, seed: int, columns, eval_columns=None) -> tuple[list, list, list]:
    """(rows to train on, held-out rows, descriptions of both for the manifest).

    What both share is dealt with as `on_leak` says: unless it says otherwise, held-out rows that begin with a training
    row's first user turn are left out, for they belong to the same tree.
    """
    rows, description = load_rows(data, data.dataset_train_split, seed, columns)
    test, held_out = load_rows(eval_data(data, config), config.eval_dataset_split, seed, eval_columns or columns)
    rows, test, overlap = separate(data, rows, test, (description["name"], held_out["name"]))
    rows, leaks = check_leaks(data, rows, seed, description["name"])
    description |= {"rows": len(rows), **({"leaks": leaks} if leaks else {})}
    return rows, test, [description, held_out | {"rows": len(test), "overlap": overlap}]


def load_or_stream(data: DataConfig, config: EvalConfig, seed: int, columns, eval_columns=None) -> tuple:
    """`stream_both` where the data is streamed, else `load_both`."""
    load = stream_both if data.streaming else load_both
    return load(data, config, seed, columns, eval_columns)


def stream_both(
    data: DataConfig, config: EvalConfig, seed: int, columns, eval_columns=None, unseen: list[dict] | None = None
) -> tuple[Stream, list[dict], list[dict]]:
    """`load_both` for rows that are read while they are used: (stream to train on, held-out rows, descriptions).

    The stream leaves out what held-out rows and the `unseen` share with it: they are known before it is read, and it
    is not. UserError for policies that would need all of it.
    """
    if data.on_leak == "stop" or data.leak_check_datasets:
        raise UserError(
            "on_leak, leak_check_datasets: with streaming, training rows that held-out rows share are left out, and "
            "nothing else can be checked before they are read: leave on_leak, or set it to drop_train or report"
        )
    test, held_out = load_rows(eval_data(data, config), config.eval_dataset_split, seed, eval_columns or columns)
    index = EvalIndex(test + (unseen or []))

    def is_seen(row: dict) -> bool:
        return any(found for kind, found in index.equal(row).items() if kind in data.leak_kinds)

    stream = stream_rows(data, data.dataset_train_split, seed, columns)
    stream = stream if data.on_leak == "report" else stream.without(is_seen)
    return stream, test, [stream.description(), held_out]


def sample_replies(engine, tokenizer, rows: list[dict], config: ReplyConfig, stop_ids, prefix: str = "") -> Rollouts:
    """eval_num_generations replies at temperature 1 to each prompt; a prefix counts as the model's own words."""
    begin = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    n = config.eval_num_generations
    sampling = Sampling(n, config.eval_max_tokens, tuple(sorted(stop_ids)))
    completions = config.engine(engine, tokenizer).generate([p + begin for p in prompts], sampling, EVAL_SEED)
    for completion in completions:
        completion.ids = begin + completion.ids
        completion.logps = [0.0] * len(begin) + completion.logps
        completion.mask = completion.mask and [1] * len(begin) + completion.mask
    return Rollouts([r for r in rows for _ in range(n)], [p for p in prompts for _ in range(n)], completions, n)


def by_prompt(values: list[float], n: int) -> list[list[float]]:
    return [values[i : i + n] for i in range(0, len(values), n)]


def judge(rollouts: Rollouts, tokenizer, config: ReplyConfig, more=()) -> dict[str, dict]:
    """Metrics of sampled replies: each reward's mean, pass@1 and pass@n for `correct`, length, share that ended.

    `more` holds reward functions that have no name to load by, as (name, function, weight).
    A prompt is one observation (its n replies are not independent), so intervals are over prompts.
    """
    rewards = [*load_rewards(config.eval_reward_funcs, [], config.eval_reward_options), *more]
    metrics, n = {}, rollouts.num_generations
    for name, values in call_rewards(rewards, rollouts, tokenizer).items():
        groups = by_prompt([v for v in values if v is not None], n)
        if name == "correct":
            metrics["pass@1"] = measured([sum(g) / n for g in groups], "%")
            metrics[f"pass@{n}"] = measured([pass_at_k(round(sum(g)), n, n) for g in groups], "%")
        else:
            metrics[name] = measured([sum(g) / n for g in groups])
    lengths = by_prompt([float(len(c.ids)) for c in rollouts.completions], n)
    ended = by_prompt([float(c.stop == "stop") for c in rollouts.completions], n)
    metrics["reply length"] = measured([sum(g) / n for g in lengths], "tokens")
    metrics["replies that end"] = measured([sum(g) / n for g in ended], "%")
    return metrics | tool_metrics(rollouts)


def tool_metrics(rollouts: Rollouts) -> dict[str, dict]:
    """Of replies that could call tools: the share that called one, calls a reply, and the share with a call that
    failed; intervals over prompts."""
    n, completions = rollouts.num_generations, rollouts.completions
    if any(c.calls is None for c in completions):
        return {}
    calls = by_prompt([float(c.calls) for c in completions], n)
    failed = by_prompt([float(c.failed_calls > 0) for c in completions], n)
    return {
        "replies that call": measured([sum(map(bool, g)) / n for g in calls], "%"),
        "calls": measured([sum(g) / n for g in calls], "a reply"),
        "replies with a failed call": measured([sum(g) / n for g in failed], "%"),
    }


def measure_replies(
    engine, tokenizer, rows, config: ReplyConfig, stop_ids, more=(), reply_kl=None
) -> tuple[dict, list[dict]]:
    """(metrics, samples for the report); with eval_prefixes also the metrics of replies made to begin so, with
    `reply_kl(rollouts)`, log pi - log ref of each reply in nats, also the KL to where the stage began."""
    rollouts = sample_replies(engine, tokenizer, rows, config, stop_ids)
    metrics = judge(rollouts, tokenizer, config, more)
    if reply_kl is not None:
        gaps = by_prompt(reply_kl(rollouts), rollouts.num_generations)
        metrics["KL to the start"] = measured([sum(g) / len(g) for g in gaps], "nats")
    for label, prefix in config.eval_prefixes.items():
        forced = judge(sample_replies(engine, tokenizer, rows, config, stop_ids, prefix), tokenizer, config)
        metrics |= {f"{name}, {label}": value for name, value in forced.items() if name != "replies that end"}
    return metrics, rollouts_as_samples(rollouts, tokenizer, config.eval_num_samples)


def measure_base(engine, tokenizer, rows, config: ReplyConfig, stop_ids) -> tuple[dict, list[dict]]:
    """As `measure_replies` for a model that has not learned turns: its answers are taken after solved examples where
    the rows have them (`few_shot`), whether it ends its replies from the chat prompt."""
    examples = all("few_shot" in row for row in rows)
    once = replace(config, eval_num_generations=1)  # replies that never end are long: one a prompt says as much
    chat = sample_replies(engine, tokenizer, rows, once if examples else config, stop_ids)
    metrics = judge(chat, tokenizer, config)
    if examples:
        n, size = config.eval_num_generations, config.eval_max_tokens
        shots = judge(sample_after_examples(engine, tokenizer, rows, n, size, EVAL_SEED), tokenizer, config)
        metrics = shots | {"replies that end": metrics["replies that end"]}
    return metrics, rollouts_as_samples(chat, tokenizer, config.eval_num_samples)


def rollouts_as_samples(rollouts: Rollouts, tokenizer, num: int, replies: int = 2) -> list[dict]:
    """The first replies to the first `num` prompts: [{"prompt", "texts"}]."""
    samples, n = [], rollouts.num_generations
    for start in range(0, min(len(rollouts.rows), num * n), n):
        texts = [decode(tokenizer, c.ids) for c in rollouts.completions[start : start + min(replies, n)]]
        samples.append({"prompt": prompt_text(rollouts.rows[start]["prompt"]), "texts": texts})
    return samples


def prompt_text(messages) -> str:
    return messages if isinstance(messages, str) else "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def merge_samples(samples: dict[str, list[dict]]) -> list[dict]:
    """{"base": samples, "sft": samples} of the same prompts -> the manifest's layout, side by side."""
    merged: dict[str, list[dict]] = {}
    for by, rows in samples.items():
        for row in rows:
            merged.setdefault(row["prompt"], []).extend({"by": by, "text": text} for text in row["texts"])
    return [{"prompt": prompt, "replies": replies} for prompt, replies in merged.items()]


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """What a reply to a row's prompt is sampled after, its tools told to the model."""
    return encode_chat(tokenizer, row["prompt"], add_generation_prompt=True, tools=row.get("tools")).input_ids


def prompt_size(tokenizer, row: dict) -> int:
    """Tokens of a held-out prompt, as a chat or after its few-shot examples, and room for a prefix."""
    return max(len(prompt_ids(tokenizer, row)), len(tokenizer(row.get("few_shot", ""))["input_ids"])) + 16


def fit_prompts(run, model, rows: list[dict], sizes: list[int], reply_tokens: int, most=None) -> tuple[list, int]:
    """(rows whose prompt and reply fit the model's context, the longest of them in tokens); `sizes` are the prompts'.

    A prompt of more than `most` tokens is left out, too; `run` is told how many. UserError where none is left.
    """
    room = model.config.max_position_embeddings - reply_tokens
    room = room if most is None else min(room, most)
    kept = [row for row, size in zip(rows, sizes, strict=True) if size <= room]
    if not kept:
        raise UserError(
            f"all {len(rows)} prompts are longer than {room} tokens, which is what the model's context "
            f"({model.config.max_position_embeddings} positions) leaves beside replies of {reply_tokens} tokens, or "
            "what max_prompt_length allows: ask for shorter replies or give shorter prompts"
        )
    if len(kept) < len(rows):
        run.note(f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than {room} tokens and left out")
    return kept, max(size for size in sizes if size <= room) + reply_tokens


def reply_gain(name: str, metric: str, before: dict, after: dict, labels: tuple[str, str], goal: float = 0.0) -> dict:
    """The gain in one metric: higher by more than the intervals and, with a `goal`, by at least that much."""
    passed = clearly_higher(before[metric], after[metric]) and after[metric]["value"] - before[metric]["value"] >= goal
    text = f"+{goal * 100:.0f} points or more" if goal else "higher by more than the intervals"
    return gain(name, before[metric], after[metric], labels=labels, goal=text, passed=passed)


def metric_of(reward: str) -> str:
    """The metric under which `judge` keeps a reward function's mean."""
    return "pass@1" if reward == "correct" else reward


def before_and_after(before: dict, after: dict) -> dict:
    """Metrics of a stage under their names, those from before it marked so."""
    return {**after, **{f"{name}, before": value for name, value in before.items()}}


def grpo_gains(before: dict, after: dict, replies: ReplyConfig, goal: float) -> list[dict]:
    """The reward's gain and, of the trained model, each way of beginning a reply against the first."""
    if not replies.eval_reward_funcs:
        return []
    metric = metric_of(replies.eval_reward_funcs[0])
    gains = [reply_gain(f"problems, {metric}", metric, before, after, ("SFT", "GRPO"), goal)]
    first, *others = replies.eval_prefixes or [None]
    for label in others:
        metrics = {"before": after[f"{metric}, {first}"], "after": after[f"{metric}, {label}"]}
        gains.append(
            gain(
                f"tokens to think, {metric}", metrics["before"], metrics["after"], labels=(first, label),
                goal="higher by more than the intervals", passed=clearly_higher(metrics["before"], metrics["after"]),
            )
        )  # fmt: skip
    return gains


def ppo_gains(before: dict, after: dict, replies: ReplyConfig, max_kl: float) -> list[dict]:
    """The judge's gain where there is one, the reward model's own, which is only a proxy, and the KL paid for it."""
    names = [*map(metric_of, replies.eval_reward_funcs[:1]), "reward model"]
    gains = [reply_gain(name, name, before, after, ("SFT", "PPO")) for name in names]
    if max_kl:
        kl = after["KL to the start"]
        none = {"value": 0.0, "low": 0.0, "high": 0.0}
        goal = f"at most {max_kl:g}"
        gains.append(
            gain(
                "KL to SFT, a reply",
                none,
                kl,
                labels=("SFT", "PPO"),
                goal=goal,
                passed=kl["high"] <= max_kl,
                better="lower",
            )
        )
    return gains


def sft_gains(before: dict, after: dict, rewards: list[str], start: str) -> list[dict]:
    """End tokens at 95 % or more and, where a reward function judges them, better answers than `start`'s, which names
    what was there before and how it was asked ("base, few-shot")."""
    ends, first = "replies that end", rewards[:1]
    passed = after[ends]["value"] >= 0.95
    return [
        gain(ends, before[ends], after[ends], labels=(start.split(",")[0], "SFT"), goal=">= 95 %", passed=passed),
        *(reply_gain(f"answers, {m}", m, before, after, (start, "SFT")) for m in map(metric_of, first)),
    ]
