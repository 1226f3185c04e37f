"""The `posttrain` command as a user calls it: a process, its exit code and what it prints."""

import subprocess
import sys
from importlib import metadata

import pytest

from posttrain import cli, environment

COMMAND = [sys.executable, "-c", "from posttrain.cli import main; main()"]


def call(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True)


def test_help_lists_the_verbs():
    result = call("--help")
    assert result.returncode == 0
    verbs = result.stdout.partition("VERB\n")[2].splitlines()
    names = [line.split()[0] for line in verbs if line[4] != " "]  # a long name stands on a line of its own
    known = "run inspect forecast report doctor chat complete board serve eval push export check-export "
    known += "ratings bestof attack-reward template env"
    assert names == known.split()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["runn"], "runn"),
        (["run"], "FOLDER"),
        (["run", "no/such/chain"], "error: no/such/chain/chain.yaml: no such file"),
        (["run", "x", "--from", "a", "--only", "b"], "--only"),
        (["report", "no/such/run"], "error: no/such/run"),
        (["chat", "no/such/model", "--prompt", "x"], "error: "),
    ],
)
def test_what_a_user_gets_wrong_ends_with_2_and_no_traceback(argv, words):
    result = call(*argv)
    assert result.returncode == 2
    assert words in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback():
    result = call("run", "no/such/chain", "--debug")
    assert result.returncode == 2 and "Traceback" in result.stderr


def test_env_names_versions_devices_and_what_is_missing():
    shown = call("env").stdout
    assert f"torch           {metadata.version('torch')}\n" in shown
    for word in ("devices", "cores", "memory", "free disk"):
        assert f"\n{word} " in shown


def test_cores_are_those_this_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from posttrain import environment as e; "
    )
    result = subprocess.run([sys.executable, "-c", code + "print(e.usable_cores())"], capture_output=True, text=True)
    assert result.stdout == "1\n"


def test_the_flags_of_run():
    options = cli.parser().parse_args(
        ["run", "x", "--set", "a=1", "--set", "b.c=2", "--seeds", "0", "1", "--dry-run", "--from", "sft", "--out", "y"]
    )
    assert (options.chain, options.overrides, options.seeds) == ("x", ["a=1", "b.c=2"], [0, 1])
    assert (options.dry_run, options.start_from, options.only, options.out) == (True, "sft", None, "y")


def test_a_package_that_cannot_be_imported_is_found_out():
    assert environment.imports("json") and not environment.imports("no_such_package")
