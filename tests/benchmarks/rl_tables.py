"""What both RL benchmarks make of their rounds: medians, ratios with their spread, markdown and JSON.

In: for each round and trainer its steps, {"tokens", "prompt_tokens", "reward", "wall": {part: s}, "cpu": {part: s}}.
Out: one dict, and tables.
"""

import shlex
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from posttrain.checkpoint import write_json

PARTS = ("generate", "sync", "reward", "score", "update", "other")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: seconds of all threads, on a machine not alone
SCORING_AND_UPDATE = ("score", "update")


def rate(steps: list[dict], clock: str, parts: tuple[str, ...] = PARTS) -> float:
    """Completion tokens a second of some parts of steps."""
    seconds = sum(step[clock].get(part, 0.0) for step in steps for part in parts)
    return sum(step["tokens"] for step in steps) / seconds


def summary(options, kinds: list[str], warm: dict, rounds: list[dict], memories: dict) -> dict:
    """Medians over rounds; ratios of each round, with the lowest and the highest."""
    found = {}
    for kind in kinds:
        each = [round[kind] for round in rounds]
        steps = [step for one in each for step in one]
        found[kind] = {
            "step seconds": {c: statistics.median(sum(step[c].values()) for step in steps) for c in CLOCKS},
            "parts": {
                c: {part: statistics.median(step[c].get(part, 0.0) for step in steps) for part in PARTS}
                for c in CLOCKS
            },
            "tokens per second": {c: statistics.median(rate(one, c) for one in each) for c in CLOCKS},
            "completion tokens a step": statistics.fmean(step["tokens"] for step in steps),
            "prompt tokens a step": statistics.fmean(step["prompt_tokens"] for step in steps),
            "rewards": [step["reward"] for step in warm[kind] + steps],
            "memory": memories[kind],
        }
    return {
        "command": command(),
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "worker", "work")},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl")},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "trainers": found,
        "rounds": rounds,
    }


def ratio(result: dict, one: str, other: str, clock: str, parts: tuple[str, ...] = PARTS) -> dict:
    """Tokens a second of `one` over those of `other`, round by round."""
    values = [rate(each[one], clock, parts) / rate(each[other], clock, parts) for each in result["rounds"]]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def command() -> str:
    """The command that gives these figures again; what it leaves out is at its default, as in `settings`."""
    return f"python tests/benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"


def write(
    result: dict, title: str, pairs: list[tuple[str, str]], goal: str, notes: list[str], out: str | None
) -> None:
    """Ratios into the result; markdown to the terminal, both to files `out`.json and `out`.md."""
    present = [pair for pair in pairs if set(pair) <= result["trainers"].keys()]
    result["ours over"] = {
        f"{one} / {other}": {
            clock: {
                "step": ratio(result, one, other, clock),
                "without generation": ratio(result, one, other, clock, SCORING_AND_UPDATE),
            }
            for clock in CLOCKS
        }
        for one, other in present
    }
    text = markdown(result, title, goal, notes)
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(f"{out}.json"), result)
        Path(f"{out}.md").write_text(text, encoding="utf-8")


def markdown(result: dict, title: str, goal: str, notes: list[str]) -> str:
    settings, clock = result["settings"], result["settings"]["clock"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# {title}", "", f"`{result['command']}`", "",
        f"{result['device']}, {result['threads']} threads, {versions}. {settings['rounds']} rounds of "
        f"{settings['steps']} steps each in turns after {settings['warmup']} to warm up; times are {clock} s.", "",
        *(f"- {note}" for note in notes),
        *(f"- {kind} did not run: {why}." for kind, why in result["left out"].items()), "",
        f"| tokens/s, ours over the peer's | step, {clock} | step, {other_clock(clock)} | score + update, {clock} |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for name, found in result["ours over"].items():
        cells = [found[clock]["step"], found[other_clock(clock)]["step"], found[clock]["without generation"]]
        lines.append(f"| {name} | " + " | ".join(map(spread, cells)) + " |")
    lines += ["", goal, "", f"| trainer | step, s | {', s | '.join(PARTS)}, s | completion tokens/s | all tokens/s | "
              "peak memory, MB (before training) |", "|---" * (len(PARTS) + 5) + "|"]  # fmt: skip
    for kind, found in result["trainers"].items():
        whole = found["completion tokens a step"] + found["prompt tokens a step"]
        speed = found["tokens per second"][clock]
        parts = " | ".join(f"{found['parts'][clock][part]:.3f}" for part in PARTS)
        memory = f"{found['memory']['peak memory']:,.0f} ({found['memory']['memory before']:,.0f})"
        every = speed * whole / found["completion tokens a step"]
        lines.append(
            f"| {kind} | {found['step seconds'][clock]:.3f} | {parts} | {speed:,.0f} | {every:,.0f} | {memory} |"
        )
    return "\n".join(lines + curve(result)) + "\n"


def other_clock(clock: str) -> str:
    return next(name for name in CLOCKS if name != clock)


def spread(found: dict) -> str:
    return f"{found['median']:.2f} x [{found['low']:.2f}, {found['high']:.2f}]"


def curve(result: dict, points: int = 8) -> list[str]:
    """Mean rewards of about `points` stretches of steps, as lines of markdown."""
    total = len(next(iter(result["trainers"].values()))["rewards"])
    edges = sorted({round(total * k / points) for k in range(points + 1)})
    stretches = [(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    names = [f"{a + 1}-{b}" if b > a + 1 else str(b) for a, b in stretches]
    lines = ["", f"| reward, mean over steps | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind, found in result["trainers"].items():
        cells = [f"{statistics.fmean(found['rewards'][a:b]):.3f}" for a, b in stretches]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines
