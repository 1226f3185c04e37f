"""Stage 2, the base model: texts in, a model that continues text out.

accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml [--max_steps 200] [--model_type gpt2]
Shapes key by key, from a config.json (`shape_of`) or by one dial (`depth`); `model_name_or_path` goes on from a
checkpoint. Gain: bits per byte of held-out text against a byte-trigram model of the training text, or against the
checkpoint that it began with; `eval_goal: 0.4` aims at 40 % fewer.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig
from posttrain.models import save_pair
from posttrain.pretrain import PretrainConfig, PretrainOptim, pretrain
from posttrain.pretrain_eval import COLUMNS, Watch, start_model, token_shards
from posttrain.shapes import ShapeConfig, dial
from posttrain.stage import StageConfig

ARGS = (StageConfig, DataConfig, EvalConfig, ShapeConfig, PretrainConfig, PretrainOptim)


def parsed(argv=None, description="") -> tuple:
    own, source, held_out, shape, config, optim = parse(ARGS, argv, description=description)
    return own, source, held_out, shape, *dial(shape, config, optim)


def check(argv, planned=()) -> dict:
    configs = own, source, held_out, _, config, _ = parsed(argv)
    stage.describe_parents(config.parents, planned)
    evals.check_both(source, held_out, own.seed, COLUMNS)
    return resolved(*configs)


def main() -> None:
    configs = own, source, held_out, shape, config, optim = parsed(description=__doc__)
    rows, test, sources = evals.load_or_stream(source, held_out, own.seed, COLUMNS)
    run = stage.start("pretrain", configs, parents=config.parents, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    model, tokenizer = start_model(shape, config)
    tokens = token_shards(run, rows, tokenizer, config)
    watch = Watch(run, model.to(accelerator.device), tokenizer, test, config)
    position = pretrain(run, accelerator, model, tokens, config, optim, watch.during)

    metrics, gains, samples = watch.after(rows, held_out.eval_goal)
    run.finish(
        lambda folder: save_pair(model, tokenizer, folder), metrics=metrics, gains=gains, samples=samples,
        tokens=position["tokens"], position=position, parameters=model.num_parameters(),
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
