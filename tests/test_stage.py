"""A stage's folder: what is refused, resumed, finished; what signals and kills leave behind.

Run: pytest tests/test_stage.py
"""

import hashlib
import json
import os
from dataclasses import dataclass

import pytest
from conftest import run_script

from posttrain import checkpoint, stage
from posttrain.args import arg
from posttrain.errors import UserError
from posttrain.stage import StageConfig

pytestmark = pytest.mark.usefixtures("restored_signals")
DATA = [{"name": "toy", "config": None, "split": "train", "rows": 3, "sha256": "d1"}]


@dataclass
class Toy:
    """Toy: something to configure"""

    learning_rate: float = arg(1e-3)


def begin(folder, *, rate=1e-3, parents=None, data=DATA, **own):
    configs = (StageConfig(output_dir=str(folder), **own), Toy(rate))
    return stage.start("toy", configs, parents=parents or {}, data=data)


def write(text):
    return lambda folder: (folder / "model.safetensors").write_text(text)


def finish(folder, text="model", **own):
    run = begin(folder, **own)
    run.log(1, loss=2.0)
    run.finish(write(text), metrics={"loss": {"value": 1.0}}, parameters=7)
    return folder


def leave_unfinished(folder, steps=(1, 2), **own):
    """A run that was killed: checkpoints and a log, no manifest."""
    run = begin(folder, **own)
    for step in range(1, max(steps, default=1) + 2):
        run.log(step, loss=float(step))
        run.append("rollouts.jsonl", [{"step": step, "completion": "a\u2028b\x85c"}])
        if step in steps:
            run.save(step, write(f"step {step}"))
    return folder


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_stage(tmp_path):
    folder = finish(tmp_path / "toy")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.yaml",
        "log.jsonl",
        "model.safetensors",
        "stage.json",
    ]
    manifest = json.loads((folder / "stage.json").read_text())
    assert (manifest["stage"], manifest["status"], manifest["seed"]) == ("toy", "finished", 0)
    assert manifest["config"]["learning_rate"] == 1e-3 and manifest["parameters"] == 7
    expected = {"sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5}
    assert manifest["files"] == {"model.safetensors": expected} and manifest["data"] == DATA
    assert manifest["versions"]["torch"] and manifest["machine"]["cores"] == len(os.sched_getaffinity(0))
    (line,) = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert (line["step"], line["loss"]) == (1, 2.0) and line["time"] >= 0


def test_finished_with_the_same_config_exits_0_and_touches_nothing(tmp_path, capsys):
    folder = finish(tmp_path / "toy")
    before = tree(folder)
    with pytest.raises(SystemExit) as stopped:
        begin(folder, logging_steps=3)  # changes what is printed, not what is computed
    assert stopped.value.code == 0 and "is finished already" in capsys.readouterr().out
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 1e-4}, "learning_rate: 0.001 -> 0.0001"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data": [{**DATA[0], "sha256": "d2"}]}, "data: ['d1'] -> ['d2']"),
    ],
)
def test_finished_or_unfinished_with_another_config_is_refused_with_the_difference(tmp_path, changes, words):
    for folder in (finish(tmp_path / "done"), leave_unfinished(tmp_path / "half")):
        before = tree(folder)
        with pytest.raises(UserError) as refused:
            begin(folder, **changes)
        assert words in str(refused.value) and "--overwrite true" in str(refused.value)
        assert tree(folder) == before


def test_another_parent_is_another_run(tmp_path):
    first, second = finish(tmp_path / "first"), finish(tmp_path / "second", rate=2e-3)
    folder = finish(tmp_path / "toy", parents={"policy": str(first)})
    manifest = stage.read_manifest(folder)
    assert manifest["parents"]["policy"]["sha256"] == checkpoint.sha256_file(first / "stage.json")
    with pytest.raises(UserError, match="parent policy: "):
        begin(folder, parents={"policy": str(second)})


def test_overwrite_starts_again(tmp_path):
    folder = finish(tmp_path / "toy")
    run = begin(folder, rate=1e-4, overwrite=True)
    assert run.resume_folder is None and stage.read_manifest(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]


def test_an_unfinished_run_is_continued_and_its_log_cut_back(tmp_path, capsys):
    folder = leave_unfinished(tmp_path / "toy", save_total_limit=2)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 1, "torn')
    run = begin(folder)
    assert run.resume_folder == folder / "checkpoints" / "step-00000002"
    assert "resuming" in capsys.readouterr().out and run.elapsed > 0
    for name in ("log.jsonl", "rollouts.jsonl"):
        with open(folder / name, encoding="utf-8") as file:
            assert [json.loads(line)["step"] for line in file] == [1, 2]
    run.finish(write("end"), metrics={})
    assert not (folder / "checkpoints").exists() and not (folder / "run.json").exists()


def test_resume_must_and_never(tmp_path):
    for folder in (tmp_path / "new", leave_unfinished(tmp_path / "none", steps=())):
        with pytest.raises(UserError, match="resume: must, but"):
            begin(folder, resume="must")
    folder = leave_unfinished(tmp_path / "half")
    assert begin(folder, resume="must").resume_folder is not None
    assert begin(folder, resume="never").resume_folder is None and not (folder / "checkpoints").exists()
    with pytest.raises(UserError, match="resume: found 'maybe'"):
        begin(folder, resume="maybe")


def test_a_damaged_checkpoint_or_mark_is_refused_and_overwrite_mends_it(tmp_path):
    folder = leave_unfinished(tmp_path / "toy")
    damaged = folder / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged.write_text("stEp 2")
    with pytest.raises(UserError, match=f"{damaged} is damaged"):
        begin(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is not valid JSON"):
        begin(folder)
    assert begin(folder, overwrite=True).resume_folder is None
    done = finish(tmp_path / "done")
    (done / "stage.json").write_text("{")
    with pytest.raises(UserError, match="stage.json is not valid JSON"):
        begin(done)


def test_folders_that_are_not_ours(tmp_path):
    foreign, link, file = tmp_path / "foreign", tmp_path / "link", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    link.symlink_to(finish(tmp_path / "real"))
    file.write_text("")
    for folder, words in ((foreign, "not a stage of posttrain"), (link, "symbolic link"), (file, "is a file")):
        for overwrite in (False, True):
            with pytest.raises(UserError, match=words):
                begin(folder, overwrite=overwrite)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    begin(tmp_path / "empty")


def test_overwrite_does_not_follow_links_out_of_the_folder(tmp_path):
    folder, outside = finish(tmp_path / "toy"), tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    for name in ("data", "checkpoints"):
        (folder / name).symlink_to(outside)
    begin(folder, overwrite=True)
    assert (outside / "precious").read_text() == "kept" and not (folder / "data").is_symlink()


def parent(folder, tokenizer):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer)
    return str(folder)


def test_parents(tmp_path):
    done, half = finish(tmp_path / "done"), leave_unfinished(tmp_path / "half")
    described = stage.describe_parents({"policy": str(done), "reward": "user/name"})
    assert described["policy"]["stage"] == "toy" and described["reward"]["sha256"] is None
    with pytest.raises(UserError, match=f"policy: {half} is an unfinished stage"):
        stage.describe_parents({"policy": str(half)})
    for path in (str(tmp_path / "no"), f"{done}/no", "./no", "no"):
        with pytest.raises(UserError, match="policy: no folder"):
            stage.describe_parents({"policy": path})
    assert stage.describe_parents({"policy": "runs/no"}, planned=["runs/no"])["policy"]["stage"] == "planned"
    one, same, other = (parent(tmp_path / n, t) for n, t in (("one", "t1"), ("same", "t1"), ("other", "t2")))
    stage.describe_parents({"policy": one, "reward": same})
    with pytest.raises(UserError, match="different tokenizers: policy .* reward "):
        stage.describe_parents({"policy": one, "reward": other})


@pytest.mark.parametrize(
    ("key", "value"), [("save_steps", -1), ("save_total_limit", 0), ("logging_steps", 0), ("resume", "yes")]
)
def test_values_out_of_range(key, value):
    with pytest.raises(UserError, match=f"{key}: found {value!r}, expected"):
        StageConfig(output_dir="x", **{key: value})


def test_when_a_checkpoint_is_due(tmp_path):
    run = begin(tmp_path / "toy", save_steps=3)
    assert [step for step in range(1, 10) if run.due(step, 9)] == [3, 6, 9]
    assert run.due(10, 10)  # the last step too: the evaluation that follows can be interrupted
    assert not any(begin(tmp_path / "none").due(step, 9) for step in range(1, 10))


SIGNALS = """
import json, os, signal, sys
from pathlib import Path
from posttrain import stage
from posttrain.errors import entry
from posttrain.stage import StageConfig

def write(folder):
    (folder / "model").write_text("whole")

def again(folder):
    write(folder)
    os.kill(os.getpid(), signal.SIGTERM)

def begin(name):
    config = StageConfig(output_dir=str(root / name), save_total_limit=2)
    run = stage.start("toy", (config,), parents={}, data=[])
    run.save(1, write)
    return run

def outside(name, number):
    run = begin(name)
    os.kill(os.getpid(), number)

def inside(name, number, write=write):
    run = begin(name)
    with run.running():
        for step in range(2, 100):
            os.kill(os.getpid(), number)
            if run.due(step, 100):
                run.save(step, write)
            if run.stopping:
                break

def twice(name, number):
    inside(name, number, again)

def finishing(name, number):
    def stopped(folder):
        write(folder)
        os.kill(os.getpid(), number)
    begin(name).finish(stopped, metrics={})

root, codes = Path(sys.argv[1]), {}
import accelerate; accelerate.PartialState()
for case in (outside, inside, twice, finishing):
    for number in (signal.SIGTERM, signal.SIGINT):
        name = f"{case.__name__}-{number.name}"
        child = os.fork()
        if child == 0:
            try:
                entry(lambda: case(name, number))
            except SystemExit as stopped:
                os._exit(stopped.code or 0)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_sigterm_and_ctrl_c(tmp_path):
    done = run_script(SIGNALS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, code in json.loads(done.stdout.splitlines()[-1]).items():
        case, number = name.split("-")
        assert code == {"SIGTERM": 143, "SIGINT": 130}[number] or (case, code) == ("twice", 143), name
        last = checkpoint.last_complete(tmp_path / name / "checkpoints")
        expected = "step-00000002" if case in ("inside", "twice") else "step-00000001"
        assert last.name == expected and stage.read_manifest(tmp_path / name) is None
        assert not list((tmp_path / name).rglob(".tmp-*")), name


# What the card imports when it is first written is here before: each file that is opened is a point to be killed at.
TOY = """
import json
import accelerate, jinja2
from huggingface_hub import ModelCardData
from posttrain import model_index, stage
from posttrain.stage import StageConfig

def write(text):
    def into(folder):
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(json.dumps({"text": text}))
    return into

def begin(folder, **own):
    return stage.start("toy", (StageConfig(output_dir=str(folder / "toy"), **own),), parents={}, data=[])

accelerate.PartialState()
"""


def folder_is_finished(folder):
    """Whether it counts as finished, and then all its files are whole."""
    manifest = stage.read_manifest(folder)
    if manifest is not None:
        checkpoint.verify(folder, manifest["files"])
    return manifest is not None


@pytest.mark.slow
def test_sigkill_at_any_point_of_finish(kill_everywhere):
    folders = kill_everywhere(
        TOY
        + """
def before(folder):
    global run
    run = begin(folder)
    run.save(1, write("checkpoint"))

def action(folder):
    run.finish(write("model"), metrics={})
"""
    )
    finished = [folder_is_finished(folder / "toy") for folder in folders]
    assert finished == sorted(finished) and not finished[0] and finished[-1]
    for folder, done in zip(folders, finished, strict=True):
        if not done:
            last = checkpoint.last_complete(folder / "toy" / "checkpoints")
            assert last.name == "step-00000001"


@pytest.mark.slow
def test_sigkill_at_any_point_of_an_overwrite(kill_everywhere):
    """The old stage is whole or gone, its checkpoints never serve the new run, and the folder stays ours."""
    folders = kill_everywhere(
        TOY
        + """
def before(folder):
    run = begin(folder, keep_checkpoints=True)
    run.save(1, write("checkpoint"))
    run.finish(write("model"), metrics={})

def action(folder):
    begin(folder, seed=1, overwrite=True)
"""
    )
    finished = [folder_is_finished(folder / "toy") for folder in folders]
    assert finished == sorted(finished, reverse=True) and finished[0] and not finished[-1]
    for folder, done in zip(folders, finished, strict=True):
        config = StageConfig(output_dir=str(folder / "toy"), seed=1, overwrite=done)
        run = stage.start("toy", (config,), parents={}, data=[])
        assert run.resume_folder is None
        run.finish(write("new"), metrics={})
        assert folder_is_finished(folder / "toy")
