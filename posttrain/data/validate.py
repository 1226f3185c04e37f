"""Rows in our layouts, each checked before anything learns from it.

In: rows after the adapter with their places. Out: the rows that can be used; for the rest `BadRows` raises or counts:
missing columns, other types, NUL and half surrogate pairs, turns in a wrong order, empty content, two rows of one id,
absurd lengths. A message begins with the place, `rows.jsonl:7 (row 6)`; rows are counted from 0, as stages do.
"""

import json
import math
from collections.abc import Iterable, Iterator

from posttrain.data.adapters import ADAPTERS
from posttrain.data.bad_rows import BadRows
from posttrain.errors import UserError

MESSAGES = "a list of {'role': ..., 'content': ...}"
LAYOUTS = {"text": "a string", "messages": MESSAGES, "prompt": MESSAGES}
REPLIES = ("chosen", "rejected")
MAY_FOLLOW = {  # role -> roles of the turn before; None: it may be the first
    "system": (None,),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
MAY_FOLLOW_TEXT = {
    "system": "a system turn first or nowhere",
    "user": "user and assistant turns in turn",
    "assistant": "user and assistant turns in turn, the user's first",
    "tool": "an assistant turn with tool_calls before it",
}
IDS = ("message_id", "id")
ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)

Fault = tuple[str, str]  # (reason, what was found and expected)


class Intake:
    """`BadRows` of one pass over a source that also knows how many rows there were.

    `read` counts raw rows, broken lines among them, `kept` the rows that came out, `refused` those given to
    `bad(reason, message)`; rows that an adapter leaves out by its own rule stand in `counts` alone.
    """

    def __init__(self, policy: str):
        self.bad, self.read, self.kept, self.refused = BadRows(policy), 0, 0, 0
        self.policy, self.counts, self.first = policy, self.bad.counts, self.bad.first

    def __call__(self, reason: str, message: str) -> None:
        self.bad(reason, message)
        self.refused += 1

    def unreadable(self, reason: str, message: str) -> None:
        """For readers: a line that holds no row."""
        self.read += 1
        self(reason, message)

    @property
    def total(self) -> int:
        return max(self.read, self.kept + self.refused)  # an adapter may make many rows of one, or one of many

    def require_share(self, most: float, name: str) -> None:
        """UserError where more than the share `most` of the rows was refused."""
        if self.refused > most * self.total:
            raise UserError(f"{self.summary(name)}; that is more than max_skipped {most}: mend the data or raise it")

    def summary(self, name: str) -> str:
        """`left out 12 of 300 rows of x.jsonl: malformed_json 3 (first: x.jsonl:7: ...), ...`"""
        reasons = (f"{reason} {count} (first: {self.first[reason][:160]})" for reason, count in self.counts.items())
        return f"left out {sum(self.counts.values())} of {self.total} rows of {name}: {', '.join(reasons)}"


def valid(
    rows: Iterable[tuple[tuple[str, int] | None, dict]],
    columns: tuple[str, ...],
    intake: Intake,
    label: str,
    max_chars: int,
    unique_ids: bool,
) -> Iterator[tuple[dict, str]]:
    """(row, its `row_key`) of the rows that have the `columns` a stage needs and nothing wrong with them."""
    seen: dict[tuple, tuple] = {}  # an id -> where it stands
    for index, (place, row) in enumerate(rows):
        key, fault = _key(row)
        fault = fault or find_fault(row, columns) or find_bad_text(row, key, max_chars)
        if fault is None and unique_ids and (given := id_of(row)):
            if given in seen:
                fault = _repeated_id(given, _name(label, *seen[given]))
            else:
                seen[given] = place, index
        if fault is not None:
            given = id_of(row) if isinstance(row, dict) and place is None else None
            own_id = f", {given[0]} {given[1]!r}" if given else ""
            intake(fault[0], f"{_name(label, place, index)}{own_id}: {fault[1]}")
            continue
        intake.kept += 1
        yield row, key


def _name(label: str, place: tuple[str, int] | None, index: int) -> str:
    return f"{place[0]}{place[1]} (row {index})" if place else f"{label}, row {index}"


def row_key(row: dict) -> str:
    """A row as text; equal rows have equal keys."""
    return ENCODER.encode(row)


def are_messages(value) -> bool:
    """Whether it is a list of {"role", "content"}; a content may be missing (tool calls), but is no other type."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | None)
        for turn in value
    )


def id_of(row: dict) -> tuple[str, object] | None:
    """("message_id", "0a1b...") or ("id", 7), whichever the row has."""
    return next(((key, row[key]) for key in IDS if isinstance(row.get(key), str | int)), None)


def find_fault(row, columns: tuple[str, ...]) -> Fault | None:
    """What is wrong with the layout of a row, or None."""
    if not isinstance(row, dict):
        return "wrong_type", f"the adapter gave {type(row).__name__}, expected a dict"
    for column in columns:
        value = row.get(column)
        if value is None:
            found = ", ".join(map(str, row)) or "none"
            adapters = f"name an adapter with dataset_adapter ({', '.join(ADAPTERS)}, or a dotted path)"
            text = f"column {column!r} is missing; found {found}; expected {', '.join(columns)}: {adapters}"
            return "missing_column", text
        if column not in LAYOUTS:
            continue
        if not (isinstance(value, str) if column == "text" else are_messages(value)):
            found = f"column {column!r}: found {str(value)[:80]!r}, expected {LAYOUTS[column]}"
            return "wrong_type", f"{found}: mend the row, or name an adapter with dataset_adapter"
        if column == "text":
            if not value.strip():
                return "empty_content", f"column 'text': found {value[:20]!r}, expected some text; remove the row"
        elif fault := turns_fault(value, column):
            return fault
    if "messages" in columns and (fault := _tools_fault(row.get("tools"))):
        return fault
    return _replies_fault(row) if "prompt" in columns else None


def turns_fault(turns: list[dict], column: str) -> Fault | None:
    """What is wrong with the order or the content of turns.

    A system turn may come first; then user and assistant turns alternate. Tool turns stand after an assistant turn
    with `tool_calls`, or after each other. `prompt` ends in a user or tool turn, which waits for a reply.
    """
    mend, before = "mend or remove the row", None
    for number, turn in enumerate(turns):
        role, content, calls = turn["role"], turn.get("content"), turn.get("tool_calls")
        if role not in MAY_FOLLOW:
            known = ", ".join(MAY_FOLLOW)
            return "wrong_role", f"column {column!r}, turn {number}: role {role!r}, expected one of {known}; {mend}"
        where = f"column {column!r}, turn {number} ({role})"
        last = before and before["role"]
        if last not in MAY_FOLLOW[role]:
            order = f"it follows {f'a turn of role {last!r}' if last else 'nothing'}, expected {MAY_FOLLOW_TEXT[role]}"
            return ("repeated_role" if last == role else "wrong_role"), f"{where}: {order}; {mend}"
        if role == "tool" and last == "assistant" and not before.get("tool_calls"):
            return "wrong_role", f"{where}: the assistant turn before it has no tool_calls; {mend}"
        if calls and (fault := _calls_fault(calls)):
            return fault[0], f"{where}: {fault[1]}"
        may_be_empty = (role == "assistant" and calls) or (role == "tool" and content is not None)
        if not may_be_empty and not (content or "").strip():
            return "empty_content", f"{where}: found content {content!r}, expected some text; {mend}"
        before = turn
    if before is None or before["role"] == "system":
        return ("wrong_role" if turns else "empty_content"), f"column {column!r}: no user turn; {mend}"
    if column == "prompt" and before["role"] == "assistant":
        return "wrong_role", f"column 'prompt' ends in a turn of role 'assistant', expected user; {mend}"
    return None


def _calls_fault(calls) -> Fault | None:
    expected = "expected [{'type': 'function', 'function': {'name': text, 'arguments': a mapping}}]"
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(calls, list) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "tool_call", f"tool_calls: found {str(calls)[:80]!r}, {expected}"
        if not isinstance(function.get("arguments"), dict | None):
            return "tool_call", f"tool_calls: arguments {str(function['arguments'])[:80]!r}, {expected}"
    return None


def _tools_fault(tools) -> Fault | None:
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return None
    return "wrong_type", f"column 'tools': found {str(tools)[:80]!r}, expected a list of JSON schemas"


def _replies_fault(row: dict) -> Fault | None:
    """Replies are checked where they are messages; what the reward stage makes of others it says itself."""
    listed = row.get("completions")
    replies = [(key, row[key]) for key in REPLIES if key in row]
    replies += [("completions", reply) for reply in listed] if isinstance(listed, list) else []
    for key, reply in replies:
        if are_messages(reply):
            if not reply or reply[-1]["role"] != "assistant":
                return "wrong_role", f"column {key!r}: found {str(reply)[:80]!r}, expected an assistant turn"
            if not any((turn.get("content") or "").strip() or turn.get("tool_calls") for turn in reply):
                return "empty_content", f"column {key!r}: an empty reply, expected some text; mend or remove the row"
    ranks = row.get("ranks")
    if isinstance(listed, list) and ranks is not None:
        if not isinstance(ranks, list) or not all(_is_finite(rank) for rank in ranks):
            return "wrong_type", f"column 'ranks': found {str(ranks)[:80]}, expected finite numbers, one a completion"
        if len(ranks) != len(listed):
            return "wrong_type", f"column 'ranks': {len(ranks)} ranks for {len(listed)} completions"
    return None


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key(row) -> tuple[str, Fault | None]:
    try:
        return row_key(row), None
    except RecursionError:
        return "", ("malformed_json", "nested too deeply; mend or remove the row")


def find_bad_text(row: dict, key: str, max_chars: int) -> Fault | None:
    """What no stage can take anywhere in a row: NUL, half a surrogate pair, more characters than `max_chars`.

    `key` is the row's `row_key`: looking there first costs next to nothing.
    """
    if "\\u0000" in key and (found := next((text for text in texts_of(row) if "\0" in text), None)) is not None:
        return "nul", f"a NUL character after {found[: found.index(chr(0))][-40:]!r}; mend or remove the row"
    try:
        key.encode()
    except UnicodeEncodeError as error:
        text = f"{key[error.start]!a} is half a surrogate pair, which no tokenizer takes; mend or remove the row"
        return "lone_surrogate", text
    if len(key) > max_chars and (size := sum(map(len, texts_of(row)))) > max_chars:
        return "too_long", f"{size:,} characters, expected max_row_chars {max_chars:,} or fewer: raise it, cut the row"
    return None


def texts_of(value) -> Iterator[str]:
    """Every string in a row, keys left out."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value


def _repeated_id(given: tuple, first: str) -> Fault:
    mend = "remove one, or set dedup: id to keep the first of each, dedup: none if these are no ids"
    return "duplicate_id", f"{given[0]} {given[1]!r} stands in {first}, too; {mend}"
