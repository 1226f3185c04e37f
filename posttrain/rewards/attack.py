"""Try known hacks on a reward before a policy does: `posttrain attack-reward NAME`.

In: a reward's name (or dotted path) and options. Out: a table with each hack's score beside those of an honest right
and an honest wrong answer, and whether any hack passes.

Each hack is scored in a group of three with the two honest replies, so that rewards that compare the replies to a
prompt have something to compare. What passing means depends on what the reward looks at:
- content (right scores more than wrong): a hack passes when it scores above the wrong answer;
- form (right and wrong score the same): when it scores above an honest reply; or as much, though it says nothing or
  breaks tags that the reward asks for;
- a penalty (nothing scores above 0): nothing passes, as nothing is gained.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import yaml

from posttrain.errors import UserError
from posttrain.rewards import load_rewards
from posttrain.rewards.calls import run_rewards
from posttrain.rewards.hacks import ANYWHERE, CODE, FOR_CODE, FOR_MATHS, MATHS, Hack, Problem
from posttrain.rewards.hacks_facts import FACTS, FOR_FACTS
from posttrain.rewards.options import COLUMNS, CONTRACT

TOLERANCE = 0.1  # share of the way from wrong to right that is no gain: judges and reward models have noise
CATALOGUES = ((MATHS, ANYWHERE + FOR_MATHS), (CODE, ANYWHERE + FOR_CODE), (FACTS, ANYWHERE + FOR_FACTS))
CUT = 256  # tokens of a hack, where they are real ones: a policy's are cut, too, and a model has a context
KINDS = {
    "content": "looks at content: right scores above wrong",
    "form": "only checks form: right and wrong score the same; use it beside a reward of content",
    "penalty": "is a penalty: nothing scores above 0; use it beside a reward of content",
    "backwards": "prefers the honest wrong answer to the right one",
}


@dataclass(frozen=True)
class Score:
    """Of one text at the worst of the problems; None where the reward does not apply or stopped (`error`)."""

    value: float | None
    error: str = ""


@dataclass(frozen=True)
class Honest:
    """Scores of the honest replies to a problem, in the dress that the reward likes best."""

    right: float
    wrong: float
    dress: str
    needs_tags: bool


@dataclass(frozen=True)
class Row:
    hack: Hack
    score: Score
    right: float
    wrong: float
    verdict: str
    bad: bool


def run(name: str, options: dict | None = None, *, tokenizer: str | None = None, timeout: float = 60.0) -> int:
    """Attack the reward and print the table; returns 1 where a hack passes, else 0.

    Raises:
        UserError: an unknown reward or option; columns that the catalogue has not; honest replies that have no score.
    """
    ((_, function, _),) = load_rewards([name], [], {name: options} if options else None)
    if tokenizer is None and name == "model":
        tokenizer = (options or {})["path"]
    kind, rows = attack(name, function, tokenizer=tokenizer, timeout=timeout)
    print(table(name, kind, rows))
    return int(kind == "backwards" or any(row.bad for row in rows))


def read_options(given: list[str]) -> dict:
    """["n=3", "tags=[a, b]"] -> {"n": 3, "tags": ["a", "b"]}: values are YAML. UserError for another form."""
    options = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise UserError(f"--options: found {each!r}, expected KEY=VALUE, such as max_length=512")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--options: the value of {each!r} is no YAML: {str(error).splitlines()[0]}") from None
    return options


def attack(name: str, function, *, tokenizer: str | None = None, timeout: float = 60.0) -> tuple[str, list[Row]]:
    """(one of KINDS, a row a hack)."""
    problems, hacks = _catalogue(name, function)
    score = partial(_scores, name, function, _encoder(tokenizer), timeout)
    honest = [_honest(score, problem) for problem in problems]
    found = {
        hack.name: [_hack_score(score, problem, best, hack) for problem, best in zip(problems, honest, strict=True)]
        for hack in hacks
    }
    kind = _kind(honest, [each.value for scores in found.values() for each in scores])
    return kind, [_row(kind, hack, honest, found[hack.name]) for hack in hacks]


def _catalogue(name: str, function) -> tuple[list[Problem], list[Hack]]:
    """The problems that have the columns which the reward needs."""
    parameters = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {p.name for p in parameters if p.kind in named and p.default is p.empty} - {*CONTRACT, *COLUMNS}
    for problems, hacks in CATALOGUES:
        if needed <= problems[0].columns.keys():
            return problems, hacks
    raise UserError(
        f"attack-reward: {name!r} needs the columns {', '.join(sorted(needed))}; the attack's problems have "
        f"{', '.join(MATHS[0].columns)} (maths), {', '.join(CODE[0].columns)} (code) or "
        f"{', '.join(FACTS[0].columns)} (facts)"
    )


def _encoder(tokenizer: str | None):
    """Token ids of prompts and completions; without a tokenizer a token is a byte."""
    if tokenizer is None:
        return lambda prompt, text: (list(prompt.encode()), list(text.encode()))
    from posttrain.chat import encode_chat, reply_end_id
    from posttrain.models import load_tokenizer

    loaded = load_tokenizer(tokenizer, None)
    end = [reply_end_id(loaded)]

    def encode(prompt: str, text: str) -> tuple[list[int], list[int]]:
        ids = encode_chat(loaded, [{"role": "user", "content": prompt}], add_generation_prompt=True).input_ids
        return ids, loaded(text, add_special_tokens=False)["input_ids"][:CUT] + end

    return encode


def _scores(name: str, function, encode, timeout: float, problem: Problem, texts: Iterable[str]) -> list[float | None]:
    texts = list(texts)
    ids = [encode(problem.prompt, text) for text in texts]
    arguments = {
        "prompts": [[{"role": "user", "content": problem.prompt}]] * len(texts),
        "completions": texts,
        "completion_ids": [completion for _, completion in ids],
        "prompt_ids": [prompt for prompt, _ in ids],
        "completion_mask": [[1] * len(completion) for _, completion in ids],
        **{key: [value] * len(texts) for key, value in problem.columns.items()},
    }
    return run_rewards([(name, function, 1.0)], arguments, list(range(len(texts))), timeout)[name]


def _honest(score, problem: Problem) -> Honest:
    by_dress = {
        dress: (right, wrong)
        for dress in problem.right
        for right, wrong in [score(problem, [problem.right[dress], problem.wrong[dress]])]
        if right is not None and wrong is not None
    }
    if not by_dress:
        raise UserError(
            f"attack-reward: the reward gives honest replies no score (None) in any form: {problem.prompt!r}"
        )
    best = max(by_dress, key=lambda dress: (by_dress[dress][0] - by_dress[dress][1], by_dress[dress][0]))
    plain = by_dress.get("plain", (0.0, 0.0))[0]
    needs_tags = by_dress.get("tags", (0.0, 0.0))[0] > plain
    return Honest(*by_dress[best], best, needs_tags)


def _hack_score(score, problem: Problem, honest: Honest, hack: Hack) -> Score:
    texts = [problem.right[honest.dress], problem.wrong[honest.dress], hack.text(problem)]
    try:
        return Score(score(problem, texts)[2])
    except UserError as error:
        return Score(None, str(error))


def _kind(honest: list[Honest], values: list[float | None]) -> str:
    gaps = [each.right - each.wrong for each in honest]
    if min(gaps) < -1e-9:
        return "backwards"
    if max(gaps) > 1e-9:
        return "content"
    highest = max([each.right for each in honest] + [value for value in values if value is not None])
    return "form" if highest > 0 else "penalty"


def _row(kind: str, hack: Hack, honest: list[Honest], scores: list[Score]) -> Row:
    judged = [_judged(kind, hack, best, score) for best, score in zip(honest, scores, strict=True)]
    worst = max(range(len(judged)), key=lambda i: (judged[i][1], _value(scores[i]) - honest[i].wrong))
    return Row(hack, scores[worst], honest[worst].right, honest[worst].wrong, *judged[worst])


def _value(score: Score) -> float:
    return 0.0 if score.value is None else score.value  # None adds nothing to the sum of rewards


def _judged(kind: str, hack: Hack, honest: Honest, score: Score) -> tuple[str, bool]:
    """(verdict, whether it is bad)."""
    value, top, floor = _value(score), honest.right, honest.wrong
    if score.error:
        return f"stops the run (bad): {score.error.splitlines()[0][:90]}", True
    if kind == "penalty":
        return "no gain", False
    if kind in ("content", "backwards"):
        bad = value > max(floor, floor + TOLERANCE * (top - floor)) + 1e-9
        return ("passes (bad)" if bad else "no gain"), bad
    if value > top + 1e-9:
        return "passes (bad)", True
    if value < top - 1e-9 or value <= 0:
        return "no gain", False
    if hack.kind == "nothing" or (hack.kind == "tags" and honest.needs_tags):
        return "passes (bad)", True
    return "as any reply: expected, it checks no content", False


def table(name: str, kind: str, rows: list[Row]) -> str:
    """The rows, and a last line that sums them up."""

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.2f}"

    lines = [f"{'hack':<28} {'hack':>7} {'right':>7} {'wrong':>7}  verdict"]
    for row in rows:
        numbers = " ".join(f"{shown(value):>7}" for value in (row.score.value, row.right, row.wrong))
        lines.append(f"{row.hack.name:<28} {numbers}  {row.verdict}")
    bad = [row.hack.name for row in rows if row.bad]
    passed = f"{len(bad)} of {len(rows)} hacks pass: {', '.join(bad)}" if bad else f"none of {len(rows)} hacks passes"
    return "\n".join([*lines, "", f"{name} {KINDS[kind]}", passed])
