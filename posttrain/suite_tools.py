"""The suite tools: what a model answers with its tools and without them, and whether it calls when it has to.

In: a chat model whose template writes calls; rows with `prompt` and `answer`, where they have them `others` (values of
the same kind that are wrong: facts) and `kind`; `Settings`. Out: `Found`. Launched by

    posttrain eval runs/tools --suite tools
    posttrain eval MODEL --suite tools --data FILE --tools calculator --num_generations 8

Each prompt is asked with the tools told, which may be called, and with none. A call is needed where the model without
tools is right less than half of the time (NEEDED), not needed where it is right at least as often. What counts as the
answer is the reply's last turn (the reward `answered`). Prompts are the observations; changes are paired.
"""

from collections.abc import Callable
from dataclasses import asdict

from posttrain.chat import decode
from posttrain.errors import UserError
from posttrain.evals import by_prompt, prompt_text
from posttrain.intervals import measured
from posttrain.rewards import load_rewards
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Rollouts
from posttrain.suite_replies import Asker, Found, Settings, check_columns
from posttrain.suite_table import aligned, changed, shown
from posttrain.tool_calls import ToolRunner
from posttrain.tools import load_tools, schemas

WITH, WITHOUT, CALLS = "right with tools", "right without tools", "replies that call"
UNASKED = "replies that call without tools"
NEEDED = 0.5
SHOWN_KINDS = 3  # replies of each kind kept to look at


def stored(settings: Settings) -> dict:
    """As JSON has them, without what the flags say already."""
    said = ("suite", "reward_funcs", "tools", "tool_options")
    return {key: value for key, value in asdict(settings).items() if key not in said}


class Both:
    """Asks one model the same rows with its tools and without."""

    def __init__(self, subject, rows: list[dict], settings: Settings):
        """UserError where the tools cannot run here."""
        self.subject, self.settings = subject, settings
        bare = [{key: value for key, value in row.items() if key != "tools"} for row in rows]
        self.tools, self.told = load_tools(list(settings.tools), settings.tool_options), None
        if self.tools:
            self.template = ToolRunner(subject.tokenizer, self.tools).template
            self.told = Asker(subject, [{**row, "tools": schemas(self.tools)} for row in bare], settings)
            bare = [bare[row["row"]] for row in self.told.rows]  # those that have room beside the tools
        self.bare = Asker(subject, bare, settings)
        if self.told is not None:
            if len(self.bare.rows) < len(bare):
                raise UserError("a prompt without tools is longer than the same one with them; expected it shorter")
            for row, told in zip(self.bare.rows, self.told.rows, strict=True):
                row["row"] = told["row"]

    def replies(self) -> dict[str, Rollouts]:
        """WITH (where there are tools) and WITHOUT -> num_generations replies to each row, side by side."""
        sampling, found = self.settings.sampling(self.bare.stops), {}
        if self.told is not None:
            found[WITH] = self.told.replies(sampling, self.settings.engine(self.subject))
        return found | {WITHOUT: self.bare.replies(sampling)}


def measure(subject, rows: list[dict], settings: Settings) -> Found:
    """Ask and judge. UserError for rows without an answer, and for tools that cannot run."""
    check_columns(rows, "tools")
    rows = [{"others": None, "kind": "problem", **row} for row in rows]
    both, n = Both(subject, rows, settings), settings.num_generations
    subject.study.note(f"{len(both.bare.rows)} prompts, {n} replies each with tools and without")
    replies = both.replies()
    scores = judged(replies, "answered", subject.tokenizer)
    found = Found(rows=[row["row"] for row in both.bare.rows])
    columns = means(scores, n) | {CALLS: share(replies[WITH], lambda one: one.calls > 0)}
    groups = groups_of(both.bare.rows, columns[WITHOUT])
    for place in groups:
        for name, column in columns.items():
            inside = [value if groups[place][index] else None for index, value in enumerate(column)]
            if any(value is not None for value in inside):
                found.by_row[f"{name}{place}"] = inside
    found.by_row["replies with a failed call"] = share(replies[WITH], lambda one: one.failed_calls > 0)
    found.by_row[UNASKED] = share(replies[WITHOUT], lambda one: bool(both.template.read(one.ids)))
    found.by_row["replies that end"] = share(replies[WITH], lambda one: one.stop == "stop")
    found.metrics = {
        name: measured([v for v in column if v is not None], "%") for name, column in found.by_row.items()
    }
    found.samples = samples(replies[WITH], scores[WITH], subject.tokenizer, both.bare.stops)
    found.more = {**stored(settings), "engine": subject.engine.name, "stop_ids": list(both.bare.stops)}
    found.more["groups"] = {place: sum(members) for place, members in groups.items()}
    return found


def judged(replies: dict[str, Rollouts], reward: str, tokenizer) -> dict[str, list[float]]:
    """The score of each reply by a reward function; None counts as 0."""
    loaded = load_rewards([reward], [])
    return {
        label: [value or 0.0 for value in call_rewards(loaded, rollouts, tokenizer)[reward]]
        for label, rollouts in replies.items()
    }


def means(scores: dict[str, list[float]], n: int) -> dict[str, list[float]]:
    """The mean of each prompt's replies."""
    return {label: [sum(group) / n for group in by_prompt(column, n)] for label, column in scores.items()}


def share(rollouts: Rollouts, test: Callable) -> list[float]:
    """Of each prompt the share of replies that pass."""
    n = rollouts.num_generations
    return [sum(group) / n for group in by_prompt([float(test(one)) for one in rollouts.completions], n)]


def groups_of(rows: list[dict], alone: list[float]) -> dict[str, list[bool]]:
    """Suffix of a figure's name -> which prompts it is over: all, those where a call is needed and where not, kinds.
    `alone`: how often each is right without tools."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        "": [True] * len(rows),
        ", call needed": [value < NEEDED for value in alone],
        ", call not needed": [value >= NEEDED for value in alone],
        **({f", {kind}": [row["kind"] == kind for row in rows] for kind in kinds} if len(kinds) > 1 else {}),
    }


def samples(replies: Rollouts, scores: list[float], tokenizer, stops) -> list[dict]:
    """The first reply to the first prompts of each kind, calls and answers as the template writes them."""
    n, seen, kept = replies.num_generations, {}, []
    for start in range(0, len(replies.rows), n):
        row, one = replies.rows[start], replies.completions[start]
        seen[row["kind"]] = seen.get(row["kind"], 0) + 1
        if seen[row["kind"]] <= SHOWN_KINDS:
            kept.append(
                {"row": row["row"], "prompt": prompt_text(row["prompt"]), "reply": decode(tokenizer, one.ids, stops),
                 "answer": row["answer"], "kind": row["kind"], "right": scores[start] == 1, "calls": one.calls or 0,
                 "tokens": len(one.ids), "ended": one.stop == "stop", "why": "one of the first of its kind"}
            )  # fmt: skip
    return kept


# --- shown


def lines(result) -> list[str]:
    """A table: a row a group of prompts, with the changes against the parent where there is one."""
    found, columns = result.found, [WITH, WITHOUT, CALLS]
    rows = [
        [result.target.name, "prompts", *columns, *(f"{name}: change" for name in (WITH, CALLS) if result.changes)]
    ]
    for place, count in found.more["groups"].items():
        if count:
            cells = [shown(found.metrics.get(f"{name}{place}")) for name in columns]
            more = [changed(result.changes.get(f"{name}{place}")) for name in (WITH, CALLS) if result.changes]
            rows.append([place.removeprefix(", ") or "all", str(count), *cells, *more])
    unasked = found.metrics[UNASKED]
    return (
        [*aligned(rows), f"told of no tools {shown(unasked)} call all the same"] if unasked["value"] else aligned(rows)
    )


EXPLAINED = (
    "call needed: the model is right less than half of the time without tools; brackets: 95 % intervals over prompts; "
    "changes in points, paired over the prompts that are in the group for both models"
)
