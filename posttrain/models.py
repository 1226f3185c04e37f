"""Make or load models: causal LMs, scalar-head models on their backbone, tokenizers.

In: a local folder or a Hub name. Out: a transformers model in fp32 or bf16. Nothing here runs code that comes with
a checkpoint: safetensors only, no remote code.
"""

from dataclasses import dataclass

from posttrain.args import arg, one_of
from posttrain.errors import UserError
from posttrain.lora import LoraArgs, keep_trainable, quantization, save_model

DTYPES = ("float32", "bfloat16")


@dataclass
class ModelConfig:
    """Model: which one to start from"""

    model_name_or_path: str = arg(help="folder of an earlier stage, any Hugging Face checkpoint folder, or a Hub name")
    model_revision: str | None = arg(None, help="branch, tag or commit on the Hub")
    dtype: str = arg("float32", help="dtype of the weights: float32 or bfloat16")
    attn_implementation: str = arg("sdpa", help="attention of transformers: sdpa, eager, flash_attention_2, ...")

    def __post_init__(self):
        one_of(self, dtype=DTYPES)


def load_tokenizer(name: str, revision: str | None = None):
    """A fast tokenizer. UserError where there is none under that name."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, "tokenizer", revision=revision)


def load_config(name: str, revision: str | None = None):
    """The architecture of a checkpoint. UserError where there is none under that name."""
    from transformers import AutoConfig

    return _load(AutoConfig, name, "model", revision=revision)


def load_causal_lm(config: ModelConfig, **kwargs):
    """A causal LM with dropout left to train()/eval()."""
    from transformers import AutoModelForCausalLM

    model = _load_weights(AutoModelForCausalLM, config, **kwargs)
    if any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ()):
        raise UserError(f"model {config.model_name_or_path!r} is a reward model: name the model it was trained from")
    return model


def load_pair(config: ModelConfig, device="cpu", lora: LoraArgs | None = None):
    """(causal LM on `device`, its tokenizer); with QLoRA asked for, the frozen weights in 4 bits."""
    quantised = {} if lora is None else quantization(lora)
    model = load_causal_lm(config, **quantised).to(device)
    return model, load_tokenizer(config.model_name_or_path, config.model_revision)


def load_scalar_model(config: ModelConfig, **kwargs):
    """A backbone with a scalar head (`score`), as `AutoModelForSequenceClassification` with one label."""
    from transformers import AutoModelForSequenceClassification

    return _load_weights(AutoModelForSequenceClassification, config, num_labels=1, **kwargs)


def _load_weights(auto_class, config: ModelConfig, **kwargs):
    model = _load(
        auto_class,
        config.model_name_or_path,
        "model",
        revision=config.model_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
        **kwargs,
    )
    keep_trainable(model)
    return model


def _load(auto_class, name: str, what: str, revision: str | None, **kwargs):
    try:
        return auto_class.from_pretrained(name, revision=revision, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{what} {name!r} could not be loaded: {first} (expected the folder of a finished stage, "
            "a Hugging Face checkpoint folder with safetensors, or a name on the Hub that can be reached)"
        ) from error


def require_positions(model, key: str, length: int) -> None:
    """UserError where sequences of `length` tokens (config key `key`) have no room in the model's context."""
    room = model.config.max_position_embeddings
    if length > room:
        raise UserError(f"{key}: found {length}, but the model's context has {room} positions: lower {key}")


def save_pair(model, tokenizer, folder) -> None:
    """Model and tokenizer as a plain Hugging Face checkpoint, adapters merged (and apart in adapter/)."""
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
