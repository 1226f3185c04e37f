"""The reward model's training beside TRL's `RewardTrainer`: speed on the same sequences, and held-out accuracy.

In: rankings, as any stage reads them, and a model (a folder, or a Llama made here). Out: a table, and JSON with
`--out`. Ours learns from whole rankings, each prompt run once; TRL 1.16 from all pairs of each ranking, padded.

    python tests/benchmarks/reward_vs_trl.py                                    # the tiny world, a small Llama
    python tests/benchmarks/reward_vs_trl.py --data oasst.jsonl --adapter oasst_rankings \
        --model HuggingFaceTB/SmolLM2-135M --test messages.jsonl --steps 20 --evaluate

Protocol: equal token ids, weights and dtype; A B A B with `--repeats` rounds; medians, and the ratio with its lowest
and highest round. "default" is TRL as it comes (bf16 autocast, gradient checkpointing), "tuned" has neither (--bf16:
the first) and puts pairs of like length together. Speed counts each distinct sequence of a ranking once for both:
what a ranking's K (K - 1) / 2 pairs cost TRL more is its way to read a ranking. `--pairs` leaves the best and the
worst of each: K = 2.
"""

import argparse
import json
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch

from posttrain import stage
from posttrain.chat import set_template
from posttrain.data import DataConfig, load_rows, origin
from posttrain.layouts import find_layout
from posttrain.lora import LoraArgs
from posttrain.models import ModelConfig, load_pair, load_scalar_model, save_pair
from posttrain.ranking_forward import score_rankings
from posttrain.ranking_metrics import measure_rankings
from posttrain.ranking_rows import Ranking, encode_rankings
from posttrain.reward_model import RewardConfig, prepare, train
from posttrain.shapes import ShapeConfig, make_model
from posttrain.tokenizer import train_tokenizer
from posttrain.training import OptimConfig

ROOT = Path(__file__).parents[2]
KINDS = ("ours", "TRL tuned", "TRL default")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: seconds of all threads, on a machine not alone


def main(argv: list[str] | None = None) -> dict:
    options = parser().parse_args(argv)
    torch.manual_seed(0)
    model, tokenizer = start_model(options)
    rankings, held, dropped = load_data(options, tokenizer)
    rounds: list[dict] = []
    for number in range(options.repeats):
        rounds.append({kind: run(kind, model, tokenizer, rankings, options, number) for kind in options.kinds})
        print(json.dumps({kind: round(found["tokens_per_second"]) for kind, found in rounds[-1].items()}), flush=True)
    result = summary(options, rankings, len(held), rounds) | {"dropped as shared": dropped}
    if held:
        result["held out"] = {kind: evaluate(found["model"], held) for kind, found in rounds[0].items()}
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("--model", help="a folder or a name on the Hub; default: a Llama of --hidden_size and --layers")
    each.add_argument("--hidden_size", type=int, default=128)
    each.add_argument("--layers", type=int, default=4)
    each.add_argument("--template", help="for a model without a chat template; default: ChatML")
    each.add_argument("--data", default="tiny")
    each.add_argument("--adapter")
    each.add_argument("--test", help="held-out rows; those that share a first turn with training rows are dropped")
    each.add_argument("--split", default="train", help="or a slice, such as train[:-200]")
    each.add_argument("--test_split", default="test")
    each.add_argument("--pairs", action="store_true", help="only the best and the worst of each ranking")
    each.add_argument("--rows", type=int, default=512)
    each.add_argument("--max_length", type=int, default=512)
    each.add_argument("--batch_size", type=int, default=16, help="rankings a step")
    each.add_argument("--steps", type=int, default=10)
    each.add_argument("--repeats", type=int, default=5)
    each.add_argument("--max_tokens", type=int, default=8192, help="ours: tokens of a micro-batch")
    each.add_argument("--layout", default="auto", help="ours")
    each.add_argument("--bf16", action="store_true", help="autocast, for ours and for TRL tuned")
    each.add_argument("--clock", choices=CLOCKS, default="wall")
    each.add_argument("--learning_rate", type=float, default=1e-4)
    each.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    each.add_argument("--evaluate", action="store_true", help="held-out accuracy after the first round")
    each.add_argument("--out")
    return each


def start_model(options):
    """(scalar-head model in fp32, its tokenizer); both trainers start from copies of it. A model without a chat
    template is given one, with new tokens' embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        if options.model:
            chat, tokenizer = load_pair(ModelConfig(options.model))
        else:
            tokenizer = train_tokenizer(["abc"], vocab_size=261)
            width = options.hidden_size
            chat = make_model(ShapeConfig(width, 3 * width, options.layers, 4, options.max_length), tokenizer)
        if tokenizer.chat_template is None:
            set_template(tokenizer, chat, options.template or str(ROOT / "chat_templates/chatml.jinja"))
        save_pair(chat, tokenizer, folder)
        model = load_scalar_model(ModelConfig(folder))
    prepare(model, tokenizer, LoraArgs())
    return model, tokenizer


def load_data(options, tokenizer) -> tuple[list[Ranking], list[Ranking], int]:
    """(to learn from, held out, held-out rows dropped since training has their first turn)."""
    kind = "rankings" if options.data == "tiny" else None

    def read(name: str, split: str) -> list[dict]:
        data = DataConfig(name, dataset_config=kind, dataset_adapter=options.adapter, max_rows=options.rows)
        return load_rows(data, split, 0, ("prompt",))[0]

    rows, test = read(options.data, options.split), []
    if options.evaluate:
        test = read(options.test or options.data, options.test_split)
    seen = {origin(row) for row in rows}
    unseen = [row for row in test if origin(row) not in seen]
    parts = [encode_rankings(tokenizer, part, options.max_length)[0] if part else [] for part in (rows, unseen)]
    if options.pairs:
        parts[0] = [
            Ranking([r.sequences[0], r.sequences[-1]], [0, 1], r.row) for r in parts[0] if r.ranks[0] < r.ranks[-1]
        ]
    return parts[0], parts[1], len(test) - len(unseen)


def run(kind: str, model, tokenizer, rankings: list[Ranking], options, number: int) -> dict:
    """Train a copy of `model` for the steps asked for; seconds of training alone, without loading and encoding."""
    from accelerate.state import AcceleratorState

    model = deepcopy(model)
    AcceleratorState._reset_state()  # one process, several precisions: there is no public way (accelerate 1.15)
    with tempfile.TemporaryDirectory() as folder:
        call = ours if kind == "ours" else trl
        seconds, loss, tokens = call(model, tokenizer, rankings, options, Path(folder) / "out", kind)
    speed = {"seconds": seconds, "loss": loss, "tokens_per_second": tokens / seconds}
    return speed | {"model": model if number == 0 else None}


def ours(model, tokenizer, rankings, options, out: Path, kind: str) -> tuple[float, float, float]:
    """(seconds, mean loss, tokens seen: of each distinct sequence once)."""
    loss_type = "bradley_terry" if options.pairs else "plackett_luce"
    config = RewardConfig(
        loss_type=loss_type, max_steps=options.steps, batch_size=options.batch_size, max_length=options.max_length,
        max_tokens_per_microbatch=options.max_tokens, layout=options.layout,
    )  # fmt: skip
    optim = OptimConfig(learning_rate=options.learning_rate, warmup_steps=0, adam_beta2=0.999, bf16=options.bf16)
    keys = stage.StageConfig(str(out), logging_steps=1)
    held = stage.start("reward", (keys, config, optim), parents={}, data=[])
    accelerator = stage.accelerator(optim.bf16)
    began = CLOCKS[options.clock]()
    done = train(held, accelerator, model, rankings, config, optim)
    seconds = CLOCKS[options.clock]() - began
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return seconds, statistics.fmean(line["loss"] for line in lines), done.tokens


def trl(model, tokenizer, rankings, options, out: Path, kind: str) -> tuple[float, float, float]:
    """As `ours`; a step has as many pairs as batch_size rankings have on average. TRL counts its tokens that are no
    padding; what pairs repeat of a ranking is taken out by the share of distinct tokens in all pairs."""
    from datasets import Dataset
    from trl import RewardConfig as Settings
    from trl import RewardTrainer

    pairs = [
        {"chosen_ids": r.sequences[i], "rejected_ids": r.sequences[j]}
        for r in rankings
        for i in range(len(r.ranks))
        for j in range(i + 1, len(r.ranks))
        if r.ranks[i] < r.ranks[j]
    ]
    each = len(pairs) / len(rankings)
    size = max(1, round(options.batch_size * each))
    tuned = {
        "bf16": options.bf16, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,  # else TRL drops the lengths
    }  # fmt: skip
    if kind == "TRL tuned":
        pairs = [{**p, "length": len(p["chosen_ids"]) + len(p["rejected_ids"])} for p in pairs]
    settings = Settings(
        output_dir=str(out), per_device_train_batch_size=size, max_steps=options.steps, max_length=options.max_length,
        learning_rate=options.learning_rate, lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(),
        report_to=[], save_strategy="no", logging_steps=options.steps, disable_tqdm=True,
        dataloader_pin_memory=False, **(tuned if kind == "TRL tuned" else {}),
    )  # fmt: skip
    trainer = RewardTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    began = CLOCKS[options.clock]()
    trainer.train()
    seconds = CLOCKS[options.clock]() - began
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    paired = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    distinct = sum(len(s) for r in rankings for s in r.sequences) / paired
    return seconds, float(line["loss"]), float(line["num_tokens"]) * distinct


def evaluate(model, held: list[Ranking]) -> dict:
    """Held-out figures of a trained model, whoever trained it."""
    layout, _ = find_layout(model, max(len(s) for r in held for s in r.sequences))
    metrics = measure_rankings(score_rankings(model.eval(), held, layout), [r.ranks for r in held])
    return {name: metrics[name] for name in ("pair accuracy", "log-likelihood, gain over a guess")}


def summary(options, rankings: list[Ranking], num_held: int, rounds: list[dict]) -> dict:
    """Medians, and ours over each of TRL's with the lowest and highest round."""
    speeds = {kind: [each[kind]["tokens_per_second"] for each in rounds] for kind in options.kinds}
    ratios = {
        kind: [a / b for a, b in zip(speeds["ours"], values, strict=True)]
        for kind, values in speeds.items()
        if kind != "ours" and "ours" in speeds
    }
    lengths = [len(s) for r in rankings for s in r.sequences]
    return {
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "rankings": len(rankings),
        "held-out rankings": num_held,
        "replies a ranking": len(lengths) / len(rankings),
        "tokens a sequence": statistics.fmean(lengths),
        "tokens that stand once a ranking": sum(r.size for r in rankings) / sum(lengths),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens per second": {kind: statistics.median(values) for kind, values in speeds.items()},
        "mean loss": {kind: [each[kind]["loss"] for each in rounds] for kind in options.kinds},
        "ours over": {
            kind: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for kind, values in ratios.items()
        },
    }


def table(result: dict) -> str:
    """The result as markdown."""
    lines = [
        f"| trainer | tokens/s (median, {result['settings']['clock']}) | ours is faster by | held-out pair accuracy |",
        "|---|---|---|---|",
    ]
    for kind, speed in result["tokens per second"].items():
        ratio = result["ours over"].get(kind)
        times = "" if ratio is None else f"{ratio['median']:.2f} x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        found = result.get("held out", {}).get(kind, {}).get("pair accuracy")
        right = "" if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        lines.append(f"| {kind} | {speed:,.0f} | {times} | {right} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
