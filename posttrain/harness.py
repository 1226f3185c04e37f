"""Tasks of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) on a loaded model.

In: a causal LM, its tokenizer and names of tasks: the harness's own, or those of YAML files in a folder, whose data
may be local files. Out: each task's figures, the harness's own standard errors as 95 % intervals, and its settings.
Run: posttrain eval MODEL --tasks hellaswag,arc_easy [--num_fewshot 5] [--limit 100]
     posttrain eval runs/tiny/pretrain --tasks tiny_facts --include_path examples/lm_eval_tasks

Contexts begin as the harness begins them: a tokenizer that adds no begin token by itself gets none, as for GPT-2.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import UserError

METADATA = ("alias", "name", "sample_len", "samples", "sample_count")


@dataclass(frozen=True)
class Settings:
    """What the harness is asked: `include_path` a folder of task files, `limit` rows of each task at most."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0


def check(settings: Settings) -> None:
    """What can be known before the model is loaded. UserError where the harness or a folder is missing."""
    if find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed: pip install 'posttrain[harness]'")
    if not settings.tasks:
        raise UserError("--tasks: no name given; expected names separated by commas, such as hellaswag,arc_easy")
    folder = settings.include_path
    if folder is not None and not any(Path(folder).rglob("*.yaml")):
        raise UserError(f"--include_path: {folder} holds no task file (*.yaml); expected a folder of them")
    for name in ("num_fewshot", "limit", "batch_size"):
        value, least = getattr(settings, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise UserError(f"--{name}: found {value}, expected {least} or more")


def measure(model, tokenizer, settings: Settings) -> dict:
    """{"metrics": "task, metric" -> figure, "harness": its version, tasks' settings and hashes, seeds}.

    Raises UserError for a task that is not known, or whose data cannot be had.
    """
    check(settings)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = find_tasks(settings)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    seeds = {f"{kind}_seed": settings.seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    try:
        found = evaluator.simple_evaluate(
            model=lm, tasks=list(settings.tasks), num_fewshot=settings.num_fewshot, limit=settings.limit,
            task_manager=manager, log_samples=False, bootstrap_iters=1000, **seeds,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--tasks: data of {', '.join(settings.tasks)} could not be had: {reason}") from error
    return {"metrics": figures(found), "harness": facts(found, settings)}


def find_tasks(settings: Settings):
    """The harness's index of tasks; UserError for names that are not in it.

    Where the folder has all the tasks, the harness's own are left out: reading their 14,000 names takes seconds.
    """
    from lm_eval.tasks import TaskManager

    from posttrain.lookup import nearest

    if settings.include_path is not None:
        own = TaskManager(include_path=settings.include_path, include_defaults=False)
        if set(settings.tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=settings.include_path)
    names = set(manager.all_tasks)
    for name in settings.tasks:
        if not manager.match_tasks([name]):
            near = nearest(name, names) or "; own ones stand in YAML files under --include_path"
            raise UserError(f"--tasks: the harness knows no task {name!r}{near}")
    return manager


def figures(found: dict) -> dict[str, dict]:
    """ "task, metric" -> value, interval (1.96 standard errors, as the harness gives them), rows."""
    metrics = {}
    for task, results in found["results"].items():
        for key, value in results.items():
            name, _, _filter = key.partition(",")
            if name in METADATA or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{name}_stderr,{_filter}")
            half = 1.96 * error if isinstance(error, int | float) else None
            share = name in ("acc", "acc_norm", "exact_match") or name.startswith("pass@")
            rows = found["n-samples"].get(task, {}).get("effective")
            label = f"{task}, {name}" + (f", {_filter}" if _filter not in ("", "none") else "")
            metrics[label] = {
                "value": value, "low": None if half is None else value - half,
                "high": None if half is None else value + half, "n": rows, "unit": "%" if share else "",
            }  # fmt: skip
    return metrics


def facts(found: dict, settings: Settings) -> dict:
    """What is needed to get the figures again."""
    from importlib import metadata

    return {
        "lm_eval": metadata.version("lm_eval"),
        "seed": settings.seed,
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "task_versions": found["versions"],
        "num_fewshot": found["n-shot"],
        "task_settings": plain(found["configs"]),
    }


def plain(value):
    """A value of JSON; functions and the like as text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)
