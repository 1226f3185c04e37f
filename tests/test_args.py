"""The parser: what users write in YAML and on the command line, and every message they can get."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import yaml_file
from posttrain.args import arg, parse, resolved
from posttrain.errors import UserError


@dataclass
class Model:
    """Model: what is trained

    A second paragraph that --help leaves out.
    """

    model_name_or_path: str = arg(help="a folder or a Hub name")
    dtype: Literal["float32", "bfloat16"] = arg("float32", help="of the weights")
    revision: str | None = arg(None, help="of the Hub's repository")
    layers: list[int] = arg([1, 2], help="sizes")
    rope: dict = arg({"theta": 10000.0}, help="position settings")
    cache: Path | None = arg(None)


@dataclass
class Optimizer:
    """Optimizer: how the weights move"""

    learning_rate: float = arg(1e-3, help="peak learning rate")
    max_steps: int = arg(100, help="optimizer steps")
    max_length: int | None = arg(512, help="in tokens; null = no limit")
    packing: bool = arg(False, help="fill rows with several examples")
    rewards: list[str] = arg(["correct"], help="names of reward functions")
    schedule: dict[str, Any] = arg({})

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate: found {self.learning_rate}, expected more than 0")
        if self.max_steps % 2:
            raise ValueError(f"max_steps must be even, found {self.max_steps}")


CLASSES = [Model, Optimizer]


def write(tmp_path, text, name="sft.yaml"):
    file = tmp_path / name
    file.write_text("model_name_or_path: m\n" + text, encoding="utf-8")
    return str(file)


def from_yaml(tmp_path, text, *flags):
    return parse(CLASSES, ["--config", write(tmp_path, text), *flags])


def from_flags(*flags):
    return parse(CLASSES, ["--model_name_or_path", "m", *flags])


def error_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_defaults_are_copied():
    first, _ = from_flags()
    second, optimizer = from_flags()
    first.layers.append(3)
    first.rope["theta"] = 1.0
    assert (second.layers, second.rope) == ([1, 2], {"theta": 10000.0})
    assert optimizer == Optimizer()


def test_yaml_values(tmp_path):
    text = "learning_rate: 1e-4\nmax-length: null\npacking: true\nlayers: [4, 5]\n"
    text += "rope: {theta: 5e5, on: no}\ncache: a/b\n"
    model, optimizer = from_yaml(tmp_path, text)
    assert (optimizer.learning_rate, optimizer.max_length, optimizer.packing) == (1e-4, None, True)
    assert (model.layers, model.rope, model.cache) == ([4, 5], {"theta": 500000.0, "on": "no"}, Path("a/b"))


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001", "+1E-4", "1e-04"])
def test_every_spelling_of_a_float(tmp_path, text):
    value = from_yaml(tmp_path, f"learning_rate: {text}")[1].learning_rate
    assert (value, type(value)) == (0.0001, float)


def test_an_int_is_a_float(tmp_path):
    for optimizer in (from_yaml(tmp_path, "learning_rate: 1")[1], from_flags("--learning_rate", "1")[1]):
        assert (optimizer.learning_rate, type(optimizer.learning_rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--learning-rate=3e-4"], "learning_rate", 3e-4),
        (["--max_steps", "2", "--max_steps", "4"], "max_steps", 4),
        (["--packing"], "packing", True),
        (["--packing", "--max_steps", "2"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--rewards", "a", "b", "c"], "rewards", ["a", "b", "c"]),
        (["--rewards=a"], "rewards", ["a"]),
        (["--rewards", "[PAD]"], "rewards", ["[PAD]"]),
        (["--rewards", "[]"], "rewards", []),
        (["--layers", "-7", "8"], "layers", [-7, 8]),
        (["--max_length", "null"], "max_length", None),
        (["--max_length", "7"], "max_length", 7),
        (["--revision", "None"], "revision", None),
        (["--revision", "1e-4"], "revision", "1e-4"),
        (["--revision=--main"], "revision", "--main"),
        (["--revision="], "revision", ""),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--rope", "{theta: 1e-4, deep: {a: [1, x]}}"], "rope", {"theta": 1e-4, "deep": {"a": [1, "x"]}}),
        (["--cache", "a b"], "cache", "a b"),
        (["--debug", "--max_steps", "2"], "max_steps", 2),
    ],
)
def test_flags(flags, key, value):
    assert resolved(*from_flags(*flags))[key] == value


def test_flags_win_over_yaml_wherever_config_stands(tmp_path):
    file = write(tmp_path, "max_steps: 10\npacking: true\n")
    for argv in (["--max_steps", "20", "--config", file], [f"--config={file}", "--max_steps", "20"]):
        _, optimizer = parse(CLASSES, argv)
        assert (optimizer.max_steps, optimizer.packing) == (20, True)


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.py", "--model_name_or_path", "here", "--max_steps", "6"])
    model, optimizer = parse(CLASSES)
    assert (model.model_name_or_path, optimizer.max_steps) == ("here", 6)


def test_misspelt_key_names_line_and_nearest_key(tmp_path):
    message = error_of(from_yaml, tmp_path, "packing: true\n\n# rates\nlearning_rte: 1e-4\n")
    assert message == (
        f"{tmp_path}/sft.yaml:5: unknown key 'learning_rte'; did you mean 'learning_rate'? --help lists every key"
    )


def test_all_unknown_keys_at_once(tmp_path):
    lines = error_of(from_yaml, tmp_path, "Max-Step: 1\nzzz: 2\n", "--packng").splitlines()
    assert [line.split(": unknown key ")[0].rsplit("/")[-1] for line in lines] == [
        "sft.yaml:2",
        "sft.yaml:3",
        "--packng",
    ]
    assert "'max_steps'" in lines[0] and "no key is near it" in lines[1] and "'packing'" in lines[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "learning_rate: fast",
            "learning_rate: found 'fast' (str), expected float; for example `learning_rate: 0.001`",
        ),
        ("max_steps: 1e3", "max_steps: found 1000.0 (float), expected int; for example `max_steps: 100`"),
        ("max_steps: true", "max_steps: found true (bool), expected int; for example `max_steps: 100`"),
        ("max_steps: '5'", "max_steps: found '5' (str), expected int; for example `max_steps: 100`"),
        ("max_steps: 010", "max_steps: found '010' (str), expected int; for example `max_steps: 100`"),
        ("max_steps:", "max_steps: found null, expected int; for example `max_steps: 100`"),
        ("max_length: long", "max_length: found 'long' (str), expected int or null; for example `max_length: 512`"),
        ("packing: yes", "packing: found 'yes' (str), expected true or false; for example `packing: false`"),
        (
            "rewards: correct",
            "rewards: found 'correct' (str), expected a list of str; for example `rewards: [\"correct\"]`",
        ),
        ("layers: [1, b]", "layers: found [1, 'b'] (list), expected a list of int; for example `layers: [1, 2]`"),
        ("rope: 3", 'rope: found 3 (int), expected a mapping; for example `rope: {"theta": 10000.0}`'),
        (
            "revision: 3",
            "revision: found 3 (int), expected str or null; put it in quotes; for example `revision: text`",
        ),
        ("cache: ''", "cache: found '' (str), expected a path or null; for example `cache: some/path`"),
        (
            "dtype: float31",
            "dtype: found 'float31' (str), expected one of 'float32', 'bfloat16'; for example `dtype: float32`",
        ),
    ],
)
def test_wrong_type_in_yaml(tmp_path, text, expected):
    assert error_of(from_yaml, tmp_path, "\n" + text) == f"{tmp_path}/sft.yaml:3: {expected}"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--learning_rate", "fast"],
            "--learning_rate: found 'fast', expected float; for example `--learning_rate 0.001`",
        ),
        (["--max_steps"], "--max_steps: found no value, expected int; for example `--max_steps 100`"),
        (["--max_steps", "1.5"], "--max_steps: found '1.5', expected int; for example `--max_steps 100`"),
        (["--packing", "yes"], "--packing: found 'yes', expected true or false; for example `--packing false`"),
        (
            ["--rope", "{a: ["],
            "--rope: found '{a: [', expected a mapping; for example `--rope '{\"theta\": 10000.0}'`",
        ),
        (["--layers", "1", "b"], "--layers: found ['1', 'b'], expected a list of int; "),
        (
            ["--revision", "a", "b"],
            "--revision: found ['a', 'b'], expected str or null; put a value with spaces in quotes",
        ),
        (
            ["max_steps", "3"],
            "--model_name_or_path: found ['m', 'max_steps', '3'], expected str; put a value with spaces",
        ),
        (["--max_steps=2", "3"], "'3': expected a flag; flags are `--key value` or `--key=value`"),
        (["--debug", "true"], "--debug: found ['true'], expected no value"),
        (["--config"], "--config: found [], expected one YAML file"),
        (["--config", "a", "--config", "b"], "--config: found ['b'], expected one YAML file, given once"),
    ],
)
def test_wrong_flags(flags, expected):
    assert error_of(from_flags, *flags).startswith(expected)


def test_required_key(tmp_path):
    assert error_of(parse, CLASSES, []) == (
        "model_name_or_path: required and not given; add `--model_name_or_path text` "
        "or, in a file given by --config, `model_name_or_path: text`"
    )
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert f"in {file}, `model_name_or_path: text`" in error_of(parse, CLASSES, ["--config", str(file)])


def test_range_checks_get_their_place(tmp_path):
    expected = f"{tmp_path}/sft.yaml:3: learning_rate: found -1.0, expected more than 0"
    assert error_of(from_yaml, tmp_path, "\nlearning_rate: -1") == expected
    assert error_of(from_flags, "--learning-rate", "nan") == "--learning_rate: found nan, expected more than 0"
    assert error_of(from_flags, "--max_steps", "3") == "--max_steps must be even, found 3"


def test_a_value_error_about_no_key_is_ours():
    @dataclass
    class Buggy:
        seed: int = arg(0)

        def __post_init__(self):
            int("x")

    with pytest.raises(ValueError, match="invalid literal"):
        parse([Buggy], [])


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            "packing: true\nmax_steps: 2\npacking: false\n",
            4,
            "key 'packing' stands twice, first in line 2: remove one",
        ),
        ("max_steps: 2\nmax-steps: 4\n", 3, "key 'max_steps' stands twice, first in line 2"),
        ("rope:\n  a: 1\n  a: 2\n", 4, "key 'a' stands twice, first in line 3"),
        ("max_steps: 2\n\tpacking: true\n", 3, "not valid YAML"),
        ("max_steps: 2: 3\n", 2, "not valid YAML"),
        ("? [a]\n: 3\n", 2, "a key is one word"),
        ("rope: !!python/object:os.system {}\n", 2, "could not determine a constructor"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, line, words):
    message = error_of(from_yaml, tmp_path, text)
    assert message.startswith(f"{tmp_path}/sft.yaml:{line}: ") and words in message


def test_files_that_are_no_config(tmp_path):
    file = write(tmp_path, "")
    assert error_of(parse, CLASSES, ["--config", f"{tmp_path}/stf.yaml"]).endswith(f"did you mean '{file}'?")
    assert error_of(parse, CLASSES, ["--config", f"{tmp_path}/no/x.yaml"]).endswith("has no YAML file")
    assert "is a folder" in error_of(parse, CLASSES, ["--config", str(tmp_path)])
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "list.yaml:1: expected one flat mapping" in error_of(parse, CLASSES, ["--config", f"{tmp_path}/list.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"model_name_or_path: caf\xe9\n")
    assert "UTF-8" in error_of(parse, CLASSES, ["--config", f"{tmp_path}/latin.yaml"])


def test_two_classes_may_not_share_a_key():
    with pytest.raises(AssertionError, match="another class has this key"):
        parse([Model, Model], [])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_grouped_by_noun(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        parse(CLASSES, ["--config", "missing.yaml", flag], description="Teaches a model to chat.")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    order = [
        "usage:",
        "Teaches a model",
        "Model: what",
        "--model_name_or_path  str; required",
        "a folder or a Hub name",
    ]
    order += ["Optimizer: how", "--learning_rate  float; default 0.001", "--max_length  int or null; default 512"]
    positions = [out.index(words) for words in order]
    assert positions == sorted(positions)
    assert "second paragraph" not in out


def test_resolved_is_json_and_reads_back(tmp_path):
    flags = [
        "--cache",
        "x/y",
        "--learning_rate",
        "1e-5",
        "--revision",
        "2024-01-01",
        "--rewards",
        "no",
        "1:30",
        "1e-4",
    ]
    once = from_flags(*flags, "--rope", "{a: 1e-7, b: null}", "--max_length", "null")
    config = resolved(*once)
    assert json.loads(json.dumps(config)) == config
    assert (config["cache"], config["revision"], config["rope"]) == ("x/y", "2024-01-01", {"a": 1e-7, "b": None})
    (tmp_path / "config.yaml").write_text(yaml_file.dump(config))
    assert parse(CLASSES, ["--config", f"{tmp_path}/config.yaml"]) == once


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("aeEnNoO0123456789.:-+_~<= #'\"\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abno1.-", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_dumped_yaml_reads_back_here_and_in_pyyaml(value):
    text = yaml_file.dump({"key": value})
    assert yaml_file.parse(text) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}
