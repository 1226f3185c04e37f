r"""The suite chat with a judge: a reward model's score of each reply, or win rates against another model.

In: what each model answered, and who decides. Out: more figures in the results. Launched by

    posttrain eval runs/tiny/ppo --suite chat --reward runs/tiny/reward
    posttrain eval runs/tiny/ppo --against runs/tiny/sft --suite chat --reward runs/tiny/reward
    posttrain eval runs/tiny/ppo --against runs/tiny/sft --suite chat --judge http://127.0.0.1:8000/v1 \
      --judge_model NAME

The first reply of each model to each prompt is compared. A reward model reads the texts under its own tokenizer and
template, so any two models can be compared; it scores a reply by itself, so no order can sway it, and equal scores
tie. A judge behind an OpenAI-compatible server reads each pair in both orders (posttrain/pairwise.py).
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from posttrain.errors import UserError
from posttrain.intervals import measured
from posttrain.pairwise import both_orders, win_rates
from posttrain.suite_settings import same_model

SCORE = "reward model"


class Comparison:
    """Measures a model (`one(target)`), then adds the scores under --reward and the win rates against --against.

    UserError for a --reward that is no reward model, an --against that cannot be asked, or prompts that only one of
    the models has room for.
    """

    def __init__(self, given, one: Callable):
        from posttrain.suite_settings import targets

        self.given, self.one = given, one
        self.scorer = Scorer(given.reward) if given.reward else None
        self.rival = None
        if given.against:
            (target, *others), _ = targets(given.against, given.suite)
            if others:
                raise UserError(f"--against: {given.against} is a run; expected one model, such as {target.path}")
            self.rival = self._scored(target)

    def __call__(self, target):
        if self.rival is None:
            return self._scored(target)[0]
        rival, theirs = self.rival
        if same_model(target.path, rival.target.path):
            return replace(rival, target=target)
        result, mine = self._scored(target)
        _add_win_rates(result, rival, self.given, mine, theirs)
        return result

    def _scored(self, target) -> tuple:
        """(result, score of each reply)."""
        result = self.one(target)
        if self.scorer is None:
            return result, []
        scores = self.scorer.scores(result.found)
        _add_score(result, scores)
        return result, scores


def _add_score(result, scores: list[float | None]) -> None:
    """The mean score: a prompt is one observation."""
    found, n = result.found, result.found.replies.num_generations
    groups = [[s for s in scores[start : start + n] if s is not None] for start in range(0, len(scores), n)]
    found.by_row[SCORE] = [sum(group) / len(group) if group else None for group in groups]
    known = [value for value in found.by_row[SCORE] if value is not None]
    if not known:
        raise UserError("--reward: all replies with their prompts are longer than the reward model's context")
    if len(known) < len(groups):
        result.conclusions.append(f"{len(groups) - len(known)} prompts are too long for the reward model: no score")
    found.metrics = {SCORE: measured(known), **found.metrics}


def _add_win_rates(result, rival, given, scores: list, rival_scores: list) -> None:
    mine, theirs = first_replies(result.found), first_replies(rival.found)
    shared = [row for row in mine if row in theirs]
    if not shared:
        raise UserError(f"--against: no prompt has room in both {result.target.path} and {rival.target.path}")
    name = rival.target.name
    if given.reward:
        a, b = by_first(result.found, scores), by_first(rival.found, rival_scores)
        outcomes = [outcome(a[row], b[row]) for row in shared]
        facts = {}
    else:
        prompts = [mine[row][0] for row in shared]
        texts = [mine[row][1] for row in shared], [theirs[row][1] for row in shared]
        outcomes, facts = both_orders(asyncio.run(_asked(prompts, *texts, given)))
    known = [(o, row) for o, row in zip(outcomes, shared, strict=True) if o is not None]
    if not known:
        raise UserError("--against: not one pair could be judged")
    lengths = [(len(mine[row][1]), len(theirs[row][1])) for _, row in known]
    rates = win_rates([o for o, _ in known], lengths, name)
    first = dict(list(rates.items())[:2])  # plain and length-controlled
    result.found.metrics = {**first, **result.found.metrics, **rates, **facts}
    result.conclusions.append(
        f"{result.target.name} against {name}: {len(known)} prompts, judged by {given.reward or given.judge_model}; "
        + ("a tie is an equal score" if given.reward else "both orders read; orders that contradict each other tie")
    )


def first_replies(found) -> dict[int, tuple[list[dict], str]]:
    """row -> (prompt's messages, the first reply's text)."""
    n = found.replies.num_generations
    return {
        row: (found.replies.rows[place * n]["prompt"], found.texts[place * n]) for place, row in enumerate(found.rows)
    }


def by_first(found, scores: list[float | None]) -> dict[int, float | None]:
    n = found.replies.num_generations
    return {row: scores[place * n] for place, row in enumerate(found.rows)}


def outcome(mine: float | None, theirs: float | None) -> float | None:
    """1 win, 0 loss, 0.5 tie; None where a reply has no score."""
    if mine is None or theirs is None:
        return None
    return 0.5 if mine == theirs else float(mine > theirs)


async def _asked(prompts: list, first: list[str], second: list[str], given) -> list[tuple]:
    from posttrain.rewards.judge import compare

    return await compare(
        prompts, first, second, base_url=given.judge, model=given.judge_model, api_key_env=given.judge_api_key_env,
        cache=given.judge_cache,
    )  # fmt: skip


class Scorer:
    """A reward model; scores are (score - mean) / std of its held-out rankings where its manifest has them."""

    def __init__(self, path: str):
        import transformers

        from posttrain.layouts import find_layout
        from posttrain.models import ModelConfig, load_scalar_model, load_tokenizer
        from posttrain.reward_eval import require_reward_model
        from posttrain.stage import read_manifest

        transformers.utils.logging.disable_progress_bar()
        require_reward_model(path, "--reward: ")
        self.model, self.tokenizer = load_scalar_model(ModelConfig(path)).eval(), load_tokenizer(path)
        metrics = (read_manifest(path) or {}).get("metrics", {})
        self.mean = metrics.get("score mean", {}).get("value", 0.0)
        self.std = metrics.get("score std", {}).get("value", 1.0)
        self.room = self.model.config.max_position_embeddings
        self.layout, _ = find_layout(self.model, self.room, ("packed", "padded"))

    def scores(self, found) -> list[float | None]:
        """Of each reply with its prompt; None where both are longer than the context. A reply that was sampled twice
        to one prompt is scored once; one that was cut off is read as if it had ended there."""
        from posttrain.ranking_forward import score_groups

        keys = [
            tuple(self._ids(row["prompt"], text)) for row, text in zip(found.replies.rows, found.texts, strict=True)
        ]
        unique = [key for key in dict.fromkeys(keys) if len(key) <= self.room]
        values = score_groups(self.model, [[list(key)] for key in unique], self.layout) if unique else []
        table = {key: (value[0] - self.mean) / self.std for key, value in zip(unique, values, strict=True)}
        return [table.get(key) for key in keys]

    def _ids(self, prompt: list[dict], text: str) -> list[int]:
        """Up to the token that closes the reply, as in training (ranking_rows.encode_rankings)."""
        from posttrain.chat import encode_chat, reply_end_id

        ids = encode_chat(self.tokenizer, [*prompt, {"role": "assistant", "content": text}]).input_ids
        end = reply_end_id(self.tokenizer)
        return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids
