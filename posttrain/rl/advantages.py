"""Advantages: from rewards (and values) to one number a token. Pure functions on tensors; torch only."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """GRPO (2402.03300): reward minus the mean of its group, over the group's std (unbiased) where `scale` is "group".

    rewards (N,), groups side by side. scale "batch" divides by the std of the whole batch, "none" by nothing
    (Dr. GRPO, 2503.20783). 1e-4 is added to a std, as TRL does. Equal rewards give exactly 0. Returns (N,).
    """
    groups = rewards.view(-1, num_generations)
    centred = groups - groups.mean(1, keepdim=True)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # a mean's rounding must not turn into a signal
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    return centred.flatten()


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438) over one completion that ends with its last token.

    rewards, values (T,): the reward after each token and the value before it. Returns advantages and returns, (T,).
    """
    advantages = torch.zeros_like(rewards)
    last = rewards.new_zeros(())
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(rewards) else 0.0
        last = rewards[t] + gamma * next_value - values[t] + gamma * lam * last
        advantages[t] = last
    return advantages, advantages + values


def whiten(values: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(values - mean) / std with statistics taken over all ranks by the caller."""
    return (values - mean) * torch.rsqrt(var + 1e-8)


def shaped_rewards(score: Tensor, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """PPO's reward after each token: -beta (log pi - log ref) everywhere, the score added on the last token.

    score (), logps and ref_logps (T,) (Ziegler et al. 1909.08593). Returns (T,).
    """
    rewards = -beta * (logps - ref_logps)
    rewards[-1] += score
    return rewards
