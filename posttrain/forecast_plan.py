"""What a stage is going to do, from its YAML alone: its model, the work of a step, the memory of a process.

In: the YAML of any stage with its flags. Out: a `Plan`. Nothing is loaded but tokenizers and config.json files; of a
parent that an earlier stage of the same chain has yet to write, that stage's own YAML says what it will be.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from posttrain import args, chain, memory, shapes
from posttrain.errors import UserError
from posttrain.lookup import nearest
from posttrain.models import load_config, load_tokenizer
from posttrain.throughput import model_flops, non_embedding_parameters

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "grpo", "rejection")
PARENTS = ("tokenizer_path", "model_name_or_path", "reward_model_path")
DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Asked:
    """A stage's YAML and flags, parsed by its own recipe. configs: by class name; key: any key of any of them."""

    stage: str
    file: Path
    recipe: Path
    module: ModuleType
    argv: list[str]
    configs: dict[str, object]

    def key(self, name: str):
        """The value of a key, None where the stage has no such key."""
        return next((getattr(one, name) for one in self.configs.values() if hasattr(one, name)), None)


def read(file: str | Path, stage: str | None = None, overrides=()) -> Asked:
    """Parse a stage's YAML as its recipe does. UserError where there is no such file, stage or recipe."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a stage's YAML such as recipes/tiny/pretrain.yaml")
    stage = stage or file.stem.split("_")[0]
    if stage not in STAGES:
        near = nearest(stage, STAGES)
        raise UserError(f"{file}: {stage!r} is no stage{near}; say which it is: --stage {' | '.join(STAGES)}")
    beside = [chain.recipe_path(file.parent, stage), Path("recipes") / f"{stage}.py"]
    recipe = next((path for path in beside if path.is_file()), None)
    if recipe is None:
        raise UserError(f"{file}: no recipe for stage {stage}: looked for {' and '.join(map(str, beside))}")
    module, argv = chain.import_recipe(recipe), ["--config", str(file), *overrides]
    configs = args.parse(module.ARGS, argv, description=f"stage {stage}")
    by_name = {type(one).__name__: one for one in configs}
    if stage == "pretrain":
        optim = by_name["PretrainOptim"]
        dialled = shapes.dial(by_name["ShapeConfig"], by_name["PretrainConfig"], optim)
        by_name |= {type(one).__name__: one for one in dialled}
    return Asked(stage, file, recipe, module, argv, by_name)


def missing_parents(asked: Asked) -> dict[str, Asked]:
    """Key -> the stage of the same chain that writes what the key names and has not been run."""
    folder, found = asked.file.parent, {}
    if not (folder / "chain.yaml").is_file():
        return found
    out, names = chain.read_chain(folder)
    for key in PARENTS:
        path = asked.key(key)
        if path is None or Path(path).exists():
            continue
        name = next((name for name in names if os.path.normpath(path) == os.path.join(out, name)), None)
        if name is not None:
            found[key] = read(folder / f"{name}.yaml")
    return found


# ---- the model ------------------------------------------------------------------------------------------------------


class _Planned:
    """A tokenizer that is not there yet: as many tokens as its stage was asked for."""

    bos_token_id = eos_token_id = 0
    pad_token_id = 1

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def model_config(asked: Asked):
    """The transformers config of the model that the stage trains. UserError where it cannot be known."""
    missing, config = missing_parents(asked), asked.configs.get("PretrainConfig")
    if "model_name_or_path" in missing:
        return model_config(missing["model_name_or_path"])
    if config is None or config.model_name_or_path is not None:
        return load_config(asked.key("model_name_or_path"), asked.key("model_revision"))
    if "tokenizer_path" in missing:
        tokenizer = _Planned(missing["tokenizer_path"].key("vocab_size"))
    else:
        tokenizer = load_tokenizer(config.tokenizer_path)
    return shapes.model_config(asked.configs["ShapeConfig"], tokenizer)


@dataclass(frozen=True)
class Shape:
    """A model's size: parameters, those that multiply every token, layers and the width of its attention."""

    kind: str
    parameters: int
    multiplying: int
    layers: int
    hidden: int
    width: int

    def flops_a_token(self, length: float, kind: str = "training") -> float:
        """Arithmetic of a token in sequences of `length`; `kind` as in `throughput.model_flops`."""
        return model_flops(self.multiplying, self.layers, self.width, 1, length, kind)


def shape_of(config) -> Shape:
    """Counted on a model without data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    width = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ) * text.num_attention_heads
    return Shape(
        config.model_type, model.num_parameters(), non_embedding_parameters(model), text.num_hidden_layers,
        text.hidden_size, width,
    )  # fmt: skip


# ---- a step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """tokens: of the training forwards of a step, over all processes; None where only the data knows.
    length: of a sequence. micro: tokens of a process's micro-batch at most. words: the step in words."""

    steps: int | None
    tokens: int | None
    length: int
    micro: int
    words: str


def work_of(asked: Asked, processes: int, row_tokens: float | None) -> Work:
    """What a step does, in any stage but the tokenizer's. row_tokens: mean tokens of a row of the data (of a ranking,
    a prompt) where they are known."""
    kinds = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "rejection": _rejection}
    return kinds.get(asked.stage, _rl)(asked, processes, row_tokens)


def _pretrain(asked: Asked, processes: int, _) -> Work:
    config = asked.configs["PretrainConfig"]
    mine = config.batch_size // processes
    if config.batch_size % processes:
        raise UserError(f"batch_size: found {config.batch_size}, expected a multiple of the {processes} processes")
    micro = min(config.micro_batch_size, mine)
    words = f"{processes} x {math.ceil(mine / micro)} micro-steps of {micro} x {config.sequence_length:,}"
    tokens = config.batch_size * config.sequence_length
    return Work(config.max_steps, tokens, config.sequence_length, micro * config.sequence_length, words)


def _sft(asked: Asked, processes: int, _) -> Work:
    config = asked.configs["SFTConfig"]
    rows, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    words = f"{processes} x {times} micro-steps of {rows} x {config.max_length:,} at most"
    tokens = processes * times * rows * config.max_length
    return Work(config.max_steps, tokens, config.max_length, rows * config.max_length, words)


def _reward(asked: Asked, processes: int, row_tokens: float | None) -> Work:
    config = asked.configs["RewardConfig"]
    tokens = None if row_tokens is None else round(config.batch_size * row_tokens)
    most = config.max_tokens_per_microbatch
    micro = most if tokens is None else min(most, math.ceil(tokens / processes))
    words = f"{config.batch_size} rankings in micro-batches of up to {most:,} tokens"
    return Work(config.max_steps, tokens, config.max_length, micro, words)


def _rl(asked: Asked, processes: int, row_tokens: float | None) -> Work:
    config = asked.configs["RLConfig"]
    length = config.max_completion_length + round(row_tokens or 0)
    tokens = config.num_prompts * config.num_generations * length
    micro = min(config.max_tokens_per_microbatch, math.ceil(tokens / processes / config.num_minibatches))
    words = (
        f"{config.num_prompts} prompts x {config.num_generations} completions of up to "
        f"{config.max_completion_length} tokens; updates: {config.num_iterations * config.num_minibatches}"
    )
    return Work(config.max_steps, None, length, micro, words)


def _rejection(asked: Asked, processes: int, row_tokens: float | None) -> Work:
    config = asked.configs["RejectionConfig"]
    length = config.max_completion_length + round(row_tokens or 0)
    micro = min(config.max_tokens_per_microbatch, math.ceil(config.batch_size * length / processes))
    words = (
        f"a round: {config.num_prompts or 'all'} problems x {config.num_generations} solutions of up to "
        f"{config.max_completion_length} tokens, then updates of {config.batch_size}"
    )
    return Work(None, None, length, micro, words)


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_of(
    asked: Asked, config, work: Work, processes: int, *, fused: bool, spread: str, checkpointing: bool
) -> dict[str, int]:
    """Bytes of a process by part, which add up to its peak. fused: whether Liger's loss runs. checkpointing: whether
    activations are computed again."""
    rows = max(1, math.ceil(work.micro / work.length))
    stored = DTYPES[asked.key("dtype") or "float32"]
    positions = config.get_text_config().max_position_embeddings
    length = min(work.length, positions)
    fused = fused and asked.stage in ("pretrain", "sft")
    options = {"bf16": asked.key("bf16"), "world": processes, "spread": spread, "checkpointing": checkpointing}
    if asked.stage == "pretrain":
        need = memory.estimate(config, rows, length, optim=asked.key("optim"), fused_loss=fused, **options)
        return need.parts()
    need = memory.footprint(
        lambda: _build(asked, config), lambda model: _loss(asked, model, rows, length, work),
        config.get_text_config().vocab_size, stored=stored, **options,
    )  # fmt: skip
    if asked.key("use_peft"):
        need = _with_adapters(asked, config, need, stored)
    return {**need.parts(), **_others(asked, config, stored)}


def _build(asked: Asked, config):
    """The model that is trained, without data, as its stage loads it; adapters are counted apart."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = getattr(torch, asked.key("dtype") or "float32")
    if asked.stage == "reward":
        scalar = type(config).from_dict({**config.to_dict(), "id2label": {0: "score"}})
        return AutoModelForSequenceClassification.from_config(scalar, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _with_adapters(asked: Asked, config, need: memory.Memory, stored: int) -> memory.Memory:
    """Adapters alone have gradients and moments. What the forward keeps is about that of training all weights: the
    inputs of the layers, for the adapters' own gradients."""
    from posttrain.lora import add_adapter

    with torch.device("meta"):
        kind = "SEQ_CLS" if asked.stage == "reward" else "CAUSAL_LM"
        wrapped = add_adapter(_build(asked, config), asked.configs["LoraArgs"], task_type=kind)
    learned = stored * sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    exchange = learned if need.exchange else 0
    frozen = need.weights // 8 if asked.key("load_in_4bit") and stored == 4 else need.weights
    return replace(
        need, weights=frozen + learned, gradients=learned, optimizer=2 * learned, update=learned, exchange=exchange
    )


def _loss(asked: Asked, model, rows: int, length: int, work: Work) -> torch.Tensor:
    """The stage's forward on tokens of its micro-batch's shape: logits of all, of the completions alone, or none."""
    from posttrain.layouts import Batch
    from posttrain.rl.forward import CriticForward, PolicyForward

    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(ids, None, None, [], torch.zeros(rows, dtype=torch.long))
    if asked.stage == "sft":
        return memory.next_token_loss(model, ids)
    if asked.stage == "reward":
        return CriticForward(model)(batch, torch.arange(rows)).sum()
    completions = torch.arange(rows * min(length, asked.key("max_completion_length")))
    logps, *_ = PolicyForward(model)(batch, completions, torch.zeros_like(completions), 1.0)
    return logps.sum()


def _others(asked: Asked, config, stored: int) -> dict[str, int]:
    """Networks beside the one that is trained, and what samples."""
    if asked.stage not in ("ppo", "grpo", "rejection"):
        return {}
    weights, found = shape_of(config).parameters * stored, _engine(asked, config, stored)
    loss, ppo = asked.configs.get("LossConfig"), asked.configs.get("PPOConfig")
    if loss is not None and (loss.beta > 0 or ppo is not None) and not asked.key("use_peft"):
        found["reference"] = 0 if asked.key("offload") else weights
    if ppo is not None:
        found["reward model"] = weights
        if ppo.critic != "trunk":  # weights, gradients and two moments of its own
            found["critic"] = 4 * weights
    return found


def _engine(asked: Asked, config, stored: int) -> dict[str, int]:
    """vLLM's weights and cache, where it runs in this process and does not sleep while training."""
    from posttrain.rl.rollout import vllm_obstacle

    engines = asked.configs["EngineConfig"]
    sleeps = engines.vllm_enable_sleep_mode != "false" and torch.cuda.is_available()
    if engines.vllm_mode == "server" or engines.use_vllm == "false" or vllm_obstacle(config) or sleeps:
        return {}
    return {"vLLM": shape_of(config).parameters * stored + round(engines.vllm_kv_cache_gb * 2**30)}
