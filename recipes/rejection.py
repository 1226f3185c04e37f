"""Stage 5c, rejection sampling: a chat model and problems with checkable answers in, taught by its own right answers.

accelerate launch recipes/rejection.py --config recipes/tiny/rejection.yaml [--num_rounds 5 --choice random]
Gain: as in GRPO, and a table by round (pass@1, pass@n, length) is printed and stands in the report; with `identity`,
who it says it is after each round, too.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.chat import stop_ids
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.models import ModelConfig, load_pair, save_pair
from posttrain.rejection import RejectionTrainer
from posttrain.rewards import load_rewards, reward_parents
from posttrain.rl.batches import gated_prompts
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.rl.watch import IdentityConfig, Watch
from posttrain.solutions import RejectionConfig
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

LEARN = (StageConfig, ModelConfig, DataConfig, RejectionConfig, OptimConfig)
ARGS = (*LEARN, evals.EvalConfig, evals.ReplyConfig, EngineConfig, IdentityConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, source, config, _, held_out, *_ = parse(ARGS, argv)
    stage.describe_parents({"policy": base.model_name_or_path, **reward_parents(config)}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",))
    load_rewards(config.reward_funcs, [], config.reward_options)
    return resolved(*configs)


def main() -> None:
    configs = own, base, source, config, optim, held_out, replies, engines, asked = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("prompt",))
    parents = {"policy": base.model_name_or_path, **reward_parents(config)}
    run = stage.start("rejection", configs, parents=parents, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    policy, tokenizer = load_pair(base, accelerator.device)
    prompts, test, length = gated_prompts(run, policy, tokenizer, rows, test, config, replies, asked.identity)
    stops = stop_ids(tokenizer, policy)
    engine = make_engine(engines, policy, tokenizer, length, run)
    watch = Watch(engine, tokenizer, stops, test, replies, asked)
    trainer = RejectionTrainer(
        run, accelerator, config, optim, policy=policy, tokenizer=tokenizer, engine=engine, prompts=prompts,
        stop_ids=stops, rewards=load_rewards(config.reward_funcs, [], config.reward_options),
        measure=lambda ends: watch.measure(prefixes=ends), before=(watch.before, watch.samples),
    )  # fmt: skip
    trainer.train()
    run.finish(
        lambda folder: save_pair(policy, tokenizer, folder),
        **trainer.result(replies, held_out.eval_goal, watch.gains("rejection")),
        tokens=trainer.tokens, parameters=policy.num_parameters(), engine=engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
