"""LoRA and QLoRA: adapters inside a model, merged weights, checkpoints; peft and transformers are the oracles.

Run: pytest tests/test_lora.py
"""

import json

import pytest
import torch
from recipe_runs import TERM, Running, argv, log, manifest, result, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from posttrain.errors import UserError
from posttrain.lora import LoraArgs, add_adapter, merged_weights, quantization, save_model

TRAINED_ROWS = [61, 62, 63]
LORA = LoraArgs(use_peft=True, lora_r=4, lora_alpha=8)


def llama(tied=True, kind=LlamaForCausalLM, **keys):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=0, **keys,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def learn(model, steps=4):
    """A few updates of what asks for a gradient; returns the inputs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (4, 16), generator=generator)
    ids[:, 3] = 62
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ids


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_checkpoint_is_the_model_with_its_adapter(tied, tmp_path):
    model = llama(tied)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    wrapped = add_adapter(model, LORA, token_ids=TRAINED_ROWS)
    assert wrapped.get_base_model() is model
    learned_from = learn(wrapped)
    model.eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected = model(ids).logits
        save_model(wrapped, tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(ids).logits, expected, atol=2e-6, rtol=0)
        from peft import PeftModel

        apart = PeftModel.from_pretrained(llama(tied), tmp_path / "adapter").eval()
        assert torch.equal(apart(ids).logits, expected)
    assert plain.config.tie_word_embeddings == tied and not hasattr(plain.config, "quantization_config")
    after = dict(plain.named_parameters())
    assert after.keys() == before.keys() == {name for name, _ in merged_weights(model)}
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "norm" not in name}
    rows = (after["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    used = TRAINED_ROWS if tied else sorted(set(TRAINED_ROWS) & set(learned_from.flatten().tolist()))
    assert rows.tolist() == used and 62 in used  # a head that is tied learns from every token it could have said


def test_what_is_trained_and_how_much():
    model = llama()
    add_adapter(model, LORA, token_ids=TRAINED_ROWS)
    layer = 4 * 2 * 64 * 4 + 3 * (64 + 96) * 4  # q, k, v, o are 64 x 64; gate, up, down 64 x 96; r = 4
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * layer + len(TRAINED_ROWS) * 64


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_head_learn_through_trls_own_loss(tied, tmp_path):
    """TRL takes the head's weight and bypasses its forward: the trained rows must get the gradient of a whole head."""
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    whole, model = llama(tied), llama(tied)
    whole(input_ids=ids, labels=ids).loss.backward()
    wrapped = add_adapter(model, LORA, token_ids=TRAINED_ROWS)
    add_fused_lm_head(model)
    outputs = wrapped(input_ids=ids, labels=ids, fused_lm_head=True)
    (-outputs.log_probs.sum() / outputs.label_mask.sum()).backward()
    deltas = {name: p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(deltas) == (1 if tied else 2)
    for name, gradient in deltas.items():
        plain = dict(whole.named_parameters())[name.replace("token_adapter.trainable_tokens_delta.default", "weight")]
        torch.testing.assert_close(gradient, plain.grad[TRAINED_ROWS], atol=1e-6, rtol=1e-4)


def test_a_scalar_head_is_saved_with_its_adapter(tmp_path):
    model = llama(tied=False, kind=LlamaForSequenceClassification, num_labels=1)
    start = model.score.weight.clone()
    wrapped = add_adapter(model, LORA, task_type="SEQ_CLS")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(1, 33)[None]
    wrapped(ids).logits.sum().backward()
    optimizer.step()
    model.eval()
    save_model(wrapped, tmp_path)
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=2e-6, rtol=0)
    assert not torch.equal(plain.score.weight, start)


def test_four_bits(tmp_path):
    """Frozen weights of 4 bits; what is saved is the model that was trained, in full precision."""
    pytest.importorskip("bitsandbytes", reason="pip install 'posttrain[qlora]'")
    llama().save_pretrained(tmp_path / "base")
    config = LoraArgs(use_peft=True, load_in_4bit=True, lora_r=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", **quantization(config))
    packed = [p for name, p in model.named_parameters() if "proj" in name]
    assert packed and all(p.dtype == torch.uint8 for p in packed)
    wrapped = add_adapter(model, config, token_ids=TRAINED_ROWS)
    ids = learn(wrapped)
    model.eval()
    save_model(wrapped, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float32 and not plain.config.to_dict().get("quantization_config")
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_four_bits_learn_the_same_whether_or_not_they_were_sampled_from_first(tmp_path):
    """A stage measures its base model before it trains."""
    pytest.importorskip("bitsandbytes", reason="pip install 'posttrain[qlora]'")
    from posttrain.models import ModelConfig, load_causal_lm

    llama().save_pretrained(tmp_path)
    ids, gradients = torch.arange(48).view(2, 24), []
    for measured in (False, True):
        model = load_causal_lm(ModelConfig(str(tmp_path)), **quantization(LoraArgs(use_peft=True, load_in_4bit=True)))
        if measured:
            with torch.no_grad():
                model.eval()(ids)
        torch.manual_seed(0)
        wrapped = add_adapter(model, LORA, token_ids=TRAINED_ROWS).train()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0].values())


def test_sft_of_four_bits(small_chain, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'posttrain[qlora]'")
    settings = {"use_peft": "true", "load_in_4bit": "true", "learning_rate": 1e-2, "loss_dataset_split": "test"}
    done = run(argv("sft", small_chain, tmp_path / "sft", **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "autograd kernel was not registered" not in done.stderr
    assert manifest(tmp_path / "sft")["gains"][-1]["passed"], "the held-out loss falls"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert plain.dtype == torch.float32 and plain.num_parameters() == manifest(small_chain / "sft")["parameters"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_r": 0}, "lora_r: found 0, expected at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout: found 1.0, expected 0 or more and less than 1"),
        ({"lora_target_modules": []}, "expected names of layers, or all-linear"),
        ({"load_in_4bit": True}, "add --use_peft true"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words):
        LoraArgs(**settings)


def test_layers_that_are_not_there_are_named():
    with pytest.raises(UserError, match="found .'attn'., expected all-linear or some of down_proj"):
        add_adapter(llama(), LoraArgs(use_peft=True, lora_target_modules=["attn"]))


def test_sft_with_adapters(small_chain, tmp_path):
    settings = {"use_peft": "true", "learning_rate": 1e-2, "lora_r": 4, "loss_dataset_split": "test"}
    done = run(argv("sft", small_chain, tmp_path / "sft", **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "sft")
    assert found["gains"][-1]["name"] == "held-out loss" and found["gains"][-1]["passed"]
    assert {"adapter/adapter_model.safetensors", "model.safetensors"} <= found["files"].keys()
    adapter = json.loads((tmp_path / "sft" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["trainable_token_indices"]
    base = AutoModelForCausalLM.from_pretrained(small_chain / "pretrain")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    rows = (tuned.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1).nonzero().flatten()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    names = tokenizer.convert_ids_to_tokens(rows.tolist())
    assert sorted(names) == ["<|im_end|>", "<|im_sep|>", "<|im_start|>"], "control tokens learn, other rows are frozen"
    assert torch.equal(tuned.model.norm.weight, base.model.norm.weight), "frozen"
    assert all(line["loss"] > 0 for line in log(tmp_path / "sft"))


def test_sft_with_adapters_goes_on_bit_equal(small_chain, tmp_path):
    """It measures after every step: what the signal kept it from is made up for when it goes on."""
    settings = {"use_peft": "true", "max_steps": 24, "eval_steps": 1, "loss_dataset_split": "test"}
    straight = run(argv("sft", small_chain, tmp_path / "straight", **settings), tmp_path)
    assert straight.returncode == 0, straight.stderr
    arguments = argv("sft", small_chain, tmp_path / "stopped", **settings)
    stopped = Running(arguments, tmp_path).stop_at(6, TERM, tmp_path / "stopped")
    assert stopped.returncode == 143, stopped.stderr
    again = run(arguments, tmp_path)
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    found, expected = result(tmp_path / "stopped"), result(tmp_path / "straight")
    found["log"].sort(key=lambda line: (line["step"], "loss" in line))  # within a step it may come last
    assert found == expected
    assert log(tmp_path / "stopped", "samples.jsonl") == log(tmp_path / "straight", "samples.jsonl")
