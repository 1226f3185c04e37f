"""`posttrain forecast CONFIG`: what a stage needs before it is run: memory by part, tokens/s, hours, dollars.

    posttrain forecast recipes/tiny/pretrain.yaml [--KEY VALUE ...] [--price 2.50] [--gpus 8] [--json FILE]
    posttrain forecast recipes/gpt2-124m/pretrain_8gpu.yaml --no-measure --device H100 --mfu 0.4 --gpus 8 --price 2.50

In: the YAML of any stage. Out: a table, and the same as JSON where asked for. Memory is counted (posttrain/memory.py);
time is measured, on this machine, by three steps of the stage's own recipe (posttrain/forecast_trial.py), or with
--no-measure computed from the arithmetic and an MFU that you name. Hours leave out evaluation, checkpoints and reading
data. Cost is hours x GPUs x price.
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

from posttrain.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_verb(verbs, debug) -> None:
    """The verb `forecast` and its flags."""
    verb = verbs.add_parser(
        "forecast", parents=[debug], help="memory, tokens/s, hours and cost of a stage before it is run",
        allow_abbrev=False, epilog="Every other --KEY VALUE is a key of the stage's config.",
    )  # fmt: skip
    verb.set_defaults(call=call)
    verb.add_argument("config", metavar="CONFIG", help="YAML of a stage, e.g. recipes/tiny/pretrain.yaml")
    verb.add_argument("--stage", metavar="NAME", help="the stage, where the file is not named after it")
    verb.add_argument(
        "--gpus", type=int, metavar="N", help="processes to forecast for; default: those of this machine"
    )
    verb.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour; without it there is no cost")
    verb.add_argument("--device-memory", metavar="SIZE", help="of a GPU, such as 80GB; default: what is free here")
    verb.add_argument("--json", metavar="FILE", help="write all figures there, too")
    verb.add_argument(
        "--accelerate_config", metavar="FILE", help="for `accelerate launch`: measure on all its processes"
    )
    verb.add_argument("--no-measure", action="store_true", help="run nothing: time from the arithmetic, by --mfu")
    verb.add_argument("--device", metavar="NAME", help="with --no-measure: the GPU, such as H100 or A100")
    verb.add_argument(
        "--mfu", type=float, metavar="SHARE", help="with --no-measure: the share of its peak, such as 0.4"
    )


def call(options) -> int:
    found = run(
        options.config, options.rest, stage=options.stage, gpus=options.gpus, price=options.price,
        device_memory=options.device_memory, measure=not options.no_measure, device=options.device, mfu=options.mfu,
        accelerate_config=options.accelerate_config,
    )  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def run(
    config: str, overrides=(), *, stage: str | None = None, gpus: int | None = None, price: float | None = None,
    device_memory: str | None = None, measure: bool = True, device: str | None = None, mfu: float | None = None,
    accelerate_config: str | None = None,
) -> dict:  # fmt: skip
    """Print the forecast of a stage; returns its figures: `memory` in bytes by part, `seconds_a_step`, `hours`, `cost`
    and more, None where a figure is not known. Raises UserError for a config that the stage itself would refuse, and
    where its trial fails."""
    from posttrain import forecast_data, forecast_plan, forecast_trial

    _check(gpus, price, measure, device, mfu)
    asked = forecast_plan.read(config, stage, overrides)
    processes = gpus or forecast_trial.processes_of(accelerate_config)
    data = forecast_data.supply(asked)
    found = {"stage": asked.stage, "config": str(asked.file), "gpus": processes, "price": price}
    _say("stage", f"{asked.stage} ({asked.file})")
    if asked.stage == "tokenizer":
        from posttrain.forecast_tokenizer import forecast

        return forecast(asked, data, found, _say, measure)
    spread = forecast_trial.spread_of(accelerate_config)
    shape, work = _tell_plan(asked, data, found, device_memory, spread)
    if measure:
        _require_room(found)
        with tempfile.TemporaryDirectory(prefix="posttrain-forecast-") as folder:
            measured = forecast_trial.measure(asked, Path(folder), accelerate_config)
        _tell_measured(asked, shape, work, data, measured, found)
    else:
        _tell_computed(asked, shape, work, device, mfu, found)
    _tell_cost(asked, found)
    return found


def _check(gpus, price, measure: bool, device, mfu) -> None:
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus: found {gpus}, expected at least 1")
    if price is not None and not price >= 0:
        raise UserError(f"--price: found {price}, expected dollars of a GPU-hour, such as 2.50")
    if measure and (device is not None or mfu is not None):
        raise UserError("--device, --mfu: go with --no-measure; what is measured is measured on this machine")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: found {mfu}, expected a share of the peak such as 0.4")
    if (device is None) != (mfu is None):
        raise UserError("--device, --mfu: one needs the other: --device H100 --mfu 0.4")


def _require_room(found: dict) -> None:
    """A trial that cannot fit would take the machine's other work with it."""
    import torch

    from posttrain import memory

    room = memory.device_memory("cuda" if torch.cuda.is_available() else "cpu")
    if found["memory_total"] > room:
        raise UserError(
            f"not measured: {found['memory_total'] / 1e9:.1f} GB are needed, {room / 1e9:.1f} are free here; take "
            "smaller micro-batches, or forecast from arithmetic alone: --no-measure --device NAME --mfu SHARE"
        )


def _say(label: str, text: str) -> None:
    print(f"{label:10} {text}", flush=True)


# ---- what is known before anything runs -----------------------------------------------------------------------------


def _tell_plan(asked, data, found: dict, device_memory: str | None, spread: str):
    from posttrain import forecast_data, forecast_plan

    config = forecast_plan.model_config(asked)
    shape = forecast_plan.shape_of(config)
    work = forecast_plan.work_of(asked, found["gpus"], data.mean)
    found |= {"model": dataclasses.asdict(shape), "parameters": shape.parameters, "steps": work.steps}
    _say("model", f"{shape.parameters:,} parameters ({shape.kind}, {shape.layers} layers of {shape.hidden})")
    tokens = "" if work.tokens is None else f"{work.tokens:,} tokens: "
    _say("step", f"{tokens}{work.words}")
    if work.steps:
        total = f", {work.steps * work.tokens:,} tokens" if work.tokens else ""
        _say("run", f"{work.steps:,} steps{total}")
    planned = forecast_data.planned(asked, work)
    found["tokens_a_step"] = work.tokens
    passes = data.passes(planned)
    found["data"] = {"unit": data.unit, "available": data.available, "planned": planned, "passes": passes}
    _say("data", _data_words(data, planned, passes))
    _tell_memory(asked, config, work, found, device_memory, spread)
    return shape, work


def _data_words(data, planned: float | None, passes: float | None) -> str:
    wanted = "" if planned is None else f"; the run takes {planned:,.0f}"
    if data.available is None:
        return f"{data.unit} unknown: {data.why}{wanted}"
    often = "" if passes is None else f", {number(passes)} times over" if passes > 1 else f", {passes:.0%} of them"
    return f"{'about ' if data.unit == 'tokens' else ''}{data.available:,.0f} {data.unit}{wanted}{often}"


def _tell_memory(asked, config, work, found: dict, device_memory: str | None, spread: str) -> None:
    import torch

    from posttrain import forecast_plan, memory
    from posttrain.liger import liger_obstacle

    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = size(device_memory) if device_memory else memory.device_memory(device)
    liger, again = (str(asked.key(key)).lower() for key in ("use_liger_kernel", "gradient_checkpointing"))
    fused = liger == "true" or (liger == "auto" and liger_obstacle() is None)

    def count(checkpointing: bool) -> tuple[dict, int, bool]:
        parts = forecast_plan.memory_of(
            asked, config, work, found["gpus"], fused=fused, spread=spread, checkpointing=checkpointing
        )
        total = sum(parts.values())
        return parts, total, total <= (1 - memory.MARGIN) * room

    parts, total, fits = count(again == "true")
    if again == "auto" and not fits:
        print(f"           {total / 1e9:.1f} GB without gradient checkpointing, which `auto` therefore turns on")
        parts, total, fits = count(True)
    found |= {"memory": parts, "memory_total": total, "device_memory": room, "fits": fits}
    unit, scale = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    _say("memory", f"of each process, counted, {unit}")
    for name, value in parts.items():
        if value:
            print(f"  {name:16} {value / scale:9.3f}")
    verdict = (
        "fits" if fits else "does NOT fit: take smaller micro-batches, gradient_checkpointing or shards (fsdp2.yaml)"
    )
    where = "as given" if device_memory else "free here"
    print(f"  {'in all':16} {total / scale:9.3f} of {room / scale:,.0f} ({where}): {verdict}", flush=True)


def size(text: str) -> int:
    """Bytes of "80GB", "140 GiB" or a plain number. UserError for anything else."""
    number = text.strip().rstrip("BbGgIiKkMmTt ").strip()
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        return round(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise UserError(f"--device-memory: found {text!r}, expected a size such as 80GB or 141GiB") from None


# ---- time -----------------------------------------------------------------------------------------------------------


def _tell_measured(asked, shape, work, data, measured, found: dict) -> None:
    micro = measured.tokens / measured.seconds
    share = measured.mfu
    if asked.stage in ("sft", "reward"):  # the others log their own, but for rejection sampling
        share = _mfu(asked, shape, work, measured)
    found["measured"] = dataclasses.asdict(measured) | {"tokens_per_second": micro, "mfu": share}
    words = f"{measured.tokens:,.0f} tokens in {number(measured.seconds)} s: {number(micro)} tokens/s"
    mfu = "" if share is None else f", MFU {share:.1%}"
    peak = "" if measured.memory_gb is None else f", peak {measured.memory_gb * 2**30 / 1e9:.2f} GB"
    _say("measured", f"{words}{mfu}{peak} ({measured.device})")
    if peak and "cuda" not in measured.device:
        print("           without a GPU the peak is the whole process's: Python and its libraries are in it")
    if measured.parts:
        parts = ", ".join(f"{name} {number(seconds)} s" for name, seconds in measured.parts.items())
        print(f"           of that {parts}")
    for note in measured.notes:
        print(f"           {note}")
    found["seconds_a_step"] = None
    if asked.stage == "rejection":
        found |= _rejection_hours(asked, data, measured, found["gpus"])
        return
    step = measured.seconds / measured.share
    if found["gpus"] != measured.processes:
        linear = asked.stage != "sft"  # whose batch is a process's own: with more of them a step does more
        step = step * measured.processes / found["gpus"] if linear else step
        print(
            f"           {found['gpus']} GPUs are assumed to be "
            f"{found['gpus'] / measured.processes:g} x as fast as the {measured.processes} measured: not measured"
        )
    found |= {"seconds_a_step": step, "hours": step * work.steps / 3600}


def _mfu(asked, shape, work, measured) -> float:
    """Of training forwards. A ranking's prompt is needed once, though its replies' tokens are counted with it."""
    import torch

    from posttrain.throughput import mfu, peak_flops

    kind = "adapter" if asked.key("use_peft") else "training"
    tokens = work.tokens if asked.stage == "reward" and work.tokens else measured.tokens
    flops = tokens * shape.flops_a_token(work.length, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = peak_flops(device, torch.bfloat16 if asked.key("bf16") else torch.float32)
    return mfu(flops, measured.seconds, peak, measured.processes)


def _rejection_hours(asked, data, measured, gpus: int) -> dict:
    from posttrain.forecast_trial import PROBLEMS

    config = asked.configs["RejectionConfig"]
    size = min(config.num_prompts or data.rows or PROBLEMS, data.rows or math.inf)
    ratio = size / min(PROBLEMS, size)
    seconds = config.num_rounds * measured.seconds * ratio * measured.processes / gpus
    _say("run", f"{config.num_rounds} rounds of {size} problems; as large a share is assumed to be kept as measured")
    return {"hours": seconds / 3600}


def _tell_computed(asked, shape, work, device: str | None, mfu: float | None, found: dict) -> None:
    """Time from arithmetic: exact for neither, but near where training is bound by it."""
    found |= {"measured": None, "seconds_a_step": None, "hours": None}
    if device is None:
        return
    from posttrain.throughput import BF16_PEAKS, listed_peak

    peak = listed_peak(device)
    if peak is None:
        raise UserError(f"--device: found {device!r}, expected one of {', '.join(BF16_PEAKS)}")
    if not asked.key("bf16"):
        raise UserError("--device: peaks are listed for bf16, and the config has bf16 false: add --bf16 true")
    if work.tokens is None:
        why = (
            "the data says how long rankings are" if asked.stage == "reward" else "sampling is not bound by arithmetic"
        )
        _say("time", f"not computed: {why}; leave out --no-measure")
        return
    kind = "adapter" if asked.key("use_peft") else "training"
    flops = work.tokens * shape.flops_a_token(work.length, kind)
    step = flops / (peak * mfu * found["gpus"])
    found |= {"seconds_a_step": step, "hours": step * work.steps / 3600, "flops": flops * work.steps}
    rate = (
        f"{peak / 1e12:.0f} TFLOP/s in bf16 at the MFU of {mfu:.0%} that was given: {work.tokens / step:,.0f} tokens/s"
    )
    _say("computed", f"{flops * work.steps:.3g} FLOPs; NOT measured: {device}, {rate}")


def _tell_cost(asked, found: dict) -> None:
    if found["hours"] is None:
        return
    step = "" if found["seconds_a_step"] is None else f"{number(found['seconds_a_step'])} s a step, "
    _say("time", f"{step}{duration(found['hours'])} without evaluation, checkpoints and reading data")
    if found["price"] is not None:
        found["cost"] = found["hours"] * found["gpus"] * found["price"]
        _say(
            "cost",
            f"${found['cost']:,.2f} = {number(found['hours'])} h x {found['gpus']} x ${found['price']:g} an hour",
        )


def duration(hours: float) -> str:
    """Hours as `35 s`, `12 min`, `3.4 h` or `2.5 days`."""
    for unit, length in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= (48.0 if unit == "days" else length):
            return f"{number(hours / length)} {unit}"
    return f"{number(hours * 3600)} s"


def number(value: float) -> str:
    """Three digits that count, or all those before the point: 0.0815, 5.61, 3,740."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
