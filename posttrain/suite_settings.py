"""What `posttrain eval --suite` measures and on what: models of a run, data, and every setting with its default.

In: the verb's options. Out: `targets`, the models to ask; `resolved`, the options with nothing left open, which are
stored and give the same figure again; the rows. Launched by posttrain/suites.py.

Defaults come from the stage where it has some: a chain that learned from `tiny` is asked about its own world (its
seed, its reply length); every other model needs --data.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.data import DataConfig, load_rows
from posttrain.data.files import is_local
from posttrain.errors import UserError
from posttrain.lookup import nearest
from posttrain.models import load_config, load_tokenizer
from posttrain.stage import read_manifest

# In these the model answers; the others read it as a base model.
REPLY_SUITES = ("math", "code", "identity", "chat", "think", "tools", "spelling")
SUITES = (*REPLY_SUITES, "base", "tiny")
# What decides a figure of the suites of replies: these flags and no others.
COMMON_FLAGS = ("suite", "data", "data_config", "data_adapter", "split", "rows", "seed", "use_vllm", "max_tokens")
THINK_FLAGS = ("budgets", "at_least", "at_once", "in_steps", "steps_system", "answer", "answer_tokens", "go_on")
TOOL_SUITES = ("tools", "spelling", "math", "code", "identity", "chat")
TOOL_FLAGS = ("tools", "tool_options", "max_tool_calls", "max_tool_tokens", "tool_timeout")
REPLY_FLAGS = (
    "num_generations", "temperature", "top_p", "top_k", "sample_seed", "system", "reward_funcs", "identity", "against",
    "reward", "judge", "judge_model", "judge_api_key_env", "judge_cache", *TOOL_FLAGS,
    *THINK_FLAGS,
)  # fmt: skip
TINY_KINDS = {
    "math": "problems", "think": "problems", "tools": "tool_problems", "chat": "prompts", "base": "documents"
}  # fmt: skip
# Data sets of the Hub under a short name: what --data, --data_config, --split and --data_adapter would say.
PRESETS = {
    "gsm8k": ("openai/gsm8k", "main", "test", "gsm8k"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "math_problems"),
    "humaneval": ("openai/openai_humaneval", None, "test", "humaneval"),
    "mbpp": ("google-research-datasets/mbpp", "full", "test", "mbpp"),
}
GENERATIONS = {"math": 8, "code": 8, "identity": 4, "chat": 1, "think": 8, "tools": 8, "spelling": 1}
TOKENS = {"math": 512, "code": 768, "identity": 64, "chat": 512, "think": 512, "tools": 512, "spelling": 128}
HINTS = {
    "math": "--data gsm8k, or a file with --data_adapter gsm8k or math_problems",
    "think": "--data gsm8k, or a file with --data_adapter gsm8k or math_problems",
    "tools": "a file or Hub name with columns prompt and answer",
    "code": "--data humaneval, or a file with --data_adapter humaneval or mbpp",
    "chat": "a file or Hub name with a column prompt, or --data_adapter oasst_rankings",
    "base": "texts, or --few_shot FILE, or --tasks A,B",
}
JUDGED_KINDS = ("problems", "prompts")  # rows of tiny that tell the simulated labeller's utility
TINY_REWARDS = ("tiny_utility",)
PIP = {"expected": [["Pip"]], "own": ["Pip"], "fact": "name"}


@dataclass(frozen=True)
class Target:
    """A model to measure; `name` in tables, `parent` the target it is held against in a run."""

    name: str
    path: str
    manifest: dict = field(default_factory=dict)
    parent: str | None = None
    chats: bool = True


def require_suite(name: str) -> None:
    if name not in SUITES:
        raise UserError(f"--suite: found {name!r}, expected one of {', '.join(SUITES)}{nearest(name, SUITES)}")


def is_run(name: str) -> bool:
    """Whether `name` is a folder of stages and no stage itself."""
    folder = Path(name)
    own = (folder / "config.json").is_file() or (folder / "stage.json").is_file()
    return folder.is_dir() and not own and any(folder.glob("*/stage.json"))


def same_model(first: str, second: str) -> bool:
    """Whether two names lead to one folder, or are one name on the Hub."""
    return Path(first).resolve() == Path(second).resolve()


def targets(name: str, suite: str) -> tuple[list[Target], list[str]]:
    """(the models to ask, a line for each stage of a run that is left out).

    UserError for a model that cannot be asked: a reward model, a base model in a suite of replies.
    """
    if not is_run(name):
        return [_single(name, suite)], []
    from posttrain.report import read_run

    found, left_out = [], []
    for stage in read_run(Path(name))[1]:
        path = Path(name) / stage.name
        why = f"it is {stage.state}" if stage.state != "finished" else _obstacle(str(path), suite)
        if why is None:
            parents = [parent for _, parent, _ in stage.parents]
            known = [target.name for target in found]
            parent = next((p for p in parents if p in known), known[-1] if known else None)
            chats = bool(load_tokenizer(str(path)).chat_template)
            found.append(Target(stage.name, str(path), stage.manifest, parent, chats))
        else:
            left_out.append(f"{stage.name}: left out, {why}")
    if not found:
        raise UserError(f"{name}: no stage that --suite {suite} can ask; {'; '.join(left_out)}")
    return found, left_out


def _single(name: str, suite: str) -> Target:
    from posttrain.serve import check_folder

    check_folder(name)
    if why := _obstacle(name, suite):
        manifest = read_manifest(name) or {}
        parent = next(iter(manifest.get("parents", {}).values()), {}).get("path")
        if "reward model" in why and parent:
            mend = f"measure it with --data tiny --data_config rankings, or the model it was trained from: {parent}"
        elif "reward model" in why:
            mend = "name a causal language model, or measure this one with --data and rankings"
        else:
            mend = f"--suite base measures it as it is; recipes/sft.py --model_name_or_path {name} makes a chat model"
        raise UserError(f"--suite {suite}: {name} cannot be asked: {why}; {mend}")
    chats = bool(load_tokenizer(name).chat_template)
    return Target(Path(name).name, name, read_manifest(name) or {}, None, chats)


def _obstacle(path: str, suite: str) -> str | None:
    """Why a suite cannot ask the model at `path`; None where it can."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return "it has no model"
    architectures = load_config(path).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "it is a reward model, which writes no replies"
    if suite in ("code", "identity", "chat", "think", "tools") and not load_tokenizer(path).chat_template:
        return "it has no chat template: a base model completes texts and answers nobody"
    return None


def resolved(options: Namespace, found: list[Target]) -> Namespace:
    """The options with every setting given: by the user, else by the last stage's own evaluation where it learned
    from tiny, else by the suite. UserError where there is nothing to measure on."""
    suite, manifest = options.suite, found[-1].manifest
    config = manifest.get("config") or {}
    trained_on_tiny = any(_learned_from_tiny(target) for target in found)
    given = Namespace(**vars(options))
    if given.data in PRESETS and not is_local(given.data):
        given.data, kind, split, adapter = PRESETS[given.data]
        given.data_config, given.split = given.data_config or kind, given.split or split
        given.data_adapter = given.data_adapter or adapter
    if given.seed is None:
        given.seed = config.get("dataset_seed") or config.get("seed") or 0
    wants_data = suite in HINTS and not (suite == "base" and (given.few_shot or given.tasks))
    if wants_data and given.data is None:
        if not trained_on_tiny or suite not in TINY_KINDS:
            raise UserError(f"--data: not given, and --suite {suite} needs it: {HINTS[suite]}")
        given.data = "tiny"
    if suite == "spelling" and given.data is None:
        given.data = "spelling"
    if given.data == "tiny" and given.data_config is None:
        given.data_config = TINY_KINDS.get(suite)
    given.split = given.split or "test"
    if suite in REPLY_SUITES:
        _resolve_replies(given, found, config)
    return given


def _learned_from_tiny(target: Target) -> bool:
    return any(source.get("name") == "tiny" for source in target.manifest.get("data") or [])


def _resolve_replies(given: Namespace, found: list[Target], config: dict) -> None:
    from posttrain.evals import EVAL_SEED
    from posttrain.identity_eval import IDENTITY_SEED

    suite = given.suite
    if suite == "identity" and given.identity is None:
        given.identity = config.get("identity")
        if given.identity is None and not any(_learned_from_tiny(target) for target in found):
            raise UserError("--identity: not given; --suite identity needs an identity.yaml, such as "
                            "recipes/identity/identity.yaml")  # fmt: skip
    room = min(_context(target.path) for target in found) // 2
    tokens = (given.data == "tiny" and config.get("eval_max_tokens")) or min(TOKENS[suite], room)
    judged = given.data == "tiny" and given.data_config in JUDGED_KINDS and suite != "think"
    defaults = {
        "num_generations": GENERATIONS[suite], "max_tokens": tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "sample_seed": IDENTITY_SEED if suite == "identity" else EVAL_SEED,
        "reward_funcs": list(TINY_REWARDS) if judged else [],
    }  # fmt: skip
    for key, value in defaults.items():
        if getattr(given, key) is None:
            setattr(given, key, value)
    _check_ranges(given)
    if suite == "tools":
        _resolve_tools(given, found)
    if suite == "think":
        from posttrain import suite_think

        suite_think.resolve(given, load_tokenizer(found[-1].path), config.get("eval_prefixes") or {})


def _resolve_tools(given: Namespace, found: list[Target]) -> None:
    """--suite tools: those of the last stage's own evaluation or training, where none are given."""
    import json

    config = found[-1].manifest.get("config") or {}
    for tools, options in (("eval_tools", "eval_tool_options"), ("tools", "tool_options")):
        if given.tools is None and config.get(tools):
            given.tools, given.tool_options = config[tools], json.dumps(config[options])
    if not given.tools:
        raise UserError("--tools: not given, and --suite tools needs some, such as --tools calculator")


def _check_ranges(given: Namespace) -> None:
    from posttrain.decoding import check_settings

    check_settings(given.temperature, given.top_p, given.max_tokens, given.top_k)
    if given.num_generations < 1:
        raise UserError(f"--num_generations: found {given.num_generations}, expected at least 1")
    if given.temperature == 0 and given.num_generations > 1:
        raise UserError(
            f"--temperature: found 0, greedy, with --num_generations {given.num_generations}: all replies to a prompt "
            "would be the same; add --num_generations 1"
        )


def _context(path: str) -> int:
    """Tokens of a model's context; models without position limit have no such key."""
    return getattr(load_config(path).get_text_config(), "max_position_embeddings", None) or 2**20


def data_config(given: Namespace) -> DataConfig:
    return DataConfig(given.data, given.data_config, dataset_adapter=given.data_adapter, max_rows=given.rows)


def load_suite(given: Namespace) -> tuple[list[dict], dict]:
    """(rows with `prompt`, their description) of a suite of replies."""
    if given.suite != "identity":
        return load_rows(data_config(given), given.split, given.seed, ("prompt",))
    from posttrain.checkpoint import sha256_file
    from posttrain.data.identity import ASSISTANTS, contrary_questions, identity_questions, read_identity
    from posttrain.data.tiny import IDENTITY_QUESTIONS

    if given.identity is None:
        asked = [{"role": "user", "content": question} for question in IDENTITY_QUESTIONS["test"]]
        rows = [{"prompt": [message], "refused": list(ASSISTANTS), **PIP} for message in asked]
        return rows, {"name": "tiny", "config": "identity", "split": "test", "rows": len(rows)}
    who = read_identity(given.identity)
    rows = [*identity_questions(who), *contrary_questions(who)]
    return rows, {"name": given.identity, "rows": len(rows), "sha256": sha256_file(Path(given.identity))}
