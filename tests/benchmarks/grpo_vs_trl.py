"""Our GRPO beside TRL's `GRPOTrainer`: step time and its parts, tokens a second, memory, reward curve.

In: a chat model of the tiny world (`posttrain run recipes/tiny --only tokenizer pretrain sft`), or none: then a Llama
of random weights, whose completions go on to the limit; speed is all that can be read off it. Out: a table, and with
`--out NAME` NAME.json and NAME.md.

    python tests/benchmarks/grpo_vs_trl.py --model runs/tiny/sft --out tests/benchmarks/results/grpo_vs_trl
    python tests/benchmarks/grpo_vs_trl.py --model Qwen/Qwen3-0.6B --bf16 --num_prompts 64 --max_completion_length 512

Same weights, prompts of every step, limit, sampling, reward function, loss (dapo, no KL), AdamW and one update a step
for all. "TRL tuned": no gradient checkpointing, the dtype of ours, as many completions a micro-batch as --trl_batch
says (all of a step); "TRL default": bf16 autocast, gradient checkpointing and 8 completions a micro-batch, as TRL 1.16
comes. One script for CPU and one GPU.
"""

import sys
from functools import partial
from pathlib import Path

import rl_bench
import rl_tables
import torch

from posttrain.rl.rollout import EngineConfig, make_engine

KINDS = {
    "ours, transformers": ("ours", {"use_vllm": "false"}),
    "ours, vLLM": ("ours", {"use_vllm": "true"}),
    "TRL tuned, generate": ("trl", {"tuned": True}),
    "TRL tuned, vLLM": ("trl", {"tuned": True, "use_vllm": True}),
    "TRL default, generate": ("trl", {"tuned": False}),
}
PAIRS = [
    ("ours, transformers", "TRL tuned, generate"),
    ("ours, vLLM", "TRL tuned, vLLM"),
    ("ours, vLLM", "TRL tuned, generate"),
    ("ours, transformers", "TRL default, generate"),
]
GOAL = "Goal: a step 1.3 x as fast as TRL's with `generate` on CPUs; on one H200 1.5 x, scoring and update 2 x."


def main(argv: list[str] | None = None) -> dict | None:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    if options.worker:
        who, settings = KINDS[options.worker]
        return rl_bench.serve(options, partial(ours if who == "ours" else trl, **settings))
    left_out = rl_bench.without_vllm(options)
    kinds = [kind for kind in options.kinds if kind not in left_out]
    result = rl_bench.compare(__file__, argv, options, kinds, left_out)
    notes = [
        f"{options.num_prompts} prompts x {options.num_generations} completions of at most "
        f"{options.max_completion_length} tokens, reward `{reward_name(options)}`, {options.dtype} weights.",
        "`ours, transformers` samples by a loop of our own over transformers' model and cache, TRL by `generate`.",
        "TRL's vLLM on a CPU has its weight sync replaced by ours (its own dies there), and runs eager as ours does.",
    ]
    rl_tables.write(result, "GRPO beside TRL", PAIRS, GOAL, notes, options.out)
    return result


def parser():
    each = rl_bench.parser(__doc__)
    each.add_argument("--num_prompts", type=int, default=24)
    each.add_argument("--num_generations", type=int, default=8)
    each.add_argument("--max_completion_length", type=int, default=80)
    each.add_argument("--reward", help="default: correct; without a model, the share of even tokens")
    each.add_argument("--trl_batch", type=int, help="TRL tuned: completions of a micro-batch; default: all of a step")
    each.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    return each


def reward_name(options) -> str:
    return options.reward or ("correct" if options.model else "rl_bench.even_tokens")


def ours(options, gate, *, use_vllm: str):
    from posttrain import stage
    from posttrain.lora import LoraArgs
    from posttrain.rewards import load_rewards
    from posttrain.rl.config import LossConfig, RLConfig
    from posttrain.rl.models import load_networks
    from posttrain.rl.trainer import RLTrainer
    from posttrain.training import OptimConfig

    config = RLConfig(
        max_steps=rl_bench.total_steps(options), num_prompts=options.num_prompts, reward_timeout=0,
        num_generations=options.num_generations, max_completion_length=options.max_completion_length,
        max_tokens_per_microbatch=options.max_tokens,
    )  # fmt: skip
    loss, base = LossConfig(), rl_bench.model_of(options)
    optim = OptimConfig(learning_rate=options.learning_rate, warmup_steps=0, adam_beta2=0.999, bf16=options.bf16)
    keys = stage.StageConfig(
        str(Path(options.work) / options.worker), seed=rl_bench.SEED, logging_steps=1, save_steps=0
    )
    run = stage.start("grpo", (keys, config, loss, optim), parents={}, data=[])
    accelerator = stage.accelerator(optim.bf16)
    networks = load_networks(base, LoraArgs(), config, loss, accelerator.device)
    prompts = rl_bench.load_prompts(options, "problems", networks.tokenizer)
    room = max(len(row["prompt_ids"]) for row in prompts) + options.max_completion_length + 1
    engine = make_engine(EngineConfig(use_vllm), networks.policy, networks.tokenizer, room, run)
    rewards = load_rewards([reward_name(options)], [])
    trainer = RLTrainer(run, accelerator, config, loss, optim, networks, engine, prompts, rewards)
    return rl_bench.our_training(trainer, gate)


def trl(options, gate, *, tuned: bool, use_vllm: bool = False):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.models import load_causal_lm
    from posttrain.rewards import load_reward

    completions = options.num_prompts * options.num_generations
    size = (options.trl_batch or completions) if tuned else 8
    choices = {"bf16": options.bf16, "gradient_checkpointing": False} if tuned else {}
    settings = GRPOConfig(
        output_dir=str(Path(options.work) / "trl"), per_device_train_batch_size=size,
        gradient_accumulation_steps=completions // size, num_generations=options.num_generations,
        max_completion_length=options.max_completion_length, max_steps=rl_bench.total_steps(options),
        learning_rate=options.learning_rate, lr_scheduler_type="constant", shuffle_dataset=False, use_vllm=use_vllm,
        use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, **choices,
    )  # fmt: skip
    tokenizer = rl_bench.tokenizer_of(options)
    rows = rl_bench.prompts_in_order(options, "problems", tokenizer)
    keep = ("prompt", "answer")
    data = Dataset.from_list([{key: row[key] for key in keep if key in row} for row in rows])
    model = load_causal_lm(rl_bench.model_of(options))
    if use_vllm:
        settings.vllm_max_model_length = max(len(r["prompt_ids"]) for r in rows) + options.max_completion_length + 1
        on_this_device(model)
    trainer = GRPOTrainer(
        model, reward_funcs=load_reward(reward_name(options)), args=settings, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    return trl_training(trainer, gate)


def trl_training(trainer, gate):
    """The trainer's `train`, its parts timed."""
    from transformers import TrainerCallback

    last = {}
    count = trainer._calculate_rewards

    def rewards(inputs, prompts, completions, completion_ids):
        found = count(inputs, prompts, completions, completion_ids)
        last["tokens"], last["reward"] = sum(map(len, completion_ids)), found.mean().item()
        return found

    def prompt_tokens(prompts):
        found = tokenize(prompts)
        last["prompt_tokens"] = sum(map(len, found[0]))
        return found

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            gate.time(optimizer, step="update")

        def on_step_end(self, args, state, control, **kwargs):
            gate.step(**last)

    trainer._calculate_rewards, tokenize = gate.timed(rewards, "reward"), trainer._tokenize_prompts
    trainer._tokenize_prompts = prompt_tokens
    gate.time(trainer, _generate="generate", _generate_and_score_completions="score", training_step="update")
    gate.time(trainer.accelerator, clip_grad_norm_="update")
    if trainer.use_vllm:
        gate.time(trainer.vllm_generation, sync_weights="sync")
    trainer.add_callback(Turns)
    return trainer.train


def on_this_device(model) -> None:
    """TRL's vLLM in the dtype of `model`; on a CPU eager, with a cache of 1 GiB, its weights synced as ours are."""
    from posttrain.rl.vllm_engine import set_environment
    from posttrain.rl.vllm_worker import repack_tied_head

    if not torch.cuda.is_available():
        set_environment()
    from trl.generation import vllm_generation
    from vllm import LLM

    dtype = str(model.dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        vllm_generation.LLM = partial(LLM, dtype=dtype)
        return
    threads = torch.get_num_threads()

    def start(gpu_memory_utilization=None, distributed_executor_backend=None, **keys):
        llm = LLM(
            enforce_eager=True, kv_cache_memory_bytes=2**30, dtype=dtype, disable_log_stats=True, **keys
        )  # fmt: skip
        torch.set_num_threads(threads)
        return llm

    def sync(self):
        weights = ((name, parameter.data) for name, parameter in self.model.named_parameters())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(repack_tied_head)
        self.llm.reset_prefix_cache()

    vllm_generation.LLM = start
    vllm_generation.VLLMGeneration.sync_weights = sync


if __name__ == "__main__":
    main()
