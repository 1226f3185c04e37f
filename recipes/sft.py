"""Stage 3, the chat model: conversations in, a base model taught to answer out.

accelerate launch recipes/sft.py --config recipes/tiny/sft.yaml [--chat_template_path chat_templates/chatml.jinja]
Gains: replies that end with the turn's end token; answers judged by the first of `eval_reward_funcs`, against the base
model given solved examples (few-shot) where the held-out rows have `few_shot`, else asked through the same template;
with `loss_dataset_split` the loss on held-out conversations. `--use_peft` trains LoRA adapters.
"""

from posttrain import sft_eval, stage
from posttrain.args import parse, resolved
from posttrain.chat import read_template, set_template
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig, ReplyConfig
from posttrain.lora import LoraArgs, train_adapter
from posttrain.models import ModelConfig, load_pair, require_positions, save_pair
from posttrain.rl.rollout import EngineConfig
from posttrain.sft import SFTConfig, make_trainer, train
from posttrain.sft_eval import Watch, WatchConfig
from posttrain.sft_stream import gated
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

LEARN = (StageConfig, ModelConfig, LoraArgs, DataConfig, SFTConfig, OptimConfig)
ARGS = (*LEARN, WatchConfig, EvalConfig, ReplyConfig, EngineConfig)


def check(argv, planned=()) -> dict:
    configs = own, model, _, source, config, _, watching, held_out, _, _ = parse(ARGS, argv)
    stage.describe_parents({"policy": model.model_name_or_path}, planned)
    sft_eval.check_all(source, held_out, watching, own.seed, planned)
    if config.chat_template_path is not None:
        read_template(config.chat_template_path)
    return resolved(*configs)


def main() -> None:
    configs = own, base, lora, source, config, optim, *asked = parse(ARGS, description=__doc__)
    watching, held_out, replies, engines = asked
    rows, test, unseen, sources = sft_eval.load_all(source, held_out, watching, own.seed)
    run = stage.start("sft", configs, parents={"policy": base.model_name_or_path}, data=sources)
    model, tokenizer = load_pair(base, lora=lora)
    set_template(tokenizer, model, config.chat_template_path)
    require_positions(model, "max_length", config.max_length)
    encoded = gated(run, tokenizer, model, rows, config)

    watch = Watch(run, model, tokenizer, test, unseen, replies, engines, config.max_length, watching.identity)
    trained = train_adapter(model, lora, tokenizer)
    trainer = make_trainer(run, trained, tokenizer, encoded, config, optim, watching.eval_steps, watch.during)
    tokens = train(trainer, run)
    metrics, gains, samples = watch.after()
    run.finish(
        lambda folder: save_pair(trained, tokenizer, folder), metrics=metrics, gains=gains, samples=samples,
        tokens=tokens, parameters=model.num_parameters(), engine=watch.engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
