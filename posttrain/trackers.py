"""Charts of a run while it runs: the numbers of log.jsonl, sent on to trackio, Weights & Biases or TensorBoard.

In: `report_to` and the numbers of a step. Out: curves in the named trackers, by Accelerate's classes for them; where
they lie or go to is each tracker's own affair (TRACKIO_DIR, WANDB_MODE=offline, ...), TensorBoard's are in
<output_dir>/tensorboard. log.jsonl is written always. In a recipe's YAML, or as flags:

    report_to: [trackio, tensorboard]    # `trackio show` and `tensorboard --logdir runs` draw them
    run_name: grpo-lr-3e-6
    tracker_project: posttrain
"""

import atexit
import re
import uuid
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import UserError

TRACKERS = ("trackio", "wandb", "tensorboard")
RUN_ID = "tracker_run.txt"  # in output_dir: what a resumed run's curves go on under
# A key that is one of these words, or ends in one: api_key, hub_token. max_tokens and pad_token_id are none.
SECRET = re.compile(r"(^|_)(key|token|secret|password|credentials?)$", re.IGNORECASE)


def chosen(report_to: list[str]) -> list[str]:
    """The trackers that `report_to` names; none for [] and [none]. UserError for a name that is unknown."""
    if report_to in ([], ["none"]):
        return []
    for name in report_to:
        if name not in TRACKERS:
            mend = "; none stands alone" if name == "none" else ""
            raise UserError(f"report_to: found {name!r}, expected none, or some of {', '.join(TRACKERS)}{mend}")
    return list(dict.fromkeys(report_to))


def require_installed(names: list[str]) -> None:
    """UserError naming a tracker that is not installed: at the start, not after an hour."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed: pip install 'posttrain[{name}]', or leave it out")


def without_secrets(config: dict) -> dict:
    """`config` flat ("outer.inner"), as trackers take it; the values of keys that look like secrets are left out."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": kept for inner, kept in without_secrets(value).items()}
        elif SECRET.search(str(key)) and value is not None:
            flat[str(key)] = "(not shown)"
        else:
            flat[str(key)] = value if isinstance(value, (bool, int, float, str)) else repr(value)
    return flat


class Trackers:
    """The open trackers of one stage's run; only its main process makes one.

    step: what the run was resumed at, 0 for a fresh one. Curves of a resumed run go on where its checkpoint was.
    """

    def __init__(self, config: dict, folder: Path, stage: str, step: int = 0):
        names = chosen(config["report_to"])
        require_installed(names)
        project = config["tracker_project"]
        run_name = config["run_name"] or "-".join(folder.absolute().parts[-2:])
        facts = {"stage": stage, **without_secrets(config)}
        self.open = [start_one(name, project, run_name, facts, folder, step) for name in names]
        atexit.register(self.close)

    def log(self, step: int, numbers: dict) -> None:
        for tracker in self.open:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Write what is still held back; a second call does nothing."""
        while self.open:
            self.open.pop().finish()
        atexit.unregister(self.close)


def start_one(name: str, project: str, run_name: str, facts: dict, folder: Path, step: int):
    """One of Accelerate's trackers, started, with the config stored."""
    from accelerate import tracking

    if name == "tensorboard":
        # purge_step hides what an interrupted run drew after the checkpoint that this one goes on from.
        tracker = tracking.TensorBoardTracker(name, folder, purge_step=step + 1 if step else None)
        tracker.start()
        tracker.tracker.add_text("config", "\n".join(f"    {key}: {value}" for key, value in facts.items()))
        return tracker
    if name == "trackio":
        tracker = tracking.TrackioTracker(project, name=run_name, config=facts, resume="allow" if step else "never")
    else:
        file = folder / RUN_ID
        if not (step and file.is_file()):
            file.write_text(uuid.uuid4().hex)
        tracker = tracking.WandBTracker(
            project, name=run_name, config=facts, dir=str(folder), id=file.read_text(), resume="allow"
        )
    tracker.start()
    return tracker
