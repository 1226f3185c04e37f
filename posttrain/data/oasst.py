"""OpenAssistant message trees -> conversations for SFT and rankings for a reward model.

In: rows of the OASST exports (Köpf et al. 2023, arXiv 2304.07327), in either form, also mixed:
- nested trees, one a row: {"message_tree_id", "prompt": {"message_id", "text", "role", "replies": [{...}, ...]}};
- flat messages, one a row, as in the Hub's OpenAssistant/oasst1: {"message_id", "parent_id", "text", "role", ...}.
Out: `oasst_conversations` yields {"messages", "message_id"}, `oasst_rankings` {"prompt", "completions", "ranks"}.

    conversations = list(oasst_conversations(map(json.loads, open("en_100_tree.jsonl"))))

All rows are read before the first row comes out: a flat export may hold a child before its parent.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

ROLES = {"prompter": "user", "assistant": "assistant"}


def oasst_conversations(
    rows: Iterable[dict],
    *,
    lang: str | None = "en",
    best_only: bool = False,
    synthetic: bool = False,
    orphans: str = "skip",
) -> Iterator[dict]:
    """Yield every path from a root down to the last assistant message on it, one conversation a path.

    A path stops above the first message that is deleted, empty, rejected by the reviewers (`review_result` false),
    of another language or, unless `synthetic`, machine-made. A path that is only the start of another is left out:
    its turns are in the longer one. Replies with a common start share it, so that start comes out once per path.

    Args:
        rows: nested trees or flat messages.
        lang: keep paths whose messages all have this `lang`; None keeps every language.
        best_only: at each fork follow only the best-ranked usable assistant reply; where none is ranked, the first.
        synthetic: keep messages written by a model, too.
        orphans: what to do with a message whose parent is not in `rows`. Real exports have some (a parent was
            withheld, or only a part of the file is read), and without it the context is unknown. "skip" leaves out
            the message and all below it and logs how many; "stop" raises.

    Yields:
        {"messages": [{"role": "user" | "assistant", "content": str}, ...], "message_id": id of the last message}.

    Raises:
        ValueError: a malformed row or tree (missing key, unknown role, duplicate id, cycle, two turns of one role
            in a row, a rank that is no integer), naming the message.
    """
    roots, replies = _link(rows, orphans)

    def usable(message: dict) -> bool:
        return _sound(message, lang) and (synthetic or not message.get("synthetic"))

    def follow(message: dict) -> list[dict]:
        children = [child for child in replies[message["message_id"]] if usable(child)]
        if best_only and children and children[0]["role"] == "assistant":
            return [min(children, key=lambda child: (child.get("rank") is None, child.get("rank") or 0))]
        return children

    for root in filter(usable, roots):
        paths = [[root]]
        while paths:  # a stack instead of recursion: a hostile tree may be deeper than Python's limit
            path = paths.pop()
            children = follow(path[-1])
            if path[-1]["role"] == "assistant" and not any(follow(child) for child in children):
                yield {"messages": _turns(path), "message_id": path[-1]["message_id"]}
            paths += [path + [child] for child in reversed(children)]


def oasst_rankings(rows: Iterable[dict], *, lang: str | None = "en", orphans: str = "skip") -> Iterator[dict]:
    """Yield the ranked assistant replies to each prompt, best first.

    Deleted, empty and unranked replies are left out and the ranks closed up (0, 2, 2, 5 -> 0, 1, 1, 2; ties stay
    ties); a prompt with fewer than two replies left gives no row, nor does one whose context (the prompt or a
    message above it) is deleted, empty or rejected by the reviewers. Machine-made messages count: people ranked them.

    Args:
        rows, lang, orphans: as for `oasst_conversations`.

    Yields:
        {"prompt": [{"role", "content"}, ...] ending in a user turn,
         "completions": [[{"role": "assistant", "content"}], ...] best to worst, "ranks": [0, 1, ...]}.

    Raises:
        ValueError: as for `oasst_conversations`.
    """
    roots, replies = _link(rows, orphans)
    for root in roots:
        paths = [[root]] if _sound(root, lang) else []
        while paths:
            path = paths.pop()
            children = [child for child in replies[path[-1]["message_id"]] if _alive(child, lang)]
            ranked = [child for child in children if child["role"] == "assistant" and child.get("rank") is not None]
            if len(ranked) >= 2:
                ranked.sort(key=lambda child: child["rank"])
                dense = {rank: i for i, rank in enumerate(sorted({child["rank"] for child in ranked}))}
                yield {
                    "prompt": _turns(path),
                    "completions": [_turns([child]) for child in ranked],
                    "ranks": [dense[child["rank"]] for child in ranked],
                }
            paths += [path + [child] for child in reversed(children) if _sound(child, lang)]


def _link(rows: Iterable[dict], orphans: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """Read all rows; return the roots and each message's replies by its id, both in the order of the rows."""
    if orphans not in ("skip", "stop"):
        raise ValueError(f"orphans={orphans!r}; expected 'skip' or 'stop'")
    messages: dict[str, dict] = {}
    replies = defaultdict(list)
    roots = []
    for row in rows:
        for message in _flatten(row):
            _check(message)
            if message["message_id"] in messages:
                raise ValueError(f"message {message['message_id']}: the id occurs twice; ids must be unique")
            messages[message["message_id"]] = message
            if message.get("parent_id") is None:
                roots.append(message)
            else:
                replies[message["parent_id"]].append(message)

    for root in roots:
        if root["role"] != "prompter":
            raise ValueError(f"message {root['message_id']}: a tree starts with role 'assistant', expected 'prompter'")
    for parent_id in [parent_id for parent_id in replies if parent_id in messages]:
        for child in replies[parent_id]:
            if child["role"] == messages[parent_id]["role"]:
                raise ValueError(
                    f"message {child['message_id']}: role {child['role']!r} replies to the same role "
                    f"(message {parent_id}); roles must alternate"
                )

    lost = [child for parent_id in replies if parent_id not in messages for child in replies[parent_id]]
    if lost and orphans == "stop":
        raise ValueError(f"message {lost[0]['message_id']}: its parent {lost[0]['parent_id']} is not in the data")
    below_lost = _reach(lost, replies)
    unreached = messages.keys() - _reach(roots, replies) - below_lost
    if unreached:
        first = next(message_id for message_id in messages if message_id in unreached)
        raise ValueError(f"message {first}: its chain of parents is a cycle and reaches no root")
    if lost:
        log.warning(
            "oasst: left out %d of %d messages: %d whose parent is missing, and all below them",
            len(below_lost),
            len(messages),
            len(lost),
        )
    return roots, replies


def _flatten(row: dict) -> Iterator[dict]:
    """Yield a nested tree's messages, parents before children, with `parent_id` set; a flat message as it is."""
    if not isinstance(row.get("prompt"), dict):
        yield row
        return
    stack = [(row["prompt"], row["prompt"].get("parent_id"))]
    while stack:
        message, parent_id = stack.pop()
        stated = message.get("parent_id")
        if stated is not None and stated != parent_id:
            raise ValueError(
                f"message {message.get('message_id')}: parent_id {stated} but it stands under {parent_id}"
            )
        yield {**message, "parent_id": parent_id}
        stack += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]


def _check(message: dict) -> None:
    """Raise ValueError unless the message has the keys and values that everything here relies on."""
    name = f"message {message.get('message_id')}"
    for key in ("message_id", "role", "text"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"{name}: {key!r} is {message.get(key)!r}, expected a string; keys: {sorted(message)}")
    if message["role"] not in ROLES:
        raise ValueError(f"{name}: role {message['role']!r}, expected one of {sorted(ROLES)}")
    rank = message.get("rank")
    if rank is not None and type(rank) is not int:  # bool is an int to isinstance
        raise ValueError(f"{name}: rank {rank!r}, expected an integer (0 is best) or null")


def _alive(message: dict, lang: str | None) -> bool:
    """Whether the message has text that may be shown, in the language asked for."""
    if lang is not None and "lang" not in message:
        raise ValueError(f"message {message['message_id']}: no 'lang'; pass lang=None to keep every language")
    return not message.get("deleted") and bool(message["text"].strip()) and lang in (None, message.get("lang"))


def _sound(message: dict, lang: str | None) -> bool:
    """Whether the message may stand in a context: alive and not rejected (null means not reviewed, which is fine)."""
    return _alive(message, lang) and message.get("review_result") is not False


def _reach(starts: list[dict], replies: dict[str, list[dict]]) -> set[str]:
    """Return the ids of the start messages and of all messages below them."""
    seen, stack = set(), list(starts)
    while stack:
        message_id = stack.pop()["message_id"]
        seen.add(message_id)
        stack += replies.get(message_id, [])
    return seen


def _turns(path: list[dict]) -> list[dict]:
    return [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]
