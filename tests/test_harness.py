"""lm-evaluation-harness on our models against our own figures: bits per byte, and answers counted by hand.

Run: pytest tests/test_harness.py
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, new_llama

from posttrain import harness
from posttrain.base_evals import bits_per_byte
from posttrain.cli import command
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.models import save_pair

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model(base_tokenizer):
    """Its choices are no ties: weights five times as wide as usual."""
    model = new_llama(base_tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    """A task file on local data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**fixed, "test_split": "test", **settings}))


def metric(name: str, aggregation: str) -> dict:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": False}


def test_bits_per_byte_are_the_harness_s(model, base_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [row["text"] for row in tiny.rows("documents", "test", 12, 0)] + ["Ünï\n\n  code 漢字"]
    task(
        tmp_path, "local_text", [{"page": text} for text in texts], output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{page}}", metric_list=[metric("bits_per_byte", "bits_per_byte")],
    )  # fmt: skip
    found = harness.measure(model, base_tokenizer, harness.Settings(("local_text",), str(tmp_path)))
    theirs = found["metrics"]["local_text, bits_per_byte"]
    ours = bits_per_byte(model, base_tokenizer, texts, 1024)
    assert theirs["value"] == pytest.approx(ours["value"], rel=1e-5) and theirs["n"] == ours["n"] == 13


def test_long_texts_are_cut_into_the_same_windows(model, base_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = " ".join(row["text"] for row in tiny.rows("documents", "test", 4, 0))
    lm = HFLM(pretrained=model, tokenizer=base_tokenizer, max_length=31)
    [nats] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    bits = -nats / torch.log(torch.tensor(2.0)).item() / len(text.encode())
    assert len(base_tokenizer(text).input_ids) > 3 * 31
    assert bits_per_byte(model, base_tokenizer, [text], 32)["value"] == pytest.approx(bits, rel=1e-5)


def logp(model, tokenizer, context: str, choice: str) -> float:
    before, whole = tokenizer(context).input_ids, tokenizer(f"{context} {choice}").input_ids
    logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def test_the_example_task_is_counted_by_hand_and_kept_with_its_settings(model, base_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # its data file is named from there
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_pair(model, base_tokenizer, tmp_path / "model")
    folder, file = "examples/lm_eval_tasks", tmp_path / "out.json"
    flags = ["--tasks", "tiny_facts", "--include_path", folder, "--limit", "40", "--json", str(file), "--seed", "3"]
    assert command(["eval", str(tmp_path / "model"), *flags]) == 0
    rows = [json.loads(line) for line in Path(folder, "tiny_facts.jsonl").read_text().splitlines()[:40]]
    right = 0
    for row in rows:
        sums = [logp(model, base_tokenizer, row["question"], choice) for choice in row["choices"]]
        right += max(range(len(sums)), key=sums.__getitem__) == row["label"]
    found = json.loads(file.read_text())
    figure = found["metrics"]["tiny_facts, acc"]
    assert figure["value"] == pytest.approx(right / 40) and figure["n"] == 40 and figure["unit"] == "%"
    share = right / 40  # the harness's standard error is that of a mean, over n - 1
    assert figure["high"] - figure["value"] == pytest.approx(1.96 * (share * (1 - share) / 39) ** 0.5)
    assert found["harness"]["num_fewshot"] == {"tiny_facts": 0} and found["harness"]["seed"] == 3
    assert found["harness"]["task_settings"]["tiny_facts"]["output_type"] == "multiple_choice"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"include_path": "recipes/accelerate/none"}, "holds no task file"),
        ({"limit": 0}, "--limit: found 0, expected 1 or more"),
        ({"num_fewshot": -1}, "--num_fewshot: found -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError) as error:
        harness.check(harness.Settings(("arc_easy",), **settings))
    assert words in str(error.value)


@pytest.mark.slow
def test_a_task_that_is_not_known_is_refused_with_the_nearest_that_is():
    """Its own 14,000 names have to be read for that."""
    with pytest.raises(UserError, match="knows no task 'tiny_fact'; did you mean 'tiny_facts'"):
        harness.find_tasks(harness.Settings(("tiny_fact",), str(REPOSITORY / "examples" / "lm_eval_tasks")))


def test_data_that_is_not_there_is_named(model, base_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task(tmp_path, "gone", [], output_type="multiple_choice", doc_to_text="", doc_to_target="0", doc_to_choice=["a"])
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(UserError, match="--tasks: data of gone could not be had: .*gone.jsonl"):
        harness.measure(model, base_tokenizer, harness.Settings(("gone",), str(tmp_path)))


def test_without_the_harness_an_error_says_how_to_get_it(base_tokenizer, tmp_path, monkeypatch):
    save_pair(new_llama(base_tokenizer), base_tokenizer, tmp_path)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'posttrain\[harness\]'"):
        command(["eval", str(tmp_path), "--tasks", "arc_easy"])
