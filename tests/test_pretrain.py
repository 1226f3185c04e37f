"""The pretraining loop: its loss, documents that do not see each other, what saves memory and time changes nothing,
order and position of the data, spikes, resumption.

Run: pytest tests/test_pretrain.py
"""

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import new_llama
from recipe_runs import call, log

from posttrain import memory, stage
from posttrain.errors import UserError
from posttrain.pretrain import ChunkLoss, Chunks, PretrainConfig, PretrainOptim, make_loss, pretrain
from posttrain.shapes import ShapeConfig, make_model
from posttrain.shards import INDEX, TokenShards
from posttrain.stage import StageConfig

pytestmark = pytest.mark.usefixtures("restored_signals")


def shards(folder, tokens, end: int = 0) -> TokenShards:
    """Tokens as one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, dtype="<u2").tofile(folder / "shard-00000.bin")
    listed = [{"name": "shard-00000.bin", "tokens": len(tokens)}]
    index = {"dtype": "<u2", "tokens": len(tokens), "eos_token_id": end, "shards": listed}
    (folder / INDEX).write_text(json.dumps(index))
    return TokenShards(folder)


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def config(**keys) -> PretrainConfig:
    settings = {"max_steps": 6, "sequence_length": 16, "batch_size": 4, "micro_batch_size": 2, **keys}
    return PretrainConfig("unused", **settings)


def start(folder, *configs, **keys):
    return stage.start("pretrain", (StageConfig(str(folder), logging_steps=1, **keys), *configs), parents={}, data=[])


def train(folder, model, tokens, optim=None, watch=None, prepare=None, **keys):
    """Weights and log of a run through the loop itself."""
    settings, optim = config(**keys), optim or PretrainOptim(0.01, warmup_steps=1)
    current = start(folder, settings, optim)
    if prepare is not None:
        prepare(current)
    position = pretrain(current, stage.accelerator(optim.bf16), model, tokens, settings, optim, watch)
    return position, log(folder)


# ---- the loss -------------------------------------------------------------------------------------------------------


def model_of(kind: str, tokenizer):
    torch.manual_seed(0)
    return make_model(ShapeConfig(32, 64, 2, 2, 64, model_type=kind), tokenizer).eval()


KINDS = ["llama", "qwen3", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_each_token_given_those_before(tokenizer, kind):
    model, chunks = model_of(kind, tokenizer), random_tokens(24, len(tokenizer)).view(2, 12)
    expected = 0.0
    for row in chunks.tolist():
        for place in range(1, 12):  # one forward a token
            logits = model(torch.tensor([row[:place]])).logits[0, -1]
            expected -= torch.log_softmax(logits, -1)[row[place]].item()
    assert ChunkLoss(model)(chunks).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_see_each_other_or_not_as_configured(tokenizer, kind):
    """Chunk: the tail of a document, then two whole ones. What the first holds changes nothing behind its end, to the
    bit; the last one's loss is that of the document alone."""
    model, end = model_of(kind, tokenizer), tokenizer.eos_token_id
    tail, other, first, last = (random_tokens(n, len(tokenizer), seed) + 5 for seed, n in enumerate((7, 7, 5, 9)))
    tail, other, first, last = (ids % len(tokenizer) for ids in (tail, other, first, last))
    ends = torch.tensor([end])
    chunks = [torch.cat([head, ends, first, ends, last])[None] for head in (tail, other)]
    found = {}

    def logits_of(loss, chunk):
        handle = model.lm_head.register_forward_hook(lambda module, inputs, output: found.update(logits=output))
        loss(chunk)
        handle.remove()
        return found["logits"][0, 7:]

    apart, together = ChunkLoss(model, end), ChunkLoss(model)
    assert torch.equal(logits_of(apart, chunks[0]), logits_of(apart, chunks[1]))
    assert not torch.allclose(logits_of(together, chunks[0]), logits_of(together, chunks[1]))
    alone = model(torch.cat([ends, last])[None]).logits[0]
    torch.testing.assert_close(logits_of(apart, chunks[0])[6:], alone, atol=1e-5, rtol=1e-4)


def test_a_model_that_cannot_keep_documents_apart_is_refused(tokenizer, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    bloom.config.max_position_embeddings = 64
    with pytest.raises(UserError, match="layout: packed, but"):
        make_loss(start(tmp_path / "out"), bloom, 0, config(cross_document_attention=False), False)


def gradients(model) -> dict:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradient(tokenizer, tmp_path, kind):
    chunks = random_tokens(48, len(tokenizer)).view(4, 12)
    found = []
    for setting in ("false", "true"):
        model = model_of(kind, tokenizer).train()
        current = start(tmp_path / setting)
        loss = make_loss(current, model, 0, config(gradient_checkpointing=setting, sequence_length=12), False)
        assert model.is_gradient_checkpointing == (setting == "true")
        loss(chunks).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_activations_are_recomputed_where_memory_asks(fresh_model, tmp_path, monkeypatch, capsys):
    settings = config(sequence_length=64, micro_batch_size=4)
    make_loss(start(tmp_path / "much"), fresh_model, 0, settings, False)
    assert not fresh_model.is_gradient_checkpointing
    monkeypatch.setattr(memory, "device_memory", lambda device: 1 << 20)
    make_loss(start(tmp_path / "little"), fresh_model, 0, settings, False)
    assert fresh_model.is_gradient_checkpointing
    assert "gradient checkpointing: 0.0 GiB are needed without it, 0.0 are free" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tokenizer, tmp_path):
    tokens, runs = shards(tmp_path / "tokens", random_tokens(600, len(tokenizer))), []
    for setting in (False, True):
        torch.manual_seed(0)
        model = make_model(ShapeConfig(32, 64, 1, 2, 64), tokenizer)  # one layer: each is compiled anew
        _, lines = train(tmp_path / str(setting), model, tokens, compile=setting, max_steps=3)
        runs.append(([line["loss"] for line in lines], model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(weight, runs[1][1][name], atol=1e-4, rtol=1e-3, msg=name)


LIGER = """
import copy, torch
from transformers import LlamaConfig, LlamaForCausalLM
from posttrain.pretrain import ChunkLoss
torch.manual_seed(0)
plain = LlamaForCausalLM(LlamaConfig(vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True))
fused = copy.deepcopy(plain)
from posttrain.pretrain import PretrainConfig, make_loss
from types import SimpleNamespace
settings = PretrainConfig("unused", max_steps=1, sequence_length=12, batch_size=2, use_liger_kernel=True,
                          liger_kernel_config={"rms_norm": False, "swiglu": False})  # Triton cannot interpret them
loss = make_loss(SimpleNamespace(note=print), fused, 0, settings, False)  # counts memory before Liger is in place
assert loss.by_liger
chunks = torch.randint(80, (2, 12))
losses = [ChunkLoss(plain)(chunks), loss(chunks)]
for loss in losses:
    loss.backward()
torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-4)
for (name, a), b in zip(plain.named_parameters(), fused.parameters()):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
"""


@pytest.mark.slow
def test_ligers_loss_and_gradient_are_torchs(tmp_path):
    done = call([os.sys.executable, "-c", LIGER], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]


# ---- order, position, spikes, resumption ----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_takes_the_same_chunks_in_the_same_order(tmp_path, world):
    tokens = shards(tmp_path, range(1000, 1000 + 37 * 8))
    ranks = [Chunks(tokens, 8, 4, seed=3, rank=rank, world=world) for rank in range(world)]
    alone = Chunks(tokens, 8, 4, seed=3)
    for step in range(30):
        parts = [chunks.indices(step) for chunks in ranks]
        assert [parts[place % world][place // world] for place in range(4)] == alone.indices(step)
    taken = [index for step in range(37) for index in alone.indices(step)]
    assert all(sorted(taken[at : at + 37]) == list(range(37)) for at in range(0, 4 * 37, 37))
    indices, rows = alone.read(5)
    assert indices == alone.indices(5)
    assert rows.tolist() == [list(range(1000 + 8 * index, 1008 + 8 * index)) for index in indices]
    assert alone.position(10) == {"tokens": 320, "chunks": 40, "epoch": 1, "place": 3}


def test_a_spike_is_skipped_logged_and_forgotten(tokenizer, tmp_path, capsys):
    """38 steps on one repeated sentence, in the middle of them a step of noise: without its update the run ends in
    other weights than with it."""
    sentence = random_tokens(16, len(tokenizer))
    tokens = sentence.repeat(400)
    order = Chunks(shards(tmp_path / "order", tokens), 16, 4, seed=0)
    for index in order.indices(36):
        tokens[index * 16 : index * 16 + 16] = random_tokens(16, len(tokenizer), seed=index)
    spoiled, runs = shards(tmp_path / "tokens", tokens), {}
    for width in (0.0, 6.0):
        model = new_llama(tokenizer)
        _, lines = train(tmp_path / str(width), model, spoiled, max_steps=38, skip_spikes=width)
        runs[width] = [line["loss"] for line in lines], model.state_dict(), lines
    losses, _, lines = runs[6.0]
    assert [line["step"] for line in lines if line["skipped"]] == [37] and losses[36] > 2 * losses[35]
    said = capsys.readouterr().out
    assert f"step 37 skipped: loss {losses[36]:.4g}" in said and f"chunks {order.indices(36)[0]}, " in said
    assert losses[:37] == runs[0.0][0][:37] and losses[37] < runs[0.0][0][37]
    assert "skipped" not in runs[0.0][2][0]


def test_stopped_by_sigterm_it_ends_in_the_same_weights(tokenizer, tmp_path):
    """With Muon, a guard and a look at the model in between: all of it is in the checkpoint, or leaves no trace."""
    tokens = shards(tmp_path / "tokens", random_tokens(700, len(tokenizer)))
    optim, looks = PretrainOptim(0.01, warmup_steps=1, optim="muon"), []

    def stop_after(step):
        def prepare(current):
            plain = current.log

            def log_and_stop(at, **numbers):
                plain(at, **numbers)
                if at == step:
                    os.kill(os.getpid(), signal.SIGTERM)

            current.log = log_and_stop

        return prepare

    def go(name, model, **keys):
        return train(tmp_path / name, model, tokens, optim, looks.append, eval_steps=2, skip_spikes=6.0, **keys)

    straight, stopped, resumed = (new_llama(tokenizer) for _ in range(3))
    position, lines = go("straight", straight)
    assert position == {"tokens": 384, "chunks": 24, "epoch": 0, "place": 24} and looks == [2, 4, 6]
    with pytest.raises(SystemExit) as left:
        go("stopped", stopped, prepare=stop_after(3))
    assert left.value.code == 143
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("*/checkpoint.json")
    facts = json.loads(saved.read_text())
    assert facts["step"] == 3 and facts["position"] == {"tokens": 192, "chunks": 12, "epoch": 0, "place": 12}
    assert go("stopped", resumed)[1] == lines
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(straight.lm_head.weight, stopped.lm_head.weight)


def test_a_look_at_the_model_changes_nothing(tokenizer, tmp_path):
    tokens, runs = shards(tmp_path / "tokens", random_tokens(700, len(tokenizer))), []
    for name, keys in {"blind": {}, "looking": {"eval_steps": 1}}.items():
        model = new_llama(tokenizer)
        modes = []
        train(tmp_path / name, model, tokens, watch=lambda _, m=model, seen=modes: seen.append(m.training), **keys)
        runs.append((copy.deepcopy(model.state_dict()), modes))
    assert runs[1][1] == [False] * 6 and not runs[0][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"gradient_checkpointing": "maybe"},
            "gradient_checkpointing: found 'maybe', expected one of auto, true, false",
        ),
        ({"skip_spikes": -1.0}, "skip_spikes: found -1.0, expected at least 0"),
        ({"model_name_or_path": "x/y"}, "tokenizer_path: with model_name_or_path it must not be set"),
    ],
)
def test_settings_that_cannot_be(keys, words):
    with pytest.raises(UserError) as error:
        config(**keys)
    assert words in str(error.value)
    with pytest.raises(UserError, match="tokenizer_path: required"):
        PretrainConfig()
    with pytest.raises(UserError, match="optim: found 'sgd', expected one of adamw, muon"):
        PretrainOptim(optim="sgd")
