"""A small real chain: three recipes that train nothing, run under the real `accelerate launch`."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import chain, checkpoint, launch
from posttrain.errors import UserError

RECIPE = '''
"""A recipe that trains nothing: it writes the folder of a finished stage."""
import json, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from posttrain import args, checkpoint, stage
from posttrain.args import arg
from posttrain.errors import UserError, entry

NAME = Path(__file__).stem

@dataclass
class Config:
    """Toy stage"""
    output_dir: str = arg()
    parent: str | None = arg(None)
    files: list[str] = arg([])
    learning_rate: float = arg(0.1)
    seed: int = arg(0)
    resume: str = arg("auto")
    overwrite: bool = arg(False)
    fail: str = arg("")
    wait: bool = arg(False)

ARGS = (Config,)

def check(argv, planned=()):
    (config,) = args.parse(ARGS, argv)
    if config.fail:
        raise UserError(config.fail)
    if config.parent and config.parent not in planned and stage.read_manifest(config.parent) is None:
        raise UserError(f"parent {config.parent} is not there")
    return args.resolved(config)

def main():
    folder = Path(check(sys.argv[1:])["output_dir"])
    config = check(sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    if config["wait"]:
        checkpoint.write_json(folder / stage.RUN, {"config": config, "parents": {}})
        wait(folder)
    with open(folder.parent / "order.txt", "a") as file:
        file.write(NAME + (" overwrite" if config["overwrite"] else "") + "\\n")
    parent = config["parent"]
    sha256 = checkpoint.sha256_file(Path(parent) / stage.STAGE) if parent else None
    gain = {"name": "toy", "unit": "%", "better": "higher", "passed": True, "goal": "higher",
            "before": {"label": "a", "value": 0.5, "low": None, "high": None},
            "after": {"label": "b", "value": 0.6 + config["seed"] / 10, "low": None, "high": None}}
    manifest = {"stage": NAME, "status": "finished", "config": config, "created": str(time.time_ns()),
                "parents": {"policy": {"path": parent, "stage": "x", "sha256": sha256}} if parent else {},
                "gains": [gain]}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    print(f"{NAME} says hello")
    checkpoint.write_json(folder / stage.STAGE, manifest)

def wait(folder):
    def save(signum, _frame):
        time.sleep(0.5)
        (folder / "saved").write_text(str(signum))
        sys.exit(128 + signum)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    (folder / "ready").touch()
    time.sleep(60)

if __name__ == "__main__":
    entry(main)
'''
NAMES = ["first", "second", "third"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """recipes/mini in a fresh current folder: first <- second <- third."""
    monkeypatch.chdir(tmp_path)
    mini = Path("recipes/mini")
    mini.mkdir(parents=True)
    (mini / "chain.yaml").write_text(f"out: runs/mini\nstages: [{', '.join(NAMES)}]\n")
    for name, parent in zip(NAMES, [None, "first", "second"], strict=True):
        Path(f"recipes/{name}.py").write_text(RECIPE)
        text = f"output_dir: runs/mini/{name}\n" + (f"parent: runs/mini/{parent}\n" if parent else "")
        (mini / f"{name}.yaml").write_text(text)
    return mini


def finish(planned: chain.Planned) -> None:
    """Write the manifest the recipe would write, without launching it."""
    planned.output_dir.mkdir(parents=True, exist_ok=True)
    parent = planned.config["parent"]
    parents = {}
    if parent:
        parents = {"policy": {"path": parent, "sha256": checkpoint.sha256_file(Path(parent) / "stage.json")}}
    manifest = {"stage": planned.name, "status": "finished", "config": planned.config, "parents": parents}
    checkpoint.write_json(planned.output_dir / "stage.json", manifest)


def plan(folder: Path, out: str = "runs/mini", overrides=()) -> list[chain.Planned]:
    return chain.plan(folder, NAMES, "runs/mini", out, overrides)


def reasons(stages: list[chain.Planned]) -> list[str | None]:
    return [chain.reason_to_run(each, earlier_ran=False, asked=False)[0] for each in stages]


def order(out: str = "runs/mini") -> list[str]:
    return Path(out, "order.txt").read_text().split("\n")[:-1]


def test_runs_in_order_then_skips_then_runs_what_changed_again(folder, capsys):
    assert chain.run(folder) == 0
    assert order() == NAMES
    assert "second says hello" in capsys.readouterr().out
    assert "second says hello" in Path("runs/mini/logs/second.log").read_text()
    record = json.loads(Path("runs/mini/chain.json").read_text())
    assert (record["name"], record["stages"], record["status"]) == ("mini", NAMES, {})

    assert chain.run(folder) == 0
    shown = capsys.readouterr().out
    assert order() == NAMES and shown.count("skipped") == 3
    assert "50.0 %" in shown and "runs/mini/report.html" in shown and "chat runs/mini/third" in shown

    assert chain.run(folder, overrides=["second.learning_rate=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "second: config changed (learning_rate: 0.1 -> 0.5), runs again" in shown
    assert order() == [*NAMES, "second overwrite", "third overwrite"]


def test_a_failed_stage_shows_its_log_and_the_command_to_try_it_alone(folder, capfd):
    assert chain.run(folder, overrides=["second.fail=a made-up fault"]) != 0
    assert order() == ["first"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[-3] == "  error: a made-up fault"  # nothing of the launcher stands after it
    assert json.loads(Path("runs/mini/chain.json").read_text())["status"] == {"second": "failed"}
    alone = subprocess.run(shlex.split(lines[-1]), capture_output=True, text=True)
    assert alone.returncode != 0 and alone.stderr == "error: a made-up fault\n"


def test_only_runs_a_finished_stage_again(folder):
    for planned in plan(folder):
        finish(planned)
    assert chain.run(folder, only="second") == 0
    assert order() == ["second overwrite"]


def test_from_looks_at_no_earlier_stage(folder):
    (folder / "first.yaml").write_text("no_such_key: 1\n")
    assert chain.run(folder, start_from="second", dry_run=True) == 2  # second's parent is not there; first is not read


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_which_saves_before_the_chain_ends(folder, signum):
    command = [sys.executable, "-c", "from posttrain.cli import main; main()", "run", str(folder)]
    process = subprocess.Popen([*command, "--set", "first.wait=true"], stderr=subprocess.PIPE, text=True)
    while not Path("runs/mini/first/ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    said = process.communicate()[1]
    assert process.returncode == 128 + signum
    assert Path("runs/mini/first/saved").read_text() == str(int(signum))
    assert f"stopped by {signal.Signals(signum).name}" in said
    # The same command goes on: the recipe is called without --overwrite and resumes by itself.
    (planned,) = chain.plan(folder, ["first"], "runs/mini", "runs/mini", ["wait=true"])
    assert chain.reason_to_run(planned, earlier_ran=False, asked=False) == ("unfinished, goes on", False)


def test_dry_run_checks_every_stage_and_writes_nothing(folder, capsys):
    assert chain.run(folder, dry_run=True) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:3]] == [[name, "ok"] for name in NAMES]
    assert chain.run(folder, dry_run=True, overrides=["second.fail=no such data"]) == 2
    assert "second  error: no such data" in capsys.readouterr().out
    assert chain.run(folder, dry_run=True, only="third") == 2  # its parent is neither there nor planned
    assert not Path("runs").exists()


def test_out_moves_every_string_of_the_config(folder, tmp_path):
    (folder / "third.yaml").write_text(
        "output_dir: runs/mini/third\nparent: runs/mini/second\nfiles: [runs/mini/a, runs/miniature, b]\n"
    )
    planned = plan(folder, str(tmp_path / "new"))[2]
    assert planned.config["output_dir"] == f"{tmp_path}/new/third"
    assert planned.config["parent"] == f"{tmp_path}/new/second"
    assert planned.config["files"] == [f"{tmp_path}/new/a", "runs/miniature", "b"]
    assert planned.argv[:2] == ["--config", "recipes/mini/third.yaml"]


def test_a_chain_can_be_named_from_inside_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert chain.run(".", dry_run=True) == 0


def test_set_reaches_every_stage_that_has_the_key_or_the_one_named(folder):
    stages = plan(folder, overrides=["seed=3", "third.learning-rate=-1", "second.files=[a b, c]", "first.files=[]"])
    assert [each.config["seed"] for each in stages] == [3, 3, 3]
    assert [each.config["learning_rate"] for each in stages] == [0.1, 0.1, -1.0]
    assert [each.config["files"] for each in stages] == [[], ["a b", "c"], []]


def test_a_moved_run_is_still_finished(folder, tmp_path):
    for planned in plan(folder):
        finish(planned)
    assert reasons(plan(folder)) == [None, None, None]
    os.rename("runs/mini", "elsewhere")
    assert reasons(plan(folder, "elsewhere")) == [None, None, None]
    assert reasons(plan(folder, str(tmp_path / "elsewhere"))) == [None, None, None]


def test_a_changed_parent_and_a_changed_config_run_again(folder):
    stages = plan(folder)
    for planned in stages:
        finish(planned)
    with open("runs/mini/first/stage.json", "a") as file:
        file.write("\n")
    assert reasons(stages) == [None, "policy runs/mini/first changed, runs again", None]
    changed = plan(folder, overrides=["third.seed=1"])[2]
    assert (
        chain.reason_to_run(changed, earlier_ran=False, asked=False)[0] == "config changed (seed: 0 -> 1), runs again"
    )
    overwrite = plan(folder, overrides=["third.overwrite=true"])[2]  # how a stage is started, not what it computes
    assert chain.reason_to_run(overwrite, earlier_ran=False, asked=False)[0] is None


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (None, {"only": "secnd"}, ["--only", "did you mean 'second'"]),
        (None, {"start_from": "fourth"}, ["--from", "first, second, third"]),
        (None, {"start_from": "first", "only": "first"}, ["--from", "--only"]),
        (None, {"overrides": ["learning_rte=1"]}, ["learning_rte", "did you mean 'learning_rate'"]),
        (None, {"overrides": ["secnd.seed=1"]}, ["secnd", "did you mean 'second'"]),
        (None, {"overrides": ["second.sed=1"]}, ["second.sed", "did you mean 'seed'"]),
        (None, {"overrides": ["seed"]}, ["--set seed", "key=value"]),
        (None, {"overrides": ["seed=many"]}, ["seed", "'many'"]),
        (None, {"overrides": ["output_dir=x"]}, ["first.yaml", "output_dir", "runs/mini/first"]),
        (None, {"accelerate_config": "no.yaml"}, ["--accelerate_config", "no.yaml"]),
        (("chain.yaml", None), {}, ["recipes/mini/chain.yaml", "no such file"]),
        (("chain.yaml", "out: runs/mini\nstage: [first]\n"), {}, ["chain.yaml:2", "'stage'"]),
        (("chain.yaml", "out: runs/mini\n"), {}, ["chain.yaml", "stages"]),
        (("chain.yaml", "stages: [first]\n"), {}, ["chain.yaml", "out"]),
        (("chain.yaml", "out: runs/mini\nstages: [first, first]\n"), {}, ["chain.yaml", "twice"]),
        (("chain.yaml", "out: runs/mini\nstages: [frst]\n"), {}, ["frst.yaml", "did you mean 'first'"]),
        (("second.yaml", None), {}, ["second.yaml", "no file"]),
        (("second.yaml", "output_dir: runs/mini/second\nsed: 1\n"), {}, ["recipes/mini/second.yaml:2", "'seed'"]),
        (("../second.py", None), {}, ["recipes/second.py"]),
    ],
)
def test_what_a_user_gets_wrong_is_named_before_anything_runs(folder, change, options, words):
    if change is not None:
        name, text = change
        (folder / name).write_text(text) if text is not None else (folder / name).unlink()
    with pytest.raises(UserError) as error:
        chain.run(folder, **options)
    assert [word for word in words if word not in str(error.value)] == []
    assert not Path("runs").exists()


def test_the_log_keeps_lines_not_bars_and_a_recipe_that_leaves_no_stage_has_failed(tmp_path, capfd):
    code = r"import sys; sys.stdout.buffer.write(b'10%\r50%\rdone\nbad \xff byte\nno line end'); sys.exit(3)"
    status, tail = launch.run_stage([sys.executable, "-c", code], tmp_path / "logs" / "x.log")
    assert (status, tail) == (3, ["done", "bad \ufffd byte", "no line end"])
    assert (tmp_path / "logs" / "x.log").read_text().splitlines()[1:] == tail


def test_only_the_last_lines_are_kept_for_a_failure(tmp_path, capfd):
    status, tail = launch.run_stage([sys.executable, "-c", "for i in range(50): print(i)"], tmp_path / "x.log")
    assert (status, tail) == (0, [str(i) for i in range(30, 50)])


def test_on_a_terminal_progress_is_redrawn_in_place(tmp_path):
    stage = (
        "import time; from posttrain.progress import Progress; p = Progress('toy', 3); time.sleep(0.6); p.update(2)"
    )
    (tmp_path / "stage.py").write_text(stage + "; p.update(); p.close(); print('end')")
    chain_code = "import sys, pathlib; from posttrain.launch import run_stage; x, y = sys.argv[1:]"
    command = [sys.executable, "-c", chain_code + "; run_stage([sys.executable, x], pathlib.Path(y))"]
    leader, follower = os.openpty()
    subprocess.run([*command, tmp_path / "stage.py", tmp_path / "x.log"], stdout=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert [line.split("  ")[1] for line in shown.split("\r\033[K")[1:]] == ["2/3 step", "3/3 step"]
    assert shown.endswith("\r\nend\r\n")
    assert (tmp_path / "x.log").read_text().count("toy  ") == 1  # the log has few of the lines that come often
