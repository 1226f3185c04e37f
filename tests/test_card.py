"""The model card, and what of a stage's words and files may leave the machine.

The oracles: markdown-it, a CommonMark parser, for what a reader of the card sees; huggingface_hub's own reader of
cards for the metadata. Run: pytest tests/test_card.py
"""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from posttrain import card, cli, hub_files, lineage
from posttrain.errors import UserError
from posttrain.stage import StageConfig

CONFIG = {"output_dir": "runs/x/sft", "seed": 0, "model_name_or_path": "runs/x/base", "license": None}


def folder_of(path: Path, **changes) -> Path:
    """A finished stage's folder, as small as it can be."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (path / "tokenizer_config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": {"sha256": sha256(b"weights").hexdigest(), "bytes": 7}}
    told = {
        "format": 1, "stage": "sft", "status": "finished", "created": "2026-11-26T08:00:00Z", "seed": 0, "parents": {},
        "data": [], "config": CONFIG, "git_commit": "abc", "versions": {}, "machine": {}, "metrics": {}, "gains": [],
        "samples": [], "gate": None, "wall_time_s": 1.0, "tokens": 5, "parameters": 10**9, "files": files,
    }  # fmt: skip
    (path / "stage.json").write_text(json.dumps(told | changes, indent=1))
    return path


def parent(path: Path, stage: str = "sft") -> dict:
    digest = sha256((path / "stage.json").read_bytes()).hexdigest()
    return {"path": str(path), "stage": stage, "sha256": digest, "tokenizer_sha256": None}


def part(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def shown(text: str) -> list:
    """The card's tokens, as a reader's browser gets them: the metadata are cut off."""
    body = text.split("---\n", 2)[2]
    found = MarkdownIt("commonmark").enable("table").parse(body)
    return [token for block in found for token in [block, *(block.children or [])]]


HOSTILE = "````\n</details><script>alert(1)</script>\n| [a](javascript:alert(1)) |"


def test_what_models_and_data_say_stays_text(tmp_path):
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unit": "%"}
    gain = {"name": HOSTILE, "before": {"label": HOSTILE, **figure}, "after": figure, "passed": False, "goal": HOSTILE}
    folder = folder_of(
        tmp_path / "sft", metrics={HOSTILE: figure}, gains=[gain | {"unit": "%"}],
        samples=[{"prompt": HOSTILE, "replies": [{"by": "sft", "text": HOSTILE}]}],
        data=[{"name": HOSTILE, "rows": 3, "sha256": "ab", "skipped": {HOSTILE: 2}}],
        gate={"allowed": {"truncated": HOSTILE}}, config=CONFIG | {"run_name": HOSTILE},
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{# " + HOSTILE + " #}")
    tokens = shown(card.make(folder, "ann/x"))
    ours = {"<details>", "</details>", "<summary>", "</summary>"}
    blocks = "".join(token.content for token in tokens if token.type.startswith("html"))
    assert "script" not in blocks and all(blocks.count(tag) for tag in ours)
    assert not [token for token in tokens if token.type == "link_open" and "javascript" in token.attrs["href"]]
    fences = [token.content for token in tokens if token.type == "fence"]
    assert f"{HOSTILE}\n--- sft\n{HOSTILE}\n" in fences and any(HOSTILE in fence for fence in fences[2:])
    rows = [token for token in tokens if token.type == "tr_open"]
    assert len(rows) == 2 * 3  # gains, figures, data: a head and one row each, whatever the names hold


def test_metadata_as_the_hub_reads_them(tmp_path):
    oasst = {"name": "OpenAssistant/oasst1", "revision": "f" * 40, "split": "train", "rows": 1200, "sha256": "1" * 64}
    data = [
        {"mixture": [oasst, {"name": "/home/ann/secret/talks.jsonl", "rows": 7, "sha256": "2" * 64}]},
        {"name": "HuggingFaceH4/MATH-500", "config": "all", "split": "test", "rows": 500, "sha256": "3" * 64},
    ]
    base = {"path": "HuggingFaceTB/SmolLM2-135M", "stage": None, "sha256": None, "hub": True}
    metrics = {"pass@1": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 500, "unit": "%"}}
    folder = folder_of(tmp_path / "sft", data=data, parents={"policy": base}, metrics=metrics)
    text = card.make(folder, "ann/x", {"license": "apache-2.0"}, {"OpenAssistant/oasst1": "apache-2.0"})
    head = ModelCard(text).data
    assert (head.base_model, head.license, head.library_name) == (base["path"], "apache-2.0", "transformers")
    assert head.base_model_relation == "finetune" and head.pipeline_tag == "text-generation"
    assert head.datasets == ["OpenAssistant/oasst1", "HuggingFaceH4/MATH-500"]
    (result,) = head.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("pass@1", 25.0, "HuggingFaceH4/MATH-500")
    table = part(text, "Data")
    assert "| OpenAssistant/oasst1 | train | 1,200 | ffffffffffff | `111111111111` | apache-2.0 |" in table
    assert "| talks.jsonl | – | 7 | – | `222222222222` | not known |" in table and "/home/ann" not in text
    assert "apache-2.0, from the base model's card" in part(text, "Licence")


def test_the_licence_is_stated_or_loudly_not(tmp_path):
    base = folder_of(tmp_path / "run" / "base", stage="pretrain", config=CONFIG | {"license": "mit"})
    reward = folder_of(tmp_path / "run" / "reward", stage="reward", config=CONFIG | {"license": "gpl-3.0"})
    parents = {"policy": parent(base, "pretrain"), "reward": parent(reward, "reward")}
    ppo = folder_of(tmp_path / "run" / "ppo", stage="ppo", parents=parents)
    assert "mit, from the stage it was trained from, base" in part(card.make(ppo), "Licence")
    assert ModelCard(card.make(ppo)).data.license == "mit"
    said = card.make(ppo, licence={"license": "cc-by-4.0", "from": "--license"})
    assert ModelCard(said).data.license == "cc-by-4.0"
    beside = folder_of(tmp_path / "run" / "sft", parents={"reward": parents["reward"]})  # no weights came from there
    assert (
        "**Not stated.**" in part(card.make(beside), "Licence") and ModelCard(card.make(beside)).data.license is None
    )
    with pytest.raises(UserError, match="license: found 'apache2', .* did you mean 'apache-2.0'"):
        StageConfig(output_dir="x", license="apache2")


def test_limits_are_what_the_manifest_tells_against_the_model(tmp_path):
    gain = {"name": "pass@1", "before": {"value": 0.1}, "after": {"value": 0.1}, "passed": False, "goal": "+30 points"}
    folder = folder_of(
        tmp_path / "sft", parameters=984_192, gains=[gain], git_commit="abc+changes",
        gate={"allowed": {"truncated": "12 % of the rows"}}, data=[{"name": "tiny", "skipped": {"no role": 3}}],
    )  # fmt: skip
    limits = part(card.make(folder), "Limits")
    for words in ("984k parameters", "missed its goal: pass@1 (+30 points)", "`--allow truncated`): 12 % of the rows",
                  "3 rows of tiny", "invented world", "in no commit", "and on nothing else"):  # fmt: skip
        assert words in limits, words
    assert part(card.make(folder_of(tmp_path / "good")), "Limits").count("\n- ") == 1


def test_evaluations_stand_in_the_card(tmp_path):
    folder = folder_of(tmp_path / "sft")
    figure = {"value": 0.31, "low": 0.28, "high": 0.34, "n": 1319, "unit": "%", "dataset": "openai/gsm8k"}
    suite = {
        "suite": "math",
        "command": "posttrain eval /home/ann/runs/sft --suite math",
        "metrics": {"pass@1": figure},
    }
    (folder / "evals").mkdir()
    (folder / "evals" / "math.json").write_text(json.dumps(suite))
    text = card.make(folder, "ann/x")
    assert "**math** (`posttrain eval sft --suite math`)" in text
    assert r"| pass@1 | 31.0 % \[28.0, 34.0\] | 1319 |" in text
    assert ModelCard(text).data.eval_results[0].dataset_type == "openai/gsm8k"
    sent = hub_files.collect(folder, text)
    assert json.loads(sent["evals/math.json"])["command"] == "posttrain eval sft --suite math"


def test_a_moved_run_knows_its_parents_and_a_stage_run_again_does_not(tmp_path):
    base = folder_of(tmp_path / "old" / "base", stage="pretrain")
    folder_of(tmp_path / "old" / "sft", parents={"policy": parent(base, "pretrain")})
    moved = (tmp_path / "old").rename(tmp_path / "new")
    (found,) = lineage.ancestors(moved / "sft")
    assert (found.name, found.hub, found.trunk) == ("base", None, True)
    (moved / "base" / "hub.json").write_text(json.dumps({"repo": "ann/base", "manifest_sha256": found.sha256}))
    assert lineage.base_model(lineage.ancestors(moved / "sft")) == "ann/base"
    (moved / "base" / "stage.json").write_text((moved / "base" / "stage.json").read_text() + " ")  # other weights now
    assert lineage.base_model(lineage.ancestors(moved / "sft")) is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ann/runs/sft", "sft"),
        ("/data/my runs/talks.jsonl", "talks.jsonl"),
        ("posttrain eval /home/ann/x/grpo --out=/tmp/a/b.json", "posttrain eval grpo --out=b.json"),
        ("~/runs/sft", "sft"),
        ("runs/tiny/sft", "runs/tiny/sft"),
        ("OpenAssistant/oasst1", "OpenAssistant/oasst1"),
        ("https://hf.co/docs/hub/model-cards", "https://hf.co/docs/hub/model-cards"),
        ("a fraction 1/2, and/or, \\frac{1}{2}/3/4", "a fraction 1/2, and/or, \\frac{1}{2}/3/4"),
    ],
)  # fmt: skip
def test_paths_of_this_machine(text, left):
    assert hub_files.without_paths(text) == left


def test_what_others_may_see_of_a_manifest(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    judge = {"api_key": "abc", "model": "m"}
    served = {"vllm_server_base_url": "http://10.0.0.7:8000", "vllm_server_host": None}
    told = {
        "config": {"reward_options": {"judge": judge}, "eos_token": "</s>", "seed": 3, **served},
        "samples": [{"prompt": "what is in /usr/lib/x and /home/ann/y?"}],
        "parents": {"policy": {"path": "/a/b/sft"}},
    }
    judge, served = {**judge, "api_key": "(not shown)"}, {**served, "vllm_server_base_url": "(not shown)"}
    assert hub_files.public(told) == {
        "config": {"reward_options": {"judge": judge}, "eos_token": "</s>", "seed": 3, **served},
        "samples": [{"prompt": "what is in /usr/lib/x and ~/y?"}],
        "parents": {"policy": {"path": "sft"}},
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hf_" + "aB3" * 11, "a Hugging Face token"),
        ("key: sk-proj-" + "aB3_" * 10, "an API key"),
        ("AKIA" + "A1B2" * 4, "an AWS key"),
        ("aws_secret_access_key = " + "a/B+" * 10, "an AWS secret"),
        ("ghp_" + "aB3" * 12, "a GitHub token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("http://ann:pa55@host/v1", "a password in a URL"),
        ("in /home/ann/runs", "a path of your home folder"),
        ("a value own-secret-value-1 of mine", "the value of MY_API_KEY"),
        ("sk-learn-based-methods-for-everyone", None),
        ("hf_hub_download and hf_token_is_here", None),
        ("http://host:8000/v1?user=a@b", None),
        ("/home/annabel", None),
    ],
)
def test_what_looks_like_a_token(text, what, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("MY_API_KEY", "own-secret-value-1")
    found = list(hub_files.secrets_in(f"first line\n{text}\nlast"))
    assert found == ([] if what is None else [(2, what)])


def test_a_dry_run_lists_what_would_go_up(tmp_path, capsys):
    folder = folder_of(tmp_path / "tiny" / "sft")
    (folder / "log.jsonl").write_text("{}")
    (folder / "checkpoints").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cli.command(["push", str(folder), "--dry_run", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "             7 B  model.safetensors\n" in said and "stays here: checkpoints/, log.jsonl\n" in said
    assert "license: mit\n" in said and "# tiny-sft\n" in said
    sizes = [int(line.split(" B ")[0].replace(",", "")) for line in said.splitlines()[1:6]]
    assert f"tiny-sft: 5 files, {sum(sizes):,} B" in said.splitlines()[0]
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (folder / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(UserError, match="model.safetensors is damaged: .* run the stage again"):
        cli.command(["push", str(folder), "--dry_run"])


def test_what_is_no_model_is_not_pushed(tmp_path):
    (tmp_path / "empty").mkdir()
    clean = folder_of(tmp_path / "clean", stage="clean")
    (clean / "tokenizer_config.json").unlink()
    half = tmp_path / "half"
    half.mkdir()
    (half / "run.json").write_text("{}")
    for folder, words in (
        (tmp_path / "no", "no such folder"),
        (tmp_path / "empty", "is no stage of posttrain .* nor a run"),
        (clean, "a clean stage leaves neither a model nor a tokenizer"),
        (half, "is an unfinished stage"),
    ):
        with pytest.raises(UserError, match=words):
            cli.command(["push", str(folder), "--dry_run"])
