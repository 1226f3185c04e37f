"""What users get wrong: a short error that names the thing and the mend, and no folder taken for a finished stage.

Run: pytest tests/test_bad_input.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from recipe_runs import ENV, LAUNCH, ROOT, argv, call, refused, run

pytestmark = pytest.mark.slow


@pytest.fixture
def refuse(small_chain, tmp_path):
    """`refuse(stage, *words, **changes)`: the small stage with these settings ends with an error that has the words,
    and leaves no finished stage. Returns the error."""

    def check(stage: str, *words: str, **changes) -> str:
        out = tmp_path / "out"
        error = refused(run(argv(stage, small_chain, out, **changes), tmp_path), *words)
        assert not (out / "stage.json").exists() and not list(tmp_path.rglob(".tmp-*"))
        return error

    return check


def jsonl(folder, *rows) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def rows_of(file: str, kind: str) -> dict:
    """Settings that train on a file and measure on tiny."""
    return {"dataset_name": file, "eval_dataset_name": "tiny", "eval_dataset_config": kind}


# ---- the config -----------------------------------------------------------------------------------------------------


def test_a_missing_config_file(tmp_path):
    done = run([str(ROOT / "recipes/sft.py"), "--config", "recipes/tiny/stf.yaml"], tmp_path)
    refused(done, "recipes/tiny/stf.yaml", "no such file", "sft.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rte: 1e-3", ["config.yaml:1", "'learning_rte'", "did you mean 'learning_rate'"]),
        ("max_steps: many", ["config.yaml:1", "max_steps", "'many'", "expected int"]),
        ("max_steps: 0", ["config.yaml:1", "max_steps", "found 0", "at least 1"]),
        ("lr_scheduler_type: cosin", ["config.yaml:1", "lr_scheduler_type", "cosine"]),
        ("max_rows: [1", ["config.yaml:", "not valid YAML"]),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_line_of_the_config(tmp_path, stage, line, words):
    file = tmp_path / "config.yaml"
    rest = (ROOT / f"recipes/tiny/{stage}.yaml").read_text().splitlines()
    file.write_text("\n".join([line, *(each for each in rest if each.split(":")[0] != line.split(":")[0])]))
    arguments = [str(ROOT / f"recipes/{stage}.py"), "--config", str(file), "--output_dir", str(tmp_path / "out")]
    refused(run(arguments, tmp_path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "key"),
    [("pretrain", "batch_size"), ("sft", "per_device_train_batch_size"), ("reward", "batch_size"),
     ("ppo", "num_prompts"), ("grpo", "max_completion_length"), ("grpo", "eval_num_generations"),
     ("pretrain", "eval_max_rows")],
)  # fmt: skip
def test_a_number_out_of_range(refuse, stage, key):
    refuse(stage, f"--{key}", "found 0", "at least 1", **{key: 0})


@pytest.mark.parametrize(("stage", "key"), [("pretrain", "sequence_length"), ("sft", "max_length")])
def test_rows_longer_than_the_context(refuse, stage, key):
    refuse(stage, key, "found 1025", "1024 positions", **{key: 1025})


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_missing_file(refuse, tmp_path):
    refuse("pretrain", "dataset_name", f"{tmp_path}/nope.jsonl", dataset_name=tmp_path / "nope.jsonl")


def test_no_rows(refuse, tmp_path):
    refuse("pretrain", "rows.jsonl", "no rows", **rows_of(jsonl(tmp_path), "documents"))


@pytest.mark.parametrize(
    ("stage", "kind", "row", "words"),
    [
        ("pretrain", "documents", {"prompt": "a"}, ["row 1", "'text' is missing", "found prompt", "dataset_adapter"]),
        ("pretrain", "documents", {"text": 5}, ["row 1", "'text'", "found '5'", "expected a string"]),
        ("sft", "problems", {"text": "a"}, ["row 1", "'messages' is missing", "dataset_adapter"]),
        ("sft", "problems", {"messages": "hello"}, ["row 1", "'messages'", "found 'hello'", "'role'", "'content'"]),
        ("sft", "problems", {"messages": [{"role": "user", "content": 5}]}, ["row 1", "'content': 5", "expected"]),
        ("sft", "problems", {"messages": [{"role": "user", "content": "a"}]}, ["row 1", "assistant turn"]),
        ("reward", "rankings", {"prompt": "a", "chosen": "b", "rejected": "c"}, ["row 1", "'prompt'", "found 'a'"]),
        ("grpo", "problems", {"prompt": 5, "answer": "1"}, ["row 1", "'prompt'", "found '5'"]),
    ],
)
def test_a_row_that_is_not_what_it_should_be(refuse, tmp_path, stage, kind, row, words):
    good = {
        "pretrain": {"text": "some words " * 100},
        "sft": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "grpo": {"prompt": [{"role": "user", "content": "a"}], "answer": "1"},
    }
    turn = {"prompt": [{"role": "user", "content": "a"}]}
    good["reward"] = {**turn, **{key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}}
    refuse(stage, *words, **rows_of(jsonl(tmp_path, good[stage], row), kind))


def test_replies_that_are_no_messages(refuse, tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    refuse("reward", "row 0", "found 'b'", "'role'", **rows_of(jsonl(tmp_path, row), "rankings"))


def test_a_reward_without_the_column_it_needs(refuse, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"a{i}"}]} for i in range(4)]
    settings = {"reward_funcs": "correct", **rows_of(jsonl(tmp_path, *rows), "problems")}
    refuse("grpo", "correct", "'answer'", **settings)


def test_a_broken_line_of_json(refuse, tmp_path):
    file = jsonl(tmp_path, {"text": "fine"}, '{"text": "cut')
    refuse("pretrain", f"{file}:2", "not valid JSON", "mend or remove", **rows_of(file, "documents"))


def test_a_data_set_that_cannot_be_fetched(refuse):
    refuse("pretrain", "'some/dataset'", "network", "local file", dataset_name="some/dataset")


# ---- models and parents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs/nowhere", "./nowhere", "/nowhere", "nowhere"])
def test_an_unknown_local_model(refuse, name):
    refuse("reward", name, model_name_or_path=name)


def test_an_unknown_model_of_the_hub(refuse):
    refuse("sft", "'some/model' could not be loaded", "Hub", model_name_or_path="some/model")


def test_an_unfinished_parent(refuse, small_chain, tmp_path):
    parent = shutil.copytree(small_chain / "sft", tmp_path / "sft")
    (parent / "stage.json").rename(parent / "run.json")
    refuse("grpo", str(parent), "unfinished", "run it to its end", model_name_or_path=parent)


def test_a_reward_model_with_another_tokenizer(refuse, small_chain, tmp_path):
    reward = shutil.copytree(small_chain / "reward", tmp_path / "reward")
    with open(reward / "tokenizer.json", "a") as file:
        file.write("\n")
    refuse("ppo", "different tokenizers", str(reward), str(small_chain / "sft"), reward_model_path=reward)


def test_stages_in_each_others_place(refuse, small_chain):
    refuse("grpo", "no chat template", model_name_or_path=small_chain / "pretrain")
    refuse(
        "grpo",
        str(small_chain / "reward"),
        "reward model",
        model_name_or_path=small_chain / "reward",
        overwrite="true",
    )
    refuse(
        "ppo", str(small_chain / "sft"), "recipes/reward.py", reward_model_path=small_chain / "sft", overwrite="true"
    )


# ---- where it writes ------------------------------------------------------------------------------------------------


def test_a_folder_of_someone_else_is_left_alone(small_chain, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    done = run(argv("pretrain", small_chain, mine, overwrite="true"), tmp_path)
    refused(done, str(mine), "not a stage of posttrain", "empty folder")
    done = run(argv("pretrain", small_chain, mine / "thesis.txt"), tmp_path)
    refused(done, "thesis.txt", "is a file")
    done = run(argv("pretrain", small_chain, mine / "thesis.txt" / "below"), tmp_path)
    refused(done, "thesis.txt")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"] and (mine / "thesis.txt").read_text() == "words"


def test_another_stage_in_the_folder(small_chain, tmp_path):
    done = run(argv("grpo", small_chain, small_chain / "sft"), tmp_path)
    refused(done, str(small_chain / "sft"), "holds a sft stage")


IN_MOUNT = """
mount -t tmpfs -o size="$1" posttrain "$2" || exit 77
[ "$3" = ro ] && mount -o remount,ro "$2"
shift 3
"$@"
code=$?
find "$MOUNTED" -name stage.json -o -name '.tmp-*' -o -name '*.safetensors'
exit $code
"""


def mounted(tmp_path, size: str, mode: str, command: list[str]) -> subprocess.CompletedProcess:
    """Run a command beside a small file system of its own, seen by it alone."""
    mount = tmp_path / "mount"
    mount.mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IN_MOUNT, "sh", size, str(mount), mode]
    if shutil.which("unshare") is None or subprocess.run([*shell, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a tmpfs of its own")
    return call([*shell, *command], MOUNTED=str(mount))


@pytest.mark.parametrize("save_steps", [0, 2], ids=["in the end", "in a checkpoint"])
def test_a_full_disk(small_chain, tmp_path, save_steps):
    """64 KiB have room for the config and the log, not for the weights."""
    arguments = argv("pretrain", small_chain, tmp_path / "mount" / "out", save_steps=save_steps)
    done = mounted(tmp_path, "64k", "rw", [sys.executable, *arguments])
    refused(done, "the disk is full", "free some space")
    assert "stage.json" not in done.stdout and "safetensors" not in done.stdout and ".tmp" not in done.stdout


def test_a_read_only_disk(small_chain, tmp_path):
    arguments = argv("tokenizer", small_chain, tmp_path / "mount" / "out")
    done = mounted(tmp_path, "64k", "ro", [sys.executable, *arguments])
    refused(done, "read-only", str(tmp_path / "mount"), "another folder")


# ---- the machine ----------------------------------------------------------------------------------------------------

NO_VLLM = """
import sys
from importlib.machinery import PathFinder

class WithoutVLLM(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "vllm" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutVLLM
"""


def test_no_vllm(small_chain, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_VLLM)
    path = os.pathsep.join([str(tmp_path), ENV["PYTHONPATH"]])
    asked = call([sys.executable, *argv("grpo", small_chain, tmp_path / "out", use_vllm="true")], PYTHONPATH=path)
    refused(asked, "use_vllm: true", "vLLM is not installed", "pip install", "--use_vllm auto")
    assert not (tmp_path / "out" / "stage.json").exists()
    auto = call([sys.executable, *argv("grpo", small_chain, tmp_path / "out", use_vllm="auto")], PYTHONPATH=path)
    assert auto.returncode == 0, auto.stderr
    assert "sampled by transformers" in auto.stdout and "vLLM is not installed" in auto.stdout


def test_a_busy_port(small_chain, tmp_path):
    """On one machine the launcher takes another port and says so; where it cannot (several machines), we say it."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command = [*launch, "--main_process_port", port, *argv("pretrain", small_chain, tmp_path / "launched")]
        done = call(command, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0 and port in done.stderr and "--main_process_port" in done.stderr, done.stderr
        arguments = argv("pretrain", small_chain, tmp_path / "out")
        ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        error = refused(run(arguments, tmp_path, ACCELERATE_USE_CPU="true", **ranks), "port is busy", port)
        assert "--main_process_port 0" in error
    assert not (tmp_path / "out" / "stage.json").exists()


# ---- how it is started ----------------------------------------------------------------------------------------------

STARTS = {"python": [sys.executable], "accelerate launch": LAUNCH}


@pytest.mark.parametrize("start", STARTS)
def test_errors_are_as_short_under_every_start(small_chain, tmp_path, start):
    arguments = argv("tokenizer", small_chain, tmp_path / "out", dataset_name="nope.jsonl")
    done = call([*STARTS[start], *arguments])
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: dataset_name: no file or folder 'nope.jsonl'")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(small_chain, tmp_path):
    arguments = argv("tokenizer", small_chain, tmp_path / "out", dataset_name="nope.jsonl")
    for done in (run([*arguments, "--debug"], tmp_path), run(arguments, tmp_path, POSTTRAIN_DEBUG="1")):
        assert done.returncode == 2 and "Traceback" in done.stderr and "load_rows" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: dataset_name: no file or folder 'nope.jsonl'")
