"""Shapes of new models against published parameter counts, the dial against its formulas worked by hand.

Run: pytest tests/test_shapes.py
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from posttrain.errors import UserError
from posttrain.shapes import ShapeConfig, dial, make_model, model_config


class Vocabulary:
    """A tokenizer as far as a shape needs one: a size and special ids."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def count(shape: ShapeConfig, vocabulary: int) -> int:
    with torch.device("meta"):
        return make_model(shape, Vocabulary(vocabulary)).num_parameters()


PUBLISHED = [
    # GPT-2 small, as its checkpoint has it.
    (ShapeConfig(768, 3072, 12, 12, 1024, model_type="gpt2"), 50257, 124_439_808),
    # SmolLM2-135M's config.json and checkpoint.
    (ShapeConfig(576, 1536, 30, 9, 8192, num_key_value_heads=3, rope_theta=100000), 49152, 134_515_008),
    # Qwen3-0.6B's: heads of 128 that are wider than hidden_size / heads.
    (
        ShapeConfig(1024, 3072, 28, 16, 40960, model_type="qwen3", num_key_value_heads=8, head_dim=128),
        151936, 596_049_920,
    ),
    # Llama 3.2 1B's.
    (ShapeConfig(2048, 8192, 16, 32, 131072, num_key_value_heads=8, rope_theta=500000), 128256, 1_235_814_400),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "vocabulary", "parameters"), PUBLISHED, ids=["gpt2", "smollm2", "qwen3", "llama"])
def test_published_models_have_their_number_of_parameters(shape, vocabulary, parameters):
    assert count(shape, vocabulary) == parameters


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_the_layers_matrices_are_counted_without_building_them(model_type):
    shape = ShapeConfig(64, 160, 3, 4, 32, model_type=model_type)
    with torch.device("meta"):
        model = make_model(shape, Vocabulary(100))
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and ".wpe" not in name]
    assert shape.parameters == sum(p.numel() for p in inside if p.shape[0] != 100)


def test_defaults_are_those_of_the_tiny_chain():
    shape = ShapeConfig()
    assert (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.num_attention_heads) == (
        128, 384, 4, 4,
    )  # fmt: skip


@dataclass
class Pretrain:
    batch_size: int | None = None
    max_steps: int | None = None
    sequence_length: int = 1024


@dataclass
class Optim:
    learning_rate: float | None = None


def test_the_dial_by_hand():
    """Depth 12: 768 wide, 12 (4 x 768^2 + 3 x 768 x 2048) = 84,934,656 weights, 1.699e9 tokens,
    72 x 12 x 768^2 + 12 x 12 x 768 x 1024 = 6.229e8 FLOPs a token, C = 1.0581e18; 0.292 C^0.3271 = 229.6 k tokens or
    224 chunks, next power of two 256; 0.3118 C^-0.125 = 1.74e-3; 1.699e9 / (256 x 1024) = 6480 steps."""
    shape = ShapeConfig(depth=12)
    assert (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads) == (768, 2048, 12)
    assert shape.parameters == 84_934_656
    assert dial(shape, Pretrain(), Optim()) == (Pretrain(256, 6480), Optim(1.74e-3))


def test_the_dial_of_gpt2_gives_gpt2():
    shape = ShapeConfig(depth=12, model_type="gpt2", max_position_embeddings=1024)
    assert count(shape, 50257) == 124_439_808


def test_what_is_given_stands_against_the_dial():
    shape = ShapeConfig(depth=12, intermediate_size=3072)
    assert shape.intermediate_size == 3072 and shape.hidden_size == 768
    config, optim = dial(shape, Pretrain(batch_size=64, max_steps=10), Optim(6e-4))
    assert (config.batch_size, config.max_steps, optim.learning_rate) == (64, 10, 6e-4)
    # Half the batch of the rule: twice the steps for the same tokens.
    full, half = dial(ShapeConfig(depth=12), Pretrain(), Optim())[0], replace(Pretrain(), batch_size=128)
    assert dial(ShapeConfig(depth=12), half, Optim())[0].max_steps == 2 * full.max_steps


def test_deeper_is_larger_batches_and_lower_rates():
    found = [dial(ShapeConfig(depth=depth), Pretrain(), Optim()) for depth in range(2, 33, 2)]
    batches, rates = [c.batch_size for c, _ in found], [o.learning_rate for _, o in found]
    assert batches == sorted(batches) and rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    assert all(batch & (batch - 1) == 0 for batch in batches)


def test_a_shape_from_a_config_file(tmp_path):
    model_config(ShapeConfig(96, 200, 2, 3, 64, model_type="qwen3"), Vocabulary(10)).save_pretrained(tmp_path)
    found = model_config(ShapeConfig(shape_of=str(tmp_path)), Vocabulary(500))
    assert (found.model_type, found.hidden_size, found.vocab_size) == ("qwen3", 96, 500)
    with pytest.raises(UserError, match="nowhere"):
        model_config(ShapeConfig(shape_of=str(tmp_path / "nowhere")), Vocabulary(500))


def test_the_vocabulary_is_padded():
    assert model_config(ShapeConfig(vocab_multiple=64), Vocabulary(50257)).vocab_size == 50304
    assert model_config(ShapeConfig(vocab_multiple=64), Vocabulary(64)).vocab_size == 64


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "bert"}, "model_type: found 'bert', expected one of llama, qwen3, gpt2"),
        ({"hidden_size": 100}, "hidden_size: found 100, expected a multiple of 2 x num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"model_type": "gpt2", "num_key_value_heads": 2}, "num_key_value_heads: found 2, but model_type gpt2"),
        ({"model_type": "gpt2", "head_dim": 64}, "head_dim: found 64, but model_type gpt2"),
        ({"model_type": "gpt2", "rope_theta": 5e5}, "rope_theta: found 500000.0, but model_type gpt2"),
        ({"head_dim": 33}, "head_dim: found 33, expected an even number"),
        ({"depth": 0}, "depth: found 0, expected at least 1"),
        ({"depth": 2, "num_hidden_layers": 4}, "depth: found 2, but num_hidden_layers is 4: leave one of them out"),
    ],
)
def test_shapes_that_cannot_be(keys, words):
    with pytest.raises(UserError) as error:
        ShapeConfig(**keys)
    assert words in str(error.value)


def test_gpt2_has_its_own_activation_in_one_kernel():
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as Hendrycks & Gimpel (1606.08415) approximate GELU."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    config = model_config(ShapeConfig(model_type="gpt2"), Vocabulary(10))
    torch.testing.assert_close(ACT2FN[config.activation_function](x), expected, atol=1e-6, rtol=1e-5)
