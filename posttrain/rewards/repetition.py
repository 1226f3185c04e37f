"""A penalty for saying the same again. In: token ids of completions. Out: a number from -max_penalty to 0 each.

reward_funcs: [correct, repetition]
reward_options: {repetition: {n: 8, max_penalty: 0.5}}
"""

from itertools import groupby

from posttrain.rewards.options import number
from posttrain.rewards.text import own_tokens, reply_text


def repetition_reward(
    prompts,
    completions,
    completion_ids=None,
    *,
    n: int = 8,
    max_penalty: float = 1.0,
    max_run: int = 16,
    completion_mask=None,
    **columns,
) -> list[float]:
    """-max_penalty times the share of n-grams that stood there before, 1 - distinct / all (2502.03373, appendix C.2),
    or the share of tokens in runs of one token longer than `max_run`, whichever is more; 0 where nothing repeats.

    N-grams are of the model's own tokens (words, where no ids are given), and reach over no tool's answer. A run is
    counted apart, since one of fewer than n tokens holds no n-gram and one of n + 1 only two.

    Args:
        n: length of an n-gram in tokens. Small tokenizers and table-like replies want a larger one.
        max_run: so many equal tokens in a row are fine.

    Raises:
        UserError: an option out of its range.
    """
    number("repetition", "n", n, low=1, whole=True)
    number("repetition", "max_penalty", max_penalty, low=0)
    number("repetition", "max_run", max_run, low=1, whole=True)
    if completion_ids is None:
        turns = [[reply_text(completion).lower().split()] for completion in completions]
    else:
        turns = own_tokens(completion_ids, completion_mask)
    return [0.0 - max_penalty * max(_repeated(pieces, n), _in_runs(pieces, max_run)) for pieces in turns]


def _repeated(pieces: list[list], n: int) -> float:
    grams = [tuple(piece[i : i + n]) for piece in pieces for i in range(len(piece) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _in_runs(pieces: list[list], max_run: int) -> float:
    runs = [len(list(run)) for piece in pieces for _, run in groupby(piece)]
    return sum(run for run in runs if run > max_run) / sum(runs) if runs else 0.0
