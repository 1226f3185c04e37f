"""The pretraining recipe as users run it: what it logs and keeps, other shapes, going on from a checkpoint, streams,
two processes.

Run: pytest tests/test_pretrain_recipe.py
"""

import json

import pytest
from recipe_runs import LAUNCH, ROOT, argv, call, log, manifest, refused, result, run

from posttrain.shards import INDEX

pytestmark = pytest.mark.slow


def recipe(chain, out, tmp_path, **changes):
    done = run(argv("pretrain", chain, out, **changes), tmp_path)
    assert done.returncode == 0, done.stderr
    return done


def test_it_logs_what_it_learns_and_keeps_samples(small_chain, tmp_path):
    out = tmp_path / "out"
    done = recipe(small_chain, out, tmp_path, eval_steps=4, keep_checkpoints="true", optim="muon")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "share/data", "memory_gb"}
    assert all(line.keys() >= keys for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [4, 8]
    written = log(out, "samples.jsonl")
    assert [line["step"] for line in written] == [4, 4, 8, 8]
    found = manifest(out)
    assert (
        found["metrics"]["bits per byte"]["value"]
        == [x for x in lines if "held_out_bits_per_byte" in x][-1]["held_out_bits_per_byte"]
    )
    (first, second), sample = {line["prompt"] for line in written}, found["samples"][0]
    assert sample["prompt"] in (first, second) and [r["by"] for r in sample["replies"]] == [
        "base model, step 4", "base model, step 8", "base model",
    ]  # fmt: skip
    assert sample["replies"][1]["text"] == sample["replies"][2]["text"]  # nothing was learned in between
    assert found["position"] == {"tokens": 2048, "chunks": 32, "epoch": 0, "place": 32}
    index = json.loads((out / "tokens" / INDEX).read_text())
    assert found["data"][0]["tokens"] == index["tokens"] and found["data"][0]["documents"] == 300
    assert f"{index['tokens']:,} tokens of 300 documents took" in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2", "cross_document_attention": "false"},
        {"model_type": "qwen3", "vocab_multiple": 64, "gradient_checkpointing": "true"},
        {"shape_of": "pretrain"},
    ],
    ids=["gpt2", "qwen3", "shape_of"],
)
def test_other_shapes_train_and_load(small_chain, tmp_path, changes):
    from transformers import AutoModelForCausalLM

    if "shape_of" in changes:
        changes = {"shape_of": small_chain / "pretrain"}
    recipe(small_chain, tmp_path / "out", tmp_path, **changes)
    losses = [line["loss"] for line in log(tmp_path / "out")]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == changes.get("model_type", "llama")
    assert not (tmp_path / "out" / "tokens").exists()


def test_it_goes_on_from_a_checkpoint(small_chain, tmp_path):
    """Of any stage: the gain is against what it began with, which is measured on the same texts."""
    out = tmp_path / "out"
    arguments = argv("pretrain", small_chain, out, model_name_or_path=small_chain / "pretrain", learning_rate=0.002)
    at = arguments.index("--tokenizer_path")
    del arguments[at : at + 2]
    config_file = tmp_path / "continued.yaml"
    config_file.write_text((ROOT / "recipes/tiny/pretrain.yaml").read_text().replace("tokenizer_path", "# tokenizer"))
    arguments[2] = str(config_file)
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    found, before = manifest(out), manifest(small_chain / "pretrain")
    assert found["parents"]["model"]["path"] == str(small_chain / "pretrain")
    (gain,) = found["gains"]
    assert (
        gain["before"]["label"] == "start" and gain["before"]["value"] == before["metrics"]["bits per byte"]["value"]
    )
    assert gain["after"]["value"] < gain["before"]["value"]
    assert found["tokenizer_sha256"] == before["tokenizer_sha256"]


def test_streamed_texts_train_as_loaded_ones_do(small_chain, tmp_path):
    """And tokens in a folder of their own serve the next run, which another seed does not change."""
    from posttrain.data import tiny

    file = tmp_path / "train.jsonl"
    rows = [{"text": row["text"]} for row in tiny.rows("documents", "train", 300, seed=0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_name": file,
        "eval_dataset_name": "tiny",
        "eval_dataset_config": "documents",
        "on_leak": "report",
    }
    kept = {**common, "streaming": "true", "shards_dir": tmp_path / "tokens"}
    recipe(small_chain, tmp_path / "loaded", tmp_path, **common, max_rows=250)
    first = recipe(small_chain, tmp_path / "streamed", tmp_path, **kept, max_rows=250)
    again = recipe(small_chain, tmp_path / "again", tmp_path, **kept, max_rows=250, seed=1, dataset_seed=0)
    streamed, loaded = result(tmp_path / "streamed"), result(tmp_path / "loaded")
    assert streamed["files"] == loaded["files"] and streamed["log"] == loaded["log"]
    assert "of 250 documents took" in first.stdout and "of 250 documents are in" in again.stdout
    assert manifest(tmp_path / "streamed")["data"][0]["rows"] == 250
    error = refused(run(argv("pretrain", small_chain, tmp_path / "other", **kept, max_rows=260), tmp_path))
    assert "shards_dir" in error and "another data" in error


@pytest.mark.parametrize("file", ["two_cpu_processes", "fsdp2"])
def test_two_processes_with_muon_train_as_one(small_chain, tmp_path, file):
    """Muon's matrices are whole under DDP and in parts under FSDP2. It computes in bf16, so the bits differ."""
    changes = {"optim": "muon", "max_steps": 4, "cross_document_attention": "false", "eval_steps": 2}
    recipe(small_chain, tmp_path / "one", tmp_path, **changes)
    own = ["--num_processes", 2] if file == "fsdp2" else []
    launch = [*LAUNCH[:3], "--config_file", ROOT / f"recipes/accelerate/{file}.yaml", *own]
    done = call([*launch, *argv("pretrain", small_chain, tmp_path / "two", **changes)])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for key in ("loss", "grad_norm"):
        found = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=2e-3) and len(found[0]) == 4
    bits = [[line["held_out_bits_per_byte"] for line in lines if len(line) == 2] for lines in (one, two)]
    assert bits[0] == pytest.approx(bits[1], rel=2e-3) and len(bits[0]) == 2
