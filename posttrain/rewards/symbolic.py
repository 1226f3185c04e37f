r"""Do two LaTeX expressions have the same value? Worked out in a process that is killed where it does not come back.

In: two strings that rewards/math.py found small. Out: a bool. Parsed by math-verify, compared by value at points.
math-verify's `verify` is not used: it calls SymPy's `simplify`, which on \log(x+y)z - 999999999999 does not come back,
and its time-outs need signals, which exist on the main thread only (elsewhere every answer turns out wrong).
"""

import cmath
import logging
import resource
import zlib
from functools import lru_cache
from math import prod
from pathlib import Path

from posttrain.rewards.guard import Pool, RemoteError, TimedOut

SECONDS = 10.0  # a comparison takes milliseconds; this is for what slips through the bounds
MEMORY = 2**31  # bytes beyond what the process has after its imports
POINTS = (0.7310585, -1.6180339, 2.2360679)  # of no special value; one negative, as sqrt(x^2) is not x


def _prepare() -> None:
    """In the process: import SymPy, and bound the memory."""
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its time-out is off: meant
    pages = Path("/proc/self/statm")
    if pages.is_file():  # Linux; elsewhere the limit on address space is not kept anyway
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


POOL = Pool(_prepare)


@lru_cache(maxsize=16384)
def same_value(candidate: str, gold: str) -> bool:
    """Whether both can be read and have one value. What takes too long or too much memory equals nothing."""
    try:
        return POOL.call(_compare, (candidate, gold), seconds=SECONDS)
    except TimedOut:
        return False
    except RemoteError as error:
        if error.kind in ("MemoryError", "RecursionError", "ProcessEnded"):
            return False
        raise


def _compare(candidate: str, gold: str) -> bool:
    ours, theirs = _parse(candidate), _parse(gold)
    return ours is not None and theirs is not None and _same_value(ours, theirs)


@lru_cache(maxsize=4096)
def _parse(latex: str):
    """Return the SymPy object that the LaTeX stands for, not worked out; None where it is not readable."""
    from math_verify import LatexExtractionConfig, parse

    parsed = parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed else None


def _same_value(a, b) -> bool:
    """Compare SymPy objects: numbers and formulas by value at POINTS, sets without order, all else part by part."""
    import sympy

    if a == b:
        return True
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(_same_value, a.flat(), b.flat()))
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        try:
            pairs = [(_at(a, point), _at(b, point)) for point in POINTS]
        except (OverflowError, ZeroDivisionError, ValueError, TypeError):
            return False  # no finite value, or a function not known here
        return all(cmath.isclose(x, y, rel_tol=1e-9) for x, y in pairs)
    if not (isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic)) or len(a.args) != len(b.args) or not a.args:
        return False
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return all(any(_same_value(x, y) for y in b.args) for x in a.args) and all(
            any(_same_value(x, y) for x in a.args) for y in b.args
        )
    return a.func == b.func and all(map(_same_value, a.args, b.args))


def _at(expression, point: float) -> complex:
    """Return the value of a SymPy expression in floating point, with the unknowns at values derived from `point`."""
    import sympy

    if isinstance(expression, sympy.Symbol):
        return complex(point + zlib.crc32(expression.name.encode()) / 2**32)
    if isinstance(expression, sympy.Number | sympy.NumberSymbol):
        return complex(float(expression))
    if expression == sympy.I:
        return 1j
    values = [_at(part, point) for part in expression.args]
    if isinstance(expression, sympy.Add):
        return sum(values)
    if isinstance(expression, sympy.Mul):
        return prod(values)
    if isinstance(expression, sympy.Pow):
        return values[0] ** values[1]
    name = type(expression).__name__
    if name not in ("sin", "cos", "tan", "log", "exp"):
        raise TypeError(f"no numeric value for {name}")
    return getattr(cmath, name)(*values)
