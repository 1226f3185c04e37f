"""Runs untrusted code, inside its sandbox: as a program whose functions the tests call over a line, or as a script.

In: `serve(line)`: requests of checker.py on a socket; `script(line)`: {"code"}. Out: values packed by values.py;
output on file descriptors 1 and 2. Nothing here is trusted by anybody: this process is the untrusted code's own.
"""

import ast
import builtins
import linecache
import os
import random
import sys
import traceback
import types

from posttrain.sandbox import values, wire


def serve(line: int) -> int:
    """Execute the program of the first message, then answer requests until the tests are done."""
    program = wire.receive(line)["program"]
    module, objects = types.ModuleType("solution"), []
    sys.modules["solution"] = module
    random.seed(0)
    try:
        exec(_compiled(program, "solution"), module.__dict__)
        wire.send(line, {"value": None})
    except Exception as error:
        wire.send(line, _raised(error))
    while True:
        request = wire.receive(line)
        try:
            answer = {"value": _answer(request, module, objects)}
            if request["do"] == "call" and answer["value"] is None:
                answer["arguments"] = request["arguments"]
        except Exception as error:
            answer = _raised(error)
        sys.stdout.flush()
        try:
            wire.send(line, answer)
        except wire.TooLong as error:
            wire.send(line, {"raised": ["ValueError"], "text": f"the result is too long: {error}"})


def _answer(request: dict, module, objects: list):
    """What the tests asked for, packed. A call that gives None leaves its packed arguments, as they are after it, in
    the request: functions like list.sort say their result so."""

    def keep(value) -> int:
        objects.append(value)
        return len(objects) - 1

    def load(packed):
        return values.unpack(packed, objects.__getitem__)

    kind = request["do"]
    if kind == "names":
        found = {name: vars(module)[name] for name in request["names"] if name in vars(module)}
        return ["dict", [[name, values.pack(value, keep)] for name, value in found.items()]]
    target = objects[request["of"]]
    if kind == "call":
        positional, named = load(request["arguments"])
        result = values.pack(target(*positional, **named), keep)
        request["arguments"] = values.pack([positional, named], keep) if result is None else None
        return result
    if kind == "attribute":
        return values.pack(getattr(target, request["name"]), keep)
    if kind == "item":
        return values.pack(target[load(request["key"])], keep)
    simple = {"iterate": iter, "next": next, "length": len, "text": str, "representation": repr}
    return values.pack(simple[kind](target), keep)


def _raised(error: Exception) -> dict:
    """The names of the error's classes, nearest first, and its text."""
    try:
        text = str(error)[:1000]
    except Exception:
        text = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}


def script(line: int) -> int:
    """Run {"code"} as a script and print the value of a last line that is an expression; the exit status."""
    code = wire.receive(line)["code"]
    os.close(line)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    random.seed(0)
    try:
        tree = ast.parse(code, "script")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        _remember(code, "script")
        exec(compile(tree, "script", "exec"), module.__dict__)
        if last is not None:
            sys.displayhook(eval(compile(ast.Expression(last.value), "script", "eval"), module.__dict__))
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's own frame
        traceback.print_exception(type(error), error, trace)
        return 1
    return 0


def _compiled(code: str, name: str):
    _remember(code, name)
    return compile(code, name, "exec")


def _remember(code: str, name: str) -> None:
    """So that a traceback shows the lines."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)


def give_exit() -> None:
    """exit() and quit(), which `site` gives and which scripts use; python -S leaves them out."""
    builtins.exit = builtins.quit = sys.exit
