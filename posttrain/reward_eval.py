"""Evaluate a reward model on held-out rankings: the same figures in a stage's manifest, its report and by hand.

In: a scalar-head model, encoded rankings and their rows. Out: metrics with intervals, gains, samples, and two curves:
`reliability` (is a 70 % sure model right in 70 %?) and `by_length` (is it right where the better reply is shorter?).
By hand: `measure_folder("runs/tiny/reward", DataConfig("tiny", dataset_config="rankings"), "test")["metrics"]`.
"""

from posttrain import ranking_metrics
from posttrain.calibration import by_length, reliability
from posttrain.data import DataConfig, load_rows
from posttrain.models import ModelConfig, load_scalar_model, load_tokenizer
from posttrain.ranking_forward import find_layout, score_rankings
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
