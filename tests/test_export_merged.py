"""Adapters merged into their base models, read again from disk and compared; peft is the oracle.

Run: pytest tests/test_export_merged.py
"""

import json
import shutil

import pytest
import torch
from export_helpers import new, save
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import cli
from posttrain.errors import UserError
from posttrain.lora import LoraArgs, add_adapter, save_model


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """root/base, and root/adapter that was made with peft alone: random matrices on every linear layer."""
    root = tmp_path_factory.mktemp("adapters")
    model = new("llama", tokenizer)
    save(root / "base", model, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize(("dtype", "within"), [(None, 1e-4), ("f16", 0.05), ("bf16", 0.5)])
def test_merged_weights_say_what_base_and_adapter_say(dtype, within, trained, tmp_path, capsys):
    flags = ["--dtype", dtype] if dtype else []
    argv = ["export", str(trained / "adapter"), "--format", "merged", "--out", str(tmp_path / "out"), *flags]
    assert cli.command(argv) == 0
    said = capsys.readouterr().out
    assert "log p moves by " in said and f"model  {tmp_path / 'out'}" in said
    ids = torch.arange(20, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(trained / "base").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert str(plain.dtype) == {None: "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16"}[dtype]
    with torch.no_grad():
        before = base(ids).logits
        apart = PeftModel.from_pretrained(base, trained / "adapter").eval()(ids).logits
        after = plain.float()(ids).logits
    assert (after - apart).abs().max() < within < (before - apart).abs().max()
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "adapter").exists()
    with pytest.raises(UserError, match="exists; expected a new folder"):
        cli.command(argv)


def test_a_stage_with_lora_is_merged_already_and_compared(tokenizer, trained, tmp_path, capsys):
    """Its folder as posttrain.lora saves it: merged weights, and adapter/ with trained rows of the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(trained / "base")
    wrapped = add_adapter(model, LoraArgs(use_peft=True, lora_r=4), token_ids=[2, 3, 4])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(wrapped, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert cli.command(["export", str(tmp_path), "--format", "merged"]) == 0
    said = capsys.readouterr().out
    assert "is merged already; log p moves by" in said and "stays at 100.0 %" in said

    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.2)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="merged weights are another model: log p moves by"):
        cli.command(["export", str(tmp_path), "--format", "merged"])


def test_what_cannot_be_merged(trained, tokenizer, tmp_path):
    with pytest.raises(UserError, match="nothing to merge"):
        cli.command(["export", str(trained / "base"), "--format", "merged"])
    with pytest.raises(UserError, match="is an adapter; merge it first: posttrain export .* --format merged"):
        cli.command(["export", str(trained / "adapter"), "--format", "gguf"])
    with pytest.raises(UserError, match="q8_0, which only a GGUF has"):
        cli.command(["export", str(trained / "adapter"), "--format", "merged", "--dtype", "q8_0"])
    moved = tmp_path / "moved"
    shutil.copytree(trained / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/such/base"}))
    with pytest.raises(UserError, match="no/such/base: no such folder"):
        cli.command(["export", str(moved), "--format", "merged"])
    save(tmp_path / "small", new("gpt2", tokenizer), tokenizer)
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "small")})
    )
    with pytest.raises(UserError, match="does not fit its base model"):
        cli.command(["export", str(moved), "--format", "merged"])
    assert not (moved / "export").exists()
