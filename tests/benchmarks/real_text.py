"""Real text: a tokenizer and a small model trained by the recipes, held against compressors and byte n-grams.

In: a file of texts in the order of their conversations. Out: bits per byte of held-out texts as a table, and with
`--out` a .md and a .json.

    python tests/benchmarks/real_text.py --data texts.jsonl.gz --minutes 15 --out tests/benchmarks/results/real_text

- Held out are `--blocks` runs of neighbouring rows, evenly spread, so that whole conversations are; `--margin` rows
  on either side belong to neither set, and held-out rows that share their text or 13 words in a row with training are
  left out (posttrain/data/overlap.py). Every figure is over the bytes of the same texts.
- Compressors take all held-out texts as one stream, end to end, with no sign between them; "after the training text"
  is what the stream grows by when the training text stands before it.
- n-grams (byte_ngrams.py) learn from all training texts; a text's first bytes have shorter contexts.
- The model: recipes/tokenizer.py, then recipes/pretrain.py for `--steps`, or as many as a trial of some steps says
  fill `--minutes`. Its figure is that of the recipe's manifest: it, too, predicts no end of a text, and it sees at
  most `sequence_length` tokens at once.
"""

import argparse
import gzip
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from datetime import date
from pathlib import Path

from byte_ngrams import ByteNgrams
from rl_tables import command

from posttrain.checkpoint import write_json
from posttrain.data import DataConfig, load_rows
from posttrain.data.overlap import find_overlap
from posttrain.provenance import machine, versions

ROOT, REAL = Path(__file__).parents[2], "POSTTRAIN_REAL_DATA"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
TOKENIZER = {"vocab_size": 4096, "split": "gpt4"}
PRETRAIN = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "sequence_length": 256, "max_position_embeddings": 256, "batch_size": 8, "micro_batch_size": 8,
    "optim": "muon", "learning_rate": 3e-3, "lr_scheduler_type": "wsd", "warmup_steps": 50, "bf16": "true",
}  # fmt: skip
TRIAL = 12  # steps that are timed; of the first third nothing is taken
WINDOW = 32_768  # bytes that deflate looks back
SIGNS = ["same_text", "ngram_13"]


def main(argv: list[str] | None = None) -> dict:
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.work or made)
        folder.mkdir(parents=True, exist_ok=True)
        train, held, facts = split(options)
        result = {"date": date.today().isoformat(), "command": shown_command(), "machine": machine()}
        result |= {"versions": versions(), "data": facts, "bits per byte": baselines(train, held, options.order)}
        result |= trained(folder, train, held, options)
    result["bits per byte"]["the model"] = result["model"]["bits per byte"]
    text = markdown(result)
    print(text)
    if options.out:
        write_json(Path(f"{options.out}.json"), result)
        Path(f"{options.out}.md").write_text(text, encoding="utf-8")
    return result


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--data", required=True, help="rows with `text`, as any stage reads them")
    each.add_argument("--rows", type=int, help="read so many rows; default: all")
    each.add_argument("--held", type=int, default=2000, help="rows that are held out, before those in both sets")
    each.add_argument("--blocks", type=int, default=8, help="in so many runs of neighbouring rows")
    each.add_argument("--margin", type=int, default=40, help="rows on either side of a block that nobody sees")
    each.add_argument("--order", type=int, default=6, choices=range(1, 7), help="longest context of n-grams, bytes")
    each.add_argument("--minutes", type=float, default=15.0, help="how long the model is trained")
    each.add_argument("--steps", type=int, help="optimizer steps, in place of --minutes")
    each.add_argument("--tokenizer", nargs="*", default=[], metavar="KEY=VALUE", help="keys of recipes/tokenizer.py")
    each.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="keys of recipes/pretrain.py")
    each.add_argument("--work", help="folder for data and stages; default: one that is removed")
    each.add_argument("--out", help="where the result goes, without .json and .md")
    return each


# ---- data -----------------------------------------------------------------------------------------------------------


def held_out_places(rows: int, held: int, blocks: int, margin: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out) of `rows` rows: `blocks` runs, each in the middle of its share."""
    size, share = held // blocks, rows / blocks
    if size < 1 or size + 2 * margin >= share:
        raise SystemExit(f"--held {held}, --blocks {blocks}, --margin {margin}: too many for {rows} rows")
    starts = [int(share * (number + 0.5) - size / 2) for number in range(blocks)]
    out = {index for start in starts for index in range(start, start + size)}
    hidden = {index for start in starts for index in range(start - margin, start + size + margin)}
    return [index for index in range(rows) if index not in hidden], sorted(out)


def split(options) -> tuple[list[str], list[str], dict]:
    """(training texts, held-out texts, numbers), without held-out texts that are in training, too."""
    config = DataConfig(options.data, max_rows=options.rows, dedup="none")
    rows, source = load_rows(config, "train", 0, ("text",))
    places = held_out_places(len(rows), options.held, options.blocks, options.margin)
    train, held = ([{"text": rows[index]["text"]} for index in found] for found in places)
    overlap = find_overlap(train, held).test
    seen = set().union(*(overlap[kind] for kind in SIGNS))
    kept = [row["text"] for index, row in enumerate(held) if index not in seen]
    if not kept:
        raise SystemExit(f"--data: all {len(held)} held-out rows are in training, too ({', '.join(SIGNS)})")
    texts = [row["text"] for row in train]
    facts = {
        "name": Path(options.data).name, "sha256": source["sha256"], "rows": len(rows), "training rows": len(texts),
        "training bytes": size_of(texts), "held-out rows": len(kept), "held-out bytes": size_of(kept),
        "held-out rows in training, too, left out": {kind: len(overlap[kind]) for kind in SIGNS},
    }  # fmt: skip
    return texts, kept, facts


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ---- what the model is held against ---------------------------------------------------------------------------------


def baselines(train: list[str], held: list[str], order: int) -> dict[str, dict]:
    """name -> {"value", "low", "high", "n", "unit"} of compressors and n-grams; one stream has no interval."""
    before, data = ("".join(texts).encode() for texts in (train, held))
    sizes = {
        "gzip -9": len(gzip.compress(data, 9, mtime=0)),
        "xz -9e": len(xz(data)),
        "deflate -9 after the last 32 kB of training text": len(deflate_after(before, data)),
        "xz -9e after the training text": len(xz(before + data)) - len(xz(before)),
    }
    found = {name: one_stream(8 * size / len(data), len(held)) for name, size in sizes.items()}
    for context, figure in ByteNgrams(train, order).bits_per_byte(held).items():
        found[f"byte {context + 1}-gram"] = figure
    return found


def one_stream(value: float, texts: int) -> dict:
    return {"value": value, "low": None, "high": None, "n": texts, "unit": "bits/byte"}


def xz(data: bytes) -> bytes:
    """As `xz -9e`; its dictionary of 64 MiB holds all that stands before, of up to that size."""
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def deflate_after(before: bytes, data: bytes) -> bytes:
    """gzip's method, all that it can look back on filled with the end of `before`; 18 bytes of frame less."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=before[-WINDOW:])
    return packer.compress(data) + packer.flush()


# ---- the model ------------------------------------------------------------------------------------------------------


def trained(folder: Path, train: list[str], held: list[str], options) -> dict:
    """{"tokenizer": facts, "model": facts} of both recipes' manifests."""
    for name, texts in (("train", train), ("test", held)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"dataset_name": folder, "dedup": "none", "on_leak": "report"}
    tokenizer = recipe("tokenizer", folder, {**data, **TOKENIZER, **pairs(options.tokenizer)})
    keys = {
        **data, "tokenizer_path": folder / "tokenizer", "shards_dir": folder / "tokens", **PRETRAIN,
        **pairs(options.pretrain),
    }  # fmt: skip
    steps = options.steps or steps_of(folder, keys, options.minutes)
    keys["warmup_steps"] = min(int(keys["warmup_steps"]), max(1, steps // 10))
    model = recipe("pretrain", folder, {**keys, "max_steps": steps})
    lines = log_of(folder / "pretrain")
    return {
        "tokenizer": {key: tokenizer[key] for key in ("vocab_size", "metrics", "wall_time_s")},
        "model": {
            "parameters": model["parameters"], "steps": steps, "tokens": model["tokens"],
            "training tokens": model["data"][0]["tokens"], "training seconds": lines[-1]["time"],
            "loss": lines[-1]["loss"], "wall_time_s": model["wall_time_s"], "samples": model["samples"],
            "bits per byte": model["metrics"]["bits per byte"], "byte trigram": model["metrics"]["trigram"],
            "config": {key: model["config"][key] for key in (*PRETRAIN, "max_steps")},
        },
    }  # fmt: skip


def pairs(given: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in given)


def recipe(name: str, folder: Path, keys: dict, out: str | None = None) -> dict:
    """Run a recipe as a user would and return its manifest."""
    target = folder / (out or name)
    flags = [text for key, value in {**keys, "output_dir": target}.items() for text in (f"--{key}", str(value))]
    launch([str(ROOT / "recipes" / f"{name}.py"), *flags])
    return json.loads((target / "stage.json").read_text(encoding="utf-8"))


def launch(arguments: list[str]) -> None:
    subprocess.run([*LAUNCH, *arguments], cwd=ROOT, check=True)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(folder: Path, keys: dict, minutes: float) -> int:
    """How many steps fill so many minutes, by a trial of a few on one held-out text."""
    short = {"max_steps": TRIAL, "logging_steps": 1, "warmup_steps": 1, "eval_max_rows": 1, "overwrite": "true"}
    recipe("pretrain", folder, {**keys, **short}, "trial")
    times = [line["time"] for line in log_of(folder / "trial")]
    each = statistics.median(b - a for a, b in zip(times[TRIAL // 3 :], times[TRIAL // 3 + 1 :], strict=False))
    return max(1, math.floor(60 * minutes / each))


def shown_command() -> str:
    """The command, with the folder of POSTTRAIN_REAL_DATA by that name."""
    folder = os.environ.get(REAL)
    return command() if not folder else command().replace(folder.rstrip("/"), f"${REAL}")


# ---- words ----------------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    data, model, tokenizer = result["data"], result["model"], result["tokenizer"]
    seen = ", ".join(f"{kind} {num}" for kind, num in data["held-out rows in training, too, left out"].items())
    config, density = model["config"], tokenizer["metrics"]["bytes per token"]["value"]
    passes = model["tokens"] / model["training tokens"]
    lines = [
        "# Real text: bits per byte of held-out texts",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']['device']}, {result['machine']['cores']} cores.",
        "",
        f"{data['name']}: {data['training rows']:,} texts to learn from, {data['training bytes']:,} bytes; "
        f"{data['held-out rows']:,} texts held out in runs of neighbouring rows, {data['held-out bytes']:,} bytes, "
        f"without rows that are in training, too ({seen}).",
        "",
        f"The model: {config['num_hidden_layers']} layers of {config['hidden_size']}, {model['parameters']:,} "
        f"parameters; {tokenizer['vocab_size']:,} tokens of {density:.2f} bytes; {model['steps']:,} steps, "
        f"{model['tokens']:,} tokens, which is {passes:.2f} times over the training text, in "
        f"{model['training seconds'] / 60:.1f} minutes.",
        "",
        "| held-out texts under | bits per byte | 95 % over texts |",
        "|---|---|---|",
    ]
    for name, figure in result["bits per byte"].items():
        interval = "one stream" if figure["low"] is None else f"[{figure['low']:.3f}, {figure['high']:.3f}]"
        lines.append(f"| {name} | {figure['value']:.3f} | {interval} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
