"""A checkpoint's shape and weights as GGUF's: hyperparameters, tensor names, rotary order, dtypes.

In:  the folder of a Llama, Qwen2, Qwen3 or GPT-2 checkpoint in safetensors, and a dtype. Out: keys and tensors in a
     `gguf.GGUFWriter`; one tensor at a time is in memory. Used by `posttrain export --format gguf`.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors and keys are the gguf package's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GPT2LMHeadModel": "GPT2",
}
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Weight:
    """A tensor of the file: its name there, the checkpoint's name, what is done to it and how it is stored."""

    name: str
    source: str
    shape: tuple[int, ...]
    rotary_heads: int = 0  # rows of so many heads go into llama.cpp's rotary order
    transposed: bool = False
    dtype: str = "F32"  # a name of gguf.GGMLQuantizationType


def architecture(config) -> str:
    """GGUF's name of a transformers config's architecture. UserError for what llama.cpp would compute otherwise."""
    names = config.architectures or []
    name = ARCHITECTURES.get(names[0] if names else "")
    if name is None:
        raise UserError(
            f"{names[0] if names else config.model_type}: no GGUF is written for this architecture, only for "
            f"{', '.join(ARCHITECTURES)}; convert it with llama.cpp's convert_hf_to_gguf.py, and check the file with "
            "posttrain check-export"
        )
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    if name != "GPT2":
        expected = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1}
        expected |= {"attention_bias": False} if name != "QWEN2" else {}
    for key, value in expected.items():
        found = getattr(config, key, value)
        if found != value:
            raise UserError(f"config.json: {key} is {found!r}; GGUF's {name.lower()} has {value!r} and no such key")
    if name == "GPT2" and config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(
            f"config.json: activation_function is {config.activation_function!r}; GGUF's gpt2 has gelu_new, the tanh "
            "approximation"
        )
    return name


def add_shape(writer, config) -> None:
    """Write the hyperparameters. UserError for a kind of rotary positions that is not written."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise UserError(
            f"config.json: rope_type is {kind!r}; a GGUF is written for default, linear and llama3. Convert it with "
            "llama.cpp's convert_hf_to_gguf.py, and check the file with posttrain check-export"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not 1; GGUF's llama and qwen turn whole heads")


def head_dim(config) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def llama3_factors(config):
    """Divisors of the rotary frequencies, (head_dim / 2,) fp32, as Llama 3.1 scales them; None for another kind.

    Wavelengths under old_context / high_freq_factor stay, over old_context / low_freq_factor are `factor` times as
    long, in between both are blended ("The Llama 3 Herd of Models", arXiv 2407.21783, section 3.4.2, and meta-llama/
    llama-models, models/llama3/model.py, apply_scaling).
    """
    import numpy as np

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / factor))
    return np.array(divisors, dtype=np.float32)


# ---- tensors --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """The safetensors of a folder, by name. UserError where there are none."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: no {missing[0]}; expected a checkpoint in safetensors")
        handles = [safe_open(folder / name, framework="pt") for name in files]
        self.files = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (no dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def array(self, name: str):
        """The tensor as a numpy array in fp32."""
        return self.files[name].get_tensor(name).float().numpy()


def plan(checkpoint: Checkpoint, config, dtype: str) -> list[Weight]:
    """What is stored how: vectors and learned positions in fp32, matrices in `dtype` (a key of DTYPES), of q8_0 those
    whose rows are no multiple of its blocks of 32 in f16. UserError for a tensor without a place in the format."""
    import gguf

    name = architecture(config)
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    prefix = "transformer." if name == "GPT2" else ""
    planned = []
    for source in sorted(checkpoint.files):
        if source.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue  # buffers of old checkpoints, not weights
        if source == "lm_head.weight" and tied:
            continue  # the embeddings once more
        full = source if source.startswith(("lm_head", prefix)) else prefix + source  # GPT-2 was saved both ways
        place = places.get_name(full, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UserError(
                f"{source}: this tensor has no place in GGUF's {name.lower()}; expected a plain checkpoint"
            )
        shape = checkpoint.shape(source)
        transposed = name == "GPT2" and full.endswith(
            (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
        )  # transformers' Conv1D keeps (in, out)
        heads = 0
        if name == "LLAMA" and ".q_proj." in source:
            heads = config.num_attention_heads
        elif name == "LLAMA" and ".k_proj." in source:
            heads = config.num_key_value_heads
        shape = shape[::-1] if transposed else shape
        stored = "F32" if len(shape) == 1 or place.startswith("position_embd") else DTYPES[dtype]
        if stored == "Q8_0" and shape[-1] % 32:
            stored = "F16"
        planned.append(Weight(place, source, shape, heads, transposed, stored))
    return planned


def rotary_order(rows, heads: int):
    """Rows of q_proj or k_proj, (heads * head_dim, ...), put in pairs: GGUF's llama turns rows 2i and 2i + 1 of a
    head, transformers' rows i and i + head_dim / 2."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def values(checkpoint: Checkpoint, weight: Weight):
    """The array of a planned tensor in the file's order, fp32. UserError where it is not finite, or too large."""
    import numpy as np

    array = checkpoint.array(weight.source)
    largest = float(np.abs(array).max()) if array.size else 0.0
    if not math.isfinite(largest):
        raise UserError(f"{weight.source}: the tensor holds NaN or infinity; use another checkpoint")
    if weight.dtype == "F16" and largest > LARGEST_F16:
        raise UserError(f"{weight.source}: {largest:.3g} is beyond fp16's {LARGEST_F16:.0f}; take --dtype bf16 or f32")
    array = array.T if weight.transposed else array
    return rotary_order(array, weight.rotary_heads) if weight.rotary_heads else array


def write_tensors(writer, checkpoint: Checkpoint, config, weights: list[Weight]) -> None:
    """Write header, keys and all tensors to the writer's file and close it."""
    import gguf
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    factors = llama3_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes, kinds.F32)
    for weight in weights:
        kind = kinds[weight.dtype]
        if kind in (kinds.F32, kinds.F16):
            held, bytes_of = np.dtype(weight.dtype.replace("F", "float")), weight.shape
        else:
            held, bytes_of = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(weight.shape, kind)
        writer.add_tensor_info(weight.name, bytes_of, held, math.prod(bytes_of) * held.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for weight in weights:
        writer.write_tensor_data(gguf.quants.quantize(values(checkpoint, weight), kinds[weight.dtype]))
    writer.close()
