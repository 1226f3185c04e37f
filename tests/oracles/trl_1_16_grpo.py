"""TRL 1.16's `GRPOTrainer._compute_loss`, the oracle of tests/test_rl_losses.py and tests/test_rl_advantages.py.

`trl_loss`: lists of 1-d float64 log-probabilities, one a completion, and settings under our names; TRL's loss and its
gradient with respect to them (only the forward pass is replaced, by the numbers given). `trl_step`: a policy and an
experience; the same with TRL's own forward, gradients of the policy. `trl_advantages`: from rewards.
"""

from types import SimpleNamespace

import torch
from oracles.statements import run_between
from rl_helpers import tiny_llama, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence


def make_trl(folder, policy=None, **config):
    """A GRPO trainer of TRL's, of a random policy where it is none's business."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder), num_generations=3, per_device_train_batch_size=6, max_completion_length=16,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **config,
    )  # fmt: skip
    return GRPOTrainer(
        policy or tiny_llama(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def configure(trainer, keys: dict) -> None:
    """The attributes that `_compute_loss` reads."""
    trainer.loss_type = "grpo" if keys["loss_type"] == "gspo" else keys["loss_type"]  # gspo is a level in TRL
    trainer.importance_sampling_level = "sequence" if keys["loss_type"] == "gspo" else keys.get("level", "token")
    trainer.epsilon_low, trainer.epsilon_high = keys["low"], keys["high"]
    trainer.args.delta, trainer.beta = keys.get("delta"), keys.get("beta", 0.0)
    trainer.args.use_bias_correction_kl = keys.get("use_bias_correction_kl", True)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = keys.get("engine", False)
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, keys.get("cap")


def importance_ratio(trainer, inputs: dict, engine) -> torch.Tensor:
    """TRL's own statements for the weights of vLLM's mismatch, (B, T)."""
    names = {
        "self": trainer, "completion_mask": inputs["completion_mask"], "tool_mask": None,
        "old_per_token_logps": inputs["old_per_token_logps"], "sampling_per_token_logps": engine,
    }  # fmt: skip
    method = type(trainer)._generate_and_score_completions
    names = run_between(method, "mask = completion_mask", "if self.vllm_importance_sampling_mode", names)
    return names["vllm_importance_sampling_ratio"]


def trl_loss(trainer, tokens: dict, keys: dict, *, counts=None, num_items=None, gradient_accumulation=None,
             steps_per_generation=1):  # fmt: skip
    """(loss, gradients of the log-probabilities). tokens: logps, old, engine, ref, advantages, each a list of (T_i,).

    counts (B,) 0 empties a completion's mask. With `gradient_accumulation` in training mode, else as in evaluation.
    """
    configure(trainer, keys)
    padded = {key: pad_sequence(list(pieces), batch_first=True) for key, pieces in tokens.items()}
    mask = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in tokens["logps"]], batch_first=True)
    mask = mask if counts is None else mask * counts[:, None]
    logps, ids = padded["logps"].clone().requires_grad_(), torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": padded["advantages"][:, 0], "old_per_token_logps": padded["old"],
        "ref_per_token_logps": padded["ref"],
        "num_items_in_batch": mask.sum() if num_items is None else torch.tensor(num_items),
    }  # fmt: skip
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = importance_ratio(trainer, inputs, padded["engine"])
    trainer.model.train(gradient_accumulation is not None)
    trainer.current_gradient_accumulation_steps = gradient_accumulation
    trainer.args.steps_per_generation = steps_per_generation
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), [gradient[: len(x)] for gradient, x in zip(logps.grad, tokens["logps"], strict=True)]


def trl_advantages(rewards: torch.Tensor, n: int, scale: str) -> torch.Tensor:
    """TRL's own statements from rewards (N,) to advantages (N,)."""
    from trl import GRPOTrainer

    names = {
        "self": SimpleNamespace(scale_rewards=scale, reward_weights=torch.ones(1)),
        "rewards_per_func": rewards[:, None],
        "num_generations": n,
        "device": "cpu",
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
    }
    method = GRPOTrainer._generate_and_score_completions
    names = run_between(method, "rewards = (rewards_per_func", "if self.scale_rewards != 'none'", names)
    return names["advantages"]


def trl_step(policy, experience, folder, **config) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the policy by `GRPOTrainer._compute_loss`, forward included, as its options have it."""
    trainer = make_trl(folder, policy, **config)
    trainer.model.eval()
    rollouts = experience.rollouts
    ids, prompts = [torch.tensor(c.ids) for c in rollouts.completions], [torch.tensor(p) for p in rollouts.prompt_ids]

    def right(pieces):
        return pad_sequence(pieces, batch_first=True)

    inputs = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        "completion_ids": right(ids),
        "completion_mask": right([torch.ones_like(c) for c in ids]),
        "advantages": torch.stack([a[0] for a in experience.advantages]),
        "old_per_token_logps": right(experience.old_logps),
        "ref_per_token_logps": right(experience.ref_logps),
        "num_items_in_batch": torch.tensor(sum(rollouts.lengths)),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return loss.item(), gradients
