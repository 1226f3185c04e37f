"""Stage 5a, PPO: a chat model, its reward model and prompts in, a model whose replies are preferred out.

accelerate launch recipes/ppo.py --config recipes/tiny/ppo.yaml [--beta 0.1]
Gain: the first of `eval_reward_funcs` on held-out prompts (tiny: the labeller's true utility, which the policy never
sees), beside the reward model's own score and the KL to the chat model it started from.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.chat import stop_ids
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig, ReplyConfig
from posttrain.models import ModelConfig, load_pair, save_pair
from posttrain.rewards.model import load_critic, load_reward_model
from posttrain.rl.batches import gated_prompts
from posttrain.rl.config import PPOConfig, RLConfig
from posttrain.rl.rollout import EngineConfig, make_engine
from posttrain.rl.trainer import RLTrainer, load_reference
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ARGS = (StageConfig, ModelConfig, DataConfig, RLConfig, PPOConfig, OptimConfig, EvalConfig, ReplyConfig, EngineConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, source, _, ppo, _, held_out, _, _ = parse(ARGS, argv)
    stage.describe_parents({"policy": base.model_name_or_path, "reward": ppo.reward_model_path}, planned)
    evals.check_both(source, held_out, own.seed, ("prompt",))
    return resolved(*configs)


def main() -> None:
    configs = own, base, source, config, ppo, optim, held_out, replies, engines = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("prompt",))
    parents = {"policy": base.model_name_or_path, "reward": ppo.reward_model_path}
    run = stage.start("ppo", configs, parents=parents, data=sources)
    accelerator = stage.accelerator(optim.bf16)
    (policy, tokenizer), reference = load_pair(base, accelerator.device), load_reference(base, accelerator.device)
    reward, critic = load_reward_model(base, ppo, accelerator.device), load_critic(base, ppo, accelerator.device)
    prompts, test, length = gated_prompts(run, policy, tokenizer, rows, test, config, replies)
    stops, judges = stop_ids(tokenizer, policy), [("reward model", reward, 1.0)]
    engine = make_engine(engines, policy, tokenizer, length, run)
    before, _ = evals.measure_replies(engine, tokenizer, test, replies, stops, judges)
    trainer = RLTrainer(
        run, accelerator, config, optim, policy=policy, tokenizer=tokenizer, engine=engine, prompts=prompts,
        stop_ids=stops, rewards=judges, reference=reference, critic=critic, ppo=ppo,
    )  # fmt: skip
    trainer.train()
    after, samples = evals.measure_replies(engine, tokenizer, test, replies, stops, judges, (policy, reference))
    run.finish(
        lambda folder: save_pair(policy, tokenizer, folder), metrics=evals.before_and_after(before, after),
        gains=evals.ppo_gains(before, after, replies, config.max_kl),
        samples=evals.merge_samples({"ppo": samples}),
        tokens=trainer.tokens, parameters=policy.num_parameters(), engine=engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
