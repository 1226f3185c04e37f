"""A model card's `model-index`: the figures of a stage and of its evaluations, as the Hub lists them.

In: a model's folder with stage.json, evals/*.json, or both. Out: a list of `huggingface_hub.EvalResult`, which
`ModelCardData(eval_results=...)` writes. Launched by whoever writes the card:

    ModelCardData(model_name="grpo", eval_results=eval_results(Path("runs/tiny/grpo")))

Shares stand in percent; interval, count and settings stand in a metric's `args`. Figures of what was there before the
stage ("pass@1, before") are another model's and are left out.
"""

import json
import math
import re
from pathlib import Path

from posttrain.errors import UserError

EVALS = "evals"  # folder of a model's evaluations, a JSON file each
# Endings of the names of figures that are not this model's: its parent's, a byte trigram's, people's.
NOT_OURS = (
    ", before", ", base", "trigram", "guessed", "of the true utility", "with each other", "people's order and length",
)  # fmt: skip
TASKS = {"reward": ("text-classification", "Reward model"), None: ("text-generation", "Text generation")}
# What the Hub demands of a data set's type; another one makes it refuse the whole card.
TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
ARGS = ("low", "high", "n", "unit")
SETTINGS = ("seed", "engine", "num_generations", "temperature", "top_p", "max_tokens", "against")


def eval_results(folder: Path) -> list:
    """The figures of stage.json and of each evals/*.json of `folder`, those of the suites first; [] where there are
    none. The same figure of the same rows is listed once.

    Raises:
        UserError: a file that is no JSON object, or whose metrics are not figures; it is named.
    """
    stage = _read(folder / "stage.json")
    found = [_results(*told) for told in [*_suites(folder), *_stage(folder, stage)]]
    unique = {}
    for result in (result for results in found for result in results):
        key = (*result.unique_identifier, result.metric_type, result.metric_value)
        unique.setdefault(key, result)
    return list(unique.values())


def read_suites(folder: Path) -> dict[str, dict]:
    """suite or file's name -> what `posttrain eval` stored in evals/*.json of a model's folder, by name.

    Raises:
        UserError: a file that is no JSON object.
    """
    return {file.stem: _read(file) for file in sorted((folder / EVALS).glob("*.json"))}


def _suites(folder: Path):
    """(file, task, data set, metrics, args) of each evals/*.json."""
    for name, told in read_suites(folder).items():
        data = (told.get("data") or [{}])[0]
        settings = {key: told["settings"][key] for key in SETTINGS if key in (told.get("settings") or {})}
        task = TASKS["reward"] if told.get("suite") == "reward" else TASKS[None]
        args = {"suite": told.get("suite") or name, **settings}
        yield folder / EVALS / f"{name}.json", task, data, told.get("metrics"), args


def _stage(folder: Path, told: dict | None):
    """As `_suites`, of the stage's own evaluation; nothing where there is no stage.json."""
    if told is None:
        return
    data = (told.get("data") or [{}])[:2]  # training rows, held-out rows
    task = TASKS.get(told.get("stage"), TASKS[None])
    yield folder / "stage.json", task, data[-1], told.get("metrics"), {"evaluated_by": f"stage {told.get('stage')}"}


def _results(file: Path, task: tuple[str, str], data: dict, metrics, args: dict) -> list:
    from huggingface_hub import EvalResult

    if not isinstance(metrics, dict):
        raise UserError(f"{file}: metrics is {metrics!r:.80}, expected an object of figures; evaluate the model again")
    results = []
    for name, figure in metrics.items():
        if name.endswith(NOT_OURS):
            continue
        value = _value(file, name, figure)
        if value is None:
            continue
        same = figure.get("dataset") in (None, data.get("name"))
        source = data if same else {"name": figure["dataset"]}  # a figure of other rows names them
        dataset = source.get("name") or "held-out rows"
        unit = figure.get("unit") or ""
        results.append(
            EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type=_type(dataset),
                dataset_name=_pretty(dataset, source),
                dataset_config=source.get("config"),
                dataset_split=figure.get("split") or source.get("split"),
                dataset_revision=_commit(source.get("revision")),
                metric_type=re.sub(r"[^\w@.]+", "_", name).strip("_").lower(),
                metric_name=f"{name}, {unit}" if unit else name,
                metric_value=value,
                metric_args={**{key: _scaled(figure, key) for key in ARGS if figure.get(key) is not None}, **args},
            )
        )
    return results


def _value(file: Path, name: str, figure) -> float | None:
    """The figure as the card has it; None where it was not defined (a correlation without spread, say)."""
    value = figure.get("value", "missing") if isinstance(figure, dict) else "missing"
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{file}: metrics[{name!r}] is {figure!r:.80}, expected a number under value")
    return _scaled(figure, "value") if math.isfinite(value) else None


def _scaled(figure: dict, key: str):
    """A number of a figure, shares in percent, to six digits."""
    value = figure[key]
    if key in ("n", "unit") or not isinstance(value, int | float):
        return value
    return float(f"{value * (100 if figure.get('unit') == '%' else 1):.6g}")


def _type(dataset: str) -> str:
    """A data set's name as the Hub takes it; of a local file its own name alone: the folders are nobody's business."""
    if TYPE.fullmatch(dataset) and not Path(dataset).exists():
        return dataset
    return re.sub(r"[^\w.-]+", "-", Path(dataset).name).strip("-") or "held-out-rows"


def _pretty(dataset: str, data: dict) -> str:
    name = dataset if TYPE.fullmatch(dataset) and not Path(dataset).exists() else Path(dataset).name
    return f"{name} ({data['config']})" if data.get("config") else name


def _commit(revision) -> str | None:
    return revision if isinstance(revision, str) and COMMIT.fullmatch(revision) else None


def _read(file: Path) -> dict | None:
    """The JSON object of a file; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no valid JSON ({error}): evaluate the model again, or remove it") from error
    if not isinstance(told, dict):
        raise UserError(f"{file}: found {type(told).__name__}, expected an object: evaluate the model again")
    return told
