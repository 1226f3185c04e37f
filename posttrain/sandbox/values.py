"""Plain values <-> JSON, for the line between tests and the program under test. Standard library only.

In: numbers, strings, bytes, None, lists, tuples, dicts, sets, and a few types of collections, datetime, decimal and
fractions. Out: nested lists. Subclasses travel as their base: only data crosses, so no object with methods of the
program's own (an `__eq__` that is always true) reaches the tests.
"""

import datetime
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

HANDLE = "handle"
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MAPPINGS = {"Counter": Counter, "OrderedDict": OrderedDict, "dict": dict}
BYTES = {"bytes": bytes, "bytearray": bytearray}
TIMES = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


def pack(value, other: Callable[[object], object]):
    """`value` as nested lists; `other(value)` gives the handle of what is no plain value."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int.__pos__(value) if -(2**62) < value < 2**62 else ["int", hex(value)]
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [pack(each, other) for each in kind.__iter__(value)]]
    for name, kind in MAPPINGS.items():
        if isinstance(value, kind):
            return [name, [[pack(key, other), pack(each, other)] for key, each in dict.items(value)]]
    return _pack_rare(value, other)


def _pack_rare(value, other: Callable[[object], object]):
    for name, kind in BYTES.items():
        if isinstance(value, kind):
            return [name, kind.hex(value)]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if type(value) is deque:
        return ["deque", [[pack(each, other) for each in value], value.maxlen]]
    if type(value) is range:
        return ["range", [pack(each, other) for each in (value.start, value.stop, value.step)]]
    if type(value) is Decimal:
        return ["Decimal", str(value)]
    if type(value) is Fraction:
        return ["Fraction", [pack(value.numerator, other), pack(value.denominator, other)]]
    if type(value) is datetime.timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    for name, kind in TIMES.items():
        if type(value) is kind:
            return [name, value.isoformat()]
    return [HANDLE, other(value)]


def unpack(packed, handle: Callable[[object], object]):
    """The value that `pack` packed; `handle(number)` gives what a handle stands for.

    ValueError, TypeError or KeyError where `packed` is nothing that `pack` makes.
    """
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise ValueError("a JSON object is no packed value")
        return packed
    name, body = packed
    if name in SEQUENCES:
        return SEQUENCES[name]([unpack(each, handle) for each in body])
    if name in MAPPINGS:
        return MAPPINGS[name]({unpack(key, handle): unpack(each, handle) for key, each in body})
    if name == HANDLE:
        return handle(body)
    if name == "int":
        return int(body, 16)
    if name in BYTES:
        return BYTES[name].fromhex(body)
    if name in TIMES:
        return TIMES[name].fromisoformat(body)
    parts = [unpack(each, handle) for each in body] if name in ("range", "Fraction") else body
    if name == "deque":
        return deque([unpack(each, handle) for each in body[0]], body[1])
    if name == "Decimal":
        return Decimal(body)
    return {"complex": complex, "range": range, "Fraction": Fraction, "timedelta": datetime.timedelta}[name](*parts)
