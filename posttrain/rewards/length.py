"""Rewards of length: `length` prefers the shorter of the right replies, `overlong` punishes replies near the limit.

In: token ids of completions, for `length` also what its measure of rightness reads (the column `answer`). Out: a
number each, or None where rightness does not apply. In a YAML:

    reward_funcs: [correct, length, overlong]
    reward_options: {length: {of: correct}, overlong: {max_length: 512, cache: 128}}
"""

from posttrain.errors import UserError
from posttrain.rewards.options import bad_option, number
from posttrain.rewards.text import groups, own_tokens

LEAST = -0.5  # what a wrong reply gets, and the longest right one


def length_reward(
    prompts, completions, completion_ids, *, of: str = "correct", right: float = 1.0, **columns
) -> list[float | None]:
    """0.5 - (l - shortest) / (longest - shortest) for the right replies to a prompt, -0.5 for wrong ones.

    The length reward of Kimi k1.5 (2501.12599, section 2.3.3), with shortest and longest taken over the right replies
    alone; 0 where these are all of one length. The paper's min(0, ...) for wrong replies prefers the shorter of two
    wrong ones; here a wrong reply gains nothing by being short. None where `of` says None.

    Args:
        completion_ids: N lists of token ids. The column `completion_mask`, where there is one, leaves tools' text out.
        of: the reward function that says what is right: a short name or a dotted path; it gets all columns.
        right: a score of `of` from which on a reply is right.

    Raises:
        UserError: `of` is unknown or this function itself; `right` is no number.
    """
    from posttrain.rewards import load_reward

    number("length", "right", right)
    if not isinstance(of, str) or of == "length":
        raise bad_option("length", "of", of, "the name of a reward that tells right from wrong, such as correct")
    measure = load_reward(of)
    if not completions:
        return []
    scores = measure(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    sizes = [sum(map(len, turns)) for turns in own_tokens(completion_ids, columns.get("completion_mask"))]
    rewards: list[float | None] = [None if score is None else LEAST for score in scores]
    for members in groups(prompts, columns.get("prompt_ids")):
        good = [i for i in members if scores[i] is not None and scores[i] >= right]
        shortest, longest = min((sizes[i] for i in good), default=0), max((sizes[i] for i in good), default=0)
        for i in good:
            rewards[i] = 0.5 - (sizes[i] - shortest) / (longest - shortest) if longest > shortest else 0.0
    return rewards


def overlong_reward(
    prompts, completions, completion_ids, *, max_length: int | None = None, cache: int | None = None, **columns
) -> list[float]:
    """DAPO's soft overlong punishment (2503.14476, equation 13): 0 up to max_length - cache tokens, then falling in a
    straight line to -1 at max_length, -1 beyond.

    Raises:
        UserError: max_length or cache is missing or no integer above 0, or cache is more than max_length.
    """
    if max_length is None or cache is None:
        raise UserError(
            "reward overlong needs both its limits: reward_options: {overlong: {max_length: 512, cache: 128}}, where "
            "max_length is max_completion_length and the last `cache` tokens are punished"
        )
    number("overlong", "max_length", max_length, low=1, whole=True)
    number("overlong", "cache", cache, low=1, high=max_length, whole=True)
    return [min(0.0, max(-1.0, (max_length - cache - len(ids)) / cache)) for ids in completion_ids]
