"""Evaluate a reward model on held-out rankings: the same figures in a stage's manifest, its report and by hand.

In: a scalar-head model, encoded rankings and their rows. Out: metrics with intervals, gains, samples, and two curves:
`reliability` (is a 70 % sure model right in 70 %?) and `by_length` (is it right where the better reply is shorter?).
By hand: `posttrain eval runs/tiny/reward --data tiny --data_config rankings`.
"""

import json
from pathlib import Path

from posttrain import ranking_metrics
from posttrain.calibration import by_length, reliability
from posttrain.data import DataConfig, load_rows
from posttrain.errors import UserError
from posttrain.eval_report import metric_lines
from posttrain.layouts import find_layout
from posttrain.models import ModelConfig, load_config, load_scalar_model, load_tokenizer
from posttrain.ranking_forward import score_rankings
from posttrain.ranking_rows import Ranking, encode_rankings
from posttrain.reward_model import RewardConfig


def evaluate(model, rankings: list[Ranking], rows: list[dict], config: RewardConfig, *, goal: float = 0.0) -> dict:
    """metrics, gains, samples, reliability, by_length: what `Stage.finish` stores of a reward model.

    Lengths are of whole sequences: within a ranking they differ as the replies do. Where rows carry the labeller's
    true `utilities`, their own pair accuracy is the ceiling and `goal` how close to it is close enough.
    """
    longest = max(len(s) for ranking in rankings for s in ranking.sequences)
    scores = score_rankings(model, rankings, find_layout(model, longest, config.layouts())[0])
    ranks, mine = [r.ranks for r in rankings], [rows[r.row] for r in rankings]
    lengths = [[len(s) for s in ranking.sequences] for ranking in rankings]
    metrics = ranking_metrics.measure_rankings(scores, ranks, lengths, config.ties)
    gains, ceiling = ranking_metrics.reward_gains(metrics, ranks, [row.get("utilities") for row in mine], goal)
    return {
        "metrics": metrics | ceiling | ranking_metrics.labeller_agreement(scores, mine),
        "gains": gains,
        "samples": ranking_metrics.sample_rankings(scores, mine),
        "reliability": reliability(scores, ranks),
        "by_length": by_length(scores, ranks, lengths),
    }


def measure_folder(path: str, data: DataConfig, split: str, *, seed: int = 0, max_length: int = 1024) -> dict:
    """`evaluate` for a saved reward model on any rows; also what was read (`data`) and how many were `too_long`."""
    rows, description = load_rows(data, split, seed, ("prompt",))
    tokenizer, model = load_tokenizer(path), load_scalar_model(ModelConfig(path)).eval()
    config = RewardConfig(max_length=max_length)
    rankings, too_long = encode_rankings(tokenizer, rows, max_length, config.ties)
    return evaluate(model, rankings, rows, config) | {"data": description, "too_long": too_long}


def require_reward_model(path: str, flag: str = "") -> None:
    """UserError, with the flag that named it, where `path` holds no reward model."""
    architectures = load_config(path).architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"{flag}{path} is no reward model ({', '.join(architectures) or 'no architecture named'}), expected a "
            "...ForSequenceClassification, as recipes/reward.py makes them"
        )


def report_folder(path: str, data: DataConfig, split: str, *, seed: int, max_length: int, file: str | None) -> str:
    """`measure_folder` as lines of name, figure, interval and count; all of it as JSON in `file`, if one is named.

    UserError where `path` holds no reward model.
    """
    require_reward_model(path)
    found = measure_folder(path, data, split, seed=seed, max_length=max_length)
    if file is not None:
        Path(file).write_text(json.dumps(found, indent=1), encoding="utf-8")
    lines = metric_lines(found["metrics"])
    source = found["data"]
    lines.append(f"{source['rows']} rows of {source['name']}, {split}; {found['too_long']} left out as too long")
    return "\n".join(lines)
