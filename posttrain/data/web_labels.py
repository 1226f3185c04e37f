"""The quality rules against labels of people: what they keep of the good and of the bad documents.

In: a JSONL file of text and label (1 good, 0 bad), the rules that are on. Out: metrics with intervals and a gain.
Used by `recipes/clean.py` (`eval_labels`) and tests/benchmarks/web_quality.py.
"""

from pathlib import Path

from posttrain.data import files
from posttrain.data.bad_rows import BadRows
from posttrain.data.web_config import StepsConfig, WebConfig
from posttrain.errors import UserError
from posttrain.intervals import clearly_higher, gain, measured

LONGEST = 100_000_000  # bytes of a labelled row


def read_labels(name: str) -> list[tuple[str, int]]:
    """(text, label) of each row. UserError naming the row that is otherwise, and where one label is missing."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"eval_labels: no file {name}; expected JSONL with the columns text and label")
    found = []
    for (prefix, number), row in files.read([path], BadRows("stop"), LONGEST):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or isinstance(label, bool) or label not in (0, 1):
            raise UserError(
                f"eval_labels: {prefix}{number}: found {', '.join(row)} with label {label!r}, expected text and a "
                "label of 1 (good) or 0 (bad)"
            )
        found.append((text, label))
    if {label for _, label in found} != {0, 1}:
        raise UserError(f"eval_labels: {name}: expected rows of both labels, 1 and 0")
    return found


def verdicts(named_steps: list[tuple], texts: list[str]) -> list[str | None]:
    """For each text what drops it (`c4_quality: curly_bracket`), or None where all of the filters keep it."""
    from datatrove.data import Document

    return [_verdict(named_steps, Document(text=text, id="")) for text in texts]


def _verdict(named_steps: list[tuple], document) -> str | None:
    for name, step in named_steps:
        found = step.filter(document)
        kept, reason = found if isinstance(found, tuple) else (found, None)
        if not kept:
            return f"{name}: {reason}" if reason else name
    return None


def agreement(labels: list[int], kept: list[bool]) -> dict:
    """How far keeping agrees with the labels, each with its 95 % interval: `share` of good documents in all,
    `precision` (among the kept; None where none is), `recall` (good ones kept), `bad_kept`."""
    pairs = list(zip(labels, kept, strict=True))
    among = [float(label) for label, keep in pairs if keep]
    return {
        "share": measured([float(label) for label in labels], "%"),
        "precision": measured(among, "%") if among else None,
        "recall": measured([float(keep) for label, keep in pairs if label], "%"),
        "bad_kept": measured([float(keep) for label, keep in pairs if not label], "%"),
    }


def measure(config: WebConfig, steps: StepsConfig, cleaning: dict) -> tuple[dict, list[dict]]:
    """(metrics, gains) of the stage. Without `eval_labels` there is no gain: nothing says which pages are good.

    The gain is shown where good documents are kept clearly more often than bad ones: then, and only then, the share
    of good ones among the kept is higher than before, and both groups are independent.
    """
    from posttrain.data.web import quality_steps

    metrics = {"pages kept": _share(cleaning["kept"], cleaning["read"])}
    if config.eval_labels is None:
        return metrics, []
    rows = read_labels(config.eval_labels)
    kept = [why is None for why in verdicts(quality_steps(steps), [text for text, _ in rows])]
    found = agreement([label for _, label in rows], kept)
    metrics |= {"labelled good, kept": found["recall"], "labelled bad, kept": found["bad_kept"]}
    if found["precision"] is None:
        return metrics, []
    metrics["labelled good among kept"] = found["precision"]
    sides, goal = ("all documents", "those kept"), "good kept more often than bad, intervals apart"
    passed = clearly_higher(found["bad_kept"], found["recall"])
    row = gain("labelled good", found["share"], found["precision"], labels=sides, goal=goal, passed=passed)
    return metrics, [row]


def _share(part: int, whole: int) -> dict:
    """A count of all pages is no sample: it has no interval."""
    return {"value": part / whole, "low": None, "high": None, "n": whole, "unit": "%"}
