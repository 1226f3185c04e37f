"""The suite think: the same problems answered at once, in steps, and with a budget of tokens to think.

In: a chat model, rows with `prompt` and `answer`, and `Settings`. Out: `Found`: for each way to reply accuracy at
temperature 0, pass@k of samples, tokens a reply, and the paired difference to answering at once; `more["curve"]` has
them as points, which posttrain/plots.py draws. Launched by

    posttrain eval runs/tiny/grpo --suite think
    posttrain eval MODEL --suite think --data gsm8k --budgets 0 32 64 128 256

A reply's thoughts are sampled once; each budget cuts those same thoughts and samples the answer behind them anew, so
that budgets differ by the cut alone. Tokens count what was put there, too. How a reply is cut or made to go on:
posttrain/think.py.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass
from statistics import fmean

from posttrain import think
from posttrain.best_of_n import powers
from posttrain.chat import decode, stop_ids
from posttrain.errors import UserError
from posttrain.evals import by_prompt, fit_prompts, prompt_ids, prompt_text
from posttrain.intervals import measured, pass_at_k
from posttrain.rewards import load_rewards
from posttrain.rl.rollout import Sampling
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Completion, Rollouts
from posttrain.suite_replies import Found, check_columns, with_system
from posttrain.suite_table import aligned, shown
from posttrain.suites import difference
from posttrain.think import Frame, Words

AT_ONCE, IN_STEPS, FREE = "at once", "in steps", "free"
TINY_WORDS = {"at_once": "The answer", "in_steps": "Ones"}
WORDS = {"at_once": "The answer is", "in_steps": "Let's think step by step."}  # Kojima et al. 2205.11916
BUDGETS = 5  # powers of two below max_tokens that are asked where no --budgets are given
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Settings:
    """All that decides a figure beside the model and the rows; the flags' own names."""

    num_generations: int
    max_tokens: int
    sample_seed: int
    temperature: float
    top_p: float
    top_k: int
    system: str | None
    budgets: tuple[int, ...]
    at_least: tuple[int, ...]
    at_once: str
    in_steps: str
    steps_system: str | None
    answer: str
    answer_tokens: int
    go_on: str

    @classmethod
    def of(cls, given: Namespace) -> "Settings":
        values = {key: getattr(given, key) for key in cls.__dataclass_fields__}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    @property
    def words(self) -> Words:
        r"""The texts with \n as a line break, which is how one types it in a shell."""
        return Words(*(text.replace("\\n", "\n") for text in (self.at_once, self.in_steps, self.answer, self.go_on)))


def resolve(given: Namespace, tokenizer, prefixes: dict) -> None:
    """Give each of THINK_FLAGS a value: the user's, else the words of the stage's own `eval_prefixes` or tiny's, else
    those of the template's tags. UserError for numbers that cannot be."""
    tags, tiny = think.tags_of(tokenizer), given.data == "tiny"
    known = {"at_once": prefixes.get(AT_ONCE), "in_steps": prefixes.get(IN_STEPS)}
    usual = TINY_WORDS if tiny else {**WORDS, "in_steps": ""} if tags else WORDS
    opening = given.at_once if given.at_once is not None else known["at_once"] or usual["at_once"]
    closing = tags.closing.replace("\n", "\\n") if tags else " " if tiny else "\\n\\n"
    most = given.max_tokens.bit_length() - 1 - (given.max_tokens.bit_count() == 1)
    defaults = {
        "budgets": [0, *(2**power for power in range(max(0, most - BUDGETS + 1), most + 1))], "at_least": [],
        "at_once": opening, "in_steps": known["in_steps"] or usual["in_steps"], "answer": closing + opening,
        "answer_tokens": min(ANSWER_TOKENS, given.max_tokens), "go_on": " Wait",
    }  # fmt: skip
    for key, value in defaults.items():
        if getattr(given, key) is None:
            setattr(given, key, value)
    for key, least in (("budgets", 0), ("at_least", 1)):
        wrong = [value for value in getattr(given, key) if not least <= value <= given.max_tokens]
        if wrong:
            raise UserError(f"--{key}: found {wrong[0]}, expected {least} to {given.max_tokens}, the most tokens that "
                            "a reply may have (--max_tokens)")  # fmt: skip
    if given.answer_tokens < 1:
        raise UserError(f"--answer_tokens: found {given.answer_tokens}, expected 1 or more")
    if given.at_least and not given.go_on.strip():
        raise UserError("--go_on: found an empty text, and --at_least needs a word that thoughts go on with")


class Thinker:
    """Asks one model the same rows in every way."""

    def __init__(self, subject, rows: list[dict], settings: Settings):
        self.subject, self.settings, self.tokenizer = subject, settings, subject.tokenizer
        self.frame = Frame.of(self.tokenizer, settings.words)
        self.stops = stop_ids(self.tokenizer, subject.model)
        asked = [{**with_system(row, settings.system), "row": index} for index, row in enumerate(rows)]
        frame = self.frame
        forced = max(len(frame.in_steps) + len(frame.answer), len(frame.at_once)) + len(frame.go_on)
        room = settings.max_tokens + settings.answer_tokens + forced + max(settings.at_least, default=0)
        sizes = [max(len(self._ids(row)), len(self._ids(row, steps=True))) for row in asked]
        self.rows, longest = fit_prompts(subject.study, subject.model, asked, sizes, room)
        subject.longest = max(subject.longest, longest)

    def _ids(self, row: dict, steps: bool = False) -> list[int]:
        own = self.settings.steps_system if steps else None
        return prompt_ids(self.tokenizer, with_system(row, own))

    def replies(self, n: int, temperature: float) -> dict[str, list[Completion]]:
        """label -> n replies to each row, side by side. The order is that of the tables."""
        has, frame, engine = self.settings, self.frame, self.subject.engine
        most = Sampling(n, has.max_tokens, tuple(sorted(self.stops)), temperature, has.top_p, has.top_k)
        short = Sampling(n, has.answer_tokens, most.stop_ids, temperature, has.top_p, has.top_k)
        plain, steps = ([self._ids(row, steps) for row in self.rows] for steps in (False, True))
        each = [ids for ids in steps for _ in range(n)]
        found = {AT_ONCE: think.begin(engine, plain, frame.at_once, short, has.sample_seed)}
        thoughts = think.begin(engine, steps, frame.in_steps, most, has.sample_seed)
        for budget in sorted(set(has.budgets) - {0}):  # without thoughts it is at once
            found[f"at most {budget}"] = think.within(engine, frame, each, thoughts, budget, short, has.sample_seed)
        found[IN_STEPS] = thoughts
        for least in sorted(set(has.at_least)):
            found[f"at least {least}"] = think.at_least(engine, frame, each, thoughts, least, most, has.sample_seed)
        if frame.in_steps or has.steps_system is not None:
            found[FREE] = engine.generate(plain, most, has.sample_seed)
        return found

    def right(self, replies: dict[str, list[Completion]], n: int) -> dict[str, list[list[float]]]:
        """label -> 1.0 or 0.0 of each reply, by prompt. With tags what counts stands behind the thoughts."""
        rewards, found = load_rewards(["correct"], []), {}
        rows = [row for row in self.rows for _ in range(n)]
        for label, completions in replies.items():
            said = [self._answer(label, completion) for completion in completions]
            rollouts = Rollouts(rows, [[]] * len(rows), said, n)
            found[label] = by_prompt(call_rewards(rewards, rollouts, self.tokenizer)["correct"], n)
        return found

    def _answer(self, label: str, completion: Completion) -> Completion:
        start = self.frame.end_of_thoughts(completion) if self.frame.tags and label != AT_ONCE else 0
        return Completion(completion.ids[start:], [], completion.stop)

    def parts(self, label: str, replies: list[Completion]) -> list[think.Parts]:
        return [think.parts(self.frame, reply, label == AT_ONCE) for reply in replies]


def measure(subject, rows: list[dict], settings: Settings) -> Found:
    """Ask and judge. UserError for rows without an answer."""
    check_columns(rows, "think")
    thinker, n = Thinker(subject, rows, settings), settings.num_generations
    subject.study.note(f"{len(thinker.rows)} prompts, {n} replies and one at temperature 0 in each way to think")
    greedy = thinker.replies(1, 0.0)
    sampled = thinker.replies(n, settings.temperature) if settings.temperature > 0 else greedy
    n = n if settings.temperature > 0 else 1
    found = Found(rows=[row["row"] for row in thinker.rows])
    right, first = thinker.right(sampled, n), thinker.right(greedy, 1)
    curve = []
    for label, replies in sampled.items():
        point = _point(thinker, label, replies, n) | {"greedy tokens": _mean_length(greedy[label], 1)}
        columns = {f"pass@{k}": [pass_at_k(round(sum(g)), n, k) for g in right[label]] for k in powers(n)}
        columns["greedy"] = [group[0] for group in first[label]]
        point |= {name: measured(column, "%") for name, column in columns.items()}
        for name in dict.fromkeys(["pass@1", "greedy", f"pass@{n}"]):
            found.by_row[f"{name}, {label}"] = columns[name]
        found.by_row[f"reply length, {label}"] = [fmean(map(_length, g)) for g in by_prompt(replies, n)]
        curve.append(point)
    found.by_row = dict(sorted(found.by_row.items(), key=lambda item: _place(item[0])))
    found.metrics = {
        name: measured(column, "tokens" if name.startswith("reply length") else "%")
        for name, column in found.by_row.items()
    }
    _differences(found, curve)
    found.samples = _samples(thinker, sampled, right, n)
    found.more = {**asdict(settings), "engine": subject.engine.name, "stop_ids": list(thinker.stops), "curve": curve}
    return found


def _point(thinker: Thinker, label: str, replies: list[Completion], n: int) -> dict:
    spent = thinker.parts(label, replies)
    means = {name: fmean(getattr(each, name) for each in spent) for name in ("thinking", "forced", "answer")}
    opening = 0 if label == FREE else len(thinker.frame.at_once if label == AT_ONCE else thinker.frame.in_steps)
    return {
        "label": label,
        "tokens": _mean_length(replies, n),
        **means,
        "interrupted": fmean(float(each.forced > opening) for each in spent),
        "ended": fmean(float(reply.stop == "stop") for reply in replies),
    }


def _length(completion: Completion) -> int:
    return len(completion.ids)


def _mean_length(replies: list[Completion], n: int) -> dict:
    return measured([fmean(map(_length, group)) for group in by_prompt(replies, n)], "tokens")


def _place(name: str) -> int:
    """By figure first, pass@1 before the others; within a figure as the ways were asked."""
    return ["pass@1", "greedy"].index(name.partition(",")[0]) if name.startswith(("pass@1,", "greedy")) else 2


def _differences(found: Found, curve: list[dict]) -> None:
    """Adds what each way changes against answering at once, paired over prompts: to the points, pass@1 to metrics."""
    for name in ("pass@1", "greedy"):
        start = found.by_row[f"{name}, {AT_ONCE}"]
        for point in curve[1:]:
            column = found.by_row[f"{name}, {point['label']}"]
            gaps = [100 * (new - old) for new, old in zip(column, start, strict=True)]
            point[f"{name} less at once"] = difference(gaps, "points")
            if name == "pass@1":
                found.metrics[f"{name}, {point['label']} less at once"] = point[f"{name} less at once"]


def _samples(thinker: Thinker, sampled: dict, right: dict, n: int) -> list[dict]:
    """The first reply to the first prompt in every way, and to the second."""
    samples = []
    for place in range(min(2, len(thinker.rows))):
        row = thinker.rows[place]
        for label, replies in sampled.items():
            reply, spent = replies[place * n], thinker.parts(label, replies[place * n : place * n + 1])[0]
            text = decode(thinker.tokenizer, reply.ids, thinker.stops)
            samples.append(
                {"row": row["row"], "prompt": prompt_text(row["prompt"]), "reply": text, "answer": row["answer"],
                 "way": label, "right": right[label][place][0] == 1, **asdict(spent), "why": "one of the first"}
            )  # fmt: skip
    return samples


# --- shown


def lines(result) -> list[str]:
    """A table: a row a way to reply."""
    name, curve = result.target.name, result.found.more["curve"]
    last = [key for key in curve[0] if key.startswith("pass@")][-1]
    rows = [[name, "tokens", "thought", "put", "answer", "greedy", "pass@1", last, "pass@1 less at once"]]
    for point in curve:
        change = point.get("pass@1 less at once")
        rows.append([
            point["label"], shown(point["tokens"], interval=False),
            *(f"{point[key]:.1f}" for key in ("thinking", "forced", "answer")),
            *(shown(point[key], interval=key == "pass@1") for key in ("greedy", "pass@1", last)),
            "" if change is None else shown(change),
        ])  # fmt: skip
    return aligned([row[:7] + row[8:] if last == "pass@1" else row for row in rows])


EXPLAINED = (
    "tokens a reply: thought, put there (openings, the answer's after a budget, words to go on), and from the answer "
    "on; brackets: 95 % intervals over prompts; differences in points, paired"
)
