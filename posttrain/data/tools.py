"""Conversations with tool calls, in three layouts -> the Hub's `messages` with `tool_calls`, and `tools`.

In, a row a conversation:
- the Hub's (transformers' chat templates, OpenAI's API): `messages` whose assistant turns may have `tool_calls`, turns
  of role `tool` with the results, and `tools`, a list of JSON schemas or such a list as a string;
- ShareGPT's with functions: `conversations` of {"from", "value"} from human, gpt, function_call and observation;
- Hermes' (Nous Research, hermes-function-calling-v1): gpt turns with <tool_call>{...}</tool_call>, tool turns with
  <tool_response>{...}</tool_response>, the schemas in `tools` or in the system turn's <tools>[...]</tools>.
Out: {"messages", "tools"}: a call is {"type": "function", "function": {"name", "arguments": {...}}}, a result
{"role": "tool", "name", "content": str}, a schema {"type": "function", "function": {"name", ...}}.

    conversations = list(tool_conversations(map(json.loads, open("calls.jsonl"))))
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator

from posttrain.data.fields import BadRow, adapt, items, parsed, text_or_none

ROLES = {"human": "user", "user": "user", "system": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant")
TOOL_ROLES = {"function_call": "assistant"}
TOOL_ROLES |= dict.fromkeys(("tool", "function", "function_response", "observation"), "tool")
NEXT = {  # the roles that may follow; "call" is an assistant turn that calls tools
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
SCHEMAS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)


def tool_conversations(rows: Iterable[dict], *, bad=None) -> Iterator[dict]:
    """Yield {"messages", "tools"}, checked: each call names a declared tool and its arguments are an object; each has
    one result, which follows it, and each result answers a call.

    Arguments that are a JSON string become a dict. Parquet writes null for each key that another row's dict has: a
    null argument goes unless the tool requires it, and so does a null in a schema. Results are matched to calls by
    `tool_call_id`, else by name, else in turn; they come out in the order of the calls and without ids. A result
    that is no string becomes JSON. Hermes' system turn, which describes the format of calls, is left out: the
    template writes its own. Turns after the last assistant turn are left out; the last may be a call. A row without
    tools is a plain conversation with `tools` [].

    Raises:
        ValueError: a row without `messages` or `conversations`, with a role that cannot stand where it does, an empty
            turn, or calls, results or schemas that do not fit (reason `tool_call`; with `bad`: as its policy says).
    """
    return adapt(rows, tool_row, bad)


def tool_row(row: dict) -> dict:
    """{"messages", "tools"} of one row, or BadRow."""
    shared = row.get("messages") is None and row.get("conversations") is not None
    turns = items(row, "conversations" if shared else "messages", dict)
    read = [message for index, turn in enumerate(turns) for message in _read(turn, index)]
    system = text_or_none(row, "system")
    if system and not (read and read[0]["role"] == "system"):
        read.insert(0, {"role": "system", "content": system})
    schemas = parsed(row.get("tools") or [], "'tools'")
    if read and read[0]["role"] == "system":
        described = [found for found in SCHEMAS.findall(read[0]["content"] or "") if found.strip()]
        if described or not (read[0]["content"] or "").strip():
            read = read[1:]
        schemas = schemas or [schema for found in described for schema in _schemas(found)]
    while read and read[-1]["role"] != "assistant":
        read = read[:-1]
    if not read:
        raise BadRow("wrong_role", "no turn of role 'assistant': there is nothing to learn")
    tools = _declared(schemas)
    _check_roles(read)
    return {"messages": _matched(read, {tool["function"]["name"]: tool["function"] for tool in tools}), "tools": tools}


def _read(turn: dict, index: int) -> list[dict]:
    """The messages a turn stands for, one but for several results in one; `calls` and `id` are still as found."""
    speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = {**ROLES, **TOOL_ROLES}.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("wrong_role", f"turn {index} is from {speaker!r:.80}, expected system, user, assistant or tool")
    if role == "tool":
        return [{"role": role, "turn": index, **result} for result in _results(turn, content)]
    if content is not None and not isinstance(content, str):
        raise BadRow("wrong_type", f"turn {index}: its text is {content!r:.80}, expected a string")
    message = {"role": role, "turn": index, "content": content}
    if role != "assistant":
        return [message]
    if isinstance(turn.get("reasoning_content"), str):
        message["reasoning_content"] = turn["reasoning_content"]
    if speaker == "function_call":
        calls, message["content"] = parsed(content, f"turn {index}"), None
    else:
        calls = parsed(turn.get("tool_calls") or turn.get("function_call") or [], f"turn {index}: tool_calls")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls and content and "<tool_call>" in content:
        calls = [_literal(found, index) for found in CALL.findall(content)]
        message["content"] = CALL.sub("", content).strip() or None
        if not calls:
            raise BadRow("tool_call", f"turn {index}: <tool_call> is never closed: {content[-80:]!r}")
    message["calls"] = [_call(call, index) for call in calls]
    return [message]


def _results(turn: dict, content) -> Iterator[dict]:
    """{"content", "name", "id"} of each result in a tool's turn; name and id may be None."""
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    found = RESPONSE.findall(content) if isinstance(content, str) else []
    for response in found or [content]:
        value, said = response, name
        if found:
            try:
                value = json.loads(response)
            except (ValueError, RecursionError):
                value = response.strip()  # a result may be any text
            if isinstance(value, dict) and "content" in value:
                said, value = value.get("name", name), value["content"]
        text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
        yield {"content": text, "name": said, "id": call_id}


def _call(call, index: int) -> dict:
    """{"name", "arguments", "id", "written"}; `written`: the arguments came as JSON, so a null in them is meant."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("tool_call", f"turn {index}: the call {call!r:.80} names no function")
    written = function.get("arguments")
    arguments = {} if written in (None, "") else parsed(written, f"turn {index}: arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise BadRow(
            "tool_call", f"turn {index}: arguments of {function['name']} are {written!r:.80}, expected an object"
        )
    written = isinstance(written, str)
    return {"name": function["name"], "arguments": arguments, "id": call.get("id"), "written": written}


def _literal(found: str, index: int):
    """A call in Hermes' tags: JSON, or Python's way of writing the same, as a part of that set has it."""
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        try:
            return json.loads(json.dumps(ast.literal_eval(found.strip())))  # what JSON can hold, no tuples or sets
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BadRow("tool_call", f"turn {index}: the call {found.strip()!r:.80} is no JSON") from None


def _schemas(found: str) -> list:
    """The schemas in a system turn: one list, or one schema a line."""
    try:
        schemas = _literal(found, 0)
    except BadRow:
        schemas = [_literal(line, 0) for line in found.strip().splitlines() if line.strip()]
    return schemas if isinstance(schemas, list) else [schemas]


def _declared(schemas) -> list[dict]:
    """The schemas as {"type": "function", "function": {...}}, without the nulls that Parquet fills in."""
    if not isinstance(schemas, list):
        raise BadRow("tool_call", f"'tools' is {schemas!r:.80}, expected a list of JSON schemas")
    tools = []
    for schema in schemas:
        schema = parsed(schema, "a schema in 'tools'")
        function = schema.get("function") or schema if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("tool_call", f"the schema {schema!r:.80} in 'tools' names no function")
        function = {key: value for key, value in function.items() if key != "type" or function is not schema}
        tools.append({"type": "function", "function": _without_nulls(function)})
    return tools


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_roles(read: list[dict]) -> None:
    before = None
    for message in read:
        role = "call" if message.get("calls") else message["role"]
        if role not in NEXT[before]:
            kind = "repeated_role" if role == before else "wrong_role"
            kind = "tool_call" if role == "tool" or before == "call" else kind
            raise BadRow(
                kind,
                f"turn {message['turn']}: {role} after {before or 'nothing'}, expected {' or '.join(NEXT[before])}",
            )
        if role not in ("call", "tool") and not (message["content"] or "").strip():
            raise BadRow("empty_content", f"turn {message['turn']} ({role}) is empty, expected text")
        before = role


def _matched(read: list[dict], functions: dict[str, dict]) -> list[dict]:
    """The messages in the Hub's layout, the results behind each call in the order of its calls."""
    messages, calls, results = [], [], []
    for message in [*read, {"role": "end"}]:
        if message["role"] == "tool":
            at = _answered(message, calls, results)
            results[at] = {"role": "tool", "name": calls[at]["name"], "content": message["content"]}
            continue
        if message["role"] != "end" and None in results:
            raise BadRow(
                "tool_call",
                f"turn {message['turn']}: no result yet of the call of {calls[results.index(None)]['name']}",
            )
        messages += [result for result in results if result is not None]
        calls = message.get("calls") or []
        results = [None] * len(calls)
        if message["role"] != "end":
            messages.append(_message(message, functions))
    return messages


def _answered(message: dict, calls: list[dict], results: list) -> int:
    """Which call a result answers: the one of its id, else the first open one of its name, else the first open."""
    opened = [at for at, result in enumerate(results) if result is None]
    if message["id"] is not None and any(call["id"] is not None for call in calls):
        opened = [at for at in opened if calls[at]["id"] == message["id"]]
    if message["name"] is not None:
        opened = [at for at in opened if calls[at]["name"] == message["name"]]
    if not opened:
        raise BadRow(
            "tool_call",
            f"turn {message['turn']}: the result of {message['name']!r} (id {message['id']!r}) answers no open call; "
            f"called: {', '.join(call['name'] for call in calls)}",
        )
    return opened[0]


def _message(message: dict, functions: dict[str, dict]) -> dict:
    said = {key: message[key] for key in ("role", "content", "reasoning_content") if key in message}
    calls = []
    for call in message.get("calls") or []:
        if call["name"] not in functions:
            raise BadRow(
                "tool_call",
                f"turn {message['turn']} calls {call['name']!r}; 'tools' declares {', '.join(functions) or 'none'}",
            )
        parameters = functions[call["name"]].get("parameters")
        required = parameters.get("required") if isinstance(parameters, dict) else None
        required = required if isinstance(required, list) else []
        arguments = {
            key: value
            for key, value in call["arguments"].items()
            if value is not None or call["written"] or key in required
        }
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return {**said, "tool_calls": calls} if calls else said
