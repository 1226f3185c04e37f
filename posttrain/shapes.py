"""Models from scratch: an architecture and its sizes, key by key, from a config.json, or all from one dial, `depth`.

In: the keys of `ShapeConfig` and a tokenizer. Out: a transformers model with random weights (`make_model`); with
`depth` also the batch, the steps and the learning rate that published rules give for that size (`dial`):

    accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml --depth 4

- width 64 a layer and heads of 64: GPT-3 Small's shape (Brown et al. 2020, arXiv 2005.14165, table 2.1; GPT-2's, too).
  The loss depends little on this ratio (Kaplan et al. 2020, 2001.08361, section 3.2). The MLP is 4 x as wide (GPT-2),
  gated ones 8/3 x (Shazeer 2020, 2002.05202), up to the next multiple of 64.
- 20 tokens a parameter (Hoffmann et al. 2022, 2203.15556), embeddings not counted.
- batch 0.2920 C^0.3271 tokens and learning rate 0.3118 C^-0.1250, with C the FLOPs of the whole run without
  embeddings, (72 L d^2 + 12 L d s) D (DeepSeek-AI 2024, 2401.02954, equation 1; fitted from 1e17 to 2e19).
"""

import math
from dataclasses import dataclass, replace

from posttrain.args import arg, at_least, one_of
from posttrain.errors import UserError

TYPES = ("llama", "qwen3", "gpt2")
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
HEAD = WIDTH_A_LAYER = 64
TOKENS_A_PARAMETER = 20


@dataclass
class ShapeConfig:
    """Shape: a model made from scratch"""

    hidden_size: int | None = arg(None, help="width; none = 128, or what depth gives, as the next three")
    intermediate_size: int | None = arg(None, help="width of the MLP; none = 384")
    num_hidden_layers: int | None = arg(None, help="layers; none = 4")
    num_attention_heads: int | None = arg(None, help="attention heads; none = 4")
    max_position_embeddings: int = arg(512, help="longest sequence, in tokens")
    model_type: str = arg("llama", help="architecture: llama, qwen3 or gpt2")
    depth: int | None = arg(None, help="one dial: layers, and from them all sizes, batch, steps and learning rate")
    num_key_value_heads: int | None = arg(None, help="heads of keys and values (not gpt2); none = as many as heads")
    head_dim: int | None = arg(None, help="width of a head (not gpt2); none = hidden_size / num_attention_heads")
    tie_word_embeddings: bool = arg(True, help="one matrix for embeddings and head")
    rope_theta: float = arg(10000.0, help="base of the rotary positions (not gpt2)")
    vocab_multiple: int = arg(1, help="pad the vocabulary to a multiple of so many rows: 64 suits a GPU")
    shape_of: str | None = arg(None, help="a folder or Hub name whose config.json gives the shape, and not these keys")

    def __post_init__(self):
        one_of(self, model_type=TYPES)
        at_least(self, depth=1, vocab_multiple=1, num_key_value_heads=1, head_dim=1, max_position_embeddings=2)
        if self.depth is not None and self.num_hidden_layers not in (None, self.depth):
            raise UserError(
                f"depth: found {self.depth}, but num_hidden_layers is {self.num_hidden_layers}: leave one of them out "
                "(with depth also the other sizes, batch_size, max_steps and learning_rate that it is to give)"
            )
        derived = SIZES if self.depth is None else sizes(self.depth, self.model_type)
        for key, value in derived.items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        at_least(self, hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1)
        if self.model_type == "gpt2":
            self._refuse_for_gpt2()
        even = 1 if self.model_type == "gpt2" else 2  # rotary positions turn pairs
        if self.head_dim is not None and self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}, expected an even number")
        if self.head_dim is None and self.hidden_size % (even * self.num_attention_heads):
            raise UserError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of {'2 x ' if even == 2 else ''}"
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise UserError(
                f"num_key_value_heads: found {self.num_key_value_heads}, expected a divisor of num_attention_heads "
                f"({self.num_attention_heads})"
            )

    def _refuse_for_gpt2(self) -> None:
        """What GPT-2 has no place for is not dropped in silence."""
        own = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        for key, value in own.items():
            if getattr(self, key) not in (None, value):
                raise UserError(f"{key}: found {getattr(self, key)}, but model_type gpt2 has {value} and no such key")
        if self.rope_theta != 10000.0:
            raise UserError(f"rope_theta: found {self.rope_theta}, but model_type gpt2 learns its positions")

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Weights of the layers' matrices: those that the scaling rules count; no embeddings, biases or norms."""
        heads = self.num_attention_heads + (self.num_key_value_heads or self.num_attention_heads)
        attention = 2 * self.hidden_size * self.head * heads
        mlp = (2 if self.model_type == "gpt2" else 3) * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp)


def sizes(depth: int, model_type: str) -> dict[str, int]:
    """What `depth` layers are given for width, MLP and heads."""
    width = WIDTH_A_LAYER * depth
    mlp = 4 * width if model_type == "gpt2" else math.ceil(8 * width / 3 / 64) * 64
    heads = width // HEAD
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads}


def dial(shape: ShapeConfig, config, optim) -> tuple:
    """(config, optim) of pretraining with `batch_size` (chunks), `max_steps` and `learning_rate` where they are none:
    by the rules above where `depth` is set, else their plain defaults."""
    batch, steps, rate = 16, 400, 1e-3
    if shape.depth is not None:
        tokens = TOKENS_A_PARAMETER * shape.parameters
        layers, width, length = shape.num_hidden_layers, shape.hidden_size, config.sequence_length
        compute = (72 * layers * width**2 + 12 * layers * width * length) * tokens
        # A power of two, the nearest in ratio, divides among the usual numbers of processes.
        batch = 2 ** max(0, round(math.log2(0.2920 * compute**0.3271 / length)))
        rate = float(f"{0.3118 * compute**-0.1250:.2e}")
        steps = math.ceil(tokens / (length * (config.batch_size or batch)))
    config = replace(config, batch_size=config.batch_size or batch, max_steps=config.max_steps or steps)
    return config, replace(optim, learning_rate=optim.learning_rate or rate)


def model_config(shape: ShapeConfig, tokenizer):
    """The transformers config of a new model for `tokenizer`. UserError where `shape_of` names none."""
    vocabulary = math.ceil(len(tokenizer) / shape.vocab_multiple) * shape.vocab_multiple
    common = {
        "vocab_size": vocabulary,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.shape_of is not None:
        from posttrain.models import load_config

        config = load_config(shape.shape_of)
        for key, value in common.items():
            setattr(config, key, value)
        return config
    common["tie_word_embeddings"] = shape.tie_word_embeddings
    if shape.model_type == "gpt2":
        from transformers import GPT2Config

        return GPT2Config(
            n_embd=shape.hidden_size,
            n_inner=shape.intermediate_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_positions=shape.max_position_embeddings,
            resid_pdrop=0.0,  # a text is seen once or a few times: nothing to overfit
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",  # gelu_new as one kernel: the same function
            **common,
        )
    from transformers import LlamaConfig, Qwen3Config

    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.model_type](
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_attention_heads,
        head_dim=shape.head,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        **common,
    )


def make_model(shape: ShapeConfig, tokenizer, attention: str = "sdpa"):
    """A causal LM with random weights for `tokenizer`, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(model_config(shape, tokenizer), attn_implementation=attention)
