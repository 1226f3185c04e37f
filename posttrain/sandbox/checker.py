"""Runs the tests, in a sandbox apart from the program's. What the tests call is a stand-in; the call goes over a line.

In: {"program", "tests", "helpers", "entry_point", "every_assert", "nonce"} on `talk`, the program's process behind
`line`. Out: the verdict on `talk`, with the nonce.

Only plain values come back over the line (values.py), so the program cannot answer with an object that equals
everything, end the tests by leaving, patch the builtins they use, or find the verdict's channel: it is not in its
process. Comparing what is no plain value fails the run and says so.
"""

import ast
import builtins
import importlib
import linecache
import random
import sys
import traceback

from posttrain.sandbox import values, wire


class Fatal(BaseException):
    """Ends the tests whatever they catch: the run has failed."""


class Line:
    """The connection to the program's process. `failure` is why the run cannot pass any more; `calls` counts."""

    def __init__(self, fd: int):
        self.fd, self.failure, self.calls = fd, None, 0

    def fail(self, reason: str) -> Fatal:
        self.failure = self.failure or reason
        return Fatal(reason)

    def ask(self, **request):
        """The value that the program's process answers with; what it raised is raised here."""
        return self._exchange(request)[0]

    def call(self, number: int, positional: tuple, named: dict):
        """The result of a call. Where it is None, lists, dicts and sets among the arguments are changed as the program
        has changed its own (list.sort); where it is a value they stay, so that emptying them wins nothing."""
        self.calls += 1
        given = [list(positional), named]
        result, after = self._exchange({"do": "call", "of": number, "arguments": self.packed(given)})
        if result is None:
            _carry_back(given, after)
        return result

    def _exchange(self, request: dict) -> tuple:
        if self.failure:
            raise Fatal(self.failure)
        try:
            wire.send(self.fd, request)
            answer, error = wire.receive(self.fd), None
            if "raised" in answer:
                error = _error(answer)
            else:
                result = tuple(values.unpack(answer.get(key), self.stand_in) for key in ("value", "arguments"))
        except (EOFError, OSError):
            raise self.fail("the program ended before its tests did") from None
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as broken:
            raise self.fail(f"the program sent no value: {type(broken).__name__}: {broken}") from None
        if error:
            raise error
        return result

    def stand_in(self, number) -> "StandIn":
        return StandIn(self, int(number))

    def packed(self, value):
        def other(value):
            if isinstance(value, StandIn):
                return value._number
            raise self.fail(f"the tests pass a {type(value).__name__} to the program: only plain values can be passed")

        return values.pack(value, other)


def _carry_back(old, new):
    """`new`, in the object that is `old` where that is a list, dict or set."""
    if type(old) is not type(new):
        return new
    if isinstance(old, list):
        old[:] = [*map(_carry_back, old, new), *new[len(old) :]]
    elif isinstance(old, dict):
        new = {key: _carry_back(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(new)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, tuple):
        for before, after in zip(old, new, strict=False):
            _carry_back(before, after)
    elif not isinstance(old, StandIn):
        return new
    return old


def _error(answer: dict) -> Exception:
    """The nearest builtin exception of those that the error is of; control of the tests is none of them."""
    for name in answer["raised"]:
        kind = vars(builtins).get(str(name))
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(str(answer["text"]))
            except TypeError:  # UnicodeDecodeError and its like want more
                continue
    return Exception(str(answer["text"]))


class StandIn:
    """A function or object of the program, which stays in its process. It can be called, read and walked through."""

    def __init__(self, line: Line, number: int):
        self._line, self._number = line, number

    def __call__(self, *positional, **named):
        return self._line.call(self._number, positional, named)

    def __getattr__(self, name: str):
        return self._line.ask(do="attribute", of=self._number, name=name)

    def __getitem__(self, key):
        return self._line.ask(do="item", of=self._number, key=self._line.packed(key))

    def __iter__(self):
        return self._line.ask(do="iterate", of=self._number)

    def __next__(self):
        return self._line.ask(do="next", of=self._number)

    def __len__(self):
        return self._line.ask(do="length", of=self._number)

    def __str__(self):
        return self._line.ask(do="text", of=self._number)

    def __repr__(self):
        return self._line.ask(do="representation", of=self._number)

    def _no_value(self, *others):
        raise self._line.fail("the tests compare an object that is no plain value: the program must not judge itself")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __contains__ = _no_value


class Tally:
    """Which assert statements of the tests held, in every one of their runs. `total` counts those that can fail."""

    def __init__(self):
        self.total, self.held, self.missed = 0, set(), set()

    def miss(self, index: int) -> None:
        """Called where an assert raised: the tests go on, unless nothing can pass any more."""
        self.missed.add(index)
        if not isinstance(sys.exception(), Exception):
            raise

    @property
    def passed(self) -> int:
        return len(self.held - self.missed)


class CountAsserts(ast.NodeTransformer):
    """`assert x` -> `try: assert x; except: miss(i); else: hold(i)`. `assert True` is no test."""

    def __init__(self, tally: Tally):
        self.tally = tally

    def visit_Assert(self, node: ast.Assert):
        if isinstance(node.test, ast.Constant):
            return node
        index, self.tally.total = self.tally.total, self.tally.total + 1
        miss, hold = (ast.parse(f"__asserts__.{call}").body for call in (f"miss({index})", f"held.add({index})"))
        handler = ast.ExceptHandler(None, None, miss)
        return ast.copy_location(ast.Try([node], [handler], hold, []), node)


def check(talk: int, line_fd: int) -> int:
    """Run the tests and send the verdict."""
    job, line, tally = wire.receive(talk), Line(line_fd), Tally()
    random.seed(0)
    try:
        reason = _run(job, line, tally)
    except BaseException as error:
        reason = _described(error)
    reason = line.failure or reason or (f"{len(tally.missed)} of {tally.total} asserts fail" if tally.missed else None)
    verdict = {"nonce": job["nonce"], "passed": reason is None, "reason": reason or "passed"}
    stray = int(reason is not None and not tally.missed)  # what failed was no counted assert, and counts as one
    share = tally.passed / (tally.total + stray) if tally.total else float(reason is None)
    wire.send(talk, verdict | {"share": share})
    return 0


def _run(job: dict, line: Line, tally: Tally) -> str | None:
    """Execute helpers and tests; None where nothing failed."""
    wire.send(line.fd, {"program": job["program"]})
    try:
        answer = wire.receive(line.fd)
    except EOFError:
        return "the program ended by itself"
    if "raised" in answer:
        return f"the program raises {answer['raised'][0]}: {answer['text']}"
    linecache.cache["tests"] = (len(job["tests"]), None, job["tests"].splitlines(True), "tests")
    namespace = {"__name__": "__main__", "__asserts__": tally}
    exec(compile(job["helpers"], "helpers", "exec"), namespace)
    tree = ast.parse(job["tests"], "tests")
    found = _names(tree, job["entry_point"], namespace, line)
    namespace |= found
    if job["every_assert"]:
        tree = ast.fix_missing_locations(CountAsserts(tally).visit(tree))
    exec(compile(tree, "tests", "exec"), namespace)
    if not line.calls and all(isinstance(value, StandIn) for value in found.values()):
        return "the tests never call the program"
    return None


def _names(tree: ast.AST, entry_point: str | None, known: dict, line: Line) -> dict:
    """What the tests may see of the program: its entry point, or without one all names that they use and have not.

    Standard modules are the tests' own even where only the program imports them: it could have patched its copy.
    """
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - vars(builtins).keys() - known.keys()
    modules = {name: importlib.import_module(name) for name in used & sys.stdlib_module_names if name != entry_point}
    wanted = [entry_point] if entry_point else sorted(used - modules.keys())
    found = line.ask(do="names", names=wanted)
    if not isinstance(found, dict) or not found.keys() <= set(wanted):
        raise line.fail("the program sent no names")
    if entry_point and entry_point not in found:
        raise line.fail(f"the program defines no {entry_point!r}")
    known |= modules
    return found


def _described(error: BaseException) -> str:
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
    where = f" in line {lines[-1].lineno} of the tests: {lines[-1].line}" if lines else ""
    return f"{type(error).__name__}{': ' if str(error) else ''}{error}{where}"[:1000]
