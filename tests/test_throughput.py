"""FLOPs by closed forms and published figures, peaks of devices, memory.

Run: pytest tests/test_throughput.py
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from posttrain.throughput import (
    listed_peak,
    measured_peak,
    mfu,
    model_flops,
    non_embedding_parameters,
    peak_flops,
    peak_memory_gb,
)


def on_meta(config, auto=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config)


def test_gpt2_has_its_published_size():
    """nanoGPT prints "number of parameters: 123.65M" for GPT-2 small: all but the table of positions, head tied."""
    model = on_meta(GPT2Config())
    assert non_embedding_parameters(model) == 124_439_808 - 1024 * 768 == 123_653_376
    # 6 N a token for the products. Attention by PaLM's appendix B is 12 layers width s where all see all; half of it
    # where a token sees only what is before it.
    flops = model_flops(123_653_376, 12, 768, tokens=1, mean_length=1024, kind="training")
    assert flops == 6 * 123_653_376 + 12 * 12 * 768 * 1024 / 2


def test_a_forward_counts_what_its_matrix_products_do():
    """torch counts the products of a real forward: 2 per weight and token, and full attention (ours counts half)."""
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model, tokens = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), torch.zeros(2, 64).long()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=tokens)
    parameters = non_embedding_parameters(model)
    norms = (2 * 3 + 1) * 32
    attention = model_flops(0, 3, 32, tokens=128, mean_length=64, kind="forward")
    assert forward.get_total_flops() == pytest.approx(2 * (parameters - norms) * 128 + 2 * attention, rel=1e-3)
    assert model_flops(parameters, 3, 32, 128, 64, "forward") == 2 * parameters * 128 + attention
    scorer = on_meta(LlamaConfig(**{**config.to_dict(), "num_labels": 1}), AutoModelForSequenceClassification)
    assert non_embedding_parameters(scorer) == parameters - 50 * 32 + 32


def test_training_costs_three_forwards_and_frozen_weights_two():
    size = {"parameters": 1000, "layers": 2, "width": 8, "tokens": 10, "mean_length": 4}
    forward, training, adapter = (model_flops(**size, kind=kind) for kind in ("forward", "training", "adapter"))
    assert (forward, training) == (2 * 1000 * 10 + 2 * 4 * 2 * 8 * 10, 3 * forward)
    assert training - adapter == 2 * 1000 * 10
    with pytest.raises(ValueError, match="kind: found 'backward'"):
        model_flops(**size, kind="backward")


def test_mfu_is_a_share_of_all_devices():
    assert mfu(989e12, seconds=2.0, peak=989e12) == 0.5
    assert mfu(989e12, seconds=2.0, peak=989e12, devices=4) == 0.125


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_listed_devices(name, tera):
    assert listed_peak(name) == tera * 1e12


def test_devices_that_are_not_listed_are_measured_once():
    assert listed_peak("Intel(R) Xeon(R)") is None and listed_peak("NVIDIA L40") is None
    peak = peak_flops("cpu", torch.float32)
    assert 1e9 < peak < 1e14 and peak_flops(torch.device("cpu"), torch.float32) == peak
    assert measured_peak.cache_info().currsize == 1


def test_peak_memory_only_grows():
    before = peak_memory_gb()
    block = torch.ones(2**28)  # 1 GiB
    assert before < peak_memory_gb() <= before + 1.1 and block.numel()
