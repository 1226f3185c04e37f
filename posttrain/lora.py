"""LoRA and QLoRA: train small matrices beside frozen weights, and give back a plain model.

In: a causal LM or a scalar-head model. Out: the same model object with adapters inside (forward, generation and
packing do not change), and its weights with the adapters added, under their plain names. Keys are TRL's:

    accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml --use_peft --lora_r 16

W' = W + (alpha / r) B A (Hu et al. 2021, arXiv 2106.09685); 4-bit base weights: Dettmers et al. 2023, 2305.14314.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from posttrain.args import arg, at_least
from posttrain.errors import UserError

# Accelerate imports bitsandbytes wherever it is installed, and on some CPUs that warns of a kernel it could download.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ADAPTER = "default"  # peft's own name for the only one
ADAPTER_DIR = "adapter"


@dataclass
class LoraArgs:
    """LoRA: small matrices in place of all weights"""

    use_peft: bool = arg(False, help="train LoRA adapters; the stage's checkpoint has them merged, adapter/ apart")
    lora_r: int = arg(16, help="rank")
    lora_alpha: int = arg(32, help="adapters count alpha / r times")
    lora_dropout: float = arg(0.0, help="dropout before the adapters (none in RL)")
    lora_target_modules: list[str] = arg(["all-linear"], help="names of layers, or all-linear")
    load_in_4bit: bool = arg(False, help="QLoRA: the frozen weights in 4 bits (NF4); needs bitsandbytes")

    def __post_init__(self):
        at_least(self, lora_r=1, lora_alpha=1)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout: found {self.lora_dropout}, expected 0 or more and less than 1")
        if not self.lora_target_modules:
            raise UserError("lora_target_modules: found [], expected names of layers, or all-linear")
        if self.load_in_4bit and not self.use_peft:
            raise UserError("load_in_4bit: 4-bit weights cannot be trained themselves: add --use_peft true")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise UserError("load_in_4bit: bitsandbytes is not installed: pip install 'posttrain[qlora]'")


def quantization(config: LoraArgs) -> dict:
    """Arguments for `from_pretrained`: none, or NF4 with the scales quantised again."""
    if not config.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": four_bits}


def keep_trainable(model) -> None:
    """Let 4-bit layers of `model` stay as they were loaded.

    On some CPUs bitsandbytes 0.50 repacks a layer's weights at its first forward without gradients, for speed. What is
    backpropagated through it afterwards is wrong, in silence; and layers narrower than 64 die.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def add_adapter(model, config: LoraArgs, *, task_type: str = "CAUSAL_LM", token_ids: list[int] = ()):
    """Freeze `model` and put adapters inside it, in place; returns peft's wrapper around the very same object.

    token_ids: rows of the embeddings (and of the head) that are trained, too: control tokens that the base model has
    never seen cannot be learned by matrices in the layers alone. A scalar head (`SEQ_CLS`) is trained whole.
    UserError where no layer has a name of lora_target_modules.
    """
    import peft

    targets = config.lora_target_modules
    rows = sorted(token_ids)
    if rows and task_type == "CAUSAL_LM" and not model.config.tie_word_embeddings:
        rows = {
            _name_of(model, layer): rows for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        }
    settings = peft.LoraConfig(
        task_type=task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        trainable_token_indices=rows or None,
    )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    try:
        wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise UserError(
            f"lora_target_modules: found {targets}, expected all-linear or some of {', '.join(linear)} "
            f"({str(error).splitlines()[0][:160]})"
        ) from error
    if rows and task_type == "CAUSAL_LM":
        model.get_output_embeddings().bias = bias  # TRL 1.16 reads it, and peft 0.21's wrapper does not pass it on
    return wrapped


def _name_of(model, layer) -> str:
    return next(name for name, module in model.named_modules() if module is layer).rpartition(".")[2]


def train_adapter(model, config: LoraArgs, tokenizer):
    """`model`, or with use_peft peft's wrapper around it, whose adapters and template's control tokens are trained."""
    if not config.use_peft:
        return model
    from posttrain.chat import PROBE, control_tokens, encode_chat

    used = set(encode_chat(tokenizer, PROBE, add_generation_prompt=True).input_ids)
    return add_adapter(model, config, token_ids=sorted(used & set(control_tokens(tokenizer))))


def has_adapter(model) -> bool:
    """Whether `add_adapter` was called on it."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


@torch.no_grad()
def merged_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, weight with its adapter added) of every parameter, one at a time; `model` is left as it is.

    Merging in place and undoing it would round the frozen weights a little more each time.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".base_layer"):
            plain = owner.removesuffix(".base_layer")
            weight = _dense(parameter)
            if plain.endswith(".token_adapter"):  # rows of the embeddings trained by themselves
                yield f"{plain.removesuffix('.token_adapter')}.{leaf}", modules[plain].get_merged_weights([ADAPTER])
            elif leaf == "weight":
                yield f"{plain}.{leaf}", weight + modules[plain].get_delta_weight(ADAPTER).to(weight.dtype)
            else:
                yield f"{plain}.{leaf}", weight
        elif f".modules_to_save.{ADAPTER}" in owner:
            yield name.replace(f".modules_to_save.{ADAPTER}", ""), parameter.detach()
        elif not any(part in name for part in (".lora_", ".trainable_tokens_", ".original_module.")):
            yield name, _dense(parameter)


def _dense(parameter) -> torch.Tensor:
    """A parameter as numbers, whether it is kept in 4 bits or not."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def save_model(model, folder) -> None:
    """The plain Hugging Face checkpoint of a model; of what `add_adapter` returned, adapter/ too, for those who keep
    one base model for many adapters. Merged weights of a 4-bit model are written in full precision."""
    import peft

    if isinstance(model, peft.PeftModel):
        # The rows of the embeddings that are trained are in the adapter as such: the whole matrix need not be.
        model.save_pretrained(f"{folder}/{ADAPTER_DIR}", save_embedding_layers=False)
        model = model.get_base_model()
    if not has_adapter(model):
        model.save_pretrained(folder)
        return
    import copy

    from safetensors.torch import save_file

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = {name: weight.contiguous().cpu() for name, weight in merged_weights(model)}
    config.dtype = next(iter(weights.values())).dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
