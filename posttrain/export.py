"""`posttrain export MODEL`: a GGUF with an Ollama Modelfile, or an adapter merged into its base model.

In:  a model's folder or Hub name; for --format merged the folder of a PEFT adapter. Out: a folder, default
     MODEL/export/DTYPE (or MODEL/export/merged), with model.gguf, Modelfile and check.json, or with a plain Hugging
     Face checkpoint. The result is named last, after it was compared with the model it came from.
Run: posttrain export runs/tiny/grpo --format gguf --dtype q8_0
     ollama create mine -f runs/tiny/grpo/export/q8_0/Modelfile
     posttrain export runs/mine/sft/adapter --format merged --out runs/mine/merged
"""

import json
from functools import partial
from pathlib import Path

from posttrain.errors import UserError
from posttrain.gguf_weights import DTYPES

UNCHECKED = "model.unchecked.gguf"
QUICK_TOKENS = 12
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def add_verb(verbs, debug) -> None:
    """The verb `export` and its flags."""
    verb = verbs.add_parser(
        "export", parents=[debug], help="GGUF with an Ollama Modelfile, or an adapter merged; checked before it counts"
    )
    verb.set_defaults(call=run)
    verb.add_argument("model", metavar="MODEL", help="folder of a model or of an adapter, or a name on the Hub")
    verb.add_argument("--format", required=True, choices=("gguf", "merged"))
    verb.add_argument(
        "--dtype", choices=(*DTYPES,), help="of matrices; default: f16 for gguf, the base model's for merged"
    )
    verb.add_argument("--out", metavar="DIR", help="default: MODEL/export/DTYPE, or MODEL/export/merged")


def run(options) -> int:
    """Export as the flags say; returns 0. UserError where the result would not be the model."""
    if options.format == "merged":
        from posttrain import export_merged

        return export_merged.run(options)
    dtype = options.dtype or "f16"
    folder = local_folder(options.model)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter; merge it first: posttrain export {folder} --format merged")
    name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
    out = Path(options.out) if options.out else default_out(options.model, dtype)
    print(gguf(folder, name, out, dtype))
    return 0


def local_folder(name: str) -> Path:
    """The folder of a checkpoint; of a name on the Hub its snapshot. UserError where there is none."""
    from posttrain.serve import check_folder

    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    check_folder(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{name}: neither a folder nor a model on the Hub that can be reached: {error}") from error


def default_out(model: str, last: str) -> Path:
    """MODEL/export/LAST beside a model that is a folder; export/NAME/LAST here for a name on the Hub."""
    folder = Path(model)
    return folder / "export" / last if folder.is_dir() else Path("export") / folder.name / last


def gguf(folder: Path, name: str, out: Path, dtype: str) -> str:
    """Write out/model.gguf, Modelfile and check.json; returns what there is to say. UserError, and no model.gguf,
    where llama.cpp does not agree with the model."""
    from posttrain import check_export, modelfile
    from posttrain.export_compare import table
    from posttrain.gguf_engine import LlamaCpp
    from posttrain.serve import load

    require()
    model, tokenizer = load(str(folder))
    out.mkdir(parents=True, exist_ok=True)
    for old in ("model.gguf", "Modelfile", "check.json"):
        (out / old).unlink(missing_ok=True)
    path = out / UNCHECKED
    remarks = write(folder, name, path, dtype, model, tokenizer)
    file, template, more = modelfile.make(model, tokenizer, folder)
    reference = check_export.Reference(model, tokenizer, None, QUICK_TOKENS)
    with LlamaCpp(path, reference.context) as engine:
        prove_tokens(engine, tokenizer)
        compared = check_export.check_gguf(reference, engine)
        if template is not None:
            through = partial(go_prompt, engine, template)
            said, _ = check_export.different_prompts(reference, through, engine)
            compared.faults += [f"Modelfile: {fault}" for fault in said]
    shown = table([compared], sum(map(len, reference.prompts)))
    if compared.faults:
        faults = "; ".join(compared.faults[:4])
        raise UserError(f"{path} is not the model, and keeps that name: {faults}\n{shown}")
    (out / "check.json").write_text(json.dumps(compared.as_dict(), indent=1) + "\n", encoding="utf-8")
    if file is not None:
        (out / "Modelfile").write_text(file, encoding="utf-8")
    path.rename(out / "model.gguf")
    return told(out, name, dtype, shown, remarks + more + compared.remarks)


def go_prompt(engine, template: str, messages: list[dict]) -> list[int]:
    """The tokens of a conversation as Ollama sends them: the Go template's text, then llama.cpp's tokenizer."""
    from posttrain.modelfile_render import render_go

    return engine.tokenize(render_go(template, messages), begin=True)


def told(out: Path, name: str, dtype: str, shown: str, remarks: list[str]) -> str:
    """What a user reads after an export."""
    size = (out / "model.gguf").stat().st_size / 2**20
    lines = [shown, "", f"model      {out / 'model.gguf'} ({size:.1f} MiB, {dtype})"]
    if (out / "Modelfile").exists():
        lines.append(f"ollama     ollama create {Path(name).name.lower()} -f {out / 'Modelfile'}")
    lines.append(f"lm studio  lms import {out / 'model.gguf'}")
    return "\n".join(lines + [f"note       {remark}" for remark in remarks])


def require() -> None:
    """UserError where the packages are missing, before anything is loaded."""
    from importlib.util import find_spec

    from posttrain.gguf_engine import MISSING

    for package in ("gguf", "xllamacpp"):
        if find_spec(package) is None:
            raise UserError(MISSING.format(name=package))


def write(folder: Path, name: str, path: Path, dtype: str, model, tokenizer) -> list[str]:
    """Write the GGUF; returns remarks. UserError for an architecture or a tokenizer that the format lacks."""
    import gguf

    from posttrain import gguf_tokenizer, gguf_weights
    from posttrain.chat import stop_ids

    checkpoint = gguf_weights.Checkpoint(folder)
    kind = gguf_weights.architecture(model.config)
    weights = gguf_weights.plan(checkpoint, model.config, dtype)
    words = gguf_tokenizer.vocabulary(tokenizer, model.config.vocab_size)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kind]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    about = facts(folder)
    if about.get("license"):
        writer.add_license(about["license"])
    if about.get("base_model"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about["base_model"])
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_weights.add_shape(writer, model.config)
    gguf_tokenizer.add_tokenizer(writer, tokenizer, words, stop_ids(tokenizer, model))
    gguf_weights.write_tensors(writer, checkpoint, model.config, weights)
    narrow = [weight.name for weight in weights if dtype == "q8_0" and weight.dtype == "F16"]
    remarks = list(words.remarks)
    if narrow:
        remarks.append(f"{len(narrow)} matrices have rows that are no multiple of 32 and stay f16: {narrow[0]}, ...")
    return remarks


def facts(folder: Path) -> dict[str, str]:
    """Licence and base model as the model card beside the checkpoint names them, where there is one."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return {}
    data = ModelCard.load(folder / "README.md").data.to_dict()
    base = data.get("base_model")
    return {"license": data.get("license"), "base_model": base[0] if isinstance(base, list) and base else base}


def prove_tokens(engine, tokenizer) -> None:
    """Encode gguf_tokenizer.texts with llama.cpp and with the tokenizer; UserError with the first that differs."""
    from posttrain.chat import common
    from posttrain.gguf_tokenizer import texts

    for text in texts(tokenizer):
        for control in (True, False):
            ours = tokenizer(text, add_special_tokens=False, split_special_tokens=not control).input_ids
            theirs = engine.tokenize(text, control=control)
            if ours != theirs:
                place = common(ours, theirs)
                near = text if len(text) < 60 else tokenizer.decode(ours[max(0, place - 4) : place + 4])
                raise UserError(
                    f"llama.cpp cuts texts otherwise than the tokenizer, at {near!r}: {theirs[place : place + 4]} in "
                    f"place of {ours[place : place + 4]}; the file keeps the name {engine.path}"
                )
