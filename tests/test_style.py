"""Limits that keep the code readable: lengths of files, recipes and functions, and no private names of TRL or vLLM.

Run: pytest tests/test_style.py
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("posttrain", "recipes", "tests") for path in (ROOT / folder).rglob("*.py"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_lengths(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (60 if path.parent.name == "recipes" else 400)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 60
    }
    assert not long


@pytest.mark.parametrize("path", [p for p in FILES if "tests" not in p.parts], ids=relative)
def test_no_private_names_of_trl_or_vllm(path):
    private = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        private += [
            name
            for name in names
            if name.split(".")[0] in ("trl", "vllm")
            and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        ]
    assert not private


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=relative)
def test_the_first_lines_say_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
