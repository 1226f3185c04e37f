"""Stage 3, the chat model: conversations in, a base model taught to answer out.

accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml [--chat_template_path chat_templates/chatml.jinja]
Gains: replies that end with the turn's end token; answers judged by the first of `eval_reward_funcs`, against the base
model given solved examples (few-shot) where the held-out rows have `few_shot`, else asked through the same template.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.chat import read_template, set_template, stop_ids
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig, ReplyConfig
from posttrain.models import ModelConfig, load_pair, require_positions, save_pair
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.sft import SFTConfig, make_trainer, train
from posttrain.sft_rows import encode_rows
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ARGS = (StageConfig, ModelConfig, DataConfig, SFTConfig, OptimConfig, EvalConfig, ReplyConfig, EngineConfig)


def check(argv, planned=()) -> dict:
    configs = own, model, source, config, _, held_out, _, _ = parse(ARGS, argv)
    stage.describe_parents({"policy": model.model_name_or_path}, planned)
    evals.check_both(source, held_out, own.seed, ("messages",), ("prompt",))
    if config.chat_template_path is not None:
        read_template(config.chat_template_path)
    return resolved(*configs)


def main() -> None:
    configs = own, base, source, config, optim, held_out, replies, engines = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("messages",), ("prompt",))
    run = stage.start("sft", configs, parents={"policy": base.model_name_or_path}, data=sources)
    model, tokenizer = load_pair(base)
    set_template(tokenizer, model, config.chat_template_path)
    require_positions(model, "max_length", config.max_length)
    encoded = encode_rows(tokenizer, rows, config.max_length, config.max_truncated)

    sizes = [evals.prompt_size(tokenizer, row) for row in test]
    test, length = evals.fit_prompts(run, model, test, sizes, replies.eval_max_tokens + 1)
    engine = make_engine(engines, model, tokenizer, length, run)
    before, base_samples = evals.measure_base(engine, tokenizer, test, replies, stop_ids(tokenizer))
    trainer = make_trainer(run, model, tokenizer, encoded, config, optim)
    tokens = train(trainer, run)
    engine.sync_weights(model)
    after, samples = evals.measure_replies(engine, tokenizer, test, replies, stop_ids(tokenizer))
    run.finish(
        lambda folder: save_pair(model, tokenizer, folder),
        metrics={**{f"{name}, base": value for name, value in before.items()}, **after},
        gains=evals.sft_gains(before, after, replies.eval_reward_funcs, test),
        samples=evals.merge_samples({"base": base_samples, "sft": samples}),
        tokens=tokens, parameters=model.num_parameters(), engine=engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
