"""Stages pushed by `posttrain push` and by recipes to a server that speaks the Hub's API, and pulled from there again.

The client is the real huggingface_hub, the processes are real ones, the oracle of what arrived is the server's own
memory. Run: pytest tests/test_hub.py
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import time

import pytest
from hub_client import Client
from hub_server import ANN, BOB, READER, Hub, Repo
from huggingface_hub import ModelCard
from recipe_runs import ROOT, STAGES, argv, manifest, refused

pytestmark = pytest.mark.slow
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL |= {"stage.json", "README.md", ".gitattributes"}
CHAT = MODEL | {"chat_template.jinja", "generation_config.json"}
HELD = {
    "tokenizer": MODEL - {"config.json", "model.safetensors"},
    "pretrain": MODEL | {"generation_config.json"},
    "sft": CHAT, "reward": CHAT - {"generation_config.json"}, "ppo": CHAT, "grpo": CHAT,
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    return Client(hub, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def run(small_chain, tmp_path_factory):
    """The finished chain, to be written to."""
    out = tmp_path_factory.mktemp("runs") / "small"
    shutil.copytree(small_chain, out)
    return out


@pytest.fixture(scope="module")
def pushed(hub, client, run):
    """All six stages on the Hub as ann/small-STAGE."""
    done = client.posttrain("push", run, "--repo", "ann/small", "--license", "mit")
    assert done.returncode == 0, done.stderr
    return done.stdout


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_run_is_private_whole_and_says_nothing_of_this_machine(hub, pushed, run):
    assert set(hub.repos) == {f"ann/small-{name}" for name in STAGES}
    for name in STAGES:
        repo, folder = hub.repos[f"ann/small-{name}"], run / name
        assert repo.private and len(repo.commits) == 2 and set(repo.files) == HELD[name]
        assert f"{hub.url}/ann/small-{name} (private), commit {repo.sha()[:12]}" in pushed
        told = json.loads(repo.files["stage.json"])
        for file, facts in told["files"].items():  # the hashes are those of what a user gets
            assert facts == {"sha256": sha256(repo.files[file]), "bytes": len(repo.files[file])}, file
        for file in set(repo.files) - {"README.md", "stage.json", ".gitattributes"}:
            assert repo.files[file] == (folder / file).read_bytes(), file
        assert told["metrics"] == manifest(folder)["metrics"] and told["data"] == manifest(folder)["data"]
        assert told["hub"]["manifest_sha256"] == sha256((folder / "stage.json").read_bytes())
    for part in (str(run), str(run.parents[1]), ANN, os.environ.get("HOME", "/root") + "/"):
        assert part.encode() not in hub.everything()


def test_every_stage_has_its_card_from_the_start(small_chain):
    for name in STAGES:
        found = ModelCard((small_chain / name / "README.md").read_text())
        assert f"# small-{name}\n" in found.text and "**Not stated.**" in found.text and name in found.data.tags
        assert "README.md" not in manifest(small_chain / name)["files"]  # a push and an evaluation write it anew


def test_cards_name_the_chain_as_the_hub_knows_it(hub, pushed, run):
    cards = {name: ModelCard(hub.repos[f"ann/small-{name}"].files["README.md"].decode()) for name in STAGES}
    heads = {name: card.data.to_dict() for name, card in cards.items()}
    bases = {name: head.get("base_model") for name, head in heads.items()}
    assert bases == {
        "tokenizer": None, "pretrain": None, "sft": "ann/small-pretrain", "reward": "ann/small-sft",
        "ppo": "ann/small-sft", "grpo": "ann/small-sft",
    }  # fmt: skip
    assert heads["grpo"]["base_model_relation"] == "finetune" and {head["license"] for head in heads.values()} == {
        "mit"
    }
    pipelines = {name: head.get("pipeline_tag") for name, head in heads.items()}
    assert pipelines["reward"] == "text-classification" and pipelines["tokenizer"] is None
    assert {pipelines[name] for name in ("pretrain", "sft", "ppo", "grpo")} == {"text-generation"}
    tree = """\
ann/small-ppo  ◀ this model
├─ policy: ann/small-sft (sft)
│  └─ policy: ann/small-pretrain (pretrain)
│     └─ tokenizer: ann/small-tokenizer (tokenizer)
└─ reward: ann/small-reward (reward)
   └─ policy: ann/small-sft (sft), as above
"""
    assert tree in cards["ppo"].text
    values = {result.metric_type: result.metric_value for result in cards["sft"].data.eval_results}
    assert values["pass@1"] == pytest.approx(100 * manifest(run / "sft")["metrics"]["pass@1"]["value"], abs=1e-3)
    assert json.loads((run / "sft" / "hub.json").read_text())["repo"] == "ann/small-sft"


PULL = """
import contextlib, io, json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
blocks, folders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name, block in blocks.items():
    said, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(block, scope)
    equal = None
    if "model" in scope:
        kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        ids = torch.arange(5, 25)[None]
        local = kind.from_pretrained(folders[name])
        equal = torch.equal(scope["model"](input_ids=ids).logits, local(input_ids=ids).logits)
    print(json.dumps([name, said.getvalue(), equal]))
"""


def test_the_code_of_each_card_runs_on_what_was_pulled(hub, client, pushed, run, tmp_path):
    names = ["tokenizer", "pretrain", "sft", "reward"]
    cards = {name: hub.repos[f"ann/small-{name}"].files["README.md"].decode() for name in names}
    blocks = {name: re.search("```python\n(.*?)```", card, re.S)[1] for name, card in cards.items()}
    script = tmp_path / "pull.py"
    script.write_text(PULL)
    done = client.run([script, json.dumps(blocks), json.dumps({name: str(run / name) for name in names})])
    assert done.returncode == 0, done.stderr
    said = {name: (text, equal) for name, text, equal in map(json.loads, done.stdout.splitlines())}
    assert [said[name][1] for name in names] == [None, True, True, True]  # the same logits, to the bit
    assert all(text for text, _ in said.values()) and len(said["reward"][0].splitlines()) == 2
    prompt = re.search('"content": ("[^"]*")', blocks["sft"])[1]
    settings = ("--temperature", "0", "--max_new_tokens", "64")
    chat = client.posttrain("chat", "ann/small-sft", "--prompt", json.loads(prompt), *settings)
    assert chat.returncode == 0 and chat.stdout.strip() == said["sft"][0].strip()
    other = client.posttrain("chat", "ann/small-sft", "--prompt", "hello", token=BOB)
    assert (
        other.returncode == 2 and "ann/small-sft: no causal language model could be loaded on the Hub" in other.stderr
    )


@pytest.fixture(scope="module")
def lora(hub, client, pushed, run):
    """SFT of ann/small-pretrain with LoRA, pushed by the recipe itself; the Hub refuses the commit the first time."""
    out = run.parent / "lora" / "sft"
    changes = {"model_name_or_path": "ann/small-pretrain", "push_to_hub": "true", "use_peft": "true"}
    command = [*argv("sft", run, out, **changes), "--debug"]
    hub.faults.append(("POST .*/commit/", lambda request: request.refuse(403)))
    return out, command, client.run(command)


def test_a_push_that_fails_leaves_the_finished_stage_and_says_how_to_go_on(hub, client, lora):
    out, command, done = lora
    assert done.returncode == 2 and "Traceback" in done.stderr  # --debug
    assert f"when finished it is pushed to {hub.url}/ann/lora-sft (private)" in done.stdout
    assert f"error: the stage is finished and whole in {out}, but it was not pushed: ann/lora-sft: 403" in done.stderr
    assert manifest(out)["status"] == "finished" and "model.safetensors" not in hub.repos["ann/lora-sft"].files
    sent = dict(hub.received)
    line = shlex.split(done.stderr.splitlines()[-1].removeprefix("push it with: "))
    assert line[:2] == ["posttrain", "push"]
    again = client.posttrain(*line[1:])
    assert again.returncode == 0, again.stderr
    assert hub.received == sent and "model.safetensors" in hub.repos["ann/lora-sft"].files  # no weight sent twice
    third = client.run(command)
    assert third.returncode == 0 and "is finished already" in third.stdout and "nothing had changed" in third.stdout
    assert len(hub.repos["ann/lora-sft"].commits) == 2


MERGED = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, name = sys.argv[1:]
merged, ids = AutoModelForCausalLM.from_pretrained(name), torch.arange(5, 25)[None]
model = AutoModelForCausalLM.from_pretrained(base)
model.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)
adapted = PeftModel.from_pretrained(model, name, subfolder="adapter")
print((adapted(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max().item())
"""


def test_the_manifest_travels_and_an_adapter_names_its_base_as_the_hub_does(hub, client, lora, tmp_path):
    out = lora[0]
    base, repo = hub.repos["ann/small-pretrain"], hub.repos["ann/lora-sft"]
    told = json.loads(base.files["stage.json"])
    assert manifest(out)["parents"]["policy"] == {
        "path": "ann/small-pretrain", "stage": "pretrain", "sha256": sha256(base.files["stage.json"]),
        "tokenizer_sha256": told["tokenizer_sha256"], "hub": True, "commit": base.sha(),
    }  # fmt: skip
    assert {name for name in repo.files if "/" in name} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert json.loads(repo.files["adapter/adapter_config.json"])["base_model_name_or_path"] == "ann/small-pretrain"
    head = ModelCard(repo.files["README.md"].decode()).data
    assert (head.base_model, head.license) == (
        "ann/small-pretrain",
        "mit",
    ) and "lora" in head.tags  # the base's licence
    script = tmp_path / "merged.py"
    script.write_text(MERGED)
    done = client.run([script, "ann/small-pretrain", "ann/lora-sft"])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


def test_no_token_is_ever_written(hub, client, lora, run):
    """After pushes that worked, failed and were shown with --debug: in no output, file, card, log or repository."""
    kept = [path for folder in (run, lora[0].parent) for path in folder.rglob("*") if path.is_file()]
    assert len(kept) > 50
    for token in (ANN, BOB, "topsecret"):
        assert token not in client.said() and token.encode() not in hub.everything()
        assert [path for path in kept if token.encode() in path.read_bytes()] == []


def test_a_recipe_that_could_not_push_does_not_begin(client, hub, run, tmp_path):
    hub.repos["ann/public"] = Repo("ann", private=False)
    out = tmp_path / "x" / "sft"
    for token, repo, words in (
        ("", "ann/x", "no token of the Hub was found: run `hf auth login`"),
        (READER, "ann/x", "the token of ann may only read"),
        (ANN, "ann/public", "ann/public is there already and everybody can see it"),
    ):
        done = client.run(argv("sft", run, out, push_to_hub="true", hub_model_id=repo), token)
        assert words in refused(done) and not out.exists()
    done = client.run(argv("sft", run, out, hub_token=ANN))
    assert "hub_token: found a value, expected none" in refused(done) and ANN not in done.stderr + done.stdout


def test_what_push_refuses(client, hub, run, pushed, tmp_path):
    hub.repos["ann/theirs"] = Repo("ann", True, [{"config.json": b"{}", "model.safetensors": b"x"}])
    before = {name: len(repo.commits) for name, repo in hub.repos.items()}
    for repo, token, words in (
        ("bob/grpo", ANN, "bob/grpo: 403 Forbidden: You don't have the rights to create a model under bob"),
        ("ann/small-sft", BOB, "The token may not write to ann"),
        ("ann/grpo", "hf_mistyped", "the Hub does not take this token"),
        ("ann/theirs", ANN, "ann/theirs holds files that are not of posttrain (config.json, model.safetensors"),
        ("ann/a b", ANN, "repository: found 'ann/a b', expected user/name"),
    ):
        assert words in refused(client.posttrain("push", run / "grpo", "--repo", repo, token=token))
    shutil.copytree(run / "grpo", tmp_path / "leaky")
    (tmp_path / "leaky" / "evals").mkdir()
    suite = {"suite": "chat", "samples": [{"prompt": "a", "reply": "my key is sk-abc123abc123abc123abc123"}]}
    (tmp_path / "leaky" / "evals" / "chat.json").write_text(json.dumps(suite | {"metrics": {}}))
    done = client.posttrain("push", tmp_path / "leaky", "--repo", "ann/leaky")
    assert "evals/chat.json:6: holds what looks like an API key; nothing was sent" in refused(done)
    assert "sk-abc123" not in done.stderr
    assert {name: len(repo.commits) for name, repo in hub.repos.items()} == before


# --- pushes that are cut off


def oid(folder, name: str) -> str:
    return sha256((folder / name).read_bytes())


def test_a_killed_push_goes_on_without_what_is_there(hub, client, run, pushed, monkeypatch):
    """SIGKILL in the middle of the weights, which go up in parts, when the tokenizer is up: it is not sent again."""
    folder, command = run / "grpo", [ROOT / "posttrain" / "cli.py", "push", run / "grpo", "--repo", "ann/cut"]
    model, tokenizer = oid(folder, "model.safetensors"), oid(folder, "tokenizer.json")
    monkeypatch.setattr(hub, "chunk", 16_384)
    for name in (model, tokenizer):
        del hub.store[name], hub.received[name]
    hub.faults.append((f"PUT lfs/{model}/3", lambda request: time.sleep(60)))
    started = client.start(command)
    until(lambda: tokenizer in hub.store and not hub.faults)
    os.kill(started.pid, signal.SIGKILL)
    assert started.finish().returncode == -signal.SIGKILL
    assert hub.received[model] == 2 * hub.chunk and hub.repos["ann/cut"].files.keys() == {".gitattributes"}
    done = client.run(command)
    assert done.returncode == 0, done.stderr
    assert hub.received[tokenizer] == (folder / "tokenizer.json").stat().st_size
    assert hub.received[model] == 2 * hub.chunk + (folder / "model.safetensors").stat().st_size
    assert sha256(hub.repos["ann/cut"].files["model.safetensors"]) == model


def until(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_what_the_hub_gets_wrong_on_the_way(hub, client, run, pushed):
    """Of one push: a connection dropped in the middle of the weights, a 503 with Retry-After before the upload and one
    at the commit, somebody's commit in between (412), an answer that is lost. One commit comes of it, none twice."""
    folder, repo = run / "ppo", Repo("ann", True)
    hub.repos["ann/hard"] = repo
    repo.commits.append({"stage.json": b"{}", "LICENSE": b"MIT", "model-00001-of-00002.safetensors": b"old"})
    model = oid(folder, "model.safetensors")
    del hub.store[model]
    hub.received[model] = 0

    def other_commit(request):
        repo.commits.append({**repo.files, "notes.txt": b"hers"})
        return "go on"

    def lost_answer(request):
        request.answer = lambda *_, **__: request.drop()
        return "go on"

    commit = "POST .*ann/hard/commit"
    hub.faults += [
        ("POST .*ann/hard/preupload", lambda request: request.refuse(503, Retry_After=0)),
        (f"PUT lfs/{model}", lambda request: request.drop(after=8192)),
        (commit, lambda request: request.refuse(503, Retry_After=1)),
        (commit, other_commit),
        (commit, lost_answer),
    ]
    done = client.posttrain("push", folder, "--repo", "ann/hard")
    assert done.returncode == 0, done.stderr
    assert not hub.faults and hub.received[model] == 8192 + (folder / "model.safetensors").stat().st_size
    assert len(repo.messages) == 1 and "nothing had changed" in done.stdout
    assert "503 Service Unavailable" in done.stdout and "trying again in 1 s" in done.stdout and "412" in done.stdout
    kept = {"LICENSE", "notes.txt"}  # others' files stay; the shard of larger weights goes
    assert set(repo.files) == CHAT - {".gitattributes"} | kept
