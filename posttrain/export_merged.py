"""`posttrain export ADAPTER --format merged`: a LoRA adapter added to its base model, as a plain checkpoint.

In:  the folder of a PEFT adapter, or of a stage that has one (adapter/); its base model, as the adapter names it. Out:
     a Hugging Face checkpoint whose logits were compared with base plus adapter on real tokens, read again from disk.
Run: posttrain export runs/mine/sft/adapter --format merged --out runs/mine/merged
     posttrain export my-adapter --format merged --dtype bf16

A stage with LoRA has merged its weights itself: for its folder this only compares them.
W' = W + (alpha / r) B A, added in fp32 and rounded once (Hu et al. 2021, arXiv 2106.09685).
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import UserError
from posttrain.lora import ADAPTER_DIR

TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# Nats that the log p of a likely token may move by, per dtype that the merged weights are stored in: mean, largest.
TOLERANCES = {"float32": (1e-4, 1e-3), "float16": (0.01, 0.1), "bfloat16": (0.05, 0.5)}


def run(options) -> int:
    """Merge as the flags say and print what was compared; returns 0. UserError where the logits are not equal."""
    if options.dtype == "q8_0":
        raise UserError("--dtype: found q8_0, which only a GGUF has; expected f32, f16 or bf16")
    folder = Path(options.model)
    adapter = next((f for f in (folder, folder / ADAPTER_DIR) if (f / "adapter_config.json").is_file()), None)
    if adapter is None:
        raise UserError(f"{folder}: no adapter_config.json in it or in {ADAPTER_DIR}/; there is nothing to merge")
    if (folder / "config.json").is_file():
        print(f"{folder} is merged already; {compared(folder, adapter)}")
        return 0
    out = Path(options.out) if options.out else folder / "export" / "merged"
    print(f"{merge(adapter, out, TORCH_DTYPES.get(options.dtype))}\nmodel  {out}")
    return 0


def merge(adapter: Path, out: Path, dtype: str | None) -> str:
    """Write `out`; returns the sentence with the figures. UserError, and no `out`, where the logits are not equal."""
    if out.exists():
        raise UserError(f"{out} exists; expected a new folder: remove it or give another --out")
    model, tokenizer, stored = load_adapted(adapter)
    ids = real_tokens(tokenizer, model.config.max_position_embeddings)
    before = log_probabilities(model, ids)
    plain = model.merge_and_unload(safe_merge=True)
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        plain.to(dtype=_torch_dtype(dtype or stored)).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        said = difference(before, log_probabilities(_load(str(beside)), ids), dtype or stored, adapter)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return said


def compared(folder: Path, adapter: Path) -> str:
    """The sentence with the figures for a stage's folder, whose weights are merged. UserError where they differ."""
    model, tokenizer, _ = load_adapted(adapter)
    ids = real_tokens(tokenizer, model.config.max_position_embeddings)
    merged = _load(str(folder))
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32"
    return difference(log_probabilities(model, ids), log_probabilities(merged, ids), dtype, adapter)


def load_adapted(adapter: Path):
    """(base model with the adapter inside in fp32, tokenizer, the base's own dtype). UserError without the base."""
    import peft

    given = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name = given.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter / 'adapter_config.json'}: no base_model_name_or_path; write the base model's there")
    base = _load(name, **_four_bits(adapter))
    stored = str(base.dtype).removeprefix("torch.")
    if getattr(base, "is_quantized", False):
        base, stored = base.dequantize(), "float32"
    base = base.float()
    tokenizer = tokenizer_of(adapter, name)
    grow(base, len(tokenizer))
    try:
        model = peft.PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{adapter} does not fit its base model {name}: {str(error).splitlines()[0][:200]}") from error
    return model.eval(), tokenizer, stored


def _load(name: str, **options):
    """A causal LM in its own dtype. UserError where there is none."""
    from transformers import AutoModelForCausalLM

    from posttrain.serve import check_folder

    check_folder(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no causal language model could be loaded: {str(error).splitlines()[0]}") from error
    return model.eval()


def _torch_dtype(name: str):
    import torch

    return getattr(torch, name)


def stage_config(adapter: Path) -> dict:
    """The resolved config of the stage that an adapter/ belongs to, where it does."""
    from posttrain import yaml_file

    file = adapter.parent / "config.yaml"
    if adapter.name != ADAPTER_DIR or not file.is_file():
        return {}
    return {key: entry.value for key, entry in yaml_file.read(file).items()}


def _four_bits(adapter: Path) -> dict:
    """QLoRA learned beside weights of 4 bits: they, and not the base's own, are what its adapter is added to."""
    from posttrain.lora import LoraArgs, quantization

    if not stage_config(adapter).get("load_in_4bit"):
        return {}
    return quantization(LoraArgs(use_peft=True, load_in_4bit=True))


def tokenizer_of(adapter: Path, base: str):
    """The tokenizer beside the adapter, of its stage, or of the base model, in this order."""
    from posttrain.models import load_tokenizer

    folders = (adapter, adapter.parent) if adapter.name == ADAPTER_DIR else (adapter,)
    found = next((f for f in folders if (f / "tokenizer_config.json").is_file()), base)
    return load_tokenizer(str(found))


def grow(model, rows: int) -> None:
    """Rows for tokens that a template added: the mean of the others, as chat.set_template makes them before training;
    those that were trained come with the adapter."""
    import torch

    old = model.get_input_embeddings().num_embeddings
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)


def real_tokens(tokenizer, positions: int) -> list[list[int]]:
    """The built-in conversations or texts of check_export as token ids, replies included, cut to the context."""
    from posttrain.chat import encode_chat
    from posttrain.check_export import built_in

    prompts = built_in(tokenizer)
    if tokenizer.chat_template:
        ids = [encode_chat(tokenizer, prompt, add_generation_prompt=True).input_ids for prompt in prompts]
    else:
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
    return [one[:positions] for one in ids if one]


def log_probabilities(model, texts: list[list[int]]):
    """log p of every next token, (tokens of all texts, V) fp32, computed in fp32."""
    import torch

    with torch.inference_mode(), _in_fp32(model):
        rows = [model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in texts]
    return torch.cat(rows)


@contextmanager
def _in_fp32(model):
    """Stored weights as they are, arithmetic in fp32."""
    own = model.dtype
    model.float()
    try:
        yield
    finally:
        model.to(own)


def difference(before, after, dtype: str, adapter: Path) -> str:
    """The sentence of how far log p of tokens of 1 % and more moved. UserError beyond the dtype's tolerance."""
    likely = before >= -4.6052
    likely[range(len(before)), before.argmax(-1)] = True
    moved = (before - after).abs()[likely]
    mean, largest = moved.mean().item(), moved.max().item()
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    said = (
        f"log p moves by {mean:.2g} nats in the mean and {largest:.2g} at most over {len(before)} tokens, the "
        f"likeliest next one stays at {100 * same:.1f} % of them ({dtype})"
    )
    most = TOLERANCES.get(dtype, TOLERANCES["float32"])
    if not (mean <= most[0] and largest <= most[1]):
        raise UserError(
            f"{adapter}: merged weights are another model: {said}; expected {most[0]} and {most[1]} at most"
        )
    return said
