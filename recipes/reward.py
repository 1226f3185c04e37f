"""Stage 4, the reward model: human rankings of K replies in, a model that scores a reply out.

accelerate launch recipes/reward.py --config recipes/tiny/reward.yaml [--loss_type bradley_terry]
Gain: pair accuracy on held-out rankings, against chance. Where rows carry the labeller's true `utilities` (tiny),
their own pair accuracy is the ceiling that noise allows, and `eval_goal: 0.03` aims at 3 points below it or better.
"""

from posttrain import evals, gate, reward_eval, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig
from posttrain.lora import LoraArgs, quantization
from posttrain.models import ModelConfig, load_scalar_model, load_tokenizer, require_positions, save_pair
from posttrain.ranking_rows import encode_rankings
from posttrain.reward_model import RewardConfig, prepare, split_validation, train
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ARGS = (StageConfig, ModelConfig, LoraArgs, DataConfig, RewardConfig, OptimConfig, EvalConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, _, source, _, _, held_out = parse(ARGS, argv)
    stage.describe_parents({"policy": base.model_name_or_path}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",))
    return resolved(*configs)


def main() -> None:
    configs = own, base, lora, source, config, optim, held_out = parse(ARGS, description=__doc__)
    rows, test_rows, sources = evals.load_both(source, held_out, own.seed, ("prompt",))
    run = stage.start("reward", configs, parents={"policy": base.model_name_or_path}, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision)
    model = load_scalar_model(base, **quantization(lora)).to(accelerator.device)
    require_positions(model, "max_length", config.max_length)
    trained = prepare(model, tokenizer, lora)
    rankings, too_long = encode_rankings(tokenizer, rows, config.max_length, config.ties)
    test, test_too_long = encode_rankings(tokenizer, test_rows, config.max_length, config.ties)
    run.note(
        f"{len(rankings)} rankings to learn from, {len(test)} held out; left out as too long: {too_long} and "
        f"{test_too_long}"
    )
    gate.require(run, gate.reward_checks(tokenizer, rows, rankings, run.parents))
    rankings, validation = split_validation(rankings, rows, config)
    done = train(run, accelerator, model, rankings, config, optim, validation)
    found = reward_eval.evaluate(model, test, test_rows, config, goal=held_out.eval_goal)
    run.finish(
        lambda folder: save_pair(trained, tokenizer, folder), **found, tokens=done.tokens,
        parameters=model.num_parameters(), steps=done.step, best_step=done.best_step,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
