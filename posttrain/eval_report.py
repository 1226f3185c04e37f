"""What `posttrain eval` says: figures as lines of text, and as JSON with what gives the same figures again.

In: name -> {"value", "low", "high", "n", "unit"}. Out: lines; a file.
"""

from pathlib import Path

from posttrain import figures
from posttrain.checkpoint import write_json

HASHED = ("model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "stage.json")


def metric_lines(metrics: dict[str, dict]) -> list[str]:
    """A line a figure: name, value and unit, interval, observations."""
    lines = []
    for name, figure in metrics.items():
        value, interval = figures.measure(figure, figure.get("unit") or "")
        unit = "" if figure.get("unit") in ("", "%") else f" {figure['unit']}"
        lines.append(f"{name:40}  {value}{unit}  {interval or ''}  n {figure.get('n')}")
    return lines


def write_report(file: str, found: dict, model: str, settings: dict) -> None:
    """`found`, the model's path and hashes of its files, the settings, versions and commit, as JSON."""
    from posttrain.provenance import file_sha256s, git_commit, versions

    facts = {
        "model": {"path": model, "sha256": file_sha256s(Path(model), HASHED)},
        "settings": settings,
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(Path(file), found | facts)
