"""Optimizers: AdamW for all parameters, or Muon for the layers' matrices and AdamW for the rest.

In: a model and the keys of `OptimConfig`. Out: one `torch.optim.Optimizer` whose state loads and saves as torch's do.

Muon, torch's own, orthogonalises each matrix's momentum by five Newton-Schulz steps (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). They are scaled by 0.2 sqrt(max(rows, columns)) to the size of AdamW's (Liu et al.
2025, arXiv 2502.16982): one learning rate and one weight decay serve both. Embeddings, head, vectors: AdamW, as there.
"""

import torch
from torch import nn

from posttrain.errors import UserError

OPTIMIZERS = ("adamw", "muon")


def make_optimizer(module: nn.Module, config, rate: float, rates: dict[str, float] | None = None):
    """AdamW, or with `optim: muon` Muon and AdamW as one. `rates`: peak of parameters whose names begin so.

    Every group has its peak in `lr`.
    """
    groups = parameter_groups(module, rate, config.weight_decay, rates or {}, muon=config.optim == "muon")
    betas = (0.9, config.adam_beta2)
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas)
    return MuonWithAdamW(groups, betas)


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `muon: True` are stepped by `torch.optim.Muon`, the others by `torch.optim.AdamW`. Both work on this
    optimizer's own groups and state, so that schedules, checkpoints and shards see a single optimizer."""

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        matrices = [group for group in groups if group["muon"]]
        if not matrices:
            raise UserError("optim: muon, but the model's layers have no matrices that are trained; take adamw")
        others = [group for group in groups if not group["muon"]]
        self.parts = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for muon, part in zip((True, False), self.parts, strict=False):
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of both. No closure: the loss is not computed again."""
        assert closure is None
        for part in self.parts:
            part.step()


def parameter_groups(
    model: nn.Module, rate: float, weight_decay: float, rates: dict[str, float], *, muon: bool = False
) -> list[dict]:
    """Groups of what is trained: matrices decay, vectors do not; names that begin as a key of `rates` have that peak
    learning rate. With `muon` the matrices of the decoder layers are groups of their own, marked `muon`.

    UserError where no parameter's name begins with a key of `rates`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if lost := [prefix for prefix in rates if not any(name.startswith(prefix) for name, _ in named)]:
        raise UserError(f"learning_rates: no trained parameter's name begins with {lost[0]!r}")
    owners = [next((prefix for prefix in rates if name.startswith(prefix)), None) for name, _ in named]
    inside = layer_matrices(model) if muon else set()
    groups = []
    for prefix in (None, *rates):
        own = [p for (_, p), owner in zip(named, owners, strict=True) if owner == prefix]
        kinds = {
            (True, True): [p for p in own if id(p) in inside],
            (True, False): [p for p in own if p.ndim > 1 and id(p) not in inside],
            (False, False): [p for p in own if p.ndim <= 1],
        }
        for (decays, by_muon), members in kinds.items():
            group = {"params": members, "weight_decay": weight_decay * decays, "lr": rates.get(prefix, rate)}
            groups.append(group | {"muon": by_muon} if muon else group)
    return [group for group in groups if group["params"]]


def layer_matrices(model: nn.Module) -> set[int]:
    """ids of the parameters with two dimensions inside the decoder layers."""
    from posttrain.sharding import blocks

    return {id(p) for layer in blocks(model) for p in layer.parameters() if p.ndim == 2}
