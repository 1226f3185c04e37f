"""Best-of-n: what picking the reward model's favourite of n replies gives, and what it costs in KL.

In: a chat model, its reward model, prompts. Out: bestof.json, bestof.md and bestof.svg in a folder: for each n the
reward model's own score of its pick, any other judge's (in the tiny world the labeller's true utility) and
KL = ln n - (n - 1)/n, which is how far the picked replies are from the model that sampled them (exact for a score
without ties, a bound where replies repeat: Beirami et al. 2401.01879).

    posttrain bestof --model runs/tiny/sft --reward runs/tiny/reward --n 16 --data tiny --data_config prompts

A score that rises while the judge's falls is over-optimization (Gao et al. 2210.10760).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.best_of_n import curve, powers
from posttrain.errors import UserError

PROXY = "reward model"


@dataclass(frozen=True)
class Study:
    """What `make_engine` and `fit_prompts` ask of a stage: a seed, a folder and somebody to tell."""

    output_dir: Path
    config: dict
    name: str = "bestof"

    def note(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)


@dataclass(frozen=True)
class Samples:
    """N replies to each of P prompts, in the order of the rows."""

    rows: list[dict]
    prompt_ids: list[list[int]]
    completions: list[list]  # (P, N) of Completion
    engine: str


def sample(study: Study, path: str, rows: list[dict], n: int, max_tokens: int, use_vllm: str = "auto") -> Samples:
    """n replies at temperature 1 to each row's prompt; prompts too long for the model are left out and counted."""
    from posttrain.chat import encode_chat, stop_ids
    from posttrain.evals import EVAL_SEED, fit_prompts
    from posttrain.models import ModelConfig, load_pair
    from posttrain.rl.rollout import EngineConfig, Sampling, make_engine, sample_seed

    model, tokenizer = load_pair(ModelConfig(path))
    prompts = [encode_chat(tokenizer, row["prompt"], add_generation_prompt=True).input_ids for row in rows]
    together = [{"row": row, "ids": ids} for row, ids in zip(rows, prompts, strict=True)]
    together, longest = fit_prompts(study, model, together, list(map(len, prompts)), max_tokens + 1)
    engine = make_engine(EngineConfig(use_vllm=use_vllm), model.eval(), tokenizer, longest, study)
    sampling = Sampling(n, max_tokens, tuple(stop_ids(tokenizer, model)))
    ids = [each["ids"] for each in together]
    found = engine.generate(ids, sampling, sample_seed(EVAL_SEED, study.config["seed"]))
    groups = [found[start : start + n] for start in range(0, len(found), n)]
    return Samples([each["row"] for each in together], ids, groups, engine.name)


def score(path: str, samples: Samples) -> torch.Tensor:
    """(P, N) scores of a reward model less their mean over their std on its held-out rankings, where its manifest has
    them. A reply that was sampled twice is scored once."""
    from posttrain.layouts import find_layout
    from posttrain.models import ModelConfig, load_scalar_model
    from posttrain.ranking_forward import score_groups
    from posttrain.stage import read_manifest

    model = load_scalar_model(ModelConfig(path)).eval()
    metrics = (read_manifest(path) or {}).get("metrics", {})
    mean, std = (metrics.get(f"score {name}", {}).get("value", start) for name, start in (("mean", 0.0), ("std", 1.0)))
    unique = [list(dict.fromkeys(tuple(c.ids) for c in group)) for group in samples.completions]
    groups = [[p + list(ids) for ids in texts] for p, texts in zip(samples.prompt_ids, unique, strict=True)]
    layout, _ = find_layout(model, max(len(s) for group in groups for s in group))
    scores = score_groups(model, groups, layout)
    tables = [dict(zip(texts, values, strict=True)) for texts, values in zip(unique, scores, strict=True)]
    lines = [[table[tuple(c.ids)] for c in group] for table, group in zip(tables, samples.completions, strict=True)]
    return (torch.tensor(lines, dtype=torch.float64) - mean) / std


def judge(names: list[str], samples: Samples, tokenizer) -> dict[str, torch.Tensor]:
    """name -> (P, N) values of reward functions. UserError where one does not apply to a reply."""
    from posttrain.rewards import load_reward
    from posttrain.rl.scoring import call_rewards
    from posttrain.rl.types import Rollouts

    n = len(samples.completions[0])
    rollouts = Rollouts(
        [row for row in samples.rows for _ in range(n)],
        [ids for ids in samples.prompt_ids for _ in range(n)],
        [c for group in samples.completions for c in group],
        n,
    )
    found = call_rewards([(name, load_reward(name), 1.0) for name in names], rollouts, tokenizer)
    for name, values in found.items():
        if any(value is None for value in values):
            raise UserError(f"--judge: {name} does not apply to every prompt, and a mean of the others would mislead")
    return {name: torch.tensor(values, dtype=torch.float64).view(-1, n) for name, values in found.items()}


def run(
    model: str, reward: str, n: int, data, split: str, *, judges: list[str] | None, out: Path, max_tokens: int,
    seed: int, use_vllm: str = "auto",
) -> dict:  # fmt: skip
    """The whole study; prints the table and writes it to `out`. `data` is a DataConfig; judges None: tiny_utility for
    the embedded world, else none. UserError where model and reward model have different tokenizers."""
    from posttrain.data import load_rows
    from posttrain.models import load_tokenizer
    from posttrain.stage import describe_parents

    if n < 2:
        raise UserError(f"--n: found {n}, expected at least 2 replies to choose from")
    parents = describe_parents({"policy": model, "reward": reward})
    rows, description = load_rows(data, split, seed, ("prompt",))
    out.mkdir(parents=True, exist_ok=True)
    samples = sample(Study(out, {"seed": seed}), model, rows, n, max_tokens, use_vllm)
    scores = score(reward, samples)
    judges = (["tiny_utility"] if data.dataset_name == "tiny" else []) if judges is None else judges
    judged = {PROXY: scores, **judge(judges, samples, load_tokenizer(model))}
    points = curve(scores, judged, powers(n))
    settings = {"n": n, "max_tokens": max_tokens, "seed": seed, "prompts": len(samples.rows)}
    result = {"parents": parents, "data": description, **settings, "engine": samples.engine, "curve": points}
    write(out, result, list(judged))
    print(markdown(points, list(judged)) + f"\nwritten to {out}: bestof.json, bestof.md, bestof.svg")
    return result


def markdown(points: list[dict], names: list[str]) -> str:
    """The curve as a table."""
    lines = ["| n | KL, nats | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for point in points:
        cells = [f"{point[m]['value']:.3f} [{point[m]['low']:.3f}, {point[m]['high']:.3f}]" for m in names]
        lines.append(f"| {point['n']} | {point['kl']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(points: list[dict], names: list[str]) -> str:
    """The curve over sqrt(KL) as an SVG file's text."""
    from posttrain.plots import Line, plot, standalone

    lines = [
        Line(name, [(math.sqrt(p["kl"]), p[name]["value"], p[name]["low"], p[name]["high"]) for p in points], colour)
        for colour, name in enumerate(names)
    ]
    return standalone(plot("best of n", lines, x="sqrt(KL), KL = ln n - (n - 1)/n in nats", y="mean of the pick"))


def write(out: Path, result: dict, names: list[str]) -> None:
    """bestof.json, bestof.md and bestof.svg in `out`."""
    from posttrain.checkpoint import write_json

    write_json(out / "bestof.json", result)
    (out / "bestof.md").write_text(markdown(result["curve"], names), encoding="utf-8")
    (out / "bestof.svg").write_text(picture(result["curve"], names), encoding="utf-8")
