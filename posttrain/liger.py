"""Liger's fused Triton kernels: whether they can run here, and the loss of a language model by them.

In: a stage's `use_liger_kernel` and a causal LM. Out: the model patched in place; a loss that never holds all logits.
Liger-Kernel, Hsu et al. 2024, arXiv 2410.10989. They need a GPU; TRITON_INTERPRET=1 runs some on a CPU, slowly.
"""

import os

import torch
from torch import Tensor

from posttrain.errors import UserError


def liger_obstacle() -> str | None:
    """Why Liger's kernels cannot run here; None where they can."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Liger's Triton kernels need a GPU, and torch sees none (TRITON_INTERPRET=1 runs them on a CPU, slowly)"


def takes_liger(setting: str, stage) -> bool:
    """Whether Liger is used; the stage is told where it cannot be. UserError where it is asked for and cannot."""
    obstacle = liger_obstacle()
    if setting == "true" and obstacle:
        raise UserError(f"use_liger_kernel: true, but {obstacle}; or --use_liger_kernel auto")
    if setting == "auto" and obstacle:
        stage.note(f"no Liger kernels: {obstacle.split(' (')[0]}")
    return setting != "false" and obstacle is None


def patch(model, kernels: dict) -> None:
    """Norms, rotary positions and MLPs of `model` by Liger, where it knows the architecture. `kernels` as transformers
    names them, {rms_norm: false}. The loss is not among them: `head_loss` is it."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {**kernels, "cross_entropy": False, "fused_linear_cross_entropy": False})


def head_loss(model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats of hidden states (N, d) through the head against targets (N,), computed in pieces:
    the logits (N, vocabulary) are never in memory together."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = model.get_output_embeddings()
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden, targets, getattr(head, "bias", None))
