"""Tools that a model may call while it answers, found by short name, by dotted path, or on an MCP server.

In: names and options from a YAML (`tools: [calculator, search, my_tools.weather, "mcp:files"]`, `tool_options:
{search: {folder: docs}}`). Out: `Tool`s: the function, and its JSON schema for the chat template, made from type hints
and a Google-style docstring.

    tools = load_tools(["calculator", "search"], {"search": {"folder": "docs"}})
    print(tools[0].schema, tools[0].call({"expression": "2 * 21"}))

To add one: write such a function in a file of your own (examples/word_count.py), and name it by dotted path.
"""

import inspect
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields

from posttrain.errors import UserError
from posttrain.lookup import function_by_name, nearest
from posttrain.sandbox import sandbox_obstacle
from posttrain.tools.calculator import calculator
from posttrain.tools.mcp import McpOptions, mcp_tools
from posttrain.tools.python import python
from posttrain.tools.search import SearchOptions, search_tool

TOOLS: dict[str, Callable] = {"calculator": calculator, "python": python}
MCP = "mcp:"  # begins the name of a server
KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


@dataclass(frozen=True)
class Tool:
    """`schema` is {"type": "function", "function": {"name", "description", "parameters"}}, as templates take it.
    `require` makes the tool ready, and raises UserError where it cannot run here; None: it can anywhere."""

    name: str
    function: Callable
    schema: dict
    require: Callable[[], object] | None = None

    def call(self, arguments: dict, timeout: float = 30.0) -> str:
        """What the function answers, as text; "error: ..." for wrong arguments, an exception, or no answer in time.

        A function that hangs keeps its (daemon) thread: one that may should have a limit of its own, as `python` has.
        """
        if wrong := self._wrong(arguments):
            return f"error: {wrong}"
        box: dict = {}

        def work() -> None:
            try:
                text = _as_text(self.function(**arguments))
                box["answer"] = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
            except UserError as error:
                box["fault"] = error  # of the machine or of the run, not of the call: the run stops
            except Exception as error:
                box["answer"] = f"error: {type(error).__name__}: {error}"

        thread = threading.Thread(target=work, name=f"tool {self.name}", daemon=True)
        thread.start()
        thread.join(timeout)
        if "fault" in box:
            raise box["fault"]
        return box.get("answer", f"error: {self.name} gave no answer within {timeout:g} s")

    def _wrong(self, arguments: dict) -> str | None:
        try:
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            return f"{self.name}: {error}"
        parameters = self.schema["function"]["parameters"]
        if missing := [key for key in parameters.get("required", []) if key not in arguments]:
            return f"{self.name}: missing a required argument: {missing[0]!r}"
        for key, schema in parameters["properties"].items():
            schema = schema if isinstance(schema, dict) else {}  # in JSON Schema `true` is one, too
            kind = KINDS.get(schema.get("type")) if isinstance(schema.get("type"), str) else None
            value = arguments.get(key)
            if key not in arguments or kind is None or (value is None and schema.get("nullable")):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                return f"{self.name}: {key} is {json.dumps(value)[:80]}, expected a value of type {schema['type']}"
        return None


def _as_text(answer) -> str:
    if isinstance(answer, str):
        return answer
    try:
        return json.dumps(answer, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(answer)


def schemas(tools: list[Tool]) -> list[dict]:
    """What `encode_chat(..., tools=)` takes."""
    return [tool.schema for tool in tools]


def load_tools(names: list[str], options: dict | None = None) -> list[Tool]:
    """The tools of short names, of dotted paths "package.module.function" and of MCP servers, "mcp:NAME".

    Modules are also looked for in the working directory: under `accelerate launch` it is not on Python's path.

    Args:
        options: keywords by name, for those that take some: {"search": {"folder": "docs"}}.

    Raises:
        UserError: no such name, module or function, with the nearest one; two tools of one name; a function without
            type hints or without a docstring that describes it and its arguments; options that are unknown or wrong.
    """
    options = options or {}
    check_tools(names, options)
    tools = [tool for name in names for tool in _load(name, options.get(name, {}))]
    for place, tool in enumerate(tools):
        if tool.name in [other.name for other in tools[:place]]:
            raise UserError(f"tools: two are called {tool.name!r}: a call could not tell them apart; rename one")
    return tools


def with_tools(rows: list[dict], names: list[str], options: dict | None = None) -> list[dict]:
    """Rows whose prompts tell the model of these tools; a row's own `tools` stay."""
    told = schemas(load_tools(names, options))
    return [{**row, "tools": row.get("tools") or told} for row in rows] if told else rows


def check_tools(names: list[str], options: dict) -> None:
    """What can be known before anything is read, started or asked for. UserError for options that are unknown or
    wrong, or that no tool has."""
    for name, given in options.items():
        if name not in names:
            listed = ", ".join(names) or "none"
            raise UserError(f"tool_options: {name!r} is not among the tools ({listed}){nearest(name, names)}")
        if _options_of(name) is None:
            raise UserError(f"tool_options: {name} takes no options; search and mcp:NAME do")
        if not isinstance(given, dict):
            raise UserError(f"tool_options: {name}: found {given!r}, expected a mapping such as {{key: value}}")
    for name in names:
        if _options_of(name) is not None:
            _made(name, options.get(name, {}))


def _options_of(name: str) -> type | None:
    """The dataclass of a tool's options; None for one that has none."""
    return SearchOptions if name == "search" else McpOptions if name.startswith(MCP) else None


def _made(name: str, given: dict):
    """A tool's options. UserError names the tool, the key and the nearest one."""
    kind = _options_of(name)
    known = [field.name for field in fields(kind)]
    for key in given:
        if key not in known:
            has = f"its options are {', '.join(known)}"
            raise UserError(f"tool_options: {name}: unknown key {key!r}{nearest(key, known)}; {has}")
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(f"tool_options: {name}: {error}") from error


def _load(name: str, given: dict) -> list[Tool]:
    if name == "search":
        return [_tool(name, *search_tool(_made(name, given)))]
    if name.startswith(MCP):
        return [Tool(each.name, each.call, each.schema) for each in mcp_tools(name, _made(name, given))]
    return [_tool(name, _function(name), _require_sandbox if name == "python" else None)]


def _require_sandbox() -> None:
    if obstacle := sandbox_obstacle():
        raise UserError(f"tools: python: {obstacle}")


def _tool(name: str, function: Callable, require: Callable[[], object] | None = None) -> Tool:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise UserError(
            f"tool {name!r}: {error}; a tool has type hints and a docstring with a description and an 'Args:' part "
            "that describes each argument"
        ) from error
    return Tool(schema["function"]["name"], function, schema, require)


def _function(name: str) -> Callable:
    function = function_by_name("tool", name, {**TOOLS, "search": search_tool})
    if not inspect.isfunction(function):
        raise UserError(f"tool {name!r}: its type is {type(function).__name__}, expected a plain function")
    return function
