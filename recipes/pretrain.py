"""Stage 2, the base model: texts in, a Llama that continues text out.

accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml [--max_steps 200]
Gain: bits per byte of held-out text against a byte-trigram model of the same training text; `eval_goal: 0.4` aims at
40 % fewer.
"""

from posttrain import base_evals, evals, intervals, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig
from posttrain.models import ShapeConfig, load_tokenizer, make_llama, save_pair
from posttrain.pretrain import PretrainConfig, make_chunks, pretrain
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ARGS = (StageConfig, DataConfig, EvalConfig, ShapeConfig, PretrainConfig, OptimConfig)


def check(argv, planned=()) -> dict:
    configs = own, source, held_out, _, config, _ = parse(ARGS, argv)
    stage.describe_parents({"tokenizer": config.tokenizer_path}, planned)
    evals.check_both(source, held_out, own.seed, ("text",))
    return resolved(*configs)


def main() -> None:
    configs = own, source, held_out, shape, config, optim = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("text",))
    run = stage.start("pretrain", configs, parents={"tokenizer": config.tokenizer_path}, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    tokenizer = load_tokenizer(config.tokenizer_path)
    model = make_llama(shape, tokenizer).to(accelerator.device)
    texts = [row["text"] for row in rows]
    tokens = pretrain(run, accelerator, model, make_chunks(tokenizer, texts, config.sequence_length), config, optim)

    trigram = base_evals.ByteTrigram(texts).bits_per_byte([row["text"] for row in test])
    bits = base_evals.bits_per_byte(model, tokenizer, [row["text"] for row in test], config.sequence_length)
    gain = intervals.gain(
        "bits per byte", trigram, bits, labels=("byte trigram", "base model"), better="lower",
        goal=f">= {held_out.eval_goal:.0%} fewer", passed=bits["high"] <= (1 - held_out.eval_goal) * trigram["low"],
    )  # fmt: skip
    run.finish(
        lambda folder: save_pair(model, tokenizer, folder), metrics={"bits per byte": bits, "trigram": trigram},
        gains=[gain], tokens=tokens, parameters=model.num_parameters(),
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
