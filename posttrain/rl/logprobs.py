"""Log-probabilities, entropies and values of chosen positions in packed rows. Torch only.

In: packed `input_ids`, `position_ids` (B, S) and `select`, the flat positions (M,) whose *next* token counts.
Out: (M,) tensors. The head runs on the selected positions alone, so prompts cost no logits.
"""

import torch
from torch import Tensor, nn


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


class TokenLogps(nn.Module):
    """A causal LM whose forward gives log-probabilities of selected tokens; a module so that DDP can wrap it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, select, targets, temperature: float) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(self.model, input_ids, position_ids)[select]  # (M, D)
        logits = scaled_logits(self.model.get_output_embeddings()(hidden), self.model.config)
        return gather_logps(logits, targets, temperature)


def scaled_logits(logits: Tensor, config) -> Tensor:
    """What some models do after their head: Cohere multiplies, Granite divides, Gemma 2 caps."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


class TokenValues(nn.Module):
    """A scalar-head model whose forward gives the value at selected positions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, select) -> Tensor:
        hidden = hidden_states(self.model, input_ids, position_ids)[select]
        return self.model.score(hidden).float()[:, 0]


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states, flattened to (B * S, D). No attention mask: restarts in position_ids isolate sequences."""
    backbone = getattr(model, model.base_model_prefix)
    output = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def completion_positions(starts: list[int], prompts: list[int], lengths: list[int]) -> Tensor:
    """Flat positions that predict each completion's tokens: from the prompt's last token to the one before the end.

    starts: offsets of the sequences; prompts, lengths: tokens of each prompt and completion. Returns (sum lengths,).
    """
    pieces = [torch.arange(s + p - 1, s + p - 1 + n) for s, p, n in zip(starts, prompts, lengths, strict=True)]
    return torch.cat(pieces)
