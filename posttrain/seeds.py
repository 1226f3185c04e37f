"""Run a chain once for each of several seeds and average what each stage gained.

In: a chain folder and the seeds. Out: `<out>/seed-<s>/` for each, a whole run of its own; `<out>/gains.json`, each
gain with its value at every seed, the mean and the 95 % interval over seeds; the same as a table. To run it:
`posttrain run recipes/tiny --seeds 0 1 2`.

A seed sets everything that is drawn (data, initial weights, order, samples), so the interval over seeds covers all of
it, where the interval in a run's own gains covers only the problems and samples it was measured on.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from posttrain import chain, checkpoint, stage
from posttrain.errors import UserError

# 97.5 % points of Student's t for 1 to 9 degrees of freedom; above, the expansion in `t_quantile` is exact to 1e-4.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
Z_975 = 1.959964


def run(
    folder: str | Path,
    seeds: Sequence[int],
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    **options,
) -> int:
    """Run the chain in `folder` at each seed into `<out>/seed-<s>`; options as for `chain.run`. Returns the exit code.

    Stops at the first seed whose chain fails; called again it goes on there. Raises UserError as `chain.run` does.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: a seed comes twice in {list(seeds)}; each seed is one run")
    default_out, names = chain.read_chain(Path(folder))
    out = Path(os.path.normpath(out if out is not None else default_out))
    for seed in seeds:
        print(f"seed {seed}:", flush=True)
        code = chain.run(folder, out / f"seed-{seed}", overrides=[*overrides, f"seed={seed}"], **options)
        if code:
            return code
    if options.get("dry_run"):
        return 0
    runs = {seed: out / f"seed-{seed}" for seed in seeds}
    if options.get("only"):  # the others may not have been run yet
        names = [name for name in names if all(stage.read_manifest(run / name) for run in runs.values())]
    gains = aggregate(runs, names)
    checkpoint.write_json(
        out / "gains.json", {"name": Path(folder).resolve().name, "seeds": list(seeds), "gains": gains}
    )
    print(f"\n{table(gains, seeds)}\n\ngains   {out / 'gains.json'}", flush=True)
    return 0


def aggregate(runs: dict[int, Path], names: Sequence[str]) -> list[dict]:
    """Each gain over the runs (seed -> folder), in the order of the stages `names`.

    A gain is {"stage", "name", "unit", "better", "passed": [of each seed], and for "before", "after" and "change":
    {"label", "values": [of each seed], "mean", "low", "high"}}. Raises UserError where a run lacks a gain.
    """
    collected = []
    for name in names:
        manifests = {seed: stage.read_manifest(folder / name) for seed, folder in runs.items()}
        unfinished = [str(runs[seed] / name) for seed, manifest in manifests.items() if manifest is None]
        if unfinished:
            raise UserError(f"no finished stage in {', '.join(unfinished)}: run the chain there to its end")
        per_seed = [{gain["name"]: gain for gain in manifest["gains"]} for manifest in manifests.values()]
        for gain_name in per_seed[0]:
            if not all(gain_name in gains for gains in per_seed):
                raise UserError(
                    f"stage {name}: the gain {gain_name!r} is not in every seed's stage.json: run them again"
                )
            collected.append(over_seeds(name, [gains[gain_name] for gains in per_seed]))
    return collected


def over_seeds(stage_name: str, gains: list[dict]) -> dict:
    """One gain of several runs as one; `change` pairs before and after of the same seed."""
    before, after = ([gain[side]["value"] for gain in gains] for side in ("before", "after"))
    first = gains[0]
    return {
        "stage": stage_name,
        "name": first["name"],
        "unit": first["unit"],
        "better": first["better"],
        "before": {"label": first["before"]["label"], **mean_interval(before)},
        "after": {"label": first["after"]["label"], **mean_interval(after)},
        "change": mean_interval([b - a for a, b in zip(before, after, strict=True)]),
        "passed": [gain["passed"] for gain in gains],
    }


def mean_interval(values: Sequence[float]) -> dict:
    """{"values", "mean", "low", "high"}: mean -+ t s / sqrt(n), 95 %; low and high are None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"values": list(values), "mean": mean, "low": None, "high": None}
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"values": list(values), "mean": mean, "low": mean - half, "high": mean + half}


def t_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t (Abramowitz and Stegun 26.7.5 from ten degrees of freedom on)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def table(gains: list[dict], seeds: Sequence[int]) -> str:
    """The gains as text: a line for each, and under it its values at every seed."""
    lines = []
    for gain in gains:
        unit = gain["unit"]
        passed = f"goal reached at {sum(map(bool, gain['passed']))} of {len(seeds)} seeds"
        lines.append(f"{gain['stage']}: {gain['name']}, {passed}")
        for side in ("before", "after", "change"):
            label = gain[side].get("label", "")
            each = ", ".join(show(value, unit) for value in gain[side]["values"])
            lines.append(f"  {side:6}  {interval(gain[side], unit):32}  {label + ': ' if label else ''}{each}")
    seed_list = ", ".join(map(str, seeds))
    return "\n".join([*lines, f"mean [95 % interval over seeds, Student's t]; then the values at seeds {seed_list}"])


def interval(part: dict, unit: str) -> str:
    """`53.0 % [50.1, 55.9]`, or the mean alone."""
    if part["low"] is None:
        return show(part["mean"], unit)
    low, high = (show(part[end], unit).removesuffix(f" {unit}") for end in ("low", "high"))
    return f"{show(part['mean'], unit)} [{low}, {high}]"


def show(value: float, unit: str) -> str:
    """A value with its unit; a fraction as a percentage."""
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3f} {unit}".rstrip()
