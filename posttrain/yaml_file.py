"""A flat YAML file: key -> value, with the line each key stands on.

In: a path, or a mapping. Out: entries with their lines (`read`), or YAML text (`dump`) that `read` reads back as the
same values. Numbers, true/false and null follow YAML 1.2: `1e-4` is a float and `no` a string, where PyYAML's own
YAML 1.1 makes them a string and False. Dates stay strings. Keys may be written with dashes for underscores.
"""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from posttrain.errors import UserError

NUMBER = r"[-+]?(\d+[eE][-+]?\d+|(\d+\.\d*|\.\d+)([eE][-+]?\d+)?)"  # with a point or an exponent, else an int
FLOAT = re.compile(rf"^({NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")  # no leading zero: YAML 1.1 would read 010 as 8


class Entry(NamedTuple):
    value: Any
    line: int  # counted from 1


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # in place of YAML 1.1's

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key is one word, not a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                problem = f"key {key_node.value!r} stands twice, first in line {seen[key_node.value]}: remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than a string."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read(path: str | Path) -> dict[str, Entry]:
    """The entries of the one mapping in `path`, keys with underscores. An empty file has none.

    Raises UserError for a missing or unreadable file, broken YAML, a key that stands twice, or no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(_missing(path))
    try:
        loader = _Loader(path.read_bytes())
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:{root.start_mark.line + 1}: expected one flat mapping of `key: value` lines")
        loader.construct_object(root, deep=True)  # refuses what is broken, at any depth
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{path}:{error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem}); expected `key: value` lines") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: {error.reason} at byte {error.position}; expected YAML in UTF-8") from error
    entries = {}
    for key_node, value_node in root.value:
        key, line = key_node.value.replace("-", "_"), key_node.start_mark.line + 1
        if key in entries:
            raise UserError(f"{path}:{line}: key {key!r} stands twice, first in line {entries[key].line}: remove one")
        entries[key] = Entry(loader.construct_object(value_node, deep=True), line)
    return entries


def parse(text: str) -> Any:
    """One YAML value from a flag. ValueError where it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {text!r}") from error


def dump(mapping: dict) -> str:
    """YAML text of plain values, in the mapping's order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder, expected a YAML file"
    beside = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), beside, n=1)
    if near:
        return f"{path}: no such file; did you mean {near[0]!r}?"
    return f"{path}: no such file, and {path.parent} " + (f"has {', '.join(beside)}" if beside else "has no YAML file")
