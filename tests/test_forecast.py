"""`posttrain forecast`: every stage's trial is the stage's own first steps, and hours and dollars follow from it."""

import json
import shutil
from pathlib import Path

import pytest
import recipe_runs
from recipe_runs import ROOT, SMALL

from posttrain import forecast, forecast_plan, forecast_tokenizer, forecast_trial, launch
from posttrain.errors import UserError

UNITS = {"pretrain": "tokens", "sft": "tokens", "reward": "rankings", "ppo": "prompts", "grpo": "prompts"}


@pytest.fixture
def warm(monkeypatch, tmp_path):
    """Trials run in processes that have the libraries imported already: only the launcher is left out."""

    def run_stage(command, log, *, debug=False):
        recipe = next(place for place, word in enumerate(command) if word.endswith(".py"))
        done = recipe_runs.run(command[recipe:], tmp_path)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    monkeypatch.setattr(launch, "run_stage", run_stage)


def small(stage: str, chain: Path) -> tuple[str, list[str]]:
    """(config, flags) of a stage of recipes/tiny, made small, its parents from a finished chain."""
    parents = {key: chain / parent for key, parent in recipe_runs.PARENTS[stage].items()}
    flags = [word for key, value in {**SMALL[stage], **parents}.items() for word in (f"--{key}", str(value))]
    return str(ROOT / f"recipes/tiny/{stage}.yaml"), flags


@pytest.mark.parametrize("stage", UNITS)
def test_every_stage(stage, small_chain, warm, capsys):
    config, flags = small(stage, small_chain)
    found = forecast.run(config, flags, price=2.5, gpus=1)
    first = recipe_runs.log(small_chain / stage)[0]
    measured, steps = found["measured"], SMALL[stage]["max_steps"]
    if stage in ("pretrain", "sft", "reward"):  # the same rows, weights and arithmetic as in the stage itself
        assert measured["loss"] == first["loss"]
    assert measured["share"] == 1 and measured["processes"] == 1
    assert found["seconds_a_step"] == measured["seconds"] > 0
    assert measured["tokens_per_second"] == measured["tokens"] / measured["seconds"]
    assert found["hours"] == found["seconds_a_step"] * steps / 3600
    assert found["cost"] == found["hours"] * 2.5
    assert found["memory_total"] == sum(found["memory"].values()) < found["device_memory"]
    weights = (small_chain / "sft" / "model.safetensors").stat().st_size
    assert found["memory"]["weights"] == pytest.approx(weights, rel=0.2)
    assert 0 < measured["mfu"] < 1
    data = found["data"]
    assert data["unit"] == UNITS[stage]
    if stage == "reward":
        assert (data["available"], data["planned"]) == (100, steps * 4)
    assert data["passes"] == data["planned"] / data["available"]
    said = capsys.readouterr().out
    assert "measured" in said and "cost" in said
    if stage == "ppo":
        assert set(measured["parts"]) >= {"generate", "score", "update"}
        assert found["memory"]["critic"] == 4 * found["memory"]["reference"]


def test_rejection_sampling(small_chain, warm):
    flags = ["--model_name_or_path", str(small_chain / "sft"), "--num_rounds", "2", "--num_prompts", "40"]
    flags += ["--max_rows", "60", "--num_generations", "4", "--max_completion_length", "8", "--threshold", "0.01"]
    flags += ["--reward_funcs", "recipe_runs.vowels", "--use_vllm", "false"]
    found = forecast.run(str(ROOT / "recipes/tiny/rejection.yaml"), flags)
    assert set(found["measured"]["parts"]) == {"sample", "learn"}
    assert found["hours"] * 3600 == pytest.approx(2 * found["measured"]["seconds"] * 40 / forecast_trial.PROBLEMS)
    assert "cost" not in found


def test_the_tokenizer(capsys):
    found = forecast.run(str(ROOT / "recipes/tiny/tokenizer.yaml"), ["--max_rows", "3000"])
    (small_bytes, large), (few, many) = found["measured"]["bytes"], found["measured"]["seconds"]
    assert large == pytest.approx(2 * small_bytes, rel=0.1)
    expected = (large - small_bytes) / (many - few) if many > few else large / many
    assert found["measured"]["bytes_per_second"] == pytest.approx(expected)
    assert found["data"]["available"] == pytest.approx(large, rel=0.1)


def test_the_line_through_two_trainings():
    assert forecast_tokenizer.line([(10, 3.0), (30, 4.0)]) == (20.0, 2.5)  # 20 bytes a second after 2.5 s
    assert forecast_tokenizer.line([(10, 1.0), (30, 3.0)]) == (10.0, 0.0)
    assert forecast_tokenizer.line([(10, 2.0), (30, 1.5)]) == (20.0, 0.0)  # noise: never a negative rate


def test_two_micro_steps_stand_for_a_long_step(small_chain, warm):
    config, flags = small("pretrain", small_chain)
    flags += ["--batch_size", "32", "--micro_batch_size", "2"]
    found = forecast.run(config, flags, gpus=4)
    measured = found["measured"]
    assert measured["share"] == 4 / 32
    assert measured["tokens"] == 4 * SMALL["pretrain"]["sequence_length"]
    assert found["seconds_a_step"] == measured["seconds"] * 8 / 4  # four processes are taken to be four times as fast


def test_a_parent_that_is_not_there_yet_is_stood_in_for(tmp_path, warm, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    flags = ["--max_rows", "300", "--sequence_length", "64", "--hidden_size", "32", "--num_attention_heads", "1"]
    flags += ["--bf16", "false", "--eval_max_rows", "20"]
    asked = forecast_plan.read("recipes/tiny/pretrain.yaml", None, flags)
    assert forecast_plan.missing_parents(asked)["tokenizer_path"].stage == "tokenizer"
    assert forecast_plan.model_config(asked).vocab_size == 1024  # as the tokenizer's YAML says
    found = forecast.run("recipes/tiny/pretrain.yaml", flags)
    assert found["measured"]["notes"] == (
        "runs/tiny/tokenizer is not there yet: 3 steps of stage tokenizer stood in for it",
    )
    assert found["data"]["available"] is None
    assert not (tmp_path / "runs").exists()


def test_adapters_take_less_than_all_weights(small_chain):
    config, flags = small("sft", small_chain)
    whole, lora = (
        forecast.run(config, [*flags, "--lora_r", "2", "--use_peft", value], measure=False)["memory"]
        for value in ("false", "true")
    )
    assert lora["optimizer"] < whole["optimizer"] / 2
    assert lora["optimizer"] == 2 * lora["gradients"]
    assert lora["weights"] == whole["weights"] + lora["gradients"]


@pytest.mark.slow
def test_the_command_measures_through_the_launcher(small_chain, tmp_path):
    config, flags = small("pretrain", small_chain)
    done = recipe_runs.posttrain("forecast", config, *flags, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["measured"]["loss"] == recipe_runs.log(small_chain / "pretrain")[0]["loss"]
    assert found["measured"]["device"] == "one process on cpu"
    assert "  | pretrain: one process on cpu" in done.stdout


def test_what_is_refused(small_chain, warm, tmp_path):
    config, flags = small("pretrain", small_chain)
    for wrong, words in (
        ({"device": "H100"}, "go with --no-measure"),
        ({"device": "H100", "measure": False}, "one needs the other"),
        ({"device": "Z9", "mfu": 0.4, "measure": False}, "'Z9', expected one of B200"),
        ({"device": "H100", "mfu": 0.4, "measure": False}, "bf16 false"),
        ({"mfu": 1.4, "device": "H100", "measure": False}, "--mfu: found 1.4"),
        ({"device_memory": "much", "measure": False}, "--device-memory: found 'much'"),
        ({"gpus": 3, "measure": False}, "batch_size: found 4, expected a multiple of the 3 processes"),
        ({"stage": "pretrian", "measure": False}, "did you mean"),
        ({"accelerate_config": "none.yaml"}, "no file none.yaml"),
    ):
        with pytest.raises(UserError, match="(?i)" + words):
            forecast.run(config, flags, **wrong)
    with pytest.raises(UserError, match="not measured: .* GB are needed"):
        forecast.run(config, [*flags, "--batch_size", "1048576", "--micro_batch_size", "1048576"])
    with pytest.raises(UserError, match="no such file"):
        forecast.run("none.yaml")
    with pytest.raises(UserError, match="learning_rat"):
        forecast.run(config, [*flags, "--learning_rat", "1"])
    with pytest.raises(UserError, match="(?s)trial of stage pretrain ended with exit code 2.*Liger.*--no-measure"):
        forecast.run(config, [*flags, "--sample_prompts", "x", "--use_liger_kernel", "true"])


def test_sizes():
    assert forecast.size("80GB") == 80 * 10**9
    assert forecast.size("141 GiB") == 141 * 2**30
    assert forecast.size("1000") == 1000
    assert [forecast.duration(h) for h in (0.001, 0.5, 5.61, 60, 89_760)] == [
        "3.6 s", "30 min", "5.61 h", "2.5 days", "3,740 days",
    ]  # fmt: skip
