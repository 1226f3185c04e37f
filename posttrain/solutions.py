"""Sampled solutions: which are right, and which of the right ones a model is taught.

In: rewards of sampled completions, right solutions by problem, a `RejectionConfig`. Out: the chosen ones. Pure
functions; sampling and training are in posttrain/rejection.py.
"""

import random
import unicodedata
from collections import Counter
from dataclasses import dataclass

from posttrain.args import arg, at_least, one_of
from posttrain.errors import UserError
from posttrain.rl.rollout import sample_seed


@dataclass
class RejectionConfig:
    """Rejection sampling: rounds, what is kept, batches"""

    tools, tool_options = (), None  # no keys: `encode_prompts` asks what prompts are told of, and there is nothing
    num_rounds: int = arg(3, help="rounds of sampling and training")
    num_prompts: int | None = arg(None, help="problems of a round, over all processes; none = all of them")
    num_generations: int = arg(15, help="solutions sampled of each problem")
    max_completion_length: int = arg(64, help="solutions are cut at so many tokens; a cut one is never kept")
    max_prompt_length: int | None = arg(
        None, help="longer prompts are left out and counted; none = what the model's context has room for"
    )
    temperature: float = arg(1.0, help="sampling temperature")
    reward_funcs: list[str] = arg(["correct"], help="a solution is right where all that apply reach the threshold")
    reward_options: dict = arg({}, help="keywords of reward functions by name: {overlong: {cache: 16}}")
    threshold: float = arg(1.0, help="least value of a reward function for a right solution")
    max_kept: int = arg(4, help="right solutions of a problem that are learned from, at most")
    choice: str = arg(
        "shortest", help="which of them: shortest (in tokens), common (sampled most often, then shortest) or random"
    )
    distinct: bool = arg(True, help="of solutions with the same text but for space and case, keep one")
    pool: str = arg("round", help="learn from this round's solutions, or from those of all rounds so far")
    start_from: str = arg("last", help="a round trains the last one's model, or the first: the one that was given")
    num_epochs: int = arg(1, help="passes over a round's kept solutions")
    batch_size: int = arg(32, help="solutions of one update, over all processes")
    max_tokens_per_microbatch: int = arg(8192, help="tokens of one forward and backward; memory, not mathematics")

    def __post_init__(self):
        one_of(self, choice=("shortest", "common", "random"), pool=("round", "all"), start_from=("last", "first"))
        at_least(self, num_rounds=1, num_prompts=1, num_generations=1, max_completion_length=1, max_prompt_length=1)
        at_least(self, max_kept=1, num_epochs=1, batch_size=1, max_tokens_per_microbatch=1)
        if not self.temperature > 0:
            raise UserError(f"temperature: found {self.temperature}, expected above 0: greedy solutions are all alike")
        if not self.reward_funcs:
            raise UserError("reward_funcs: found [], expected functions that say which solutions are right")


@dataclass(frozen=True)
class Solution:
    """A right solution as it was sampled: tokens, and 1 in `mask` for those that the model wrote (None = all)."""

    ids: list[int]
    mask: list[int] | None
    text: str


@dataclass
class Problem:
    """What one problem's samples came to; `row` is its place among the prompts."""

    row: int
    right: int
    cut: int
    tokens: int  # of its completions
    solutions: list[Solution]  # the right ones that ended by themselves


def normalised(text: str) -> str:
    """Text for comparing solutions: compatibility forms, space and case do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def choose(solutions: list[Solution], config: RejectionConfig, seed: int) -> list[Solution]:
    """At most max_kept of a problem's right solutions; of equal texts the shortest in tokens stands for all."""
    ordered = sorted(solutions, key=lambda solution: len(solution.ids))  # stable: earlier samples first
    times = Counter(normalised(each.text) for each in ordered)
    if config.distinct:
        first = {}
        for each in ordered:
            first.setdefault(normalised(each.text), each)
        ordered = list(first.values())
    if config.choice == "random":
        return random.Random(seed).sample(ordered, min(config.max_kept, len(ordered)))
    if config.choice == "common":
        ordered.sort(key=lambda each: -times[normalised(each.text)])
    return ordered[: config.max_kept]


def are_right(by_name: dict[str, list[float | None]], threshold: float, rows: list[dict]) -> list[bool]:
    """Whether each completion reaches the threshold by every reward function that applies (is not None).

    UserError naming the row where none applies: nothing then says what is right.
    """
    verdicts = []
    for index, values in enumerate(zip(*by_name.values(), strict=True)):
        known = [value for value in values if value is not None]
        if not known:
            row = rows[index].get("row", index)
            raise UserError(f"no reward function applies to row {row}: all returned None ({', '.join(by_name)})")
        verdicts.append(min(known) >= threshold)
    return verdicts


def select(found: list[tuple[int, Solution]], config: RejectionConfig, seed: int) -> list[tuple[int, Solution]]:
    """The chosen solutions of every problem, by row."""
    by_row: dict[int, list[Solution]] = {}
    for row, solution in found:
        by_row.setdefault(row, []).append(solution)
    chosen = {row: choose(each, config, sample_seed(seed, row)) for row, each in sorted(by_row.items())}
    return [(row, solution) for row, each in chosen.items() for solution in each]


def mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
