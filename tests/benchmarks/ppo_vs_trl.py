"""Our PPO beside TRL's last one, of 1.12: step time and its parts, tokens a second, memory, reward curve.

In: a chat model of the tiny world and its reward model (`posttrain run recipes/tiny --only tokenizer pretrain sft
reward`), or none: then random weights, and completions that go on to the limit. Out: a table, and with `--out NAME`
NAME.json and NAME.md.

    pip install --target build/trl112 --no-deps trl==1.12.0
    python tests/benchmarks/ppo_vs_trl.py --trl112 build/trl112 --model runs/tiny/sft --reward_model runs/tiny/reward

Same weights, prompts of every step, one completion a prompt, limit, sampling, reward model (its raw score), KL in the
reward, GAE, clipping, critic (the reward model's backbone under a head of zeros), learning rates and updates for all;
gradients are not clipped, since TRL's are not. "TRL tuned": no gradient checkpointing, the dtype of ours, a minibatch
in one piece; "TRL default": bf16 autocast, gradient checkpointing, micro-batches of 8, as 1.12 comes. TRL then makes
one optimizer step a batch, whatever num_mini_batches says: it counts the batch's micro-batches, not a minibatch's.
"""

import gc
import sys
from functools import partial
from pathlib import Path

import rl_bench
import rl_tables
import torch

from posttrain.models import ModelConfig, load_scalar_model
from posttrain.rl.rollout import EngineConfig, make_engine

INSTALL = "pip install --target build/trl112 --no-deps trl==1.12.0, then --trl112 build/trl112"
KINDS = {
    "ours, transformers": ("ours", {"use_vllm": "false"}),
    "ours, vLLM": ("ours", {"use_vllm": "true"}),
    "TRL tuned": ("trl", {"tuned": True}),
    "TRL default": ("trl", {"tuned": False}),
}
PAIRS = [("ours, transformers", "TRL tuned"), ("ours, vLLM", "TRL tuned"), ("ours, transformers", "TRL default")]
GOAL = "Goal: a step 2 x as fast as TRL 1.12's on CPUs, 5 x on one H200."


def main(argv: list[str] | None = None) -> dict | None:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    if options.trl112 and not (Path(options.trl112) / "trl" / "experimental" / "ppo").is_dir():
        sys.exit(f"--trl112 {options.trl112}: there is no trl/experimental/ppo in it; {INSTALL}")
    if options.worker:
        who, settings = KINDS[options.worker]
        return rl_bench.serve(options, partial(ours if who == "ours" else trl, **settings))
    left_out = rl_bench.without_vllm(options)
    if not options.trl112:
        left_out |= {kind: f"TRL 1.12 is not there: {INSTALL}" for kind in options.kinds if "TRL" in kind}
    kinds = [kind for kind in options.kinds if kind not in left_out]
    result = rl_bench.compare(__file__, argv, options, kinds, left_out)
    result["versions"]["trl"] = rl_bench.peer_version(options.trl112)
    notes = [
        f"{options.num_prompts} prompts, a completion each of at most {options.max_completion_length} tokens, "
        f"{options.num_minibatches} updates a step, {options.dtype} weights.",
        "`ours, transformers` samples by a loop of our own over transformers' model and cache, TRL by `generate`.",
        "TRL's `reward` and `score` are the reward model's, and the reference's and the critic's forwards; all else "
        "but generation (the policy's old log-probabilities, GAE, the update) is its `update`; its `other` is "
        "Python's garbage collector, which it calls in every step, whatever the size of the batch.",
    ]
    if {"ours, transformers", "TRL tuned"} <= result["trainers"].keys():
        found = rl_tables.ratio(result, "ours, transformers", "TRL tuned", options.clock, rl_tables.PARTS[:-1])
        notes.append(f"Without `other`, ours, transformers / TRL tuned is {rl_tables.spread(found)}.")
    rl_tables.write(result, "PPO beside TRL 1.12", PAIRS, GOAL, notes, options.out)
    return result


def parser():
    each = rl_bench.parser(__doc__)
    each.add_argument("--trl112", help=f"folder with TRL 1.12: {INSTALL}")
    each.add_argument("--reward_model", help="reward model of the tiny world, for --model")
    each.add_argument("--num_prompts", type=int, default=128)
    each.add_argument("--num_minibatches", type=int, default=2)
    each.add_argument("--max_completion_length", type=int, default=96)
    each.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    return each


def reward_folder(options) -> str:
    """The reward model's; without one, the policy's, whose scalar head is drawn anew."""
    return options.reward_model or rl_bench.model_of(options).model_name_or_path


def scalar_model(options):
    torch.manual_seed(1)  # a head that is drawn is the same in every process
    return load_scalar_model(ModelConfig(reward_folder(options), dtype=options.dtype))


def ours(options, gate, *, use_vllm: str):
    from posttrain import stage
    from posttrain.lora import LoraArgs
    from posttrain.rewards.model import RewardModelScore
    from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
    from posttrain.rl.models import load_networks
    from posttrain.rl.trainer import RLTrainer
    from posttrain.training import OptimConfig

    config = RLConfig(
        max_steps=rl_bench.total_steps(options), num_prompts=options.num_prompts, num_generations=1,
        max_completion_length=options.max_completion_length, num_minibatches=options.num_minibatches,
        missing_eos_penalty=1.0, max_tokens_per_microbatch=options.max_tokens, reward_timeout=0,
    )  # fmt: skip
    loss, base, rate = LossConfig(beta=0.05), rl_bench.model_of(options), options.learning_rate
    ppo = PPOConfig(reward_folder(options), critic_learning_rate=rate)
    optim = OptimConfig(rate, warmup_steps=0, adam_beta2=0.999, max_grad_norm=1e9, bf16=options.bf16)
    keys = stage.StageConfig(
        str(Path(options.work) / options.worker), seed=rl_bench.SEED, logging_steps=1, save_steps=0
    )
    run = stage.start("ppo", (keys, config, loss, ppo, optim), parents={}, data=[])
    accelerator = stage.accelerator(optim.bf16)
    networks = load_networks(base, LoraArgs(), config, loss, accelerator.device, ppo)
    prompts = rl_bench.load_prompts(options, "prompts", networks.tokenizer)
    room = max(len(row["prompt_ids"]) for row in prompts) + options.max_completion_length + 1
    engine = make_engine(EngineConfig(use_vllm), networks.policy, networks.tokenizer, room, run)
    judge = scalar_model(options).to(accelerator.device).requires_grad_(False)
    rewards = [("reward model", RewardModelScore(judge), 1.0)]
    trainer = RLTrainer(run, accelerator, config, loss, optim, networks, engine, prompts, rewards, ppo)
    return rl_bench.our_training(trainer, gate)


def trl(options, gate, *, tuned: bool):
    sys.path.insert(0, options.trl112)
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from posttrain.models import load_causal_lm

    size = options.num_prompts if tuned else 8
    keys = {"bf16": options.bf16, "gradient_checkpointing": False, "local_rollout_forward_batch_size": size}
    tokenizer = rl_bench.tokenizer_of(options)
    tokenizer.padding_side = "left"
    settings = PPOConfig(
        output_dir=str(Path(options.work) / "trl"), per_device_train_batch_size=size,
        gradient_accumulation_steps=options.num_prompts // size, num_mini_batches=options.num_minibatches,
        total_episodes=options.num_prompts * rl_bench.total_steps(options), num_ppo_epochs=1, temperature=1.0,
        response_length=options.max_completion_length, learning_rate=options.learning_rate, missing_eos_penalty=1.0,
        lr_scheduler_type="constant", stop_token="eos", num_sample_generations=0, kl_coef=0.05, report_to=[],
        use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, **(keys if tuned else {}),
    )  # fmt: skip
    loader = ppo_trainer.DataLoader
    ppo_trainer.DataLoader = lambda data, **given: loader(data, **{**given, "shuffle": False})  # our order of prompts
    rows = [{"input_ids": row["prompt_ids"]} for row in rl_bench.prompts_in_order(options, "prompts", tokenizer)]
    policy, reference = (load_causal_lm(rl_bench.model_of(options)) for _ in range(2))
    critic = scalar_model(options)
    torch.nn.init.zeros_(critic.score.weight)
    trainer = PPOTrainer(
        settings, tokenizer, policy, reference, scalar_model(options), Dataset.from_list(rows), critic
    )  # fmt: skip
    return trl_training(trainer, ppo_trainer, tokenizer.pad_token_id, gate)


def trl_training(trainer, module, pad: int, gate):
    """The trainer's `train`, its parts timed: they are functions of its module."""
    from transformers import TrainerCallback

    last, score, run = {"tokens": 0, "prompt_tokens": 0, "scores": []}, module.get_reward, module.forward

    def get_reward(model, sequences, pad_id, width):
        found = gate.timed(score, "reward" if model is trainer.reward_model else "score")(
            model, sequences, pad_id, width
        )
        if model is trainer.reward_model:
            real = sequences != pad
            last["prompt_tokens"] += real[:, :width].sum().item()
            last["tokens"] += real[:, width:].sum().item()
            last["scores"] += found[1].tolist()
        return found

    def forward(*args):
        return run(*args) if torch.is_grad_enabled() else gate.timed(run, "score")(*args)

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            scores = last.pop("scores")
            gate.step(reward=sum(scores) / len(scores), **last)
            last.update(tokens=0, prompt_tokens=0, scores=[])

    module.get_reward, module.forward = get_reward, forward
    gate.time(module, batch_generation="generate")
    gate.time(gc, collect="other")
    trainer.add_callback(Turns)
    return gate.timed(trainer.train, "update")


if __name__ == "__main__":
    main()
