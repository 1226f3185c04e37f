"""The calculator that a model may call. In: an expression. Out: its value as text, or "error: ...".

Nothing is evaluated by Python: the expression's syntax tree is walked, and whatever could grow large (powers,
factorials) is refused before it is worked out.
"""

import ast
import math
import operator

MAX_CHARS = 500
MAX_BITS = 2048  # of an integer: 616 digits
CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
FUNCTIONS = {
    "abs": abs, "round": round, "min": min, "max": max, "floor": math.floor, "ceil": math.ceil, "gcd": math.gcd,
    "lcm": math.lcm, "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "log2": math.log2, "log10": math.log10,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "asin": math.asin, "acos": math.acos, "atan": math.atan,
    "radians": math.radians, "degrees": math.degrees, "factorial": math.factorial, "comb": math.comb,
}  # fmt: skip
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def calculator(expression: str) -> str:
    """
    Works out an arithmetic expression and returns its value.

    Args:
        expression: Numbers with + - * / // % ** and brackets, pi, e, and functions like sqrt(2), log(8, 2).
    """
    if len(expression) > MAX_CHARS:
        return f"error: the expression has {len(expression)} characters, at most {MAX_CHARS} are read"
    try:
        tree = ast.parse(expression.translate(SIGNS).replace("^", "**").strip(), mode="eval")
        return _text(_value(tree.body))
    except (SyntaxError, RecursionError, MemoryError):
        return "error: this is no arithmetic expression"
    except ZeroDivisionError:
        return "error: division by zero"
    except (ValueError, TypeError, OverflowError) as error:
        return f"error: {error}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return _bounded(OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, [_value(argument) for argument in node.args])
    raise ValueError(f"{ast.unparse(node)[:60]} is not arithmetic")


def _called(name: str, arguments: list) -> int | float:
    if name not in FUNCTIONS:
        raise ValueError(f"there is no function {name}; known: {', '.join(FUNCTIONS)}")
    if name in ("factorial", "comb") and any(abs(argument) > 300 for argument in arguments):
        raise ValueError(f"{name} takes numbers up to 300")
    if name == "round" and len(arguments) == 2 and abs(arguments[1]) > 20:
        raise ValueError("round takes up to 20 digits")
    return _bounded(FUNCTIONS[name](*arguments))


def _check_power(base, exponent) -> None:
    """Both are bounded already, so a float cannot run away: it overflows at once."""
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and abs(base) > 1
        and exponent * base.bit_length() > MAX_BITS
    ):
        raise ValueError("the power is too large")
    if base < 0 and isinstance(exponent, float) and not exponent.is_integer():
        raise ValueError("the power of a negative number is not real")


def _bounded(value):
    if type(value) is int and value.bit_length() <= MAX_BITS or type(value) is float and math.isfinite(value):
        return value
    raise ValueError("the number is too large")


def _text(value: int | float) -> str:
    """Twelve digits of a float, which hides that 0.1 + 0.2 is not 0.3; a whole one without its point."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)
