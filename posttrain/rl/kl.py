"""KL to the reference: estimators, their loss, controllers of its weight; and running moments of rewards. Torch only.

In: log-probabilities of sampled tokens, flat (M,). Out: one number a token, or the `beta` to weight them with.
Controllers and `RunningMoments` are the only state here; `state` and `load_state` carry it through a checkpoint.
"""

import math

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimates(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """Schulman's estimators of KL(pi, ref) from samples of pi (joschu.net/blog/kl-approx.html); (M,).

    k1 = log pi - log ref (no bias, large spread, may be negative); k2 = k1^2 / 2 (biased); k3 = exp(-k1) - 1 + k1
    (no bias, never negative). In a reward, where no gradient flows through them, k1 gives the gradient of KL(pi, ref).
    What each gives as a loss is another matter: see `kl_loss`.
    """
    k1 = logps - ref_logps
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1**2
    if kind == "k3":
        return torch.exp(-k1) - 1 + k1
    raise ValueError(f"kl_estimator: found {kind!r}, expected one of {', '.join(KL_ESTIMATORS)}")


def kl_loss(logps: Tensor, ref_logps: Tensor, kind: str, ratio: Tensor, use_bias_correction_kl: bool = True) -> Tensor:
    """The KL's term of the loss, one number a token, before `beta` and the token's weight; all (M,).

    `ratio` is pi over the sampling policy with its gradient (`PolicyTerms.ratio`). Expected gradient on policy:

    | kind | estimate alone (GRPO's paper)  | times ratio: use_bias_correction_kl (DeepSeek-V3.2, 2512.02556) |
    |------|--------------------------------|------------------------------------------------------------------|
    | k1   | zero: it does nothing          | KL(pi, ref)                                                      |
    | k2   | KL(pi, ref)                    | that of half the mean of k1^2 under pi: no KL's                  |
    | k3   | KL(ref, pi)                    | KL(pi, ref)                                                      |

    With the ratio of a token it holds off policy too, but for what follows from earlier tokens of the completion; a
    sequence's ratio is spread over its tokens. The default is TRL 1.16's.
    """
    estimates = kl_estimates(logps, ref_logps, kind)
    return estimates * ratio if use_bias_correction_kl else estimates


class FixedKL:
    """A weight of the KL that stays as it is."""

    def __init__(self, beta: float):
        self.beta = beta

    def update(self, kl: float, num: int) -> None:
        pass

    def state(self) -> dict:
        return {"beta": self.beta}

    def load_state(self, state: dict) -> None:
        self.beta = state["beta"]


class AdaptiveKL:
    """Proportional controller of the KL's weight (Ziegler et al. 1909.08593, 2.2): `beta` is what to use next.

    Each batch multiplies beta by 1 + e num / horizon, where e = KL / target - 1, cut to +-0.2. `target` in nats a
    completion, `horizon` in completions.
    """

    def __init__(self, init: float, target: float, horizon: int):
        if not (init > 0 and target > 0 and horizon > 0):
            raise ValueError(f"found beta {init}, target {target}, horizon {horizon}: expected each above 0")
        self.beta, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, num: int) -> None:
        """`kl`: mean nats a completion over the step's `num` completions of all processes."""
        if not math.isfinite(kl):
            raise ValueError(f"KL: found {kl}, expected a finite number of nats a completion")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * num / self.horizon

    def state(self) -> dict:
        return {"beta": self.beta}

    def load_state(self, state: dict) -> None:
        self.beta = state["beta"]


class RunningMoments:
    """Mean and variance of all rewards seen so far, merged batch by batch (Chan et al. 1979), in double precision.

    `update` wants the rewards of all processes, gathered, so that every process holds the same moments.
    """

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: summed squared distances to the mean

    def update(self, values: Tensor) -> None:
        values = values.double().flatten()
        count = len(values)
        if count == 0:
            return
        mean = values.mean().item()
        gap, total = mean - self.mean, self.count + count
        self.squares += ((values - mean) ** 2).sum().item() + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased; 0 before the second value."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def normalized(self, values: Tensor) -> Tensor:
        """(values - mean) / std in the values' own dtype; while all rewards seen were equal, the distance alone."""
        scale = self.std if self.std > 1e-8 else 1.0
        return ((values.double() - self.mean) / scale).to(values.dtype)

    def state(self) -> dict:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: dict) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
