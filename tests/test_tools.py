"""Tools by name and by path, their schemas, wrong arguments, the calculator's bounds, the Python tool's sandbox.

Run: pytest tests/test_tools.py
"""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import UserError
from posttrain.sandbox import sandbox_obstacle
from posttrain.tools import TOOLS, load_tools
from posttrain.tools.calculator import calculator
from posttrain.tools.python import python

isolated = pytest.mark.skipif(sandbox_obstacle() is not None, reason=f"no sandbox here: {sandbox_obstacle()}")


def test_tools_by_name_and_path():
    tools = load_tools([*TOOLS, "examples.word_count.word_count"])
    assert [tool.name for tool in tools] == ["calculator", "python", "word_count"]
    for tool in tools:
        function = tool.schema["function"]
        assert function["parameters"]["type"] == "object" and function["parameters"]["required"]
        assert function["description"] and all(p["description"] for p in function["parameters"]["properties"].values())
    assert tools[0].call({"expression": "2 * 21"}) == "42"
    assert tools[2].call({"text": "two words"}) == "2"
    assert tools[2].call({"text": "two words", "unit": "characters"}) == "9"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["calculater"], "unknown; did you mean 'calculator'.*known: calculator, python"),
        (["no_such_module.f"], "no module 'no_such_module'"),
        (["examples.word_count.word_cont"], "did you mean 'word_count'"),
        (["posttrain.tools.TOOLS"], "its type is dict, expected a function"),
        (["calculator", "calculator"], "two are called 'calculator'"),
        (["os.path.join"], "tool 'os.path.join': .*type hints and a docstring"),
        (["posttrain.tools.load_tools"], "tool 'posttrain.tools.load_tools': .*docstring"),
    ],
)
def test_tools_that_cannot_be(names, message):
    with pytest.raises(UserError, match=message):
        load_tools(names)


TYPED = '''
import time

def typed(a: int, b: float = 1.0, c: bool = False, d: list[int] | None = None) -> dict:
    """
    Says what it got.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
    """
    if a == 13:
        raise ValueError("unlucky")
    if a == 14:
        time.sleep(60)
    return {"a": a, "b": b, "c": c, "d": d}
'''


@pytest.fixture
def typed(tmp_path, monkeypatch):
    (tmp_path / "typed_tools.py").write_text(TYPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return load_tools(["typed_tools.typed"])[0]


def test_arguments_are_checked_and_errors_are_text(typed):
    assert typed.call({"a": 1, "b": 2}) == '{"a": 1, "b": 2, "c": false, "d": null}'
    assert typed.call({"a": 1, "d": None}).startswith('{"a": 1')
    wrong = [{"b": "x"}, {"c": 1}, {"d": {}}, {"z": 2}, {"a": "1"}, {"a": True}, {"a": 1.5}]
    for arguments in ({}, *({"a": 1} | each for each in wrong)):
        assert typed.call(arguments).startswith("error: typed: "), arguments
    assert typed.call({"a": 13}) == "error: ValueError: unlucky"
    assert typed.call({"a": 14}, timeout=0.2) == "error: typed gave no answer within 0.2 s"


NUMBERS = st.integers(-999, 999).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join).map("({})".format),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_the_calculator_agrees_with_exact_fractions(expression):
    """Python's own fractions on the same expression are the oracle."""
    found = calculator(expression)
    try:
        exact = eval("".join(f"Fraction({part})" if part.isdigit() else part for part in split_numbers(expression)))
    except ZeroDivisionError:
        assert found.startswith("error")
        return
    assert abs(Fraction(found) - exact) <= abs(exact) / 10**10 + Fraction(1, 10**9)


def split_numbers(text: str) -> list[str]:
    parts = [""]
    for character in text:
        if character.isdigit() == parts[-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2*21", "42"), ("7/2", "3.5"), ("6/3", "2"), ("0.1+0.2", "0.3"), ("2^10", "1024"), ("-2**2", "-4"),
        ("3 × 4 − 2 ÷ 1", "10"), ("17 % 5 // 2", "1"), ("sqrt(2)", "1.41421356237"), ("round(2.567, 2)", "2.57"),
        ("2*pi", "6.28318530718"), ("factorial(20)", "2432902008176640000"), ("max(1, 2, 3)", "3"), ("1e3", "1000"),
    ],
)  # fmt: skip
def test_the_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "1 +", "x", "1/0", "__import__('os').system('id')", "(1).__class__", "[1, 2]", "'a' * 9", "1j",
        "max()", "1 if 1 else 2", "True", "1 < 2", "lambda: 1", "print(1)", "sqrt(-1)", "(-8) ** (1/3)", "9**9**9",
        "9**9**9**9", "(9**300)**9", "2**-99999999999999", "10**10**10", "1e308 * 10", "1e999", "factorial(10**9)",
        "factorial(1.5)", "comb(10**9, 5*10**8)", "round(1.5, 10**9)", "sqrt(1, 2)", "log(0)", "1" * 501, "(" * 400,
        "-" * 490 + "x",
        "0x10 and 1", "a := 1", "round(9**99, -99)",
    ],
)  # fmt: skip
def test_what_the_calculator_refuses_it_refuses_at_once(expression):
    start = time.monotonic()
    found = calculator(expression)
    assert found.startswith("error: ") or found == "0", found  # 2 to a huge negative power is 0
    assert time.monotonic() - start < 1 and len(found) < 300


@isolated
def test_the_python_tool(monkeypatch):
    assert python("x = 6\nprint(x)\nx * 7") == "6\n42"
    assert python("pass") == "(no output)"
    assert python("print('a')\n1 / 0").splitlines()[0] == "a" and "ZeroDivisionError" in python("1 / 0")
    assert python("x") and "NameError" in python("x = 1\ny")
    said = python("print('x' * 9999)")
    assert len(said) < 4100 and "(5999 characters left out)" in said
    assert python("while True: print('x' * 10**6)").endswith("error: more than 256 KB of output")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in python("import os; os.environ") + python("open('/proc/self/environ').read()")
    assert python("import os; os._exit(3)") == "error: exit status 3"
