"""Tools that a model may call while it answers, found by short name or by dotted path.

In: names from a YAML (`tools: [calculator, my_tools.weather]`). Out: `Tool`s: the function, and its JSON schema for
the chat template, made from type hints and a Google-style docstring.

    tools = load_tools(["calculator"])
    print(tools[0].schema, tools[0].call({"expression": "2 * 21"}))

To add one: write such a function in a file of your own (examples/word_count.py), and name it by dotted path.
"""

import inspect
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.lookup import function_by_name
from posttrain.tools.calculator import calculator
from posttrain.tools.python import python

TOOLS: dict[str, Callable] = {"calculator": calculator, "python": python}
KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


@dataclass(frozen=True)
class Tool:
    """`schema` is {"type": "function", "function": {"name", "description", "parameters"}}, as templates take it."""

    name: str
    function: Callable
    schema: dict

    def call(self, arguments: dict, timeout: float = 30.0) -> str:
        """What the function answers, as text; "error: ..." for wrong arguments, an exception, or no answer in time.

        A function that hangs keeps its (daemon) thread: one that may should have a limit of its own, as `python` has.
        """
        if wrong := self._wrong(arguments):
            return f"error: {wrong}"
        box: dict = {}

        def work() -> None:
            try:
                box["answer"] = _as_text(self.function(**arguments))
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
        for key, schema in self.schema["function"]["parameters"]["properties"].items():
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


def load_tools(names: list[str]) -> list[Tool]:
    """The tools of short names in TOOLS or of dotted paths "package.module.function".

    Modules are also looked for in the working directory: under `accelerate launch` it is not on Python's path.

    Raises:
        UserError: no such name, module or function, with the nearest one; two tools of one name; a function without
            type hints or without a docstring that describes it and its arguments.
    """
    tools = [_tool(name) for name in names]
    for place, tool in enumerate(tools):
        if tool.name in [other.name for other in tools[:place]]:
            raise UserError(f"tools: two are called {tool.name!r}: a call could not tell them apart; rename one")
    return tools


def _tool(name: str) -> Tool:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    function = _function(name)
    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise UserError(
            f"tool {name!r}: {error}; a tool has type hints and a docstring with a description and an 'Args:' part "
            "that describes each argument"
        ) from error
    return Tool(schema["function"]["name"], function, schema)


def _function(name: str) -> Callable:
    function = function_by_name("tool", name, TOOLS)
    if not inspect.isfunction(function):
        raise UserError(f"tool {name!r}: its type is {type(function).__name__}, expected a plain function")
    return function
