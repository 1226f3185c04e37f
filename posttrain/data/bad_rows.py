"""What to do with a row that cannot be used: stop at the first, or leave it out and count it by reason.

In: `on_bad_row` of a config. Out: a callable that readers, adapters and validation are given:

    bad = BadRows("skip")
    for row in rows:
        if not row["text"]:
            bad("empty_content", "docs.jsonl:12: the text is empty; expected some")   # raises under "stop"
            continue
    bad.counts                                                                     # {"empty_content": 1}
"""

from collections import Counter

from posttrain.errors import UserError

POLICIES = ("stop", "skip")


class BadRows:
    """`bad(reason, message)` raises UserError(message) under "stop" and counts `reason` under "skip".

    `counts` goes into the log and the manifest; `first` keeps one message a reason, to be shown with the count.
    """

    def __init__(self, policy: str = "stop"):
        if policy not in POLICIES:
            raise UserError(f"on_bad_row: found {policy!r}, expected {' or '.join(POLICIES)}")
        self.policy, self.counts, self.first = policy, Counter(), {}

    def __call__(self, reason: str, message: str) -> None:
        if self.policy == "stop":
            raise UserError(f"{message} [{reason}; on_bad_row: skip leaves such rows out and counts them]")
        self.counts[reason] += 1
        self.first.setdefault(reason, message)
