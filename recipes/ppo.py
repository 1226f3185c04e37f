"""Stage 5a, PPO: a chat model, its reward model and prompts in, a model whose replies are preferred out.

accelerate launch recipes/ppo.py --config recipes/tiny/ppo.yaml [--beta 0.1] [--critic trunk] [--use_peft]
Gain: the first of `eval_reward_funcs` on held-out prompts (tiny: the labeller's true utility, which the policy never
sees), beside the reward model's own score and the KL to its start. `identity` watches whether it forgets who it is.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.lora import LoraArgs
from posttrain.models import ModelConfig, save_pair
from posttrain.rewards.model import load_reward_model
from posttrain.rl.batches import gated_prompts
from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
from posttrain.rl.models import load_engine, load_networks
from posttrain.rl.rollout import EngineConfig
from posttrain.rl.trainer import RLTrainer
from posttrain.rl.watch import DriftConfig, Watch
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

RL = (RLConfig, LossConfig, PPOConfig, OptimConfig, EngineConfig)
ARGS = (StageConfig, ModelConfig, LoraArgs, DataConfig, *RL, evals.EvalConfig, evals.ReplyConfig, DriftConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, _, source, _, loss, ppo, *_, held_out, _, _ = parse(ARGS, argv)
    loss.resolved(critic=True)
    stage.describe_parents({"policy": base.model_name_or_path, "reward": ppo.reward_model_path}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",))
    return resolved(*configs)


def main() -> None:
    configs = parse(ARGS, description=__doc__)
    own, base, lora, source, config, loss, ppo, optim, engines, held_out, replies, drift = configs
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("prompt",))
    parents = {"policy": base.model_name_or_path, "reward": ppo.reward_model_path}
    run = stage.start("ppo", configs, parents=parents, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    networks = load_networks(base, lora, config, loss, accelerator.device, ppo)
    policy, tokenizer = networks.policy, networks.tokenizer
    judges = [("reward model", load_reward_model(base, ppo, accelerator.device), 1.0)]
    prompts, test, length = gated_prompts(run, policy, tokenizer, rows, test, config, replies, drift.identity)
    engine = load_engine(engines, networks, config, replies, length, run)
    watch = Watch(engine, tokenizer, networks.stop_ids, test, replies, drift, judges)
    trainer = RLTrainer(run, accelerator, config, loss, optim, networks, engine, prompts, judges, ppo, watch)
    trainer.train()
    before, after, samples = watch.before, *watch.measure(trainer.reply_kl)
    run.finish(
        lambda folder: save_pair(networks.trained, tokenizer, folder), metrics=evals.before_and_after(before, after),
        gains=evals.ppo_gains(before, after, replies, config.max_kl) + watch.gains("PPO"), engine=engine.name,
        samples=evals.merge_samples({"ppo": samples}), tokens=trainer.tokens, parameters=policy.num_parameters(),
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
