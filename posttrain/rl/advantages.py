"""Advantages: from rewards (and values) to one number a token. Pure functions on tensors; torch only.

N completions, those of one prompt side by side; T tokens of one completion, the last one its end. How they combine:
GRPO `group_advantages`; RLOO `rloo_advantages`; REINFORCE++ `to_go` of `shaped_rewards`, whitened; PPO `gae` of
`shaped_rewards`, whitened.
"""

import torch
from torch import Tensor

from posttrain.rl.kl import kl_estimates

ADVANTAGES = ("group", "rloo", "reinforce_pp", "gae")


def group_advantages(rewards: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """GRPO (2402.03300): reward minus the mean of its group, over the group's std (unbiased) where `scale` is "group".

    rewards (N,), groups side by side. scale "batch" divides by the std of the whole batch (give it the rewards of all
    processes), "none" by nothing (Dr. GRPO, 2503.20783). 1e-4 is added to a std, as TRL does. Equal rewards give
    exactly 0. Returns (N,).
    """
    groups = rewards.view(-1, num_generations)
    centred = _centred(groups)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale_rewards: found {scale!r}, expected group, batch or none")
    return centred.flatten()


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """REINFORCE leave-one-out (2402.14740): reward minus the mean of the group's others; (N,), groups side by side.

    Equal rewards give exactly 0. ValueError for groups of one, which leave no others.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations: found {num_generations}, expected at least 2 for a leave-one-out mean")
    groups = rewards.view(-1, num_generations)
    return (_centred(groups) * (num_generations / (num_generations - 1))).flatten()


def _centred(groups: Tensor) -> Tensor:
    """Distance to the mean of its row; exactly 0 in rows of equal numbers, so that no rounding becomes a signal."""
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return (groups - groups.mean(1, keepdim=True)).masked_fill(equal, 0.0)


def to_go(token_rewards: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to the end, (T,): what REINFORCE++ (2501.03262) then whitens."""
    return _discounted(token_rewards, gamma)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438) over one completion that ends with its last token.

    rewards, values (T,): the reward after each token and the value before it. Returns advantages and returns, (T,).
    """
    following = torch.cat([values[1:], values.new_zeros(1)])  # nothing comes after the end
    advantages = _discounted(rewards + gamma * following - values, gamma * lam)
    return advantages, advantages + values


def _discounted(numbers: Tensor, factor: float) -> Tensor:
    """sum over k >= t of factor^(k - t) numbers_k, (T,). Plain floats: indexing tensors costs 50 times as much."""
    total, sums = 0.0, []
    for number in reversed(numbers.tolist()):
        total = number + factor * total
        sums.append(total)
    return numbers.new_tensor(sums[::-1])


def whiten(values: Tensor, mean: Tensor, var: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std with masked statistics taken over all ranks by the caller.

    shift_mean=False adds the mean back, as PPO does to rewards. TRL's variance is the unbiased one.
    """
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def shaped_rewards(score: Tensor, logps: Tensor, ref_logps: Tensor, beta: float, kind: str = "k1") -> Tensor:
    """PPO's reward after each token: -beta times the KL's estimate everywhere, the score added on the last token.

    score (), logps and ref_logps (T,) (Ziegler et al. 1909.08593); kind: see `kl_estimates`. Returns (T,).
    """
    rewards = -beta * kl_estimates(logps, ref_logps, kind)
    rewards[-1] += score
    return rewards


def overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """DAPO's soft punishment of long completions (2503.14476, equation 13); lengths in tokens (N,), returns (N,).

    0 up to max_length - cache tokens, from there linearly down to -1 at max_length and beyond.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache: found {cache}, expected 1 to max_length, {max_length}")
    return ((max_length - cache - lengths) / cache).clamp(-1, 0)
