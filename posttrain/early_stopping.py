"""Stop a training run when its validation loss no longer falls, and give back the best weights.

In: a validation loss every now and then. Out: the model with the weights of the lowest one. State and weights travel
with the checkpoints, so that a resumed run decides as an uninterrupted one.
"""

from pathlib import Path

import torch

from posttrain.sharding import fill, full, trained

BEST = "best.safetensors"


class EarlyStopping:
    """`done` once `patience` evaluations in a row were no better than the best before them."""

    def __init__(self, model, patience: int):
        self.model, self.patience = model, patience
        self.best, self.best_step, self.stale = float("inf"), 0, 0
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def done(self) -> bool:
        return self.stale >= self.patience

    def see(self, step: int, loss: float) -> None:
        """Note the validation loss at `step`; a new best keeps a copy of the trained weights in memory."""
        if loss < self.best:
            self.best, self.best_step, self.stale = loss, step, 0
            self.weights = {name: full(p).to("cpu", copy=True) for name, p in trained(self.model).items()}
        else:
            self.stale += 1

    def restore(self) -> None:
        """Give the model its best weights; none were seen where training was shorter than an evaluation's turn."""
        for name, parameter in trained(self.model).items():
            if name in self.weights:
                fill(parameter, self.weights[name])

    def state(self) -> dict:
        return {"best": self.best, "best_step": self.best_step, "stale": self.stale}

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if self.weights:
            save_file({name: weight.contiguous() for name, weight in self.weights.items()}, folder / BEST)

    def load(self, folder: Path, state: dict) -> None:
        from safetensors.torch import load_file

        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
        if self.best_step:
            self.weights = load_file(folder / BEST)
