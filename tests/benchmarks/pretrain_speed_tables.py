"""Markdown of what pretrain_speed.py found. In: its result. Out: text; nothing is computed but shares and products."""

from rl_tables import other_clock, spread

MFU_SHARES = ("MFU of measured", "MFU of listed", "data share")


def markdown(result: dict) -> str:
    facts, clock = result["machine"], result["settings"]["clock"]
    lines = ["# Pretraining's speed", "", f"`{result['command']}`", ""]
    here = f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}"
    lines.append(f"{result['date']}; {here}; medians of {result['settings']['rounds']} rounds by {clock} time.")
    for key, part in (("mfu", mfu), ("step", step), ("loader", loader), ("processes", processes)):
        if key in result:
            lines += ["", *part(result[key], clock)]
    return "\n".join(lines) + "\n"


def step(cases: list[dict], clock: str) -> list[str]:
    lines = ["## The step beside a plain loop", ""]
    lines += [f"| size | dtype | ours over plain | {clock} | {other_clock(clock)} |", "|---|---|---|---|---|"]
    for case in cases:
        for pair, found in case["ratios"].items():
            cells = f"{spread(found[clock])} | {spread(found[other_clock(clock)])}"
            lines.append(f"| {case['size']} | {case['dtype']} | {pair} | {cells} |")
    lines += ["", "| size | dtype | trainer | tokens/s | held-out loss, nats a token | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for case in cases:
        for kind, end in case["trainers"].items():
            cells = f"{case['tokens per second'][kind][clock]:,.0f} | {end['held-out loss']:.3f}"
            lines.append(f"| {case['size']} | {case['dtype']} | {kind} | {cells} | {end['peak memory']:,.0f} |")
    return lines + data_share(cases)


def data_share(cases: list[dict]) -> list[str]:
    """Of the step part's own trainers: what the loop's meter counted for data, over a step's time."""
    lines = ["", "| size | dtype | trainer | data, ms a step | share of the step |", "|---|---|---|---|---|"]
    for case in cases:
        for kind, end in case["trainers"].items():
            if end["data seconds a step"] is not None:
                seconds = end["data seconds a step"]
                whole = case["tokens a step"] / case["tokens per second"][kind]["wall"]
                lines.append(
                    f"| {case['size']} | {case['dtype']} | {kind} | {seconds * 1000:.2f} | {seconds / whole:.2%} |"
                )
    return lines


def loader(found: dict, clock: str) -> list[str]:
    rate, goal, step = found["rate"] / 1e12, found["goal"], found["H200 step"]
    lines = ["## Data", ""]
    lines.append(
        f"{found['batch']} chunks of {found['length']} tokens, a step of GPT-2 124M, in a seeded order from "
        f"{found['chunks']:,} chunks of random tokens. The step of one H200 is computed, not measured: what it needs "
        f"(6 N D and attention) at {rate:.0f} TFLOP/s and {goal:.0%} MFU, the goal, takes {step:.2f} s."
    )
    lines += ["", "| read from | ms a step | share of that step |", "|---|---|---|"]
    lines += [f"| {name} | {found[name] * 1000:.1f} | {found[name] / step:.2%} |" for name in ("disk", "memory")]
    return [
        *lines,
        "",
        f"The order of an epoch is shuffled once, in {found['shuffle'] * 1000:.0f} ms. From the disk: that of this "
        "machine, what the system had read of it forgotten before each step. Training reads the next step's chunks in "
        "a thread while a step runs; the shares above that the trainers' own meters saw are what it still waits.",
    ]


def processes(found: dict, clock: str) -> list[str]:
    [ratio] = found["ratios"].values()
    lines = ["## One process and two", ""]
    lines.append(
        f"Size {found['size']}, fp32, a thread each, gloo, the same batch in all. Tokens a second, two over one: "
        f"{spread(ratio['wall'])} by wall time, where 2 is the most that two free cores give; "
        f"{spread(ratio['cpu'])} by the CPU time of the first process, which leaves waiting out."
    )
    lines += ["", "| trainer | tokens/s (wall) | held-out loss, nats a token |", "|---|---|---|"]
    for kind, end in found["trainers"].items():
        lines.append(f"| {kind} | {found['tokens per second'][kind]['wall']:,.0f} | {end['held-out loss']:.3f} |")
    return lines


def mfu(found: dict, clock: str) -> list[str]:
    listed = f"{found['listed peak'] / 1e12:.0f}" if found["listed peak"] else "not listed"
    lines = ["## MFU", ""]
    lines.append(
        f"bf16, compiled, chunks of {found['length']} tokens, {found['batch']} a step. Matrix products run at "
        f"{found['matmul rate'] / 1e12:.0f} TFLOP/s here (measured); the maker's figure is {listed}. Goals: >= 50 % "
        "MFU at >= 0.5B, >= 40 % at 124M."
    )
    lines += ["", "| model | parameters, M | trainer | micro-batch | tokens/s [lowest, highest] | MFU of measured | "
              "of the maker's | data | peak memory, GiB |", "|---" * 9 + "|"]  # fmt: skip
    for run in found["runs"]:
        begin = f"| {run['model']} | {run['parameters'] / 1e6:.0f} | {run['trainer']} | {run['micro batch']} | "
        if "failed" in run:
            lines.append(f"{begin}{run['failed']} | | | | |")
            continue
        speed = f"{run['tokens per second']:,.0f} [{run['low']:,.0f}, {run['high']:,.0f}]"
        shares = " | ".join("" if run[key] is None else f"{run[key]:.1%}" for key in MFU_SHARES)
        lines.append(f"{begin}{speed} | {shares} | {run['peak memory'] / 1024:.1f} |")
    return lines
