"""Rejection sampling against GRPO at an equal number of sampled completions, in the tiny world.

In: a chat model of the tiny world (`posttrain run recipes/tiny`, its sft stage). Out: rejection_vs_grpo.{json,md}: the
held-out reward by completions drawn, with 95 % intervals over problems, and wall time.

    python tests/benchmarks/rejection_vs_grpo.py --model runs/tiny/sft --work runs/rejection_vs_grpo

GRPO runs as recipes/tiny/grpo.yaml says and is measured at its checkpoints; rejection sampling as
recipes/tiny/rejection.yaml says but for the number of problems, which makes its rounds as large as GRPO's share of the
steps; once for every way of choosing among right answers. Runs that are finished already are taken as they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from posttrain.bestof import Study
from posttrain.chat import stop_ids
from posttrain.checkpoint import write_json
from posttrain.data import DataConfig
from posttrain.evals import EvalConfig, ReplyConfig, load_both, measure_replies, metric_of, prompt_size
from posttrain.models import ModelConfig, load_pair
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.rl.state import WEIGHTS
from posttrain.stage import read_manifest

ROOT = Path(__file__).parents[2]


def main() -> None:
    options = parser().parse_args()
    curves = [curve(options, name, seed) for name in ("grpo", *options.choices) for seed in options.seeds]
    result = {"command": command(options), "metric": metric_of(options.reward), "curves": curves}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "rejection_vs_grpo.json", result)
    (out / "rejection_vs_grpo.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--model", required=True, help="chat model of the tiny world")
    each.add_argument("--work", default="runs/rejection_vs_grpo", help="where the runs go")
    each.add_argument("--out", default="tests/benchmarks/results")
    each.add_argument("--seeds", type=int, nargs="+", default=[0])
    each.add_argument("--choices", nargs="+", default=["shortest", "common", "random"])
    each.add_argument("--rounds", type=int, default=3, help="of rejection sampling, and checkpoints of GRPO")
    each.add_argument("--steps", type=int, default=36, help="of GRPO, a multiple of the rounds")
    each.add_argument("--num_prompts", type=int, default=48, help="of a step of GRPO")
    each.add_argument("--max_tokens", type=int, default=80)
    each.add_argument("--eval_rows", type=int, default=200)
    each.add_argument("--reward", default="correct")
    each.add_argument("--threshold", type=float, default=1.0)
    each.add_argument("--use_vllm", default="auto")
    return each


def command(options: argparse.Namespace) -> str:
    words = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in vars(options).items()}
    return "python tests/benchmarks/rejection_vs_grpo.py " + " ".join(
        f"--{key} {value}" for key, value in words.items()
    )


def curve(options: argparse.Namespace, name: str, seed: int) -> dict:
    """One run: {"name", "seed", "seconds", "points": [{"sampled", and the metric's value, low, high}]}."""
    folder = Path(options.work) / f"{name}-{seed}"
    common = {
        "model_name_or_path": options.model, "output_dir": folder, "seed": seed, "reward_funcs": options.reward,
        "max_completion_length": options.max_tokens, "eval_max_rows": options.eval_rows, "use_vllm": options.use_vllm,
        "eval_reward_funcs": options.reward, "eval_prefixes": "{}",
    }  # fmt: skip
    every = options.steps // options.rounds
    if name == "grpo":
        own = {"num_prompts": options.num_prompts, "max_steps": options.steps, "save_steps": every}
        run("grpo", {**common, **own, "keep_checkpoints": "true", "save_total_limit": options.rounds})
        points = grpo_points(options, folder, seed)
    else:
        group = json_config("grpo", "num_generations")
        problems = round(options.num_prompts * group * every / json_config("rejection", "num_generations"))
        own = {"num_rounds": options.rounds, "num_prompts": problems, "choice": name, "threshold": options.threshold}
        run("rejection", {**common, **own})
        rounds = read_manifest(folder)["rounds"]
        points = [{"sampled": line["sampled"], **line["metrics"][metric_of(options.reward)]} for line in rounds]
    manifest = read_manifest(folder)
    return {
        "name": name,
        "seed": seed,
        "seconds": manifest["wall_time_s"],
        "engine": manifest["engine"],
        "points": points,
    }


def json_config(recipe: str, key: str):
    from posttrain import yaml_file

    return yaml_file.read(ROOT / f"recipes/tiny/{recipe}.yaml")[key].value


def run(recipe: str, flags: dict) -> None:
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    config = ["--config", str(ROOT / f"recipes/tiny/{recipe}.yaml")]
    subprocess.run([sys.executable, str(ROOT / f"recipes/{recipe}.py"), *config, *words], check=True, cwd=ROOT)


def grpo_points(options: argparse.Namespace, folder: Path, seed: int) -> list[dict]:
    """The starting model and GRPO's checkpoints, measured as the recipe measures: same problems, same seeds."""
    from safetensors.torch import load_file

    metric, group = metric_of(options.reward), json_config("grpo", "num_generations")
    data, held_out = DataConfig("tiny", dataset_config="problems"), EvalConfig(eval_max_rows=options.eval_rows)
    _, rows, _ = load_both(data, held_out, seed, ("prompt",))
    model, tokenizer = load_pair(ModelConfig(options.model))
    config = ReplyConfig(eval_reward_funcs=[options.reward], eval_max_tokens=json_config("grpo", "eval_max_tokens"))
    longest = max(prompt_size(tokenizer, row) for row in rows) + config.eval_max_tokens + 1
    engine = make_engine(EngineConfig(options.use_vllm), model.eval(), tokenizer, longest, Study(folder, {"seed": 0}))
    points = []
    for checkpoint in [None, *sorted((folder / "checkpoints").glob("step-*"))]:
        step = 0
        if checkpoint is not None:
            missing, strange = model.load_state_dict(
                load_file(checkpoint / WEIGHTS), strict=False
            )  # a tied head is once
            if strange or set(missing) - {"lm_head.weight"}:
                raise ValueError(f"{checkpoint / WEIGHTS}: {strange or missing}")
            step = json.loads((checkpoint / "checkpoint.json").read_text())["step"]
        engine.sync_weights(model)
        metrics, _ = measure_replies(engine, tokenizer, rows, config, stop_ids(tokenizer, model))
        points.append({"sampled": step * options.num_prompts * group, **metrics[metric]})
    return points


def cell(points: list[dict]) -> str:
    """One seed's value and interval over problems; of several seeds the mean and the range of their values."""
    values = [point["value"] for point in points]
    unit, scale = (" %", 100) if points[0]["unit"] == "%" else ("", 1)
    low, high = (points[0]["low"], points[0]["high"]) if len(points) == 1 else (min(values), max(values))
    return f"{scale * statistics.fmean(values):.1f}{unit} [{scale * low:.1f}, {scale * high:.1f}]"


def table(result: dict) -> str:
    """Held-out metric by completions drawn, as markdown."""
    by_name: dict[str, list[dict]] = {}
    for each in result["curves"]:
        by_name.setdefault(each["name"], []).append(each)
    seeds = len(next(iter(by_name.values())))
    brackets = "95 % intervals over problems" if seeds == 1 else f"the lowest and highest of {seeds} seeds"
    lines = [
        "# Rejection sampling and GRPO at equal samples, tiny world", "", f"`{result['command']}`", "",
        f"Held-out {result['metric']}; brackets: {brackets}. Samples by {result['curves'][0]['engine']}. Wall time is "
        "the whole stage's, with loading and measuring.", "",
    ]  # fmt: skip
    counts = [[point["sampled"] for point in each[0]["points"]] for each in by_name.values()]
    heads = [" / ".join(f"{count:,}" for count in dict.fromkeys(column)) for column in zip(*counts, strict=True)]
    lines += ["| completions drawn | " + " | ".join(heads) + " | wall time |", "|---" * (2 + len(heads)) + "|"]
    for name, runs in by_name.items():
        label = "GRPO" if name == "grpo" else f"rejection, {name}"
        cells = [cell([each["points"][i] for each in runs]) for i in range(len(heads))]
        seconds = statistics.median(each["seconds"] for each in runs)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {seconds:.0f} s |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
