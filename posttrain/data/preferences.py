r"""Anthropic's HH dialogues -> preference pairs.

In: rows {"chosen": str, "rejected": str}, each a whole dialogue "\n\nHuman: ...\n\nAssistant: ..." (Bai et al. 2022,
arXiv 2204.05862; the Hub's Anthropic/hh-rlhf) that differ in the last reply.
Out: `hh_pairs` yields {"prompt", "chosen", "rejected"} in TRL's conversational layout.

    pairs = list(hh_pairs(map(json.loads, open("train.jsonl"))))
"""

import logging
import re
from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_pairs(rows: Iterable[dict], *, unusable: str = "skip") -> Iterator[dict]:
    """Yield {"prompt": messages ending in a user turn, "chosen": [assistant], "rejected": [assistant]}.

    Some rows cannot be a pair: the dialogues differ before the last reply, a turn is empty, the roles do not
    alternate, or both replies are the same.

    Args:
        rows: pairs of dialogues.
        unusable: "skip" leaves such rows out and logs how many of each sort at the end; "stop" raises at the first.

    Raises:
        ValueError: a row without both columns or that does not start with "\\n\\nHuman:"; an unusable row with "stop".
    """
    if unusable not in ("skip", "stop"):
        raise ValueError(f"unusable={unusable!r}; expected 'skip' or 'stop'")
    skipped: dict[str, int] = {}
    total = 0
    for row in rows:
        total += 1
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
        reason = _why_unusable(chosen, rejected)
        if reason is None:
            yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        elif unusable == "stop":
            raise ValueError(f"{reason}: chosen ends {row['chosen'][-80:]!r}, rejected {row['rejected'][-80:]!r}")
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    for reason, count in skipped.items():
        log.warning("hh_pairs: left out %d of %d rows: %s", count, total, reason)


def _turns(row: dict, key: str) -> list[dict]:
    text = row.get(key)
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        raise ValueError(f"{key!r} is {text!r:.80}, expected a dialogue that starts with '\\n\\nHuman:'")
    _, *parts = TURN.split(text)  # role, text, role, text, ...
    return [{"role": ROLES[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def _why_unusable(chosen: list[dict], rejected: list[dict]) -> str | None:
    if chosen[:-1] != rejected[:-1]:
        return "the dialogues differ before the last reply"
    for turns in (chosen, rejected):
        roles = [turn["role"] for turn in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            return "the roles do not alternate from Human to a last Assistant"
        if not all(turn["content"] for turn in turns):
            return "a turn is empty"
    if chosen == rejected:
        return "both replies are the same"
    return None
