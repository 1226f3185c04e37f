"""Stage 5b, GRPO: a chat model and problems with checkable answers in, a model that solves more of them out.

accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml [--loss_type dr_grpo]
Gain: the first of `eval_reward_funcs` on held-out problems, before and after; `eval_goal: 0.3` aims at 30 points.
`eval_prefixes` makes the same model answer at once and in steps: what tokens to think are worth.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.chat import stop_ids
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig, ReplyConfig
from posttrain.models import ModelConfig, load_pair, save_pair
from posttrain.rewards import load_rewards
from posttrain.rl.batches import gated_prompts
from posttrain.rl.config import RLConfig
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.rl.trainer import RLTrainer, load_reference
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ARGS = (StageConfig, ModelConfig, DataConfig, RLConfig, OptimConfig, EvalConfig, ReplyConfig, EngineConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, source, config, _, held_out, _, _ = parse(ARGS, argv)
    stage.describe_parents({"policy": base.model_name_or_path}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",))
    load_rewards(config.reward_funcs, config.reward_weights)
    return resolved(*configs)


def main() -> None:
    configs = own, base, source, config, optim, held_out, replies, engines = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("prompt",))
    run = stage.start("grpo", configs, parents={"policy": base.model_name_or_path}, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    policy, tokenizer = load_pair(base, accelerator.device)
    prompts, test, length = gated_prompts(run, policy, tokenizer, rows, test, config, replies)
    stops = stop_ids(tokenizer, policy)
    engine = make_engine(engines, policy, tokenizer, length, run)
    before, _ = evals.measure_replies(engine, tokenizer, test, replies, stops)
    trainer = RLTrainer(
        run, accelerator, config, optim, policy=policy, tokenizer=tokenizer, engine=engine, prompts=prompts,
        stop_ids=stops, rewards=load_rewards(config.reward_funcs, config.reward_weights),
        reference=load_reference(base, accelerator.device) if config.beta else None,
    )  # fmt: skip
    trainer.train()
    after, samples = evals.measure_replies(engine, tokenizer, test, replies, stops)
    run.finish(
        lambda folder: save_pair(policy, tokenizer, folder), metrics=evals.before_and_after(before, after),
        gains=evals.grpo_gains(before, after, replies, held_out.eval_goal),
        samples=evals.merge_samples({"grpo": samples}),
        tokens=trainer.tokens, parameters=policy.num_parameters(), engine=engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
