"""Log-probabilities and entropies of tokens from logits. Pure functions; torch only.

In: logits (M, V) of M positions and the tokens (M,) that came next. Out: (M,) tensors in fp32.
"""

import torch
from torch import Tensor


def gather_logps(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """log pi(target) (M,) and entropy (M,) in nats of softmax(logits / temperature); logits (M, V), targets (M,).
    Without its gradient the entropy needs no (M, V) tensors kept for the backward."""
    logits = logits.float()
    logps = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy


def scaled_logits(logits: Tensor, config) -> Tensor:
    """What some models do after their head: Cohere multiplies, Granite divides, Gemma 2 caps."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
