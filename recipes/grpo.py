"""Stage 5b, GRPO: a chat model and problems with checkable answers in, a model that solves more of them out.

accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml [--loss_type dr_grpo] [--use_peft]
Gain: the first of `eval_reward_funcs` on held-out problems; `eval_goal: 0.3` aims at 30 points. `eval_prefixes`: at
once and in steps, what tokens to think are worth. `identity` watches whether the model forgets who it is.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.lora import LoraArgs
from posttrain.models import ModelConfig, save_pair
from posttrain.rewards import load_rewards, reward_parents
from posttrain.rl.batches import gated_prompts
from posttrain.rl.config import LossConfig, RLConfig
from posttrain.rl.models import load_engine, load_networks
from posttrain.rl.rollout import EngineConfig
from posttrain.rl.trainer import RLTrainer
from posttrain.rl.watch import DriftConfig, Watch
from posttrain.training import OptimConfig

RL = (RLConfig, LossConfig, OptimConfig, EngineConfig)
ARGS = (stage.StageConfig, ModelConfig, LoraArgs, DataConfig, *RL, evals.EvalConfig, evals.ReplyConfig, DriftConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, _, source, config, loss, *_, held_out, _, _ = parse(ARGS, argv)
    loss.resolved(critic=False)
    stage.describe_parents({"policy": base.model_name_or_path, **reward_parents(config)}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",), planned=planned)
    load_rewards(config.reward_funcs, config.reward_weights, config.reward_options)
    return resolved(*configs)


def main() -> None:
    configs = parse(ARGS, description=__doc__)
    own, base, lora, data, config, loss, optim, engines, held_out, replies, drift = configs
    rows, test, sources = evals.load_both(data, held_out, own.seed, ("prompt",))
    parents = {"policy": base.model_name_or_path, **reward_parents(config)}
    run = stage.start("grpo", configs, parents=parents, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    networks = load_networks(base, lora, config, loss, accelerator.device)
    policy, tokenizer = networks.policy, networks.tokenizer
    prompts, test, length = gated_prompts(run, policy, tokenizer, rows, test, config, replies, drift.identity)
    engine = load_engine(engines, networks, config, replies, length, run)
    watch = Watch(engine, tokenizer, networks.stop_ids, test, replies, drift)
    rewards = load_rewards(config.reward_funcs, config.reward_weights, config.reward_options)
    trainer = RLTrainer(run, accelerator, config, loss, optim, networks, engine, prompts, rewards, watch=watch)
    trainer.train()
    before, after, samples = watch.before, *watch.measure()
    run.finish(
        lambda folder: save_pair(networks.trained, tokenizer, folder), metrics=evals.before_and_after(before, after),
        gains=evals.grpo_gains(before, after, replies, held_out.eval_goal) + watch.gains("GRPO"), engine=engine.name,
        samples=evals.merge_samples({"grpo": samples}), tokens=trainer.tokens, parameters=policy.num_parameters(),
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
