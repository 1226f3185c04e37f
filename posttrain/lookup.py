"""Names that users write: the nearest known one for an error, and functions found by short name or by dotted path.

In: a name from a YAML file and what is known. Out: a hint, or the function.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping

from posttrain.errors import UserError


def nearest(found: object, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where something known is near, else nothing."""
    close = difflib.get_close_matches(str(found), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def function_by_name(kind: str, name: str, known: Mapping[str, Callable]) -> Callable:
    """The function of a short name in `known` or of a dotted path "package.module.function".

    Modules are also looked for in the working directory: under `accelerate launch` it is not on Python's path.
    UserError, which begins with `kind` and the name, where there is no such name, module or function, or where it is
    no function.
    """
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f"{kind} {name!r}: unknown{nearest(name, known)}; known: {', '.join(sorted(known))}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module was found, but something it imports was not: its traceback says where
        raise UserError(
            f"{kind} {name!r}: no module {error.name!r}{nearest(name, known)}; a dotted path is "
            f"package.module.function, found from the working directory {os.getcwd()} or PYTHONPATH"
        ) from None
    if attribute not in vars(module):
        raise UserError(f"{kind} {name!r}: no {attribute!r} in {module_name}{nearest(attribute, vars(module))}")
    function = vars(module)[attribute]
    if not callable(function):
        raise UserError(f"{kind} {name!r}: its type is {type(function).__name__}, expected a function")
    return function
