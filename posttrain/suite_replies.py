"""What a model answers, measured: the suites math, code, identity and chat.

In: a model, rows with `prompt`, and `Settings`. Out: `Found`: figures with 95 % intervals over prompts, the values of
each prompt behind them (for paired differences), and replies to look at. Launched by `posttrain eval MODEL --suite
math` (posttrain/suites.py).

A prompt is one observation: its replies are not independent. pass@k is the unbiased estimate of Chen et al. 2021
(arXiv:2107.03374, equation 1), maj@n the share of problems whose most frequent answer is right (Wang et al. 2022,
arXiv:2203.11171). Rows are sampled as the stages' own evaluations sample them, so that the same checkpoint gives the
same figure here and there.
"""

from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass, field, fields

from posttrain import suite_chat
from posttrain.best_of_n import powers
from posttrain.chat import decode, stop_ids
from posttrain.errors import UserError
from posttrain.evals import by_prompt, fit_prompts, prompt_ids, prompt_text
from posttrain.identity_eval import RIGHT, identity_metrics, side
from posttrain.identity_eval import judge as judge_identity
from posttrain.intervals import measured, pass_at_k
from posttrain.rewards import load_rewards
from posttrain.rewards.code import code_blocks
from posttrain.rewards.math import marked_answer, parse_number
from posttrain.rl.rollout import Sampling
from posttrain.rl.scoring import call_rewards
from posttrain.rl.tools import ToolEngine
from posttrain.rl.types import Completion, Rollouts
from posttrain.tool_calls import ToolLimits, limits_of
from posttrain.tools import load_tools, with_tools
from posttrain.tools.flags import options_of

VERIFIERS = {"math": "correct", "code": "code"}
FIRST_SHOWN, WRONG_SHOWN = 4, 8  # replies kept to look at: of the first prompts, and the first wrong ones
UNITS = {"reply length": "tokens"}


@dataclass(frozen=True)
class Settings:
    """All that decides a figure beside the model and the rows."""

    suite: str
    num_generations: int
    max_tokens: int
    sample_seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    system: str | None = None
    reward_funcs: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    tool_options: dict = field(default_factory=dict)
    max_tool_calls: int = ToolLimits.max_tool_calls
    max_tool_tokens: int = ToolLimits.max_tool_tokens
    tool_timeout: float = ToolLimits.tool_timeout

    @classmethod
    def of(cls, given: Namespace) -> "Settings":
        values = {each.name: getattr(given, each.name) for each in fields(cls)}
        listed = {key: tuple(values[key] or ()) for key in ("reward_funcs", "tools")}
        return cls(**values | listed | {"tool_options": options_of(given)})

    def engine(self, subject):
        """What samples: the subject's engine, with the tools where there are some."""
        if not self.tools:
            return subject.engine
        loaded = load_tools(list(self.tools), self.tool_options)
        return ToolEngine(subject.engine, loaded, subject.tokenizer, **limits_of(self))

    def sampling(self, stops) -> Sampling:
        return Sampling(
            self.num_generations, self.max_tokens, tuple(sorted(stops)), self.temperature, self.top_p, self.top_k
        )


@dataclass
class Found:
    """Figures, and for some of them the value of each prompt (None where it does not apply to one)."""

    metrics: dict[str, dict] = field(default_factory=dict)
    by_row: dict[str, list[float | None]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  # places of the prompts among the suite's rows
    samples: list[dict] = field(default_factory=list)
    replies: Rollouts | None = None
    texts: list[str] = field(default_factory=list)  # of the replies, end tokens cut off
    conclusions: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)


class Asker:
    """Puts the rows to a model as chats or, to a base model, after solved examples; the same rows for all suites."""

    def __init__(self, subject, rows: list[dict], settings: Settings):
        self.subject, self.settings, self.tokenizer = subject, settings, subject.tokenizer
        self.chats = bool(self.tokenizer.chat_template)
        if not self.chats and not all("few_shot" in row for row in rows):
            raise UserError(
                f"{subject.options.model} has no chat template: a base model answers only after solved examples, and "
                f"the rows have no few_shot; take --suite base, or a chat model (recipes/sft.py makes one of it)"
            )
        self.stops = stop_ids(self.tokenizer, subject.model if self.chats else None)
        asked = [{**with_system(row, settings.system), "row": index} for index, row in enumerate(rows)]
        sizes = [len(self._ids(row)) for row in asked]
        self.rows, longest = fit_prompts(subject.study, subject.model, asked, sizes, settings.max_tokens + 1)
        subject.longest = max(subject.longest, longest)

    def _ids(self, row: dict) -> list[int]:
        if self.chats:
            return prompt_ids(self.tokenizer, row)
        return self.tokenizer(row["few_shot"], add_special_tokens=False)["input_ids"]

    def replies(self, sampling: Sampling, engine=None) -> Rollouts:
        """sampling.n replies to each row, side by side, by the subject's engine or another one. A base model's answer
        ends at its line's end."""
        prompts = [self._ids(row) for row in self.rows]
        found = (engine or self.subject.engine).generate(prompts, sampling, self.settings.sample_seed)
        if not self.chats:
            found = [self._line(completion) for completion in found]
        repeated = [(row, ids) for row, ids in zip(self.rows, prompts, strict=True) for _ in range(sampling.n)]
        return Rollouts([row for row, _ in repeated], [ids for _, ids in repeated], found, sampling.n)

    def _line(self, completion: Completion) -> Completion:
        text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
        if "\n" not in text:
            return completion
        return Completion(self.tokenizer(text.split("\n")[0], add_special_tokens=False)["input_ids"], [], "stop")


def with_system(row: dict, system: str | None) -> dict:
    """The row with a system message of its own in place of any it had; None changes nothing."""
    if system is None:
        return row
    rest = [message for message in row["prompt"] if message["role"] != "system"]
    return {**row, "prompt": [{"role": "system", "content": system}, *rest]}


def measure(subject, rows: list[dict], settings: Settings) -> Found:
    """Sample and judge. UserError for rows that the suite cannot judge, or a base model that it cannot ask."""
    check_columns(rows, settings.suite)
    rewards = _rewards(settings)
    if settings.tools and not subject.tokenizer.chat_template:
        raise UserError(f"--tools: {subject.options.model} has no chat template, so it cannot call any")
    rows = with_tools(rows, list(settings.tools), settings.tool_options)
    asker = Asker(subject, rows, settings)
    sampling = settings.sampling(asker.stops)
    each = "1 reply" if sampling.n == 1 else f"{sampling.n} replies"
    subject.study.note(
        f"{len(asker.rows)} prompt{'s' * (len(asker.rows) != 1)}, {each} each, at most {sampling.max_tokens} tokens"
    )
    engine = settings.engine(subject)
    replies = asker.replies(sampling, engine)
    texts = [decode(subject.tokenizer, completion.ids, asker.stops) for completion in replies.completions]
    found = Found(rows=[row["row"] for row in asker.rows], replies=replies, texts=texts)
    values = _judged(settings, rewards, replies, texts, subject.tokenizer)
    if asker.chats:
        values["replies that end"] = [float(c.stop == "stop") for c in replies.completions]
    values["reply length"] = [float(len(c.ids)) for c in replies.completions]
    if settings.tools:
        values["replies that call"] = [float(c.calls > 0) for c in replies.completions]
        values["replies with a failed call"] = [float(c.failed_calls > 0) for c in replies.completions]
    _summarise(found, settings, values)
    if settings.suite == "math" and settings.temperature > 0:
        found.by_row["pass@1, greedy"] = _greedy(asker, sampling, engine, subject.tokenizer)
    if settings.suite == "identity":
        groups = [texts[start : start + sampling.n] for start in range(0, len(texts), sampling.n)]
        found.metrics |= _identity_by_fact(asker.rows, groups)
    found.by_row = dict(sorted(found.by_row.items(), key=lambda item: _place(item[0], sampling.n)))
    found.metrics = {name: _figure(name, column) for name, column in found.by_row.items()} | found.metrics
    right = values.get(VERIFIERS.get(settings.suite, RIGHT))
    found.samples = _samples(replies, texts, right)
    found.more = {**asdict(settings), "engine": subject.engine.name, "stop_ids": list(asker.stops)}
    return found


def check_columns(rows: list[dict], suite: str) -> None:
    """UserError for rows without what the suite judges replies by."""
    answers = ("answer", "gsm8k, math_problems")
    needed = {"math": answers, "think": answers, "tools": answers, "code": ("tests", "humaneval, mbpp")}
    column, adapters = needed.get(suite, (None, ""))
    if column is None:
        return
    for index, row in enumerate(rows):
        if row.get(column) is None:
            raise UserError(
                f"--suite {suite}: row {index} has no {column} (its columns: {', '.join(row)}), which replies are "
                f"judged by: name an adapter that makes it, such as --data_adapter {adapters.split(',')[0]}"
            )


def _rewards(settings: Settings) -> list:
    """The suite's verifier and the rewards asked for; those that cannot run here say so before anything is sampled."""
    names = [*filter(None, [VERIFIERS.get(settings.suite)]), *settings.reward_funcs]
    if settings.suite == "chat":
        load_rewards(["language"], [])
    return load_rewards(list(dict.fromkeys(names)), [])


def _judged(settings: Settings, rewards: list, replies: Rollouts, texts: list[str], tokenizer) -> dict:
    """name -> a value a reply."""
    values = call_rewards(rewards, replies, tokenizer)
    if settings.suite == "math":
        marks = [marked_answer(text, number=True) is not None for text in texts]
        return values | {"replies with a marked answer": list(map(float, marks))}
    if settings.suite == "code":
        return values | {"replies with a code block": [float(bool(code_blocks(text))) for text in texts]}
    if settings.suite == "identity":
        return values | {RIGHT: [_right(text, row) for text, row in zip(texts, replies.rows, strict=True)]}
    return values | suite_chat.judge(replies, texts, tokenizer)


def _right(text: str, row: dict) -> float | None:
    """None for questions under another's system message: which answer is right there is the user's choice."""
    return None if "contrary" in row else float(judge_identity(text, row))


def _identity_by_fact(rows: list[dict], replies: list[list[str]]) -> dict[str, dict]:
    """Each fact's share and, where the rows have contrary system messages, who keeps its identity under them."""
    if any("contrary" in row for row in rows):
        return {name: figure for name, figure in identity_metrics(rows, replies).items() if name != RIGHT}
    return {}


def _summarise(found: Found, settings: Settings, values: dict[str, list[float | None]]) -> None:
    """Fills `by_row`: the mean of each prompt's values, of a verifier's pass@k and maj@n."""
    n = settings.num_generations
    verifier = VERIFIERS.get(settings.suite)
    for name, column in values.items():
        groups = by_prompt(column, n)
        if name == verifier:
            for k in powers(n):
                found.by_row[f"pass@{k}"] = [pass_at_k(round(sum(group)), n, k) for group in groups]
            if settings.suite == "math" and n > 2:
                found.by_row[f"maj@{n}"] = majority(found, groups, n)
        else:
            found.by_row[name] = [_mean(group) for group in groups]


def majority(found: Found, right: list[list[float]], n: int) -> list[float]:
    """Of each problem, whether the answer that most of its replies give is right. Replies without an answer have no
    vote; of answers with as many votes the one given first counts."""
    values = []
    for start, group in zip(range(0, len(found.texts), n), right, strict=True):
        answers = [answer_of(text) for text in found.texts[start : start + n]]
        votes = Counter(answer for answer in answers if answer is not None)
        values.append(group[answers.index(votes.most_common(1)[0][0])] if votes else 0.0)
    return values


def answer_of(text: str) -> str | None:
    """The marked answer in a form that equal ones share: a number's value, else its text without blanks."""
    marked = marked_answer(text, number=True)
    if marked is None:
        return None
    number = parse_number(marked, whole=False)
    return "".join(marked.split()) if number is None else f"{number.value}{'%' * number.percent}"


def _greedy(asker: Asker, sampling: Sampling, engine, tokenizer) -> list[float]:
    once = Sampling(1, sampling.max_tokens, sampling.stop_ids, temperature=0.0)
    return call_rewards(load_rewards(["correct"], []), asker.replies(once, engine), tokenizer)["correct"]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


SHARES = ("pass@", "maj@", "replies", RIGHT, *suite_chat.SHARES)


def _place(name: str, n: int) -> int:
    """Where a figure stands in tables: what one looks at first, then the rest as it was found."""
    first = ["pass@1", "pass@1, greedy", f"maj@{n}", f"pass@{n}", RIGHT, "replies that end", "reply length"]
    return first.index(name) if name in first else len(first)


def _figure(name: str, column: list[float | None]) -> dict:
    known = [value for value in column if value is not None]
    unit = "%" if name.startswith(SHARES) else UNITS.get(name, "")
    if not known:
        return {"value": None, "low": None, "high": None, "n": 0, "unit": unit}
    return measured(known, unit)


def _samples(replies: Rollouts, texts: list[str], right: list[float | None] | None) -> list[dict]:
    """The first reply to each of the first prompts, and each prompt's first wrong reply for the first prompts that
    have one: in the rows' order, not picked by hand."""
    n, kept = replies.num_generations, []
    for start in range(0, min(len(texts), FIRST_SHOWN * n), n):
        kept.append((start, "one of the first"))
    if right is not None:
        wrong = [
            next(filter(lambda i: right[i] is not None and right[i] < 1, range(start, start + n)), None)
            for start in range(0, len(texts), n)
        ]
        kept += [(index, "one of the first wrong ones") for index in wrong if index is not None][:WRONG_SHOWN]
    return [_sample(replies, texts, right, index, why) for index, why in kept]


def _sample(replies: Rollouts, texts: list[str], right, index: int, why: str) -> dict:
    row, completion = replies.rows[index], replies.completions[index]
    facts = {key: row[key] for key in ("answer", "entry_point", "fact") if key in row}
    if right is not None and right[index] is not None:
        facts["right"] = right[index] == 1
    if "contrary" in row:
        facts["side"] = side(texts[index], row)
    facts |= {"tokens": len(completion.ids), "ended": completion.stop == "stop", "why": why}
    return {"row": row["row"], "prompt": prompt_text(row["prompt"]), "reply": texts[index], **facts}
