"""Limits that keep the code readable: lengths of files, recipes and functions, and no private names of TRL or vLLM.

Run: pytest tests/test_style.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = [path for folder in ("posttrain", "recipes", "examples") for path in (ROOT / folder).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in OURS + TESTS}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_have_at_most_400_lines_recipes_60():
    assert [path for path in TREES if lines(path) > (60 if path.parent == ROOT / "recipes" else 400)] == []


def test_functions_have_at_most_60_lines():
    functions = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if is_function(node)]
    assert len(functions) > 100
    assert [(path.name, f.name) for path, f in functions if f.end_lineno - f.lineno + 1 > 60] == []


def is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_the_first_lines_of_a_file_say_what_it_is():
    assert [path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_no_private_name_of_trl_or_vllm_is_used():
    """They change without notice between versions."""
    found = [(path.name, name) for path in OURS for node in ast.walk(TREES[path]) for name in names(node)]
    private = [
        (path, name)
        for path, name in found
        if name.split(".")[0] in ("trl", "vllm")
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    ]
    assert private == [] and any(name.startswith("vllm.") for _, name in found)


def names(node: ast.AST) -> list[str]:
    """Dotted names that an import or an attribute access uses."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
