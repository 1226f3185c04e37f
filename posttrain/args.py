"""The strict parser: dataclasses <- one flat YAML file <- flags.

In: dataclasses whose fields are made by `arg`, and the command line. Out: one instance of each. A key that no class
has, a value of another type and a missing key stop with a UserError that names the file and line, or the flag.

    @dataclass
    class OptimizerArgs:
        '''Optimizer: how the weights move'''

        learning_rate: float = arg(1e-3, help="peak learning rate of AdamW")

    (optimizer,) = parse([OptimizerArgs])

    accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml --learning_rate 3e-4

Flags are `--key value` or `--key=value`, lists `--key a b c` (`--key []` is the empty one), a bool alone is true, a
dict is YAML in quotes. Dashes are underscores. A flag wins over the file, a later flag over an earlier one.
`--debug` belongs to `errors.entry` and `--help` prints every key.
"""

import copy
import difflib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain import yaml_file
from posttrain.errors import UserError

RESERVED = {"config", "help", "debug"}
NAMES = {int: "int", float: "float", str: "str", bool: "true or false", dict: "a mapping", NoneType: "null"}
EXAMPLES = {int: 8, float: 0.1, str: "text", bool: True, dict: {"key": 1}, Path: "some/path", NoneType: None}


@dataclass(frozen=True)
class _Key:
    name: str
    kind: Any  # the field's type, resolved
    field: Field

    @property
    def default(self) -> Any:
        return self.field.default if self.field.default_factory is MISSING else self.field.default_factory()


@dataclass(frozen=True)
class _Given:
    value: Any  # from a file: any YAML value; from a flag: str, or list[str] unless there is exactly one
    where: str  # "recipes/tiny/sft.yaml:7" or "--learning_rate"
    is_flag: bool


def arg(default: Any = MISSING, help: str = "", **field_kw) -> Any:
    """A dataclass field with a help text; required where it has no default. A list or dict default is copied."""
    metadata = {**field_kw.pop("metadata", {}), "help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata, **field_kw)
    if default is not MISSING:
        field_kw["default"] = default
    return field(metadata=metadata, **field_kw)


def parse(classes: Sequence[type], argv: list[str] | None = None, *, description: str = "") -> tuple:
    """One instance of each class, in order, from `argv` (None: the command line) and the file its `--config` names.

    Types: int, float, str, bool, Path, Literal, list[X], dict and unions of them; null only for `X | None`. An int is
    fine for a float; a bool is no int. Ranges are checked in `__post_init__`: a UserError or ValueError raised there
    gets the place of the key it names. Raises UserError; SystemExit(0) after `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _keys(classes)
    if "--help" in argv or "-h" in argv:
        print(_help(classes, description))
        raise SystemExit(0)
    config, flags = _read_flags(argv)
    given = {}
    if config is not None:
        given = {k: _Given(e.value, f"{config}:{e.line}", False) for k, e in yaml_file.read(config).items()}
    given |= flags
    if unknown := [_unknown(name, g, keys) for name, g in given.items() if name not in keys]:
        raise UserError("\n".join(unknown))
    values = {name: _typed(keys[name], g) for name, g in given.items()}
    if missing := [_missing(key, config) for key in keys.values() if key.default is MISSING and key.name not in given]:
        raise UserError("\n".join(missing))
    return tuple(_build(cls, values, given) for cls in classes)


def resolved(*instances) -> dict:
    """Every key of the instances -> plain JSON value, flat: what a manifest stores, and what a YAML file can give."""
    return {f.name: _plain(getattr(one, f.name)) for one in instances for f in fields(one) if f.init}


def at_least(config, **least: int) -> None:
    """Check that keys of a config are at least so much. Raises UserError naming the first that is not."""
    for key, bound in least.items():
        found = getattr(config, key)
        if found is not None and found < bound:
            raise UserError(f"{key}: found {found}, expected at least {bound}")


def one_of(config, **choices: Iterable[str]) -> None:
    """Check that keys of a config are among their choices. Raises UserError naming the first that is not."""
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise UserError(f"{key}: found {getattr(config, key)!r}, expected one of {', '.join(allowed)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    assert value is None or isinstance(value, (str, bool, int, float)), f"{value!r} is no plain value"
    return value


# --- what was given


def _keys(classes: Sequence[type]) -> dict[str, _Key]:
    keys = {}
    for cls in classes:
        kinds = get_type_hints(cls)
        for f in fields(cls):
            if f.init:
                assert f.name not in RESERVED, f"{cls.__name__}.{f.name}: --{f.name} is the parser's own"
                assert f.name not in keys, f"{cls.__name__}.{f.name}: another class has this key"
                keys[f.name] = _Key(f.name, kinds[f.name], f)
    return keys


def _read_flags(argv: list[str]) -> tuple[str | None, dict[str, _Given]]:
    """The path after --config (or None), and the flags. What follows a flag up to the next `--` is its value."""
    config, flags, position = None, {}, 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("--") or token == "--":
            raise UserError(f"{token!r}: expected a flag; flags are `--key value` or `--key=value`")
        name, equals, value = token[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
        position += 1
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if name == "config":
            if config is not None or len(values) != 1 or not values[0]:
                raise UserError(
                    f"--config: found {values}, expected one YAML file, given once; flags override its keys"
                )
            config = values[0]
        elif name == "debug":
            if values:
                raise UserError(f"--debug: found {values}, expected no value")
        else:
            flags[name] = _Given(values[0] if len(values) == 1 else values, f"--{name}", True)
    return config, flags


def _unknown(name: str, given: _Given, keys: dict[str, _Key]) -> str:
    near = difflib.get_close_matches(name.lower(), keys, n=1)
    mend = f"did you mean {near[0]!r}?" if near else "no key is near it;"
    return f"{given.where}: unknown key {name!r}; {mend} --help lists every key"


def _missing(key: _Key, config: str | None) -> str:
    text = f"{key.name}: required and not given; add `{_example(key, True)}`"
    return f"{text} or, in {config or 'a file given by --config'}, `{_example(key, False)}`"


# --- types


def _typed(key: _Key, given: _Given) -> Any:
    value = given.value
    if given.is_flag and value == []:
        if bool not in (key.kind, *_members(key.kind)):
            raise UserError(f"{given.where}: found no value, expected {_name(key.kind)}; {_for_example(key, given)}")
        return True
    try:
        return _convert(value, key.kind, given.is_flag)
    except ValueError:
        pass
    where = given.where if given.is_flag else f"{given.where}: {key.name}"
    quote = "; put it in quotes" if str in (key.kind, *_members(key.kind)) and not isinstance(value, str) else ""
    if given.is_flag and isinstance(value, list):
        quote = "; put a value with spaces in quotes"
    found = f"{_short(value)} ({type(value).__name__})" if not given.is_flag and value is not None else _short(value)
    raise UserError(f"{where}: found {found}, expected {_name(key.kind)}{quote}; {_for_example(key, given)}")


def _convert(value: Any, kind: Any, is_flag: bool) -> Any:
    """`value` as `kind`; ValueError where it is none. A flag's value is text and is read as `kind` says."""
    if kind is Any:
        return value
    if members := _members(kind):
        return _convert_union(value, members, is_flag)
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        for option in inner:
            if (is_flag and value == str(option)) or (value == option and type(value) is type(option)):
                return option
    elif origin is list:
        if is_flag:
            value = [] if value == "[]" else [value] if isinstance(value, str) else value
        if isinstance(value, list):
            return [_convert(item, inner[0] if inner else Any, is_flag) for item in value]
    elif origin is dict:
        value = yaml_file.parse(value) if is_flag and isinstance(value, str) else value
        if isinstance(value, dict):
            if not inner:
                return value
            return {_convert(k, inner[0], False): _convert(v, inner[1], False) for k, v in value.items()}
    elif origin is Path:
        # Path("") would be the current folder: an unset shell variable must not become a place to write to.
        if isinstance(value, str) and value:
            return Path(value)
    else:
        return _convert_scalar(value, origin, is_flag)
    raise ValueError


def _convert_union(value: Any, members: tuple, is_flag: bool) -> Any:
    if NoneType in members and value in (None, "None"):
        return None  # Python's spelling counts too: nobody means the word "None"
    # Any text is a str, so on the command line str comes last: `--x 3` of a `str | int` is the number.
    for member in sorted(members, key=lambda m: is_flag and m in (str, Path)):
        try:
            return _convert(value, member, is_flag)
        except ValueError:
            continue
    raise ValueError


def _convert_scalar(value: Any, kind: type, is_flag: bool) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is float and isinstance(value, str):
        return float(value)  # of a flag, or a quoted number in YAML
    if is_flag and isinstance(value, str) and kind is not str:
        if kind is int:
            return int(value)
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind is NoneType and value == "null":
            return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError


def _members(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else ()


# --- words


def _name(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if members := _members(kind):
        return " or ".join(_name(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(_short(option) for option in inner)
    if origin is list:
        return f"a list of {_name(inner[0])}" if inner else "a list"
    if origin is Path:
        return "a path"
    return NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def _example(key: _Key, is_flag: bool) -> str:
    """The default as one would write it, else a value of the type."""
    value = key.default if key.default not in (MISSING, None, "", [], {}) else _example_of(key.kind)
    value = _plain(value)
    if not is_flag:
        return f"{key.name}: {value if isinstance(value, str) else json.dumps(value)}"
    texts = [v if isinstance(v, str) else json.dumps(v) for v in (value if isinstance(value, list) else [value])]
    return f"--{key.name} " + " ".join(f"'{text}'" if re.search(r"[\s{\"]", text) else text for text in texts)


def _example_of(kind: Any) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if members := _members(kind):
        return _example_of(members[0])
    if origin is Literal:
        return inner[0]
    if origin is list:
        return [_example_of(inner[0])] if inner else ["text"]
    return EXAMPLES.get(origin, "value")


def _for_example(key: _Key, given: _Given) -> str:
    return f"for example `{_example(key, given.is_flag)}`"


def _short(value: Any, width: int = 60) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _build(cls: type, values: dict[str, Any], given: dict[str, _Given]) -> Any:
    """An instance of `cls`; what its __post_init__ refuses gets the place of the first given key the message names."""
    names = [f.name for f in fields(cls) if f.init]
    try:
        return cls(**{name: values[name] for name in names if name in values})
    except (UserError, ValueError) as error:
        named = [word for word in re.findall(r"\w+", str(error)) if word in names]
        if not named and not isinstance(error, UserError):
            raise  # not about a key: a bug of ours
        name = next((word for word in named if word in given), None)
        if name is None:
            place = ""
        elif given[name].is_flag and str(error).startswith(name):
            place = "--"
        else:
            place = f"{given[name].where}: "
        raise UserError(f"{place}{error}") from error


def _help(classes: Sequence[type], description: str) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 119)
    lines = [f"usage: {sys.argv[0]} [--config FILE.yaml] [--key value ...] [--debug]"]
    if description:
        lines += ["", *textwrap.wrap(description, width)]
    for cls in classes:
        undocumented = not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}(")  # what @dataclass writes itself
        lines += ["", cls.__name__ if undocumented else cls.__doc__.strip().splitlines()[0]]
        for key in _keys([cls]).values():
            default = "required" if key.default is MISSING else f"default {_short(_plain(key.default))}"
            lines.append(f"  --{key.name}  {_name(key.kind)}; {default}")
            indent = " " * 6
            text = key.field.metadata.get("help") or ""
            lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)
