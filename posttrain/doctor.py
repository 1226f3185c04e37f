"""The doctor: plain sentences where a run goes wrong, or looks as if it did and does not, each with its mend.

In: lines of a stage's log.jsonl, and its config. Out: `Remark`s. While training:

    doctor = doctor_of(stage)
    for remark in doctor.look(line): stage.note(str(remark))

Afterwards: `python -m posttrain.doctor runs/tiny/grpo` (or a whole run's folder). What is looked for stands in
posttrain/doctor_checks.py.
"""

import json
import math
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from posttrain.doctor_checks import CHECKS, NORMAL, History, is_number
from posttrain.errors import UserError, entry

WINDOW = 60  # lines that are looked at
QUIET = 10  # steps a remark must have been away for before it is said again


@dataclass(frozen=True)
class Remark:
    """`normal`: it looks wrong and is not. `key` names the check."""

    key: str
    step: int
    text: str
    normal: bool = False

    def __str__(self) -> str:
        return f"doctor, step {self.step}: {'(normal) ' if self.normal else ''}{self.text}"


def remarks(history: History, config: dict) -> list[Remark]:
    """What there is to say of the newest line of a history, in the light of those before it."""
    if not history:
        return []
    history = [{key: value for key, value in line.items() if is_number(value)} for line in history]
    step, found = history[-1]["step"], []
    for check in (*CHECKS, *NORMAL):
        text = check(history, config)
        if text is not None:
            found.append(Remark(check.__name__, step, text, check in NORMAL))
    return found


class Doctor:
    """Keeps the last lines; says a remark once, and again only after it has been away for QUIET steps."""

    def __init__(self, config: dict):
        self.config, self.history = config, deque(maxlen=WINDOW)
        self.last: dict[str, int] = {}  # key -> step at which it last held

    def look(self, line: dict) -> list[Remark]:
        """New remarks after one more line of the log; `line` has its step."""
        self.history.append(line)
        found = remarks(list(self.history), self.config)
        new = [each for each in found if each.step - self.last.get(each.key, -math.inf) > QUIET]
        self.last |= {each.key: each.step for each in found}
        return new


def heard(lines: History, config: dict) -> list[Remark]:
    """All that the doctor would have said while these lines were logged."""
    doctor = Doctor(config)
    return [remark for line in lines if is_number(line.get("step")) for remark in doctor.look(line)]


def diagnose(folder: str | Path) -> list[Remark]:
    """The remarks on a stage's folder, finished or not. UserError where it has no log.jsonl or one that is broken."""
    from posttrain import yaml_file

    folder = Path(folder)
    if not (folder / "log.jsonl").is_file():
        raise UserError(f"{folder}: no log.jsonl; expected the folder of a stage that trains, such as runs/tiny/grpo")
    config = {}
    if (folder / "config.yaml").is_file():
        config = {key: entry.value for key, entry in yaml_file.read(folder / "config.yaml").items()}
    return heard(read_log(folder / "log.jsonl"), config)


def read_log(file: Path) -> History:
    """The lines of a log.jsonl, but for a last one that is being written. UserError naming a line that is no JSON."""
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            lines += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from error
    return lines


def doctor_of(stage) -> Doctor:
    """A doctor for a stage that trains; one that is resumed has it know what was logged, and said, before."""
    doctor, log = Doctor(stage.config), stage.output_dir / "log.jsonl"
    for line in read_log(log) if stage.resume_folder is not None and log.is_file() else []:
        doctor.look(line)
    return doctor


def tell(folder: str | Path) -> str:
    """The remarks on a stage, or on each stage of a run, as text."""
    folder = Path(folder)
    stages = sorted(path.parent for path in folder.glob("*/log.jsonl"))
    if (folder / "log.jsonl").is_file() or not stages:
        stages = [folder]
    told = []
    for stage in stages:
        found = diagnose(stage)
        told += [f"{stage.name}: {line}" for line in map(str, found)] or [f"{stage.name}: nothing to remark on"]
    return "\n".join(told)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: python -m posttrain.doctor RUN, the folder of a stage or of a run, e.g. runs/tiny")
    print(tell(sys.argv[1]))


if __name__ == "__main__":
    entry(main)
