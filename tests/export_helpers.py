"""Small models of each shape that export knows, with weights so large that attention and positions matter, and what
the tests of export do to them."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from posttrain import check_export, export
from posttrain.gguf_engine import LlamaCpp

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
SHAPES = {
    "llama": lambda v: LlamaConfig(**GROUPED, **v, head_dim=32, tie_word_embeddings=False, rms_norm_eps=1e-3),
    "llama3": lambda v: LlamaConfig(**GROUPED, **v, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "linear": lambda v: LlamaConfig(**GROUPED, **v, rope_parameters=LINEAR, tie_word_embeddings=True),
    "qwen2": lambda v: Qwen2Config(**GROUPED, **v, tie_word_embeddings=True),
    "qwen3": lambda v: Qwen3Config(**GROUPED, **v, head_dim=32, tie_word_embeddings=True),
    "gpt2": lambda v: GPT2Config(n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=512, **v),
}


def new(shape: str, tokenizer, rows: int | None = None):
    """A model of random weights of standard deviation 0.2, biases and norms included."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = SHAPES[shape]({"vocab_size": rows or len(tokenizer), **special})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.2)
    return model


def save(folder: Path, model, tokenizer) -> Path:
    """As a stage's folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(folder: Path, model, tokenizer, dtype: str = "f32", *, written=None, tokens: int = 8):
    """(what check-export finds of a file of `model`, remarks of the writer). `written`: the tokenizer in the file,
    where it is to be another one."""
    save(folder, model, tokenizer)
    remarks = export.write(folder, "test", folder / "t.gguf", dtype, model, written or tokenizer)
    reference = check_export.Reference(deepcopy(model), tokenizer, None, tokens)
    with LlamaCpp(folder / "t.gguf", reference.context) as engine:
        return check_export.check_gguf(reference, engine), remarks
