"""Three real steps of a stage by its own recipe, in a folder that is thrown away: the first warms up, two are timed.

In: a stage's YAML as `forecast_plan.Asked`. Out: `Measured`. A step of pretraining or SFT is cut to two micro-steps on
each process; a step of the reward model and of RL is a whole one, with sampling and scoring. Few rows are read, and
evaluation is cut to a minimum. A parent that an earlier stage of the chain has yet to write is made the same way, by
a trial of that stage: its weights are next to random, and its shape is right.
"""

import json
import math
import resource
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from posttrain import chain, launch, shards, stage, yaml_file
from posttrain.environment import usable_cores
from posttrain.errors import UserError
from posttrain.forecast_plan import Asked, missing_parents

STEPS = 3
ROWS = 2000  # of training data, at most
PROBLEMS = 16  # of rejection sampling
EVALUATION = {
    "eval_max_rows": 20, "eval_num_generations": 1, "eval_max_tokens": 4, "eval_prefixes": "{}", "eval_steps": 0,
    "loss_max_rows": 4, "sample_tokens": 1, "identity": "null", "compare_tokenizers": "[]",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """seconds: of a step as it was run, with `share` of a whole step's work in it, over `processes`.

    tokens: of the training forwards of that step (RL: of its rollouts). parts: seconds of a step by part, of RL.
    memory_gb: most memory of a process, on a GPU by torch's count, else all of the process. loss: of the first step.
    """

    seconds: float
    share: float
    tokens: float
    processes: int
    device: str
    memory_gb: float | None
    mfu: float | None
    loss: float | None
    parts: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def processes_of(accelerate_config: str | None) -> int:
    """How many processes the launcher starts: as its file says, or one a GPU."""
    if accelerate_config is None:
        import torch

        return max(1, torch.cuda.device_count())
    return int(_launch_key(accelerate_config, "num_processes", 1))


def spread_of(accelerate_config: str | None) -> str:
    """How these processes share a model, as `memory.estimate` names it."""
    kind = "" if accelerate_config is None else str(_launch_key(accelerate_config, "distributed_type", ""))
    return {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(kind, "ddp")


def _launch_key(accelerate_config: str, key: str, default):
    if not Path(accelerate_config).is_file():
        raise UserError(f"--accelerate_config: no file {accelerate_config}; see recipes/accelerate/")
    entry = yaml_file.read(accelerate_config).get(key)
    return default if entry is None else entry.value


def measure(asked: Asked, folder: Path, accelerate_config: str | None = None) -> Measured:
    """Run the stage's trial under `folder`. UserError where the recipe refuses or fails."""
    processes, notes, made = processes_of(accelerate_config), [], {}
    command = launch.launcher(accelerate_config, usable_cores())
    parents = _stand_ins(asked, folder, command, processes, made, notes)
    changed, share = settings(asked, processes)
    out = _run(asked, folder / asked.stage, command, {**changed, **parents})
    lines = [json.loads(line) for line in (out / stage.LOG).read_text(encoding="utf-8").splitlines()]
    manifest = stage.read_manifest(out)
    read = _rejection if asked.stage == "rejection" else _steps
    facts = read(asked, lines)
    return Measured(
        share=share, processes=processes, device=manifest["machine"]["processes"], notes=tuple(notes), **facts
    )


def settings(asked: Asked, processes: int) -> tuple[dict, float]:
    """(what the trial changes in the stage's config, the share of a whole step's work that its step does)."""
    has = {key for one in asked.configs.values() for key in vars(one)}
    changed = {key: value for key, value in EVALUATION.items() if key in has}
    changed |= {"save_steps": 0, "logging_steps": 1, "report_to": "none", "resume": "never", "max_steps": STEPS}
    share, source = 1.0, asked.configs["DataConfig"]
    if not source.dataset_mixture:
        changed["max_rows"] = min(ROWS, source.max_rows or ROWS)
    if asked.stage == "pretrain":
        config = asked.configs["PretrainConfig"]
        batch = min(config.batch_size, 2 * processes * min(config.micro_batch_size, config.batch_size // processes))
        share, changed["batch_size"] = batch / config.batch_size, batch
        if config.shards_dir is not None and (Path(config.shards_dir) / shards.INDEX).is_file():
            changed["max_rows"] = source.max_rows or "null"  # the tokens that are there are those of all rows
        else:
            changed["shards_dir"] = "null"
    if asked.stage == "sft":
        times = asked.configs["SFTConfig"].gradient_accumulation_steps
        changed["gradient_accumulation_steps"] = min(2, times)
        share = min(2, times) / times
    if asked.stage == "rejection":
        changed |= {"num_rounds": 1, "num_prompts": min(PROBLEMS, asked.key("num_prompts") or PROBLEMS)}
    return {key: value for key, value in changed.items() if key in has}, share


def _stand_ins(asked: Asked, folder: Path, command, processes: int, made: dict, notes: list) -> dict[str, Path]:
    """Key -> folder of each missing parent, made by trials of the stages before; each stage once."""
    found = {}
    for key, parent in missing_parents(asked).items():
        if parent.stage not in made:
            parents = _stand_ins(parent, folder, command, processes, made, notes)
            changed, _ = settings(parent, processes)
            print(f"{asked.key(key)} is not there yet: a trial of stage {parent.stage} stands in", flush=True)
            made[parent.stage] = _run(parent, folder / parent.stage, command, {**changed, **parents})
            notes.append(f"{asked.key(key)} is not there yet: {STEPS} steps of stage {parent.stage} stood in for it")
        found[key] = made[parent.stage]
    return found


def _run(asked: Asked, out: Path, command: list[str], changed: dict) -> Path:
    flags = [word for key, value in changed.items() for word in chain.flag(key, value)]
    argv = [*asked.argv, *flags, "--output_dir", str(out)]
    log = out.parent / "logs" / f"{asked.stage}.log"
    with redirect_stdout(_Indented(sys.stdout)):
        code, tail = launch.run_stage([*command, str(asked.recipe), *argv], log)
    if code:
        last = next((line for line in reversed(tail) if "error" in line.lower()), tail[-1] if tail else "no output")
        raise UserError(
            f"the trial of stage {asked.stage} ended with exit code {code}: {last.removeprefix('error: ')}\n"
            "Mend that, or forecast from arithmetic alone: --no-measure --device NAME --mfu SHARE"
        )
    return out


class _Indented:
    """Sets what the trial prints apart from the forecast."""

    def __init__(self, stream):
        self.stream, self.begun = stream, False

    def write(self, text: str) -> None:
        for piece in text.splitlines(keepends=True):
            self.stream.write(piece if self.begun else f"  | {piece}")
            self.begun = not piece.endswith("\n")

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False  # progress in plain lines


def _steps(asked: Asked, lines: list[dict]) -> dict:
    """Numbers of the steps after the first."""
    lines = [line for line in lines if "loss" in line or "reward" in line]
    if len(lines) < 2:
        raise UserError(f"the trial of stage {asked.stage} logged {len(lines)} steps, expected {STEPS}")
    first, timed = lines[0], lines[1:]
    seconds = (timed[-1]["time"] - first["time"]) / len(timed)

    def mean(key: str) -> float | None:
        values = [line[key] for line in timed if key in line]
        return math.fsum(values) / len(values) if values else None

    if "tokens" in first:
        tokens = (timed[-1]["tokens"] - first["tokens"]) / len(timed)
    else:
        tokens = mean("tokens_per_second") * seconds
    shares = [key for key in timed[0] if key.startswith("share/")]
    return {
        "seconds": seconds, "tokens": tokens, "loss": first.get("loss"), "mfu": mean("mfu"),
        "memory_gb": _memory(timed), "parts": {key[6:]: mean(key) * seconds for key in shares},
    }  # fmt: skip


def _rejection(asked: Asked, lines: list[dict]) -> dict:
    """A round is one sampling and its updates, which are scaled to the round's own number of problems and, as the
    share of right solutions was the same, of solutions kept."""
    place = next(i for i, line in enumerate(lines) if "kept" in line)
    sampled, updates = lines[place], [line for line in lines[place + 1 :] if "loss" in line]
    config = asked.configs["RejectionConfig"]
    problems = min(PROBLEMS, config.num_prompts or PROBLEMS)
    sampling = sampled["time"] - lines[place - 1]["time"]
    learning = updates[-1]["time"] - sampled["time"]
    tokens = sampled["completion_length"] * problems * config.num_generations
    return {
        "seconds": sampling + learning, "tokens": tokens, "loss": updates[0]["loss"], "mfu": None,
        "memory_gb": _memory(lines), "parts": {"sample": sampling, "learn": learning},
    }  # fmt: skip


def _memory(lines: list[dict]) -> float | None:
    """Most memory of a process in GiB: what the stage logged; else, without a GPU, of the largest process started."""
    import torch

    logged = [line["memory_gb"] for line in lines if "memory_gb" in line]
    if logged:
        return max(logged)
    if torch.cuda.is_available():
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30
