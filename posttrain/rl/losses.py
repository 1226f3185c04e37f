"""Losses of PPO and GRPO, one number a token, and how tokens are weighted into one step's loss. Torch only.

In: flat tensors (M,) over the policy's own tokens of whole completions, one after the other, `sizes` tokens each (a
tool's tokens are left out before). A step's loss is the sum over micro-batches and processes of
    (policy_loss(...).loss + beta * kl_loss(...) - entropy_coef * entropy) * weights
with each token's weight from `sequence_weights`; the sum does not depend on how completions fall into micro-batches.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo")
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class PolicyTerms:
    """Tensors (M,); the first two carry a gradient, the others are 0 or 1, to be averaged and logged."""

    loss: Tensor  # of each token, not yet weighted
    ratio: Tensor  # pi / old of the token, or of its sequence spread over its tokens
    clipped: Tensor  # the clip took the token's gradient (cispo: cut its ratio)
    truncated: Tensor  # the importance weight was cut at `cap`


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sizes: list[int], *, low: float, high: float,
    loss_type: str = "dapo", level: str = "token", delta: float | None = None, cap: float = math.inf,
    behaviour_logps: Tensor | None = None,
) -> PolicyTerms:  # fmt: skip
    """The policy's loss of each token: PPO's clipped surrogate (1707.06347), or CISPO (2506.13585). All tensors (M,).

    r = exp(logps - old_logps), at level "sequence" and for gspo (2507.18071) the exponential of its mean over the
    sequence; the advantages must then be equal along a sequence, as a group's are.
    - surrogate: -min(r A, clip(r, 1 - low, 1 + high) A); high > low is DAPO's clip-higher. `delta` (> 1 + high) bounds
      r itself: it acts where A < 0 (dual clip, 1912.09729; TRL's delta).
    - cispo: -min(r, high) A logps with no gradient through r. Here `high` is the bound itself and not a distance
      from 1, as in TRL 1.16 (which advises 5.0).

    What the engine sampled with may differ from pi_old; importance weights of single tokens, truncated at `cap`:
    - behaviour_logps None: old_logps are the engine's, r is the importance ratio and is itself truncated: the
      gradient's coefficient is min(r, cap).
    - behaviour_logps given (old_logps from a pass of the trainer): each loss is multiplied by
      min(exp(old_logps - behaviour_logps), cap), TRL's mode token_truncate.
    ValueError for an unknown loss_type or level, and for a cispo whose bound is below 1.
    """
    _known("loss_type", loss_type, LOSS_TYPES)
    _known("importance_sampling_level", level, LEVELS)
    log_ratio = logps - old_logps
    if level == "sequence" or loss_type == "gspo":
        log_ratio = _sequence_means(log_ratio, sizes)
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        if high < 1:
            raise ValueError(f"epsilon_high: found {high}; for cispo it bounds the ratio: at least 1, such as 5.0")
        coefficient = ratio.detach().clamp(max=high)
        loss, clipped = -coefficient * advantages * logps, (ratio > high) & (advantages != 0)
    else:
        coefficient = ratio.detach()
        loss, clipped = _clipped_surrogate(ratio, advantages, low, high, delta)
    if behaviour_logps is None:
        truncated = coefficient > cap
        weight = torch.where(truncated, cap / coefficient, 1.0)
    else:
        importance = torch.exp(old_logps - behaviour_logps)
        weight, truncated = importance.clamp(max=cap), importance > cap
    return PolicyTerms(loss * weight, ratio, clipped.float(), truncated.float())


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None
) -> tuple[Tensor, Tensor]:
    """Loss (M,) and where the clip took its gradient (M,)."""
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    plain, clipped = bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    taken = clipped < plain
    if delta is not None:
        taken = taken | ((ratio > delta) & (advantages < 0))
    return -torch.minimum(plain, clipped), taken


def _sequence_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Each sequence's mean, spread over its tokens; (M,)."""
    return torch.cat([piece.mean().expand(len(piece)) for piece in values.split(sizes) if len(piece)])


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one; (M,)."""
    kept = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (kept - returns) ** 2)


def sequence_weights(
    loss_type: str, lengths: Tensor, total_tokens: float, num_sequences: int, max_length: int,
    counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weight of every token of each sequence, so that the weighted sum over all tokens is the step's loss; (N,).

    - grpo, gspo: mean over sequences of their token means.
    - bnpo, dapo, cispo: sum over tokens over `total_tokens`; which tokens those are: see `token_total`.
    - dr_grpo: sum over tokens over (sequences x max_length), which does not depend on a sequence's own length.
    lengths (N,) are the policy's own tokens; `num_sequences` counts the minibatch on all processes. `counts` (N,) is 0
    for completions left out (TRL's mask_truncated_completions: they still count as sequences, their tokens count no
    more, so leave them out of `total_tokens`), else 1.
    """
    _known("loss_type", loss_type, LOSS_TYPES)
    if loss_type in ("grpo", "gspo"):
        weights = 1.0 / (lengths.clamp(min=1) * num_sequences)
    else:
        whole = num_sequences * max_length if loss_type == "dr_grpo" else max(1, total_tokens)
        weights = torch.full_like(lengths, 1.0 / whole, dtype=torch.float32)
    return weights if counts is None else weights * counts


def token_total(loss_type: str, minibatch_tokens: int, batch_tokens: int, num_minibatches: int) -> float:
    """`total_tokens` of `sequence_weights`: the tokens over which a loss type takes its mean. All processes count.

    bnpo, and PPO's masked mean: the tokens of this minibatch. dapo and cispo: those of all the step's rollouts, spread
    evenly over its minibatches, so that a token weighs the same in each; one minibatch makes them bnpo. TRL 1.16 says
    the same by num_items_in_batch / num_processes * gradient_accumulation_steps / steps_per_generation; its bnpo is a
    mean over each forward's own tokens, ours equals it where one forward on one process is the minibatch.
    """
    _known("loss_type", loss_type, LOSS_TYPES)
    return batch_tokens / num_minibatches if loss_type in ("dapo", "cispo") else minibatch_tokens


def _known(key: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{key}: found {found!r}, expected one of {', '.join(expected)}")
