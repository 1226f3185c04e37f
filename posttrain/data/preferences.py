r"""Sets of chosen and rejected or scored replies -> preference pairs, rankings, and dialogues for SFT.

In: Anthropic HH (Bai et al. 2022, arXiv 2204.05862; the Hub's Anthropic/hh-rlhf): whole dialogues
"\n\nHuman: ...\n\nAssistant: ..." under `chosen` and `rejected`. UltraFeedback (Cui et al. 2023, arXiv 2310.01377;
openbmb/UltraFeedback, and HuggingFaceH4/ultrafeedback_binarized of Tunstall et al. 2023, arXiv 2310.16944). Other
sets with a chosen and a rejected reply.
Out: {"prompt", "chosen", "rejected"} and, where the source has scores, "margin"; {"prompt", "completions", "ranks"};
{"messages"}.

    pairs = list(hh_pairs(map(json.loads, open("train.jsonl"))))

Published sets hold rows that state no preference (both replies are the same, one is empty, the dialogues part too
early). By default (`unusable="skip"`) their adapters leave these out whatever the policy, count them in `bad`, and
log how many; with "stop" they are refused as any bad row is.
"""

import re
from collections.abc import Iterable, Iterator
from math import isfinite

from posttrain.data.fields import (
    BadRow,
    adapt,
    alternating,
    expected_reasons,
    items,
    messages,
    text,
    text_or_none,
    turn,
)

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SCORES = ("overall_score", "fine-grained_score")


def hh_pairs(rows: Iterable[dict], *, unusable: str = "skip", bad=None) -> Iterator[dict]:
    """Yield {"prompt": messages ending in a user turn, "chosen": [assistant], "rejected": [assistant]}.

    Args:
        rows: pairs of dialogues.
        unusable: "skip" or "stop" for a row whose dialogues differ before the last reply or have the same one, hold
            an empty turn, or have roles that do not alternate.
        bad: the stage's BadRows.

    Raises:
        ValueError: a row without both columns or that does not start with "\\n\\nHuman:"; an unusable one with "stop".
    """
    return adapt(rows, _hh_pair, bad, expected=_hh_reasons(unusable), name="hh_pairs")


def hh_conversations(rows: Iterable[dict], *, unusable: str = "skip", bad=None) -> Iterator[dict]:
    """Yield {"messages"}: the chosen dialogue. `unusable`: an empty turn, or roles that do not alternate.

    Raises:
        ValueError: a row without `chosen`, or that does not start with "\\n\\nHuman:"; an unusable one with "stop".
    """
    return adapt(
        rows,
        lambda row: {"messages": _hh_replied(_hh_turns(row, "chosen"))},
        bad,
        expected=_hh_reasons(unusable),
        name="hh_conversations",
    )


def _hh_reasons(unusable: str) -> tuple[str, ...]:
    return expected_reasons(unusable, "unusable_pair", "empty_content", "repeated_role", "wrong_role")


def _hh_pair(row: dict) -> dict:
    chosen, rejected = _hh_turns(row, "chosen"), _hh_turns(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("unusable_pair", _parted(chosen, rejected))
    return _pair(_hh_replied(chosen)[:-1], chosen[-1:], _hh_replied(rejected)[-1:])


def _hh_replied(turns: list[dict]) -> list[dict]:
    if turns[-1]["role"] != "assistant":
        raise BadRow("wrong_role", "the roles do not alternate from Human to a last Assistant")
    return alternating(turns)


def _hh_turns(row: dict, key: str) -> list[dict]:
    dialogue = text(row, key)
    if not dialogue.startswith("\n\nHuman:"):
        raise BadRow("wrong_type", f"{key!r} is {dialogue!r:.80}, expected a dialogue that starts with '\\n\\nHuman:'")
    _, *parts = TURN.split(dialogue)  # role, text, role, text, ...
    return [turn(ROLES[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)]


def preference_pairs(
    rows: Iterable[dict],
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    unusable: str = "stop",
    bad=None,
) -> Iterator[dict]:
    """Yield {"prompt": messages, "chosen": [assistant], "rejected": [assistant]}, and "margin" where it is known.

    Replies may be strings, messages of one assistant turn, or whole conversations with one last reply each that they
    do not share; the prompt a string or messages, and none where the conversations hold it. A `system` column becomes
    the first turn. The margin is the column `margin`, or `score_chosen` - `score_rejected`.

    Args:
        rows: of a set of pairs.
        prompt, chosen, rejected: the names of the columns.
        unusable: "skip" or "stop" for rows that state no preference: the same reply twice, an empty one, a rejected
            one that scores higher, conversations that part before the last reply or do not begin with the prompt.
        bad: the stage's BadRows.

    Raises:
        ValueError: a row without the columns, of another layout, or with roles that do not alternate; an unusable
            one with "stop" (with `bad`: as its policy says).
    """

    expected = expected_reasons(unusable, "unusable_pair", "empty_content")
    return adapt(
        rows, lambda row: _preference(row, prompt, chosen, rejected), bad, expected=expected, name="preference_pairs"
    )


def ultrafeedback_pairs(rows: Iterable[dict], *, unusable: str = "skip", bad=None) -> Iterator[dict]:
    """Yield {"prompt", "chosen", "rejected", "margin"}; margin = score_chosen - score_rejected, 0 where they tie.

    In: HuggingFaceH4/ultrafeedback_binarized: `prompt` (str), `chosen` and `rejected` (messages, the prompt first),
    `score_chosen` and `score_rejected` (1 to 10). `unusable` as for `preference_pairs`.

    Raises:
        ValueError: a row without the columns or of another layout; an unusable one with "stop".
    """

    def convert(row: dict) -> dict:
        for key in ("score_chosen", "score_rejected"):
            if row.get(key) is None:
                raise BadRow("missing_column", f"{key!r} is None, expected a number; keys: {', '.join(map(str, row))}")
        return _preference(row, "prompt", "chosen", "rejected")

    expected = expected_reasons(unusable, "unusable_pair", "empty_content")
    return adapt(rows, convert, bad, expected=expected, name="ultrafeedback_pairs")


def ultrafeedback_rankings(
    rows: Iterable[dict], *, score: str = "overall_score", unusable: str = "skip", bad=None
) -> Iterator[dict]:
    """Yield {"prompt": [user], "completions": [[assistant], ...] best to worst, "ranks": [0, ...]}, equal scores tied.

    In: openbmb/UltraFeedback: `instruction` and `completions`, each with `response` and scores. The system prompts
    under which the replies were sampled differ within a row and are left out. A reply that is empty or has no score
    is left out, too; a row with fewer than two left, or with one score for all, says nothing and is unusable.

    Args:
        rows: of openbmb/UltraFeedback.
        score: "overall_score" (1 to 10, from the critique) or "fine-grained_score" (1 to 5, the mean of four aspects).
        unusable, bad: as for `preference_pairs`.

    Raises:
        ValueError: a row without the columns or of another layout; an unusable one with "stop".
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}; expected one of {', '.join(SCORES)}")
    expected = expected_reasons(unusable, "unusable_pair")
    return adapt(rows, lambda row: _scored(row, score), bad, expected=expected, name="ultrafeedback_rankings")


def _scored(row: dict, key: str) -> dict:
    prompt = [turn("user", text(row, "instruction"))]
    replies = []
    for completion in items(row, "completions", dict):
        reply, score = text_or_none(completion, "response"), _number(completion, key)
        if reply is not None and score is not None:
            replies.append((score, reply))
    scores = sorted({score for score, _ in replies}, reverse=True)
    if len(scores) < 2:
        raise BadRow(
            "unusable_pair", f"{len(replies)} replies with {len(scores)} different {key!r}, expected 2 or more"
        )
    replies.sort(key=lambda scored: -scored[0])
    return {
        "prompt": prompt,
        "completions": [[turn("assistant", reply)] for _, reply in replies],
        "ranks": [scores.index(score) for score, _ in replies],
    }


def _preference(row: dict, prompt: str, chosen: str, rejected: str) -> dict:
    """The pair of a row whose columns have these names."""
    asked = _prompt(row, prompt)
    if isinstance(row.get(chosen), str) or isinstance(row.get(rejected), str):
        replies = [[turn("assistant", text(row, key))] for key in (chosen, rejected)]
        if not asked:
            raise BadRow(
                "missing_column",
                f"no {prompt!r} beside replies that are strings; keys: {', '.join(map(str, row))}; name its column "
                "with the option `prompt`, or use hh_pairs for dialogues in one string",
            )
    else:
        asked, *replies = _parting(asked, messages(row, chosen), messages(row, rejected))
    system = text_or_none(row, "system")
    if system and asked[0]["role"] != "system":
        asked = [turn("system", system), *asked]
    return {**_pair(asked, *replies), **_margin(row)}


def _prompt(row: dict, key: str) -> list[dict]:
    """The prompt's turns, none where the row has no such column."""
    if row.get(key) is None:
        return []
    return messages(row, key) if isinstance(row[key], list) else [turn("user", text(row, key))]


def _parting(asked: list[dict], chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompt, chosen reply, rejected reply) of two lists of messages: replies alone, or whole conversations."""
    if asked and len(chosen) == len(rejected) == 1:
        return asked, chosen, rejected
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        raise BadRow("unusable_pair", _parted(chosen, rejected))
    before = chosen[:-1]
    if any(said not in before for said in asked):
        raise BadRow("unusable_pair", f"the prompt {asked!r:.80} is not in the conversation {before!r:.80}")
    return before, chosen[-1:], rejected[-1:]


def _parted(chosen: list[dict], rejected: list[dict]) -> str:
    ends = ", ".join(f"{name} ends {turns[-1:]!r:.80}" for name, turns in (("chosen", chosen), ("rejected", rejected)))
    return f"the dialogues differ before the last reply, or share no prompt: {ends}"


def _pair(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    for reply in (chosen, rejected):
        alternating([*prompt, *reply])
        if reply[-1]["role"] != "assistant":
            raise BadRow("wrong_role", f"the last turn is of role {reply[-1]['role']!r}, expected 'assistant'")
    if chosen == rejected:
        raise BadRow("unusable_pair", f"both replies are the same: {chosen[-1]['content']!r:.80}")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _margin(row: dict) -> dict:
    """{"margin": by how much the chosen reply is better}, {} where the row has no number for it."""
    margin = _number(row, "margin")
    if margin is None:
        scores = [_number(row, key) for key in ("score_chosen", "score_rejected")]
        if None in scores:
            return {}
        margin = scores[0] - scores[1]
    if margin < 0:
        raise BadRow("unusable_pair", f"the rejected reply scores higher, by {-margin}")
    return {"margin": margin}


def _number(row: dict, key: str) -> float | None:
    """The row's number under a key, None where there is none or NaN. BadRow where it is something else."""
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise BadRow("wrong_type", f"{key!r} is {value!r:.80}, expected a number")
    return None if value is None or not isfinite(value) else float(value)
