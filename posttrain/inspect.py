"""`posttrain inspect`: a stage's rows as it would train on them, token by token, and the gate's verdict on them.

    posttrain inspect --config recipes/tiny/sft.yaml [--KEY VALUE ...] [--rows N] [--html FILE] [--against TOKENIZER]
    posttrain inspect --data FILE --model FOLDER [--template FILE]

In: a stage's YAML with its flags, or data and a model. Out: text, a page where asked for; exit code 0, or 2 where the
gate refuses. Nothing is trained or written but the page.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from posttrain import args, chain, evals, gate, stage, xray, xray_text
from posttrain.chat import set_template
from posttrain.conditions import known
from posttrain.conversations import Conversation
from posttrain.data import DataConfig, load_rows, stream_rows
from posttrain.errors import UserError
from posttrain.models import ModelConfig, load_pair, load_tokenizer
from posttrain.shapes import ShapeConfig, make_model
from posttrain.stage import StageConfig
from posttrain.xray import Subject

STAGES = ("sft", "reward", "ppo", "grpo")


def run(
    config: str | None,
    overrides: Sequence[str] = (),
    *,
    stage_name: str | None = None,
    data: str | None = None,
    model: str | None = None,
    template: str | None = None,
    rows: int = 2,
    html: str | None = None,
    against: str | None = None,
) -> int:
    """Print what a stage would train on; returns 0, or 2 where the gate refuses it.

    Raises UserError for a config, data or model that cannot be read, and where a parent is not there yet.
    """
    import transformers

    if (config is None) == (data is None) or (data is None) != (model is None):
        raise UserError("inspect: expected --config FILE, or --data PATH with --model PATH")
    if template is not None and data is None:
        raise UserError("--template: goes with --data; with --config it is --chat_template_path")
    if config is not None:
        configs = from_file(config, stage_name, overrides)
    else:
        configs = from_paths(data, model, template, stage_name, overrides)
    transformers.utils.logging.disable_progress_bar()
    subject = LOOK[configs["stage"]](configs)
    other = load_tokenizer(against) if against else None
    found = xray.look(subject, rows, other, against)
    width = min(160, shutil.get_terminal_size((100, 24)).columns)
    print(xray_text.report(found, width, xray_text.wants_colour()))
    if html is not None:
        from posttrain import xray_page

        print(f"\npage  {xray_page.write(found, Path(html))}")
    return 2 if found.refused else 0


# ---- the config -----------------------------------------------------------------------------------------------------


def from_file(config: str, name: str | None, overrides: Sequence[str]) -> dict:
    """{"stage": name, and the recipe's configs by class name}. The recipe stands beside the config's folder, as in a
    chain, or in recipes/."""
    file = Path(config)
    if not file.is_file():
        raise UserError(f"--config: no file {config}; for example recipes/tiny/sft.yaml")
    name = name or file.stem
    if name not in STAGES:
        raise UserError(f"{config}: {name!r} is no stage with a gate; expected --stage {', '.join(STAGES)}")
    beside = [chain.recipe_path(file.parent, name), Path("recipes") / f"{name}.py"]
    recipe = next((path for path in beside if path.is_file()), None)
    if recipe is None:
        raise UserError(f"{config}: no recipe for stage {name}: looked for {' and '.join(map(str, beside))}")
    module = chain.import_recipe(recipe)
    configs = args.parse(module.ARGS, ["--config", config, *overrides], description=f"stage {name}")
    by_name = {type(one).__name__: one for one in configs}
    parents = {"policy": by_name["ModelConfig"].model_name_or_path}
    if "PPOConfig" in by_name:
        parents["reward"] = by_name["PPOConfig"].reward_model_path
    return {"stage": name, "parents": find_parents(parents, file.parent), **by_name}


def find_parents(parents: dict[str, str], folder: Path) -> dict:
    """`stage.describe_parents`; where a stage of this chain has not been run yet, the error says which and how."""
    for role, path in parents.items():
        if Path(path).exists() or not (folder / "chain.yaml").is_file():
            continue
        out, names = chain.read_chain(folder)
        written = {os.path.join(out, name): name for name in names}
        if os.path.normpath(path) in written:
            name = written[os.path.normpath(path)]
            before = [n for n in names[: names.index(name) + 1] if not (Path(out) / n / stage.STAGE).is_file()]
            commands = " && ".join(f"posttrain run {folder} --only {n}" for n in before)
            raise UserError(f"{role}: {path} is not there yet: stage {name} of {folder} writes it; run it: {commands}")
    return stage.describe_parents(parents)


def from_paths(data: str, model: str, template: str | None, name: str | None, overrides: Sequence[str]) -> dict:
    """As `from_file`, of a data set and a model; without a stage's name the rows' columns say which it is for."""
    from posttrain.evals import ReplyConfig
    from posttrain.reward_model import RewardConfig
    from posttrain.rl.config import RLConfig
    from posttrain.sft import SFTConfig

    kinds = {"sft": (SFTConfig,), "reward": (RewardConfig,), "ppo": (RLConfig, ReplyConfig)}
    kinds["grpo"] = kinds["ppo"]
    if name is None:
        name = guess_stage(["--dataset_name", data, *data_flags(overrides)])
    elif name not in kinds:
        raise UserError(f"--stage: found {name!r}, expected one of {', '.join(STAGES)}")
    argv = ["--output_dir", "-", "--model_name_or_path", model, "--dataset_name", data, *overrides]
    if template is not None:
        if name != "sft":
            raise UserError(f"--template: stage {name} keeps the template of its model")
        argv += ["--chat_template_path", template]
    configs = args.parse((StageConfig, ModelConfig, DataConfig, *kinds[name]), argv)
    return {"stage": name, "parents": {}, **{type(one).__name__: one for one in configs}}


def data_flags(overrides: Sequence[str]) -> list[str]:
    """The flags among them that are keys of DataConfig, with their values."""
    keys, kept, taking = {field.name for field in dataclasses.fields(DataConfig)}, [], False
    for word in overrides:
        if word.startswith("--"):
            taking = word[2:].partition("=")[0].replace("-", "_") in keys
        if taking:
            kept.append(word)
    return kept


def guess_stage(argv: list[str]) -> str:
    (source,) = args.parse((DataConfig,), argv)
    split = source.dataset_train_split
    rows = stream_rows(source, split, 0, ()) if source.streaming else load_rows(source, split, 0, ())[0]
    first = next(iter(rows))
    for column, name in (("messages", "sft"), ("completions", "reward"), ("chosen", "reward"), ("prompt", "grpo")):
        if column in first:
            return name
    raise UserError(
        f"--data: rows have the columns {', '.join(map(str, first))}; expected messages, or prompt, perhaps with "
        "chosen and rejected or completions: name an adapter with --dataset_adapter"
    )


# ---- what each stage would train on ---------------------------------------------------------------------------------


def look_sft(configs: dict) -> Subject:
    from posttrain import sft_rows

    config, rows = configs["SFTConfig"], load(configs, ("messages",))
    model, tokenizer = load_model(configs["ModelConfig"])
    set_template(tokenizer, model, config.chat_template_path)
    chats = sft_rows.encode_chats(tokenizer, rows)
    judged = model if has_weights(configs["ModelConfig"]) else None
    checks = gate.sft_checks(tokenizer, judged, rows, chats, config, configs["parents"])
    kept = [1 in chat.assistant_mask[1 : config.max_length] for chat in chats]
    packed = []
    if config.packing and any(kept):
        encoded = sft_rows.cut_rows(chats, config.max_length, config.too_long)
        packed = sft_rows.pack_rows(encoded, config.max_length, tokenizer.pad_token_id or 0)
    talks, masks = gate.sft_talks(rows, chats), [chat.assistant_mask for chat in chats]
    return subject(configs, tokenizer, talks, masks, "supervised", checks, max_length=config.max_length, packed=packed)


def look_reward(configs: dict) -> Subject:
    from posttrain.ranking_rows import encode_rankings

    base, config, rows = configs["ModelConfig"], configs["RewardConfig"], load(configs, ("prompt",))
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision)
    rankings, _ = encode_rankings(tokenizer, rows, config.max_length, config.ties)
    talks, checks = (
        gate.reward_talks(rows, rankings),
        gate.reward_checks(tokenizer, rows, rankings, configs["parents"]),
    )
    masks = [[0] * (len(talk.ids) - 1) + [1] for talk in talks]
    names = [f"row {each.row}, reply {place}" for each in rankings for place, _ in enumerate(each.sequences, 1)]
    return subject(configs, tokenizer, talks, masks, "scored", checks, names=names)


def look_rl(configs: dict) -> Subject:
    from posttrain.rl.batches import encode_prompts

    rows, (model, tokenizer) = load(configs, ("prompt",)), load_model(configs["ModelConfig"])
    notes = SimpleNamespace(note=print)
    prompts, _, _ = encode_prompts(notes, model, tokenizer, rows, rows, configs["RLConfig"], configs["ReplyConfig"])
    judged = model if has_weights(configs["ModelConfig"]) else None
    checks = gate.rl_checks(tokenizer, judged, rows, prompts, configs["parents"])
    talks = gate.rl_talks(prompts)
    return subject(configs, tokenizer, talks, [[0] * len(talk.ids) for talk in talks], "", checks)


LOOK = {"sft": look_sft, "reward": look_reward, "ppo": look_rl, "grpo": look_rl}


def load(configs: dict, columns: tuple[str, ...]) -> list[dict]:
    """The training rows, without what the stage leaves out for its held-out rows; of a stream its first buffer."""
    source, seed = configs["DataConfig"], configs["StageConfig"].seed
    if source.streaming:
        stream = stream_rows(source, source.dataset_train_split, seed, columns)
        return list(islice(stream, configs["SFTConfig"].stream_buffer))
    if "EvalConfig" in configs:
        return evals.load_both(source, configs["EvalConfig"], seed, columns, ("prompt",))[0]
    return load_rows(source, source.dataset_train_split, seed, columns)[0]


def has_weights(base: ModelConfig) -> bool:
    folder = Path(base.model_name_or_path)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def load_model(base: ModelConfig):
    """(model, tokenizer); for a folder with a tokenizer alone, a small model that only gives its shape."""
    if has_weights(base):
        return load_pair(base)
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision)
    return make_model(ShapeConfig(32, 64, 1, 2, 1 << 20), tokenizer), tokenizer


def subject(configs: dict, tokenizer, talks: list[Conversation], masks, marked: str, checks, names=None, **more):
    base, source = configs["ModelConfig"], configs["DataConfig"]
    label = f"{source.dataset_name}{f' ({source.dataset_config})' if source.dataset_config else ''}"
    weightless = configs["stage"] != "reward" and not has_weights(base)
    return Subject(
        stage=configs["stage"],
        model=base.model_name_or_path,
        data=f"{label}, split {source.dataset_train_split}",
        tokenizer=tokenizer,
        talks=talks,
        names=names or [talk.name for talk in talks],
        masks=masks,
        marked=marked,
        checks=checks,
        allow=known(configs["StageConfig"].allow),
        unchecked="packing and the generation config, since the folder has no weights" if weightless else "",
        **more,
    )
