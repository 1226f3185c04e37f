"""Losses of PPO and GRPO, one number a token, and how tokens are weighted into one step's loss. Torch only."""

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "dr_grpo", "dapo")


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (1707.06347): -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logps - old_logps).

    All (M,). Returns the loss and, detached, 1 where the clip took the gradient. high > low is DAPO's clip-higher.
    """
    ratio = torch.exp(logps - old_logps)
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float().detach()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one; (M,)."""
    kept = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (kept - returns) ** 2)


def kl_estimates(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """Schulman's estimators of KL(pi, ref) from samples of pi (joschu.net/blog/kl-approx.html); (M,).

    k1 = log pi - log ref; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1. As a loss, k1 has zero expected gradient, k2 has
    that of KL(pi, ref), k3 that of KL(ref, pi).
    """
    k1 = logps - ref_logps
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1**2
    if kind == "k3":
        return torch.exp(-k1) - 1 + k1
    raise ValueError(f"kl_estimator: found {kind!r}, expected k1, k2 or k3")


def sequence_weights(
    loss_type: str, lengths: Tensor, total_tokens: int, num_sequences: int, max_length: int
) -> Tensor:
    """Weight of every token of each sequence, so that the weighted sum over all tokens is the step's loss; (N,).

    grpo: mean over sequences of their token means; dapo: mean over all tokens; dr_grpo: sum over tokens over
    (sequences x max_length), which does not depend on a sequence's own length. Totals count all processes.
    """
    if loss_type == "grpo":
        return 1.0 / (lengths.clamp(min=1) * num_sequences)
    if loss_type == "dapo":
        return torch.full_like(lengths, 1.0 / max(1, total_tokens), dtype=torch.float32)
    if loss_type == "dr_grpo":
        return torch.full_like(lengths, 1.0 / (num_sequences * max_length), dtype=torch.float32)
    raise ValueError(f"loss_type: found {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
