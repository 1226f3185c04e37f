"""`posttrain eval --again FILE`: measure what a stored evaluation measured, with its settings, and say if it agrees.

In: MODEL/evals/NAME.json (or what --json wrote of one model); another place of the same model, where it has moved.
Out: a table of both figures, and what differs between then and now: the model's files, the data, versions. Exit code
0 where every figure is equal, 1 where one is not. Nothing is stored but --json FILE.

    posttrain eval --again runs/tiny/grpo/evals/math.json
    posttrain eval somewhere/else/grpo --again math.json
"""

import json
from argparse import Namespace
from pathlib import Path

from posttrain.errors import UserError
from posttrain.suite_table import aligned, shown

DIGITS = 1e-9  # figures that differ by less are equal: sums of floats


def run(options: Namespace) -> tuple[str, bool]:
    """(what to print, whether all figures agree). UserError for a file that is no stored evaluation."""
    from posttrain import suites
    from posttrain.checkpoint import write_json
    from posttrain.eval_verb import defaults

    told = read(options.again)
    usual = vars(defaults())
    settings = {key: value for key, value in told["settings"].items() if key in usual}
    model = options.model or told["model"]
    given, results, _ = suites.measure(Namespace(**{**usual, **settings, "model": model}))
    if len(results) != 1:
        raise UserError(f"{model} is a run, and {options.again} is the evaluation of one model: name that one")
    now = suites.stored(results[0], given)
    if options.json is not None:
        write_json(Path(options.json), now)
    rows, agree = compared(told["metrics"], now["metrics"])
    lines = [f"{options.again}: measured {told['created']}, and again", "", *aligned(rows), ""]
    changed = differences(told, now)
    lines += [f"not as it was: {each}" for each in changed]
    if agree:
        lines.append(f"all {len(rows) - 1} figures are equal")
    else:
        lines.append("the figures differ" + ("" if changed else ", though model, data and versions are the same"))
    return "\n".join(lines), agree


def read(file: str) -> dict:
    """A stored evaluation of one model. UserError names the file and what it lacks."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--again: no file {file!r}; expected MODEL/evals/NAME.json, which posttrain eval wrote")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--again: {file} is no valid JSON: {error}") from error
    told = told if isinstance(told, dict) else {}
    if "models" in told:
        raise UserError(f"--again: {file} has several models; take the file of one, MODEL/evals/NAME.json")
    missing = [key for key in ("suite", "model", "created", "settings", "metrics") if key not in told]
    if missing:
        raise UserError(f"--again: {file} is no stored evaluation: it has no {', '.join(missing)}")
    return told


def compared(then: dict[str, dict], now: dict[str, dict]) -> tuple[list[list[str]], bool]:
    """(rows of a table, headings first; whether value and interval of each figure are equal)."""
    rows, agree = [["figure", "then", "now", ""]], True
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name), now.get(name)
        same = old is not None and new is not None and all(_equal(old.get(k), new.get(k)) for k in KEYS)
        agree = agree and same
        rows.append([name, shown(old), shown(new), "equal" if same else "differs"])
    return rows, agree


KEYS = ("value", "low", "high", "n")


def _equal(old, new) -> bool:
    if old is None or new is None:
        return old is new
    return abs(old - new) <= DIGITS * max(1.0, abs(old))


def differences(then: dict, now: dict) -> list[str]:
    """What is another one than it was: files of the model, data, versions, engine."""
    lines = []
    for name in sorted({*then.get("model_sha256", {}), *now["model_sha256"]}):
        old, new = then.get("model_sha256", {}).get(name), now["model_sha256"].get(name)
        if old != new:
            lines.append(f"the model's {name}: sha256 {_short(old)} then, {_short(new)} now")
    for role in now.get("others", {}):
        if (old := then.get("others", {}).get(role, {}).get("sha256")) != now["others"][role]["sha256"]:
            lines.append(f"--{role}: other files than then" if old is not None else f"--{role}: not there then")
    for old, new in zip(then.get("data", []), now["data"], strict=False):
        if old.get("sha256") != new.get("sha256"):
            lines.append(f"the rows of {new.get('name')}: sha256 {_short(old.get('sha256'))} then, "
                         f"{_short(new.get('sha256'))} now")  # fmt: skip
    for name in sorted({*then.get("versions", {}), *now["versions"]}):
        old, new = then.get("versions", {}).get(name), now["versions"].get(name)
        if old != new:
            lines.append(f"{name} {old or 'missing'} then, {new or 'missing'} now")
    old, new = then["settings"].get("engine"), now["settings"].get("engine")
    return lines + ([f"sampled by {old} then, {new} now"] if old != new else [])


def _short(digest: str | None) -> str:
    return "missing" if digest is None else digest[:12]
