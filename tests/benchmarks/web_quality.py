"""FineWeb's quality rules against labels of people: what each rule, all of them, and all but one keep of good and bad.

In: JSONL of text and label (1: good for pretraining, 0: bad), as DCLM's `agreement_data.jsonl` (Li et al. 2024,
2406.11794: 281 web documents). Out: web_quality.{json,md}.

    python tests/benchmarks/web_quality.py --labels dclm_human_quality/agreement_data.jsonl

Precision: share of good documents among the kept; recall: share of the good ones that are kept. The rules have
FineWeb's settings and are run in its order, where C4's changes the text that FineWeb's own rules see.
"""

import argparse
from collections import Counter
from pathlib import Path

from posttrain.checkpoint import sha256_file, write_json
from posttrain.data.web import quality_steps
from posttrain.data.web_config import QUALITY, StepsConfig
from posttrain.data.web_labels import agreement, read_labels, verdicts
from posttrain.figures import measure
from posttrain.web_figure import title

REASONS = 12  # in the table, those that drop most


def main() -> None:
    options = parser().parse_args()
    rows = read_labels(options.labels)[: options.max_rows]
    result = {
        "command": f"python tests/benchmarks/web_quality.py --labels {Path(options.labels).name}",
        "labels_sha256": sha256_file(Path(options.labels)), "documents": len(rows), "good": sum(y for _, y in rows),
        **compare(rows),
    }  # fmt: skip
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "web_quality.json", result)
    (out / "web_quality.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--labels", required=True, help="JSONL with the columns text and label (1 good, 0 bad)")
    each.add_argument("--max_rows", type=int, default=None)
    each.add_argument("--out", default="tests/benchmarks/results")
    return each


def compare(rows: list[tuple[str, int]]) -> dict:
    """{"choices": [{"rules", "agreement"}], "reasons": [{"reason", "good", "bad"}]}."""
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    choices = [("no rule", ())] + [(title(name), (name,)) for name in QUALITY] + [("all four", QUALITY)]
    choices += [(f"all but {title(name)}", tuple(n for n in QUALITY if n != name)) for name in QUALITY]
    lines, reasons = [], []
    for name, rules in choices:
        steps = StepsConfig(**{rule: rule in rules for rule in QUALITY})
        found = verdicts(quality_steps(steps), texts)
        lines.append({"rules": name, "agreement": agreement(labels, [why is None for why in found])})
        if rules == QUALITY:
            counted = Counter(why for why in found if why).most_common()
            good = Counter(why for why, label in zip(found, labels, strict=True) if label)
            reasons = [{"reason": why, "good": good[why], "bad": count - good[why]} for why, count in counted]
    return {"choices": lines, "reasons": reasons}


def table(result: dict) -> str:
    def shown(entry: dict | None) -> str:
        return " ".join(measure(entry, "%")) if entry else "–"

    lines = [
        "# FineWeb's quality rules against labels of people", "", f"`{result['command']}`", "",
        f"{result['documents']} web documents, {result['good']} of them good. Brackets: 95 % intervals.", "",
        "| rules | good among kept (precision) | good kept (recall) | bad kept |", "|---|---|---|---|",
    ]  # fmt: skip
    for line in result["choices"]:
        found = line["agreement"]
        cells = [line["rules"], *(shown(found[key]) for key in ("precision", "recall", "bad_kept"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What drops a document first, with all four:", "", "| reason | good dropped | bad dropped |"]
    lines += ["|---|---|---|"]
    lines += [f"| {each['reason']} | {each['good']} | {each['bad']} |" for each in result["reasons"][:REASONS]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
