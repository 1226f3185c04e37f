"""Another library's own statements, run on given tensors: for formulas that stand inline in a long method.

`run_between(method, first, last, names, then)` takes the method's source, keeps the statements of one block from the
first whose text starts with `first` to the next that starts with `last`, and executes them among `names` and the
globals of the method's module. Nothing is retyped, so what comes out is the library's.
"""

import ast
import inspect
import sys
import textwrap


def blocks(tree: ast.AST):
    """Every list of statements in a tree, outermost first."""
    for node in ast.walk(tree):
        for key in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, key, None), list):
                yield getattr(node, key)


def run_between(method, first: str, last: str, names: dict) -> dict:
    """The names after the statements; LookupError where no block has both ends."""
    source = textwrap.dedent(inspect.getsource(method))
    for block in blocks(ast.parse(source)):
        texts = [ast.unparse(statement) for statement in block]
        starts = [i for i, text in enumerate(texts) if text.startswith(first)]
        ends = [i for i, text in enumerate(texts) if text.startswith(last) and starts and i >= starts[0]]
        if ends:
            module = ast.Module(block[starts[0] : ends[0] + 1], type_ignores=[])
            names = dict(names)
            exec(
                compile(module, f"<{method.__qualname__}>", "exec"),
                vars(sys.modules[method.__module__]) | names,
                names,
            )
            return names
    raise LookupError(f"{method.__qualname__}: no block from {first!r} to {last!r}")
