"""What the adapters share: a row -> row function over many rows, and the checks that name what is wrong with one.

In: rows of a source and a function that returns a row of ours or raises `BadRow`. Out: the rows that could be used:

    def question(row):
        return {"prompt": [turn("user", text(row, "question"))]}

    rows = list(adapt(map(json.loads, open("questions.jsonl")), question))
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

log = logging.getLogger(__name__)

ON_UNUSABLE = ("skip", "stop")


class BadRow(ValueError):
    """A row that cannot be used: `reason` is what it is counted under; the text says what is found and expected."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def adapt(
    rows: Iterable[dict],
    convert: Callable[[dict], dict],
    bad=None,
    *,
    expected: Collection[str] = (),
    name: str = "",
) -> Iterator[dict]:
    """Yield convert(row) for each row; one that raises BadRow is refused.

    Args:
        rows: rows of a source.
        convert: a row of the source -> a row of ours, or BadRow.
        bad: the stage's BadRows, or None to raise at the first bad row.
        expected: reasons for which the source is known to hold rows that cannot be used. Such rows are left out
            whatever the policy, counted in `bad`, and logged under `name` when the rows are at their end.
        name: of the adapter, for the log.

    Raises:
        ValueError: a bad row, by its number (from 0), where `bad` is None.
    """
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    total = 0
    for total, row in enumerate(rows, 1):
        try:
            converted = convert(row)
        except BadRow as error:
            message = f"row {total - 1}: {error}"
            if error.reason in expected:
                leave_out(bad, error.reason, message)
                left_out[error.reason] += 1
                first.setdefault(error.reason, message)
            else:
                refuse(bad, error.reason, message)
        else:
            yield converted
    for reason, count in left_out.items() if bad is None else ():  # a stage tells what `bad` has counted
        log.warning("%s: left out %d of %d rows: %s (first: %s)", name, count, total, reason, first[reason])


def refuse(bad, reason: str, message: str) -> None:
    """Raise ValueError, or hand the row to `bad`, which raises UserError or counts, by the policy."""
    if bad is None:
        raise BadRow(reason, message)
    bad(reason, message)


def leave_out(bad, reason: str, message: str) -> None:
    """Count a row that is left out under either policy, so that the manifest has it."""
    if bad is not None:
        bad.counts[reason] += 1
        bad.first.setdefault(reason, message)


def expected_reasons(unusable: str, *reasons: str) -> tuple[str, ...]:
    """The reasons for `adapt`'s `expected`: those given where `unusable` is "skip", none where it is "stop"."""
    if unusable not in ON_UNUSABLE:
        raise ValueError(f"unusable={unusable!r}; expected 'skip' or 'stop'")
    return reasons if unusable == "skip" else ()


def text(row: dict, key: str) -> str:
    """The row's text under a key. BadRow where it is missing, no string, or blank."""
    value = row.get(key)
    if value is None:
        raise BadRow("missing_column", f"{key!r} is None, expected a string; keys: {', '.join(map(str, row))}")
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{key!r} is {value!r:.80}, expected a string")
    if not value.strip():
        raise BadRow("empty_content", f"{key!r} is {value!r:.80}, expected text")
    return value


def text_or_none(row: dict, key: str) -> str | None:
    """The row's text under a key, None where it is missing or blank. BadRow where it is no string."""
    blank = row.get(key) is None or (isinstance(row[key], str) and not row[key].strip())
    return None if blank else text(row, key)


def items(row: dict, key: str, kind: type) -> list:
    """The row's list under a key. BadRow where it is missing or holds something else than `kind`."""
    values = row.get(key)
    if values is None:
        raise BadRow("missing_column", f"{key!r} is None, expected a list; keys: {', '.join(map(str, row))}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise BadRow("wrong_type", f"{key!r} is {values!r:.80}, expected a list of {kind.__name__}")
    return values


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def messages(row: dict, key: str) -> list[dict]:
    """The row's turns under a key, {"role", "content"} alone. BadRow where they are no such list."""
    turns = items(row, key, dict)
    for index, said in enumerate(turns):
        if said.get("role") not in ("system", "user", "assistant"):
            raise BadRow(
                "wrong_role", f"{key!r}, turn {index}: role {said.get('role')!r}; expected system, user or assistant"
            )
        if not isinstance(said.get("content"), str):
            raise BadRow(
                "wrong_type", f"{key!r}, turn {index}: content {said.get('content')!r:.80}, expected a string"
            )
    return [turn(said["role"], said["content"]) for said in turns]


def alternating(turns: list[dict]) -> list[dict]:
    """The turns, if they are user, assistant, user, ... with text, after at most one system turn; else BadRow."""
    start = 1 if turns and turns[0]["role"] == "system" else 0
    for index, said in enumerate(turns):
        role = said["role"]
        wanted = role if index < start else ("user", "assistant")[(index - start) % 2]
        if role != wanted:
            reason = "repeated_role" if index and role == turns[index - 1]["role"] else "wrong_role"
            raise BadRow(reason, f"turn {index} is of role {role!r}, expected {wanted!r}: the roles do not alternate")
        if not said["content"].strip():
            raise BadRow("empty_content", f"turn {index} ({role}) is empty, expected text")
    return turns


def answered(turns: list[dict]) -> list[dict]:
    """The turns up to the last assistant's, without a blank system turn: what nobody answers teaches nothing. BadRow
    where they do not alternate."""
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    if not turns:
        raise BadRow("wrong_role", "no turn of role 'assistant': there is nothing to learn")
    return alternating(turns)


def parsed(value, what: str):
    """A value that may stand as JSON in a string. BadRow (`tool_call`) where that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("tool_call", f"{what}: {value!r:.80} is no JSON ({error})") from None
