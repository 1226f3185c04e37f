"""What the report's page shows of the stages, as plain values for its template.

In: stages as posttrain/report_read.py gives them. Out: strings, numbers, lists, and the picture of the chain. What a
model, a data set or a config wrote is hostile: `visible` makes it readable, the template escapes it.
"""

import json
import math
import re
from pathlib import Path

from markupsafe import Markup

from posttrain import figures
from posttrain.errors import UserError
from posttrain.plots import evaluation_pictures
from posttrain.report_read import Stage

LONGEST_TEXT = 4000  # characters of one reply or prompt; the rest is counted, not shown
FOLD_FROM = 260  # characters of a completion that stand in a row of the table before it is folded
UNPRINTABLE = re.compile("[^\n\t -~\xa0-\ud7ff\ue000-\U0010ffff]")  # control characters and lone surrogates
ROLE = re.compile(r"(system|user|assistant|tool): ")
# What is said of the first step and the last, as posttrain/rl/metrics.py logs it: (key, name, unit).
STEP_FACTS = (
    ("reward", "reward", ""), ("completion_length", "length", "tokens"), ("cut_share", "cut at the limit", "%"),
    ("zero_signal_groups", "zero-variance groups", "%"), ("kl", "KL to the start", "nats"),
    ("entropy", "entropy", "nats a token"),
)  # fmt: skip


def visible(text: object) -> str:
    """Text as a reader should see it: control characters and lone surrogates as signs, and not without end."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    rest = len(text) - LONGEST_TEXT
    return UNPRINTABLE.sub("\ufffd", text[:LONGEST_TEXT]) + (f" … ({rest:,} more characters)" if rest > 0 else "")


def turn(prompt: object) -> tuple[str, str]:
    """(role, text) of a sample's prompt, which begins with the role of its first turn; ("", text) of any other."""
    text = visible(prompt)
    found = ROLE.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def samples(stages: list[Stage]) -> list[dict]:
    """The same prompts over all stages: {"prompt", "replies": {by: text}}; the first stage to show a reply has it."""
    merged: dict[str, dict[str, str]] = {}
    for stage in stages:
        for sample in stage.manifest.get("samples", []):
            replies = merged.setdefault(visible(sample.get("prompt")), {})
            for reply in sample["replies"]:
                replies.setdefault(reply["by"], reply.get("text"))
    return [{"prompt": prompt, "replies": replies} for prompt, replies in merged.items()]


def left_out(source: dict) -> dict[str, int]:
    """Rows of a data set that a stage did not use, by reason, the commonest first."""
    overlap = source.get("overlap") or {}
    counts = {**(source.get("skipped") or {}), **(source.get("duplicates") or {})}
    counts |= {f"leak: {key}": count for key, count in (source.get("leaked") or {}).items()}
    counts |= {"in both sets": overlap.get("dropped_eval", 0) + overlap.get("dropped_train", 0)}
    counts = {str(key): count for key, count in counts.items() if isinstance(count, int | float) and count}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def verdict(gain: dict) -> str:
    """shown | not shown | not judged (the stage stored no `passed`)."""
    return {True: "shown", False: "not shown"}.get(gain.get("passed"), "not judged")


def gains_of(stages: list[Stage]) -> list[tuple[Stage, dict]]:
    return [(stage, gain) for stage in stages for gain in stage.manifest.get("gains", [])]


def summary(stages: list[Stage]) -> tuple[int, list[str]]:
    """How many gains are shown, and ["grpo: failed, so no gain to show", ...] for the stages that are not finished."""
    shown = sum(verdict(gain) == "shown" for _, gain in gains_of(stages))
    open_ones = [f"{stage.name}: {stage.state}, so no gain to show" for stage in stages if stage.state != "finished"]
    return shown, open_ones


def evaluations(stages: list[Stage]) -> list[dict]:
    """One table a suite over the stages that have it: {"suite", "stages", "rows": [(metric, unit, [(figure or None,
    its paired change in words)])], "settings": those all its files share, "commands", "conclusions": sentences,
    "pictures": [(caption, picture)]}."""
    tables = []
    for suite in dict.fromkeys(suite for stage in stages for suite in stage.evals):
        having = [stage for stage in stages if suite in stage.evals]
        told = [stage.evals[suite] for stage in having]
        rows = []
        for name in dict.fromkeys(name for each in told for name in each["metrics"]):
            cells = [(each["metrics"].get(name), _change(each, name)) for each in told]
            unit = next(cell.get("unit") or "" for cell, _ in cells if cell is not None)
            rows.append((name, unit, cells))
        settings = [each.get("settings") if isinstance(each.get("settings"), dict) else {} for each in told]
        shared = {key: value for key, value in settings[0].items() if all(each.get(key) == value for each in settings)}
        said = dict.fromkeys(str(line) for each in told for line in each.get("conclusions") or [])
        commands = [str(each["command"]) for each in told if each.get("command")]
        tables.append({"suite": suite, "stages": having, "rows": rows, "settings": shared, "commands": commands})
        tables[-1]["conclusions"] = list(said)
        tables[-1]["pictures"] = pictures_of(having, suite)
    return tables


def pictures_of(stages: list[Stage], suite: str) -> list[tuple[str, Markup]]:
    """(stage and caption, picture) of the curves that a suite's evaluations hold. UserError names one that is none."""
    found = []
    for stage in stages:
        try:
            pictures = evaluation_pictures(stage.evals[suite].get("details"))
        except UserError as error:
            mend = "evaluate again, or remove the file"
            raise UserError(f"{stage.name}/evals/{suite}.json: {error}; {mend}") from error
        found += [(f"{stage.name}: {caption}", picture) for caption, picture in pictures]
    return found


def _change(told: dict, name: str) -> str:
    """`+43.1 [40.2, 46.0] points against sft`, the paired change that an evaluation stored; "" where it has none."""
    change = (told.get("changes") or {}).get(name)
    numbers = [change.get(key) for key in ("value", "low", "high")] if isinstance(change, dict) else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return ""
    value, interval = figures.measure(change)
    sign = "+" if numbers[0] > 0 else ""
    return f"{sign}{value} {interval} {change.get('unit') or ''} against {change.get('against') or 'its parent'}"


# ---- rollouts -------------------------------------------------------------------------------------------------------


def step_facts(stage: Stage) -> list[tuple[str, str, list[float | None]]]:
    """[(name, unit, values)]: what the log says of the whole step of each group of rollouts; [] where it is silent."""
    lines = {row.get("step"): row for row in stage.log}
    steps = [lines.get(step, {}) for step, *_ in stage.rollouts]
    functions = dict.fromkeys(
        key for line in steps for key in line if key.startswith("reward/") and not key.endswith(("/std", "/none"))
    )
    keys = [STEP_FACTS[0], *((key, key.replace("/", ": ", 1), "") for key in functions if len(functions) > 1)]
    keys += STEP_FACTS[1:]
    found = []
    for key, name, unit in keys:
        values = [line.get(key) if isinstance(line.get(key), int | float) else None for line in steps]
        if any(value is not None for value in values):
            found.append((name, unit, values))
    return found


def no_signal(row: dict, stage: Stage) -> bool:
    """Whether a rollout teaches nothing: an advantage of exactly 0 in a group in which all rewards are equal. Rows
    without the group's rewards (those of earlier versions) may be the rare ones that got just its mean."""
    low, high = row.get("group_rewards") or (0, 0)
    return row.get("advantage") == 0 and low == high and stage.kind != "ppo"


def fold(text: object) -> tuple[str, str]:
    """(what a row of the table shows, all of it where that is not all)."""
    whole = visible(text)
    if len(whole) <= FOLD_FROM and whole.count("\n") <= 6:
        return whole, ""
    start = "\n".join(whole[:FOLD_FROM].split("\n")[:6])
    return start.rstrip() + " …", whole


# ---- the chain ------------------------------------------------------------------------------------------------------


def headline(stage: Stage) -> list[str]:
    """The first gain in two short lines, ["pass@1", "43 → 87 %"]; [] where there is none."""
    for gain in stage.manifest.get("gains", []):
        values = [gain[side].get("value") for side in ("before", "after")]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            continue
        if gain.get("unit") == "%":
            return [gain["name"], " → ".join(f"{100 * value:.0f}" for value in values) + " %"]
        return [gain["name"], " → ".join(f"{value:.2f}" for value in values)]
    return []


def chain_picture(stages: list[Stage], *, down: bool = False) -> Markup:
    """The stages as boxes: size and time, gains shown, and the first gain. An arrow from each parent; dashed
    from the stage before, where a stage has not written down its parents yet."""
    boxes, edges, names = [], [], {stage.name for stage in stages}
    for index, stage in enumerate(stages):
        manifest = stage.manifest
        size = manifest.get("parameters")
        facts = [f"{figures.compact(size)} params"] if size else []
        facts += [figures.duration(manifest.get("wall_time_s"))] if manifest.get("wall_time_s") is not None else []
        goals = [verdict(gain) for gain in manifest.get("gains", [])]
        result = f"{goals.count('shown')} of {len(goals)} gains shown" if goals else stage.state
        lines = [line for line in (" · ".join(facts), result, *headline(stage)) if line]
        state = "not shown" if stage.state == "finished" and "not shown" in goals else stage.state
        boxes.append(
            {"name": stage.name, "title": stage.name, "lines": lines, "state": state, "href": f"#stage-{index}"}
        )
        roles: dict[str, list[str]] = {}
        for role, parent, _ in stage.parents:
            roles.setdefault(parent, []).append(role)
        for parent in roles.keys() - names:
            names.add(parent)
            line = ["from outside this run"]
            boxes.append({"name": parent, "title": Path(parent).name, "lines": line, "state": "outside", "href": None})
        labels = {parent: ", ".join(each) if len(roles) > 1 else "" for parent, each in roles.items()}
        edges += [(parent, stage.name, label, "known") for parent, label in labels.items()]
        if not manifest and not stage.begun and index:  # its parents are not written down yet: the order of the chain
            edges.append((stages[index - 1].name, stage.name, "", "assumed"))
    return figures.chain(boxes, edges, down=down)
