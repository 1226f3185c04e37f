"""OpenAssistant message trees -> conversations for SFT and rankings for a reward model.

In: rows of the OASST1 and OASST2 exports (Köpf et al. 2023, arXiv 2304.07327), in any form, also mixed:
- nested trees, one a row: {"message_tree_id", "prompt": {"message_id", "text", "role", "replies": [{...}, ...]}};
  the root may also stand under "tree", or in a list under "replies", as in the first exports;
- flat messages, one a row, as in the Hub's OpenAssistant/oasst1: {"message_id", "parent_id", "text", "role", ...}.
Out: `oasst_conversations` yields {"messages", "message_id"}, `oasst_rankings` {"prompt", "completions", "ranks",
"message_id"}.

    conversations = list(oasst_conversations(map(json.loads, open("en_100_tree.jsonl"))))

All rows are read before the first row comes out: a flat export may hold a child before its parent.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain.data.fields import BadRow, leave_out, refuse

log = logging.getLogger(__name__)

ROLES = {"prompter": "user", "assistant": "assistant"}
REVIEWED = {
    "any": (True, None, False),
    "not_rejected": (True, None),
    "approved": (True,),
}  # which values of `review_result` may stand; null: not reviewed


def oasst_conversations(
    rows: Iterable[dict],
    *,
    lang: str | None = "en",
    best_only: bool = False,
    top_k: int | None = None,
    quality: float | None = None,
    review_result: str = "not_rejected",
    deleted: bool = False,
    synthetic: bool = False,
    max_per_tree: int | None = None,
    orphans: str = "skip",
    bad=None,
) -> Iterator[dict]:
    """Yield every path from a root down to the last assistant message on it, one conversation a path.

    A path stops above the first message that a filter does not let through; empty ones never pass. A path that is
    only the start of another is left out: its turns are in the longer one. Replies with a common start share it, so
    that start comes out once per path.

    Args:
        rows: nested trees or flat messages.
        lang: keep messages of this `lang`; None keeps every language.
        best_only: the same as top_k 1.
        top_k: at each fork follow only so many of the assistant replies that pass, the best-ranked first, unranked
            ones after them, ties in the order of the rows.
        quality: keep assistant replies whose label `quality` (the labellers' mean, 0 to 1) is at least this; a reply
            that nobody labelled so is left out. What users wrote is kept: it is not what a model learns to say.
        review_result: "not_rejected" keeps messages that reviewers accepted or did not review, "approved" those
            they accepted, "any" also those they rejected.
        deleted: keep messages that were deleted, too.
        synthetic: keep messages written by a model, too.
        max_per_tree: at most so many conversations of a tree. Those with the best-ranked replies are kept, compared
            reply by reply from the root (unranked after ranked, ties in the order of the rows).
        orphans: what to do with a message whose parent is not in `rows`. Real exports have some (a parent was
            withheld, or only a part of the file is read), and without it the context is unknown. "skip" leaves out
            the message and all below it whatever the policy, counts it in `bad` and logs how many; "stop" refuses it
            as any bad row.
        bad: the stage's BadRows. What it lets through is left out with all below it.

    Yields:
        {"messages": [{"role": "user" | "assistant", "content": str}, ...], "message_id": id of the last message}.

    Raises:
        ValueError: a malformed row or tree (missing key, unknown role, duplicate id, cycle, two turns of one role in
            a row, a rank that is no integer), naming the message, where `bad` is None; an option out of its range.
    """
    most = _replies_a_fork(best_only, top_k, max_per_tree)
    passes = Filter(lang, review_result, deleted, synthetic, quality)
    roots, replies = _link(rows, lang, orphans, bad)

    def follow(message: dict) -> list[dict]:
        children = [child for child in replies[message["message_id"]] if passes.sound(child)]
        return _first(children, most, _rank) if most and message["role"] == "prompter" else children

    for root in filter(passes.sound, roots):
        paths = _paths(root, follow)
        for path in _first(list(paths), max_per_tree, _merit) if max_per_tree else paths:
            yield {"messages": _turns(path), "message_id": path[-1]["message_id"]}


def oasst_rankings(
    rows: Iterable[dict],
    *,
    lang: str | None = "en",
    review_result: str = "not_rejected",
    deleted: bool = False,
    synthetic: bool = True,
    orphans: str = "skip",
    bad=None,
) -> Iterator[dict]:
    """Yield the ranked assistant replies to each prompt, best first.

    Empty and unranked replies are left out, and those that `lang`, `deleted` and `synthetic` do not let through; the
    ranks are closed up (0, 2, 2, 5 -> 0, 1, 1, 2; ties stay ties). A prompt with fewer than two replies left gives no
    row, nor does one whose context (the prompt or a message above it) does not pass. `review_result` is asked of the
    context only: people ranked the replies that reviewers rejected, too, and a reward model shall know bad ones.

    Args:
        rows, lang, review_result, deleted, orphans, bad: as for `oasst_conversations`.
        synthetic: keep messages written by a model; by default they count, since people ranked them.

    Yields:
        {"prompt": [{"role", "content"}, ...] ending in a user turn,
         "completions": [[{"role": "assistant", "content"}], ...] best to worst, "ranks": [0, 1, ...],
         "message_id": id of the prompt's last message}.

    Raises:
        ValueError: as for `oasst_conversations`.
    """
    passes = Filter(lang, review_result, deleted, synthetic)
    roots, replies = _link(rows, lang, orphans, bad)
    for root in roots:
        paths = [[root]] if passes.sound(root) else []
        while paths:
            path = paths.pop()
            children = [child for child in replies[path[-1]["message_id"]] if passes.alive(child)]
            ranked = [child for child in children if child["role"] == "assistant" and child.get("rank") is not None]
            if len(ranked) >= 2:
                ranked.sort(key=_rank)
                dense = {rank: i for i, rank in enumerate(sorted({child["rank"] for child in ranked}))}
                yield {
                    "prompt": _turns(path),
                    "completions": [_turns([child]) for child in ranked],
                    "ranks": [dense[child["rank"]] for child in ranked],
                    "message_id": path[-1]["message_id"],
                }
            paths += [path + [child] for child in reversed(children) if passes.sound(child)]


@dataclass(frozen=True)
class Filter:
    """Which messages pass; the fields are the options of `oasst_conversations`."""

    lang: str | None
    review_result: str
    deleted: bool
    synthetic: bool
    quality: float | None = None

    def __post_init__(self):
        if self.review_result not in REVIEWED:
            raise ValueError(f"review_result={self.review_result!r}; expected one of {', '.join(REVIEWED)}")
        if self.quality is not None and not 0 <= self.quality <= 1:
            raise ValueError(f"quality={self.quality}; expected 0 to 1, or none to keep every reply")

    def alive(self, message: dict) -> bool:
        """Whether the message has text that may be shown, in the language and of the origin asked for."""
        return (
            bool(message["text"].strip())
            and self.lang in (None, message.get("lang"))
            and (self.deleted or not message.get("deleted"))
            and (self.synthetic or not message.get("synthetic"))
        )

    def sound(self, message: dict) -> bool:
        """Whether the message may be learnt from or answered: alive, and the reviewers and labellers are content."""
        if not self.alive(message) or message.get("review_result") not in REVIEWED[self.review_result]:
            return False
        if self.quality is None or message["role"] != "assistant":
            return True
        found = _label(message, "quality")
        return found is not None and found >= self.quality


def _replies_a_fork(best_only: bool, top_k: int | None, max_per_tree: int | None) -> int | None:
    """How many replies to follow at a fork, None for all. ValueError for limits that make no sense."""
    for name, limit in (("top_k", top_k), ("max_per_tree", max_per_tree)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit}; expected at least 1, or none for no limit")
    if best_only and top_k not in (None, 1):
        raise ValueError(f"best_only and top_k={top_k}: best_only is top_k 1; give one of them")
    return 1 if best_only else top_k


def _label(message: dict, name: str) -> float | None:
    """The mean a label has, None where nobody gave it: {name: {"value"}} in trees, parallel arrays in flat rows."""
    labels = message.get("labels")
    if not isinstance(labels, dict):
        return None
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        value = dict(zip(labels["name"], labels["value"], strict=False)).get(name)
    else:
        value = labels[name].get("value") if isinstance(labels.get(name), dict) else None
    return value if isinstance(value, int | float) else None


def _rank(message: dict) -> tuple[bool, int]:
    """The order of preference: by rank, 0 the best, the unranked last."""
    return message.get("rank") is None, message.get("rank") or 0


def _paths(root: dict, follow) -> Iterator[list[dict]]:
    """Paths to the last assistant messages, in the order of the rows."""
    paths = [[root]]
    while paths:  # a stack instead of recursion: a hostile tree may be deeper than Python's limit
        path = paths.pop()
        children = follow(path[-1])
        if path[-1]["role"] == "assistant" and not any(follow(child) for child in children):
            yield path
        paths += [path + [child] for child in reversed(children)]


def _merit(path: list[dict]) -> list[tuple[bool, int]]:
    """What paths are compared by: the rank of each reply from the root."""
    return [_rank(message) for message in path if message["role"] == "assistant"]


def _first(found: list, most: int, key) -> list:
    """The `most` first by a key, in the order they came."""
    order = sorted(range(len(found)), key=lambda i: key(found[i]))
    return [found[i] for i in sorted(order[:most])]


def _turns(path: list[dict]) -> list[dict]:
    return [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]


def _link(rows: Iterable[dict], lang: str | None, orphans: str, bad) -> tuple[list[dict], dict[str, list[dict]]]:
    """Read all rows; return the roots and each message's replies by its id, both in the order of the rows."""
    if orphans not in ("skip", "stop"):
        raise ValueError(f"orphans={orphans!r}; expected 'skip' or 'stop'")
    messages, refused = _read(rows, lang, bad)
    replies, roots, lost, cut = defaultdict(list), [], [], []
    for message in messages.values():
        parent = messages.get(message["parent_id"])
        if message["parent_id"] is None and message["role"] == "prompter":
            roots.append(message)
        elif message["parent_id"] is None:
            cut.append(message)
            refuse(bad, "wrong_role", f"{_name(message)}: a tree starts with role 'assistant', expected 'prompter'")
        elif parent is None:
            (cut if message["parent_id"] in refused else lost).append(message)
        elif parent["role"] == message["role"]:
            cut.append(message)
            refuse(
                bad,
                "repeated_role",
                f"{_name(message)}: role {message['role']!r} replies to the same role (message "
                f"{parent['message_id']}); roles must alternate",
            )
        else:
            replies[message["parent_id"]].append(message)

    for orphan in lost:
        report = refuse if orphans == "stop" else leave_out
        report(bad, "missing_parent", f"{_name(orphan)}: its parent {orphan['parent_id']} is not in the data")
    below_lost = _reach(lost, replies)
    below_cut = _reach(cut, replies)
    unreached = messages.keys() - _reach(roots, replies) - below_lost - below_cut
    below_cut |= _cycles(messages, replies, unreached, bad)
    if lost:
        log.warning(
            "oasst: left out %d of %d messages: %d whose parent is missing, and all below them",
            len(below_lost),
            len(messages),
            len(lost),
        )
    if below_cut:
        log.warning("oasst: left out %d of %d messages at or below bad ones", len(below_cut), len(messages))
    return roots, replies


def _read(rows: Iterable[dict], lang: str | None, bad) -> tuple[dict[str, dict], set]:
    """Messages by id, with `parent_id`, parents before children where a row is a tree; and the ids of bad ones."""
    messages: dict[str, dict] = {}
    refused = set()
    for index, row in enumerate(rows):
        stack = [(root, None) for root in reversed(_roots(row))]
        while stack:
            message, parent_id = stack.pop()
            try:
                message = _checked(message, parent_id, lang)
                if message["message_id"] in messages:
                    raise BadRow("duplicate_id", f"{_name(message)}: the id occurs twice; ids must be unique")
            except BadRow as error:
                refuse(bad, error.reason, f"row {index}, {error}")
                if isinstance(message, dict) and isinstance(message.get("message_id"), str):
                    refused.add(message["message_id"])
                continue
            messages[message["message_id"]] = message
            stack += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]
    return messages, refused


def _roots(row: dict) -> list:
    """The message a row is, or the roots of the tree it holds."""
    for key in ("prompt", "tree", "replies"):
        found = row.get(key)
        if isinstance(found, dict) or (key == "replies" and isinstance(found, list) and "message_id" not in row):
            return found if isinstance(found, list) else [found]
    return [row]


def _checked(message, parent_id: str | None, lang: str | None) -> dict:
    """The message with its parent's id. BadRow unless it has the keys and values that everything here relies on.

    Args:
        message: as found.
        parent_id: of the message that it stands under; None for a row's own.
        lang: the option: where it is set, each message must say its language.
    """
    if not isinstance(message, dict):
        raise BadRow("wrong_type", f"found {message!r:.80}, expected a message")
    name = _name(message)
    for key in ("message_id", "role", "text"):
        if not isinstance(message.get(key), str):
            raise BadRow(
                "missing_column" if message.get(key) is None else "wrong_type",
                f"{name}: {key!r} is {message.get(key)!r}, expected a string; keys: {', '.join(map(str, message))}",
            )
    if message["role"] not in ROLES:
        raise BadRow("wrong_role", f"{name}: role {message['role']!r}, expected one of {', '.join(ROLES)}")
    rank = message.get("rank")
    if rank is not None and type(rank) is not int:  # bool is an int to isinstance
        raise BadRow("wrong_type", f"{name}: rank {rank!r}, expected an integer (0 is best) or null")
    if lang is not None and "lang" not in message:
        raise BadRow("missing_column", f"{name}: no 'lang'; pass lang=None to keep every language")
    if not isinstance(message.get("replies") or [], list):
        raise BadRow("wrong_type", f"{name}: replies {message['replies']!r:.80}, expected a list of messages")
    stated = message.get("parent_id")
    stated = None if stated == "None" else stated  # so the first exports wrote a root's
    if not isinstance(stated, str | None):
        raise BadRow("wrong_type", f"{name}: parent_id {stated!r:.80}, expected a string or null")
    if parent_id is not None and stated not in (None, parent_id):
        raise BadRow("missing_parent", f"{name}: parent_id {stated} but it stands under {parent_id}")
    return {**message, "parent_id": parent_id if parent_id is not None else stated}


def _name(message: dict) -> str:
    return f"message {message.get('message_id')!s:.80}"


def _cycles(messages: dict[str, dict], replies: dict[str, list[dict]], unreached: set[str], bad) -> set[str]:
    """Refuse one message of each cycle of parents; return the ids of all messages on or below one."""
    below: set[str] = set()
    for message_id in messages:
        if message_id not in unreached or message_id in below:
            continue
        above: set[str] = set()
        while message_id not in above:
            above.add(message_id)
            message_id = messages[message_id]["parent_id"]
        if message_id not in below:
            below |= _reach([messages[message_id]], replies)
            refuse(bad, "cycle", f"{_name(messages[message_id])}: its chain of parents is a cycle and reaches no root")
    return below


def _reach(starts: list[dict], replies: dict[str, list[dict]]) -> set[str]:
    """Return the ids of the start messages and of all messages below them."""
    seen: set[str] = set()
    stack = list(starts)
    while stack:
        message_id = stack.pop()["message_id"]
        if message_id not in seen:
            seen.add(message_id)
            stack += replies.get(message_id, [])
    return seen
