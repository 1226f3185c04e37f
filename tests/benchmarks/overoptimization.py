"""Over-optimization by best-of-n in the tiny world, the shape of Gao et al. (2210.10760): R = d (alpha - beta d),
d = sqrt(KL), for reward models from several numbers of rankings.

In: a chat model of the tiny world (`posttrain run recipes/tiny`, its sft stage). Out: overoptimization.{json,md,svg}.
The judge ("gold") is the labeller's true utility, which rankings were drawn from with noise and no reward model sees.

    python tests/benchmarks/overoptimization.py --model runs/tiny/sft --work runs/overoptimization

Every reward model starts from the chat model, trains with recipes/tiny/reward.yaml on the first rows of the same
rankings and stops by itself on a validation part of them. All pick among the same samples of the chat model.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

from posttrain import bestof
from posttrain.best_of_n import curve, expected_best, fit_best_of_n, powers
from posttrain.checkpoint import write_json
from posttrain.data import DataConfig, load_rows
from posttrain.models import load_tokenizer
from posttrain.plots import Line, plot, standalone
from posttrain.stage import read_manifest

ROOT = Path(__file__).parents[2]
GOLD = "tiny_utility"


def main() -> None:
    options = parser().parse_args()
    rows, _ = load_rows(DataConfig("tiny", dataset_config="prompts", max_rows=options.prompts), "test", 0, ("prompt",))
    folders = {size: train(options, size) for size in options.sizes}
    study = bestof.Study(Path(options.work), {"seed": 0})
    samples = bestof.sample(study, options.model, rows, options.n, options.max_tokens)
    [gold] = bestof.judge([GOLD], samples, load_tokenizer(options.model)).values()
    ns = powers(options.n)
    models = [measure(size, folder, samples, gold, ns) for size, folder in folders.items()]
    ideal = curve(gold, {GOLD: gold}, ns)
    result = {
        "command": "python tests/benchmarks/overoptimization.py "
        + " ".join(
            f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in vars(options).items()
        ),
        "prompts": len(samples.rows),
        "engine": samples.engine,
        "models": models,
        "picked by the judge itself": ideal,
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "overoptimization.json", result)
    (out / "overoptimization.md").write_text(table(result), encoding="utf-8")
    (out / "overoptimization.svg").write_text(picture(models), encoding="utf-8")
    print(table(result))


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--model", required=True, help="chat model of the tiny world")
    each.add_argument("--work", default="runs/overoptimization", help="where the reward models go")
    each.add_argument("--out", default="tests/benchmarks/results")
    each.add_argument("--sizes", type=int, nargs="+", default=[60, 600, 6000], help="rankings to learn from")
    each.add_argument("--n", type=int, default=512, help="replies to each prompt")
    each.add_argument("--prompts", type=int, default=128)
    each.add_argument("--max_tokens", type=int, default=96)
    each.add_argument("--max_steps", type=int, default=250)
    return each


def train(options: argparse.Namespace, size: int) -> Path:
    """The reward model of `size` rankings; one that is finished already is taken as it is."""
    folder = Path(options.work) / f"reward-{size}"
    flags = {
        "config": ROOT / "recipes/tiny/reward.yaml", "model_name_or_path": options.model, "output_dir": folder,
        "max_rows": size, "max_steps": options.max_steps, "eval_steps": 10, "early_stopping_patience": 8,
        "validation_share": 0.2, "save_steps": 50,
    }  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, str(ROOT / "recipes/reward.py"), *words], check=True, cwd=ROOT)
    return folder


def measure(size: int, folder: Path, samples, gold, ns: list[int]) -> dict:
    """One reward model: what it picks, as it sees it and as the judge does, and the judge's curve fitted."""
    scores, manifest = bestof.score(str(folder), samples), read_manifest(folder)
    fit = fit_best_of_n(expected_best(scores, gold, ns), ns)
    return {
        "rankings": size,
        "steps": manifest["best_step"],
        "held-out pair accuracy": manifest["metrics"]["pair accuracy"],
        "curve": curve(scores, {bestof.PROXY: scores, GOLD: gold}, ns),
        "alpha": fit.alpha,
        "beta": fit.beta,
        "peak d": fit.peak,
        "rms of the fit": fit.rms,
    }


def interval(entry: dict, digits: int = 3) -> str:
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def table(result: dict) -> str:
    """The fits, and the judge's value at each n, as markdown."""
    models, ideal = result["models"], result["picked by the judge itself"]
    lines = [
        "# Over-optimization by best-of-n, tiny world", "",
        f"`{result['command']}`", "",
        f"{result['prompts']} held-out prompts, samples by {result['engine']}. R = d (alpha - beta d), d = sqrt(KL); "
        "95 % intervals over prompts.", "",
        "| rankings | best step | held-out pair accuracy | alpha | beta | peak of the fit, d | rms of the fit |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model in models:
        peak = "none" if model["peak d"] is None else f"{model['peak d']:.2f}"
        cells = [interval(model["held-out pair accuracy"]), interval(model["alpha"]), interval(model["beta"]), peak]
        start = f"| {model['rankings']} | {model['steps']} | "
        lines.append(start + " | ".join(cells) + f" | {model['rms of the fit']:.3f} |")
    names = [f"{model['rankings']} rankings" for model in models]
    lines += ["", "True utility of the pick:", "", "| n | d | " + " | ".join(names) + " | the judge's own pick |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for index, point in enumerate(ideal):
        cells = [interval(model["curve"][index][GOLD]) for model in models] + [interval(point[GOLD])]
        lines.append(f"| {point['n']} | {math.sqrt(point['kl']):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(models: list[dict]) -> str:
    """The judge's gain over one sample against d, with the fits."""
    lines = []
    for colour, model in enumerate(models):
        start = model["curve"][0][GOLD]["value"]
        points = [(math.sqrt(p["kl"]), p[GOLD]["value"] - start, None, None) for p in model["curve"]]
        lines.append(Line(f"{model['rankings']} rankings", points, colour))
        alpha, beta = model["alpha"]["value"], model["beta"]["value"]
        last = points[-1][0]
        fitted = [(last * k / 40, last * k / 40 * (alpha - beta * last * k / 40), None, None) for k in range(41)]
        lines.append(Line(f"d ({alpha:.2f} - {beta:.2f} d)", fitted, colour, dashed=True))
    axes = {"x": "d = sqrt(KL), KL = ln n - (n - 1)/n in nats", "y": "true utility over one sample"}
    return standalone(plot("over-optimization by best-of-n", lines, **axes))


if __name__ == "__main__":
    main()
