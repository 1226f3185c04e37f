"""What a user gets from the recipes: stages that load, manifests that are true, a chain that skips what is finished.

Run: pytest tests/test_recipes.py (a small whole chain is trained once, about half a minute)
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from recipe_runs import (
    LAUNCH,
    PARENTS,
    ROOT,
    STAGES,
    TRAINED,
    argv,
    call,
    log,
    manifest,
    posttrain,
    refused,
    result,
    run,
)
from recipe_runs import small_settings as settings

from posttrain import args, chain, cli

pytestmark = pytest.mark.slow  # the first test of any file that asks for small_chain pays for it
KEYS = {
    "format", "stage", "status", "created", "seed", "parents", "data", "tokenizer_sha256", "chat_template_sha256",
    "config", "git_commit", "versions", "machine", "metrics", "gains", "samples", "wall_time_s", "tokens", "files",
}  # fmt: skip


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---- what a stage leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_manifest_tells_the_truth(small_chain, stage):
    folder = small_chain / stage
    found = manifest(folder)
    assert found.keys() >= KEYS and (found["stage"], found["status"], found["seed"]) == (stage, "finished", 0)
    for name, facts in found["files"].items():
        assert facts == {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}, name
    assert found["tokenizer_sha256"] == sha256(folder / "tokenizer.json")
    has_template = stage not in ("tokenizer", "pretrain")
    assert found["chat_template_sha256"] == (sha256(folder / "chat_template.jinja") if has_template else None)
    parents = {parent["path"]: parent["sha256"] for parent in found["parents"].values()}
    assert parents == {
        str(small_chain / parent): sha256(small_chain / parent / "stage.json") for parent in PARENTS[stage].values()
    }
    assert found["config"]["output_dir"] == str(folder)
    assert [data["split"] for data in found["data"]] == ["train", "test"]
    assert all(data["rows"] > 0 and len(data["sha256"]) == 64 for data in found["data"])
    assert found["machine"]["world_size"] == 1 and found["versions"]["torch"]
    # Nothing unfinished is left beside it.
    assert not (folder / "run.json").exists() and not (folder / "checkpoints").exists()
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_and_gains_come_with_intervals(small_chain, stage):
    found = manifest(small_chain / stage)
    values = [*found["metrics"].values(), *(gain[side] for gain in found["gains"] for side in ("before", "after"))]
    assert found["metrics"] and (found["gains"] or stage == "tokenizer")
    for value in values:
        if value.get("low") is not None:
            assert value["low"] <= value["value"] <= value["high"], value
    for gain in found["gains"]:
        assert gain["after"]["low"] is not None and gain["before"]["low"] is not None, gain
        assert gain["goal"] and gain["passed"] in (True, False) and gain["better"] in ("higher", "lower")


@pytest.mark.parametrize("stage", TRAINED)
def test_curves(small_chain, stage):
    lines = log(small_chain / stage)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] < max(rates), "warm-up"


def test_stages_load_with_transformers_alone(small_chain):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    ids = torch.tensor([[5, 6, 7]])
    for stage in ("pretrain", "sft", "ppo", "grpo"):
        model, told = AutoModelForCausalLM.from_pretrained(small_chain / stage, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and model(ids).logits.shape[:2] == (1, 3)
        assert model.num_parameters() == manifest(small_chain / stage)["parameters"]
    model, told = AutoModelForSequenceClassification.from_pretrained(small_chain / "reward", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and model(ids).logits.shape == (1, 1)
    for stage in STAGES:
        tokenizer = AutoTokenizer.from_pretrained(small_chain / stage)
        assert tokenizer.decode(tokenizer("17 + 25 = 42é").input_ids) == "17 + 25 = 42é"
        assert (tokenizer.chat_template is None) == (stage in ("tokenizer", "pretrain"))


def test_each_stage_has_trained(small_chain):
    """Weights differ from the parent's, and the parent's own folder was left alone (its hashes are checked above)."""
    hashes = {stage: manifest(small_chain / stage)["files"]["model.safetensors"]["sha256"] for stage in TRAINED}
    assert len(set(hashes.values())) == len(TRAINED), hashes


def test_samples_show_the_same_prompts_before_and_after(small_chain):
    samples = manifest(small_chain / "sft")["samples"]
    assert len(samples) == 6
    for sample in samples:
        assert {reply["by"] for reply in sample["replies"]} == {"base", "sft"}, sample
    prompts = {stage: {s["prompt"] for s in manifest(small_chain / stage)["samples"]} for stage in ("sft", "grpo")}
    assert prompts["sft"] == prompts["grpo"]


def test_the_report_and_the_table(small_chain):
    page = (small_chain / "report.html").read_text()
    assert all(stage in page for stage in STAGES) and "bits per byte" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page), "the report asks the network for something"
    said = (small_chain / "said.txt").read_text()
    assert (
        "bits per byte" in said and f"chat {small_chain / 'grpo'}" in said and str(small_chain / "report.html") in said
    )
    rollouts = [json.loads(line) for line in (small_chain / "grpo" / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts and rollouts[0].keys() >= {"step", "prompt", "completion", "reward", "advantage", "stop", "tokens"}
    assert all(row["group_rewards"][0] <= row["reward"] <= row["group_rewards"][1] for row in rollouts)


def test_chat(small_chain):
    options = ["--temperature", "0", "--max_new_tokens", "6"]
    done = posttrain("chat", small_chain / "grpo", "--prompt", "What is 17 + 25?", *options)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "<|im_" not in done.stdout
    base = posttrain("chat", small_chain / "pretrain", "--prompt", "Once upon a time", *options)
    assert base.returncode == 0 and base.stdout.strip(), base.stderr
    assert base.stdout != done.stdout


def test_eval_gives_the_figures_of_the_manifest(small_chain, tmp_path):
    rows = ["--data", "tiny", "--data_config", "rankings", "--rows", "20", "--json", tmp_path / "found.json"]
    done = posttrain("eval", small_chain / "reward", *rows, "--max_length", "256")
    assert done.returncode == 0, done.stderr
    found, kept = json.loads((tmp_path / "found.json").read_text())["metrics"], manifest(small_chain / "reward")
    assert found.keys() == kept["metrics"].keys()
    for name, figure in found.items():
        assert figure["value"] == pytest.approx(kept["metrics"][name]["value"], abs=1e-4), name
    assert "pair accuracy" in done.stdout and "20 rows of tiny" in done.stdout
    refused(posttrain("eval", small_chain / "sft", *rows), "is no reward model (LlamaForCausalLM)")


# ---- run again ------------------------------------------------------------------------------------------------------


def test_finished_stages_are_skipped_and_a_changed_one_and_all_after_it_run_again(small_chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(small_chain, moved)
    before = {stage: sha256(moved / stage / "stage.json") for stage in STAGES}
    again = posttrain("run", "recipes/tiny", "--out", moved, *settings())
    assert again.returncode == 0 and again.stdout.count("skipped") == len(STAGES), again.stdout + again.stderr
    assert {stage: sha256(moved / stage / "stage.json") for stage in STAGES} == before

    changed = posttrain("run", "recipes/tiny", "--out", moved, *settings(), "--set", "ppo.beta=0.2")
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert "ppo: config changed (beta: 0.05 -> 0.2), runs again" in changed.stdout
    after = {stage: sha256(moved / stage / "stage.json") for stage in STAGES}
    assert [stage for stage in STAGES if after[stage] != before[stage]] == ["ppo", "grpo"]


@pytest.mark.parametrize("stage", TRAINED)
def test_a_seed_decides_everything(small_chain, tmp_path, stage):
    for name, seed in {"again": 0, "other": 1}.items():
        done = run(argv(stage, small_chain, tmp_path / name, seed=seed), tmp_path)
        assert done.returncode == 0, done.stderr
    first, again, other = (result(folder) for folder in (small_chain / stage, tmp_path / "again", tmp_path / "other"))
    assert again == first
    weights = "model.safetensors"
    assert other["files"][weights]["sha256"] != first["files"][weights]["sha256"] and other["log"] != first["log"]


def test_one_stage_alone_and_a_flag_that_wins_over_the_yaml(small_chain, tmp_path):
    done = call([*LAUNCH, *argv("reward", small_chain, tmp_path / "reward", max_steps=2, loss_type="bradley_terry")])
    assert done.returncode == 0, done.stderr
    config = manifest(tmp_path / "reward")["config"]
    assert (config["loss_type"], config["learning_rate"]) == ("bradley_terry", 1e-3)


@pytest.mark.vllm
def test_replies_through_vllm(small_chain, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done = call([*LAUNCH, *argv("grpo", small_chain, tmp_path / "grpo", use_vllm="true", max_steps=3)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest(tmp_path / "grpo")["engine"].startswith("vllm ")
    assert all(line["mismatch"] < 1.001 for line in log(tmp_path / "grpo"))


# ---- the README says what works -------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    """Commands in the code blocks of README.md and recipes/README.md, joined where a backslash ends the line."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "recipes/README.md"))
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(posttrain|accelerate launch) ", line)]


# Verbs that go on for ever, need an account or what another command leaves; their own tests run them as users do.
RUN_ELSEWHERE = {
    "serve": "test_engine_server.py", "board": "test_board.py", "push": "test_hub.py", "ratings": "test_arena.py",
    "check-export": "test_export_tokens.py", "eval --again": "test_suites_run.py",
}  # fmt: skip


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme(small_chain, line, monkeypatch, capsys, tmp_path):
    """`posttrain` verbs are really called, `run` with --dry-run; recipes get their flags parsed. Runs that the README
    supposes are there are the small chain."""
    (tmp_path / "runs").mkdir()
    for run_dir in ("tiny", "eager"):  # where chains that begin after another one look for its models
        (tmp_path / "runs" / run_dir).symlink_to(small_chain)
    for name in ("recipes", "examples", "chat_templates"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "HF_HUB_OFFLINE": "1"})
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    words = [re.sub(r"^runs/[\w.-]+", str(small_chain), word) for word in words]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        recipe = chain.import_recipe(Path(launch.training_script))
        args.parse(recipe.ARGS, launch.training_script_args)
        return
    if (words[1] in RUN_ELSEWHERE or "--again" in words) and "--dry_run" not in words:
        assert cli.parser().parse_args(words[1:]).call
        return
    parent = ["--model_name_or_path", str(small_chain / "pretrain"), "--max_rows", "50", "--max_length", "320"]
    extra = {
        "run": ["--dry-run"], "chat": ["--prompt", "Hello", "--max_new_tokens", "2"], "inspect": parent,
        "eval": ["--rows", "200", "--use_vllm", "false"],
        "bestof": ["--rows", "4", "--n", "4", "--max_tokens", "8", "--use_vllm", "false"],
    }  # fmt: skip
    if "--rows" in words:  # a suite samples replies
        extra["eval"][1] = "20"
    if "think" in words:  # the small chain's own replies have 8 tokens
        extra["eval"] += ["--max_tokens", "40"]
    words = [re.sub(r"^(?=rows\.html$)", f"{tmp_path}/", word) for word in words]
    assert cli.command([*words[1:], *extra.get(words[1], [])]) == 0
    assert capsys.readouterr().out


def test_the_readme_lists_what_is_there():
    text = (ROOT / "README.md").read_text()
    house = text[text.index("## The house") :]
    modules = [path.name for path in ROOT.glob("posttrain/*.py")] + [path.name for path in ROOT.glob("recipes/*.py")]
    assert [name for name in modules if name not in house and name != "__init__.py"] == []
    assert [name for name in RUN_ELSEWHERE.values() if not (ROOT / "tests" / name).is_file()] == []
    everywhere = {
        path.name for folder in ("posttrain", "recipes", "examples") for path in (ROOT / folder).rglob("*.py")
    }
    assert set(re.findall(r"\w+\.py\b", house)) <= everywhere
    assert "accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml" in readme_commands()
