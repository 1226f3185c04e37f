"""`posttrain eval RUN|MODEL --suite NAME`: one model or all of a run's, on the same rows, stored so that it repeats.

In: the verb's options. Out: a table as text; MODEL/evals/NAME.json and NAME.md of each local model, and --json FILE.

    posttrain eval runs/tiny --suite math --data tiny
    posttrain eval MODEL --suite math --data gsm8k --num_generations 8
    posttrain eval runs/tiny/ppo --against runs/tiny/sft --suite chat --reward runs/tiny/reward
    posttrain eval --again runs/tiny/grpo/evals/math.json

In a run each stage is held against its parent on the same prompts: the mean of the paired differences and 1.96 of its
standard errors. What a stage's own evaluation measured on the same rows with the same settings is compared, too.
"""

import math
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from posttrain import card, plots, suite_table
from posttrain.checkpoint import write_json
from posttrain.errors import UserError
from posttrain.eval_report import HASHED
from posttrain.manifests import STAGE
from posttrain.model_index import EVALS
from posttrain.suite_settings import (
    COMMON_FLAGS,
    REPLY_FLAGS,
    REPLY_SUITES,
    THINK_FLAGS,
    TOOL_SUITES,
    Target,
    data_config,
    load_suite,
    require_suite,
    resolved,
    same_model,
    targets,
)

# Flags that decide no figure: where it goes, and what the others already say.
NOT_SETTINGS = ("model", "json", "again", "debug", "call", "rest")
SAMPLED_BY = ("engine", "dtype", "chat_template_sha256", "stop_ids")  # settings that no flag has
FORMAT = 1


@dataclass
class Result:
    """One model's figures; `changes` are those against `target.parent`."""

    target: Target
    found: object
    data: list[dict]
    changes: dict[str, dict] = field(default_factory=dict)
    conclusions: list[str] = field(default_factory=list)


def run(options: Namespace) -> str:
    """Measure, store, and say it. Each model's figures are stored as soon as they are there. UserError for what cannot
    be asked, before any model is loaded."""
    told, notes = [], []

    def done(given: Namespace, result: Result) -> None:
        if given.against and same_model(
            given.against, result.target.path
        ):  # a run's stage that others are held against
            given = Namespace(**{**vars(given), "against": None, "judge": None})
        told.append(stored(result, given))
        notes.extend(keep(result.target.path, given, told[-1]))

    given, results, left_out = measure(options, done)
    if options.json is not None:
        write_json(Path(options.json), told[0] if len(told) == 1 else {"format": FORMAT, "models": told})
    return "\n".join([suite_table.text(given, results), *left_out, *notes])


def measure(options: Namespace, done: Callable = lambda given, result: None) -> tuple[Namespace, list, list[str]]:
    """(resolved options, a result a model, a line for each stage that is left out); `done` gets each result."""
    require_suite(options.suite)
    found, left_out = targets(options.model, options.suite)
    given = resolved(options, found)
    check_flags(given)
    if given.suite in REPLY_SUITES:
        rows, description = load_suite(given)
        if len(found) > 1 and not all("few_shot" in row for row in rows):
            bases = [target.name for target in found if not target.chats]
            left_out += [f"{name}: left out, it has no chat template and the rows no few_shot" for name in bases]
            found = [target for target in found if target.chats] or found
        if len(found) > 1 and given.tools:
            found, unable = _that_call(found, given)
            left_out += unable
        one = _with_judge(partial(_measure_replies, given=given, rows=rows, description=description), given)
    else:
        one = partial(_measure_base, given=given)
    results: dict[str, Result] = {}
    for target in found:
        result = results[target.name] = one(target)
        result.conclusions += own_figures(result, given) + seen_in_training(result)
        if parent := results.get(target.parent):
            result.changes = paired(parent.found, result.found, target.parent)
        done(given, result)
    return given, list(results.values()), left_out


def _that_call(found: list[Target], given: Namespace) -> tuple[list[Target], list[str]]:
    """(the stages whose template can write calls of the tools, a line for each other one); all where none can: the
    first that is asked says why."""
    from posttrain.models import load_tokenizer
    from posttrain.tool_calls import ToolTemplate
    from posttrain.tools import load_tools
    from posttrain.tools.flags import options_of

    tools, able, left_out = load_tools(given.tools, options_of(given)), [], []
    for target in found:
        try:
            ToolTemplate(load_tokenizer(target.path), tools)
            able.append(target)
        except UserError:
            left_out.append(f"{target.name}: left out, its chat template cannot write calls of the tools")
    return (able, left_out) if able else (found, [])


def _with_judge(one: Callable, given: Namespace) -> Callable:
    """`one`, with a reward model's scores and win rates added where they are asked for."""
    if not (given.against or given.reward):
        return one
    from posttrain.suite_against import Comparison

    return Comparison(given, one)


def check_flags(given: Namespace) -> None:
    """UserError for flags that the suite does not have or that need another one."""
    _only_with("chat", ("against", "reward", "judge"), given)
    _only_with("think", THINK_FLAGS, given)
    if given.suite == "think" and given.reward_funcs:
        raise UserError("--reward_funcs: --suite think judges by the verifier alone; leave it out")
    if given.tools and given.suite not in TOOL_SUITES:
        raise UserError(f"--tools: works with --suite {', '.join(TOOL_SUITES)}, found --suite {given.suite}; take "
                        "one of these or leave --tools out")  # fmt: skip
    if given.judge and not given.judge_model:
        raise UserError("--judge: needs --judge_model, the name under which that server has the judge")
    if given.judge and given.reward:
        raise UserError("--judge and --reward: both given; one of them decides who wins, so leave one out")
    if given.against and not (given.judge or given.reward):
        raise UserError(f"--against {given.against}: needs one who decides: --reward FOLDER or --judge URL")
    if given.judge and not given.against:
        raise UserError("--judge: it compares two models: add --against MODEL")


def _only_with(suite: str, flags: tuple[str, ...], given: Namespace) -> None:
    for flag in flags:
        if given.suite != suite and getattr(given, flag) is not None:
            raise UserError(f"--{flag}: works with --suite {suite}, found --suite {given.suite}; take the other or "
                            f"leave --{flag} out")  # fmt: skip


def _measure_replies(target: Target, given: Namespace, rows: list[dict], description: dict) -> Result:
    from posttrain import suite_replies
    from posttrain.eval_base import Subject

    subject = Subject(Namespace(**{**vars(given), "model": target.path}))
    suite = suite_table.module_of(given.suite) or suite_replies
    found = suite.measure(subject, rows, suite.Settings.of(given))
    found.more |= {"dtype": str(subject.model.dtype).removeprefix("torch."), **_template(subject.tokenizer)}
    if len(found.rows) < len(rows):
        found.conclusions.append(f"{len(rows) - len(found.rows)} of {len(rows)} prompts are too long and left out")
    return Result(target, found, [description], conclusions=[*found.conclusions])


def _template(tokenizer) -> dict:
    from hashlib import sha256

    text = tokenizer.chat_template
    return {"chat_template_sha256": sha256(text.encode()).hexdigest()} if isinstance(text, str) else {}


def _measure_base(target: Target, given: Namespace) -> Result:
    from posttrain import eval_base

    found = eval_base.measure(Namespace(**{**vars(given), "model": target.path}))
    data = [found.more.pop(key) for key in ("data", "train_data") if key in found.more]
    if given.suite == "tiny":
        data.append({"name": "tiny", "config": "documents, problems", "split": "test"})
    return Result(target, found, data, conclusions=[*found.conclusions])


# --- held against others


def paired(before, after, against: str) -> dict[str, dict]:
    """name -> change of a figure over the prompts that both models were asked, with its 95 % interval; shares in
    points."""
    changes = {}
    for name in after.by_row:
        old = dict(zip(before.rows, before.by_row.get(name, ()), strict=False))
        new = dict(zip(after.rows, after.by_row[name], strict=False))  # texts and questions differ in number
        pairs = [(old[i], new[i]) for i in new if old.get(i) is not None and new[i] is not None]
        if pairs:
            unit = after.metrics[name]["unit"]
            scale = 100 if unit == "%" else 1
            changes[name] = difference([scale * (b - a) for a, b in pairs], "points" if unit == "%" else unit)
            changes[name]["against"] = against
    return changes


def difference(values: list[float], unit: str) -> dict:
    """Mean of paired differences +- 1.96 standard errors."""
    n, mean = len(values), math.fsum(values) / len(values)
    half = 1.96 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n, "unit": unit}


def own_figures(result: Result, given: Namespace) -> list[str]:
    """Whether the stage's own evaluation of the same rows with the same settings says the same; nothing where it
    measured something else. It may have stopped at fewer rows: then so many of the first are compared."""
    from posttrain.data import load_rows
    from posttrain.intervals import measured

    manifest, found = result.target.manifest, result.found
    sources = (manifest.get("data") or [])[1:]
    config = manifest.get("config") or {}
    if given.suite not in REPLY_SUITES or given.suite == "identity" or not sources or not result.target.chats:
        return []
    same = {"num_generations": config.get("eval_num_generations"), "max_tokens": config.get("eval_max_tokens")}
    plain = (given.temperature, given.top_p, given.top_k, given.system) == (1.0, 1.0, 0, None)
    count = sources[0].get("rows")
    asked = max(found.rows, default=-1) + 1
    if not plain or any(getattr(given, key) != value for key, value in same.items()) or not 0 < (count or 0) <= asked:
        return []
    cut = Namespace(**{**vars(given), "rows": count})
    if load_rows(data_config(cut), given.split, given.seed, ("prompt",))[1].get("sha256") != sources[0].get("sha256"):
        return []
    lines = []
    for name, old in manifest.get("metrics", {}).items():
        values = [v for row, v in zip(found.rows, found.by_row.get(name, ()), strict=False) if row < count]
        # A stage's reward model reads the tokens as sampled, here the texts: those may be tokenized otherwise.
        if not values or None in values or name == "reward model":
            continue
        new = measured(values, old["unit"])["value"]
        if math.isclose(new, old["value"], rel_tol=1e-6, abs_tol=1e-9):
            lines.append(f"{name}: as in stage.json")
        else:
            lines.append(f"{name}: {new:.6g}, in stage.json {old['value']:.6g}")
    if not lines:
        return []
    first = f"{result.target.name}: its own evaluation had the first {count} of these rows and the same settings"
    agree = [line for line in lines if line.endswith("as in stage.json")]
    if len(agree) == len(lines):
        return [f"{first}; all {len(lines)} figures are equal"]
    engines = manifest.get("engine"), found.more.get("engine")
    why = f" (sampled by {engines[0]} there, {engines[1]} here)" if engines[0] != engines[1] else ""
    return [f"{first}, and {len(agree)} of {len(lines)} figures are equal{why}: {'; '.join(lines)}"]


def seen_in_training(result: Result) -> list[str]:
    """A line where the stage learned from the split that it is asked about."""
    trained = (result.target.manifest.get("data") or [{}])[0]
    for source in result.data:
        splits = [str(one.get("split")).partition("[")[0] for one in (trained, source)]
        if splits[0] == splits[1] and all(trained.get(key) == source.get(key) for key in ("name", "config")):
            return [f"{result.target.name} learned from the split {splits[0]} of {source['name']}: these figures may "
                    "be what it remembers"]  # fmt: skip
    return []


# --- stored


def stored(result: Result, given: Namespace) -> dict:
    """What MODEL/evals/NAME.json holds."""
    from posttrain.provenance import file_sha256s, git_commit, versions

    settings = {key: value for key, value in asked(given).items() if value is not None}
    more = {key: value for key, value in result.found.more.items() if key not in settings}
    first = result.data[0] if result.data else {}
    where = {"dataset": first.get("name"), "split": first.get("split")}
    return {
        "format": FORMAT,
        "suite": given.suite,
        "model": result.target.path,
        "model_sha256": file_sha256s(Path(result.target.path), HASHED),
        **({"others": others} if (others := _others(given)) else {}),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command(result.target.path, given),
        "settings": {**settings, **{key: more.pop(key) for key in SAMPLED_BY if key in more}},
        "versions": versions(),
        "commit": git_commit(),
        "data": result.data,
        "metrics": {name: {**figure, **where} for name, figure in result.found.metrics.items()},
        "changes": result.changes,
        "conclusions": result.conclusions,
        "samples": result.found.samples,
        **({"details": more} if more else {}),
    }


def asked(given: Namespace) -> dict:
    """The flags that decide a figure of the suite."""
    foreign = () if given.suite in REPLY_SUITES else REPLY_FLAGS
    kept = (*COMMON_FLAGS, *REPLY_FLAGS) if given.suite in REPLY_SUITES else vars(given)
    return {key: getattr(given, key) for key in kept if key not in (*NOT_SETTINGS, *foreign)}


def _others(given: Namespace) -> dict:
    """The models that decided with this one: role -> path and hashes."""
    from posttrain.provenance import file_sha256s

    paths = {role: getattr(given, role) for role in ("against", "reward") if getattr(given, role)}
    return {role: {"path": path, "sha256": file_sha256s(Path(path), HASHED)} for role, path in paths.items()}


def command(model: str, given: Namespace) -> str:
    """The call that measures this again, every setting spelled out that is not the verb's own default."""
    from posttrain.eval_verb import defaults

    words, usual = ["posttrain", "eval", model], vars(defaults())
    for key, value in asked(given).items():
        if value is None or value == usual.get(key) or value == []:
            continue
        words.append(f"--{key}")
        words += [] if value is True else [str(each) for each in (value if isinstance(value, list) else [value])]
    return shlex.join(words)


def file_name(given: Namespace) -> str:
    """math; of other data than tiny's math-gsm8k, of a file math-gsm8k-train; with --against chat-against-sft."""
    parts = [given.suite]
    if given.data not in (None, "tiny", given.suite):
        path = Path(given.data)
        parts += [path.resolve().parent.name, path.name.partition(".")[0]] if path.is_file() else [path.name]
    if given.against:
        parts += ["against", Path(given.against).name]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-")


def keep(model: str, given: Namespace, told: dict) -> list[str]:
    """Write MODEL/evals/NAME.json and NAME.md; a line that says so. Nothing for a name on the Hub."""
    folder, name = Path(model), file_name(given)
    if not folder.is_dir():
        return []
    if not os.access(folder, os.W_OK):
        return [f"{folder} cannot be written: nothing is stored there; --json FILE stores it elsewhere"]
    (folder / EVALS).mkdir(exist_ok=True)
    write_json(folder / EVALS / f"{name}.json", told)
    picture = None
    for _, svg in plots.evaluation_pictures(told.get("details")):  # a suite has one at most
        picture = f"{name}.svg"
        (folder / EVALS / picture).write_text(plots.standalone(svg), encoding="utf-8")
    (folder / EVALS / f"{name}.md").write_text(suite_table.markdown(told, picture), encoding="utf-8")
    if (folder / STAGE).is_file():  # its model card shows them, too
        card.write(folder)
    return [f"stored in {folder / EVALS / name}.json and .md"]
