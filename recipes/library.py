"""A library to search: texts in, a folder with documents.jsonl out, for the tool `search` of later stages.

accelerate launch recipes/library.py --config recipes/tools/library.yaml
Then `tools: [search]`, `tool_options: {search: {folder: runs/tools/library}}`. Nothing is trained, so it has no gain.
"""

import json

from posttrain import data, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig, load_rows
from posttrain.errors import entry
from posttrain.intervals import measured
from posttrain.stage import StageConfig

ARGS = (StageConfig, DataConfig)


def check(argv, planned=()) -> dict:
    own, source = parse(ARGS, argv)
    data.check(source, source.dataset_train_split, own.seed, ("text",))
    return resolved(own, source)


def main() -> None:
    own, source = parse(ARGS, description=__doc__)
    rows, described = load_rows(source, source.dataset_train_split, own.seed, ("text",))
    run = stage.start("library", (own, source), parents={}, data=[described])
    lines = [
        json.dumps({key: row[key] for key in ("title", "text") if key in row}, ensure_ascii=False) for row in rows
    ]

    def write(folder) -> None:
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    run.finish(write, metrics={"document": measured([float(len(row["text"])) for row in rows], "characters")})


if __name__ == "__main__":
    entry(main)
