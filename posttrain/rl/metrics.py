"""What a step of the RL loop tells: means over completions and tokens of all processes, one flat dict a step.

In: experience and sums over tokens from the update. Out: the numbers of a line of log.jsonl.
"""

import math

import torch
from torch import Tensor

from posttrain.rl.experience import kl_of_replies
from posttrain.rl.types import Experience
from posttrain.throughput import mfu, model_flops, non_embedding_parameters, peak_flops, peak_memory_gb


class TokenSums:
    """Sums over tokens of what an update sees; read once a step, so that no micro-batch waits for the device."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Add tensors (M,)."""
        for key, value in values.items():
            total = torch.stack([value.detach().double().sum(), torch.tensor(float(len(value)), device=value.device)])
            self.sums[key] = self.sums[key] + total if key in self.sums else total

    def means(self, reduce) -> dict[str, float]:
        """Means over the tokens of all processes, which must have added the same keys."""
        if not self.sums:
            return {}
        totals = reduce(torch.stack([self.sums[key] for key in sorted(self.sums)]))
        return {key: (a / max(n, 1)).item() for key, (a, n) in zip(sorted(self.sums), totals, strict=True)}


def experience_numbers(experience: Experience, *, tools: bool = False) -> dict[str, float]:
    """Means over this process's completions; the keys are the same on every process. `tools`: theirs, too."""
    rollouts = experience.rollouts
    groups = experience.rewards.view(-1, rollouts.num_generations)
    numbers = {
        "reward": experience.rewards.mean().item(),
        "completion_length": mean(rollouts.sampled_lengths),
        "completion_length_max": float(max(rollouts.sampled_lengths)),
        "cut_share": mean([c.stop == "length" for c in rollouts.completions]),
    }
    if groups.shape[1] > 1:  # a group of one, as PPO may have, has no spread to speak of
        numbers["reward_std"] = groups.std(1).mean().item()
        numbers["zero_signal_groups"] = (groups == groups[:, :1]).all(1).float().mean().item()
    advantages = torch.cat(experience.advantages)
    numbers["advantage_spread"] = (advantages.max() - advantages.min()).item()
    for name, values in experience.rewards_by_name.items():
        known = [v for v in values if v is not None]
        numbers[f"reward/{name}"] = mean(known) if known else 0.0
        numbers[f"reward/{name}/std"] = torch.tensor(known).std(correction=0).item() if known else 0.0
        numbers[f"reward/{name}/none"] = 1 - len(known) / len(values)
    if experience.ref_logps is not None:
        numbers["kl"] = mean(kl_of_replies(experience))
    if experience.returns is not None:
        numbers["explained_variance"] = explained_variance(experience.values, experience.returns)
    if tools:
        answers = [0 if c.mask is None else c.mask.count(0) for c in rollouts.completions]
        numbers["tool_tokens"] = mean(answers)
        numbers["tool_share"] = mean([answer > 0 for answer in answers])
        calls = [c.calls or 0 for c in rollouts.completions]
        numbers["tool_calls"] = mean(calls)
        numbers["tool_calls_failed"] = sum(c.failed_calls or 0 for c in rollouts.completions) / max(1, sum(calls))
    return numbers


class Arithmetic:
    """FLOPs of a step against what this device can do: MFU, recomputed and padded tokens not counted."""

    def __init__(self, policy, critic, device, dtype):
        self.peak = peak_flops(device, dtype)
        self.models = [self._shape(model) for model in (policy, critic) if model is not None]
        self.flops = 0.0

    @staticmethod
    def _shape(model) -> tuple[int, int, int]:
        config = model.config.get_text_config()
        return non_embedding_parameters(model), config.num_hidden_layers, config.hidden_size

    def add(self, tokens: int, sequences: int, kind: str, critic: bool = False) -> None:
        """Count a pass over `tokens` tokens: "training", "adapter" or "forward", of the policy or the critic."""
        shape = self.models[1 if critic and len(self.models) > 1 else 0]
        self.flops += model_flops(*shape, tokens, tokens / max(1, sequences), kind)

    def numbers(self, seconds: float) -> dict[str, float]:
        """`mfu` of the time since the last call, and the most memory held."""
        flops, self.flops = self.flops, 0.0
        return {"mfu": mfu(flops, seconds, self.peak), "memory_gb": peak_memory_gb()}


def mean(values) -> float:
    return math.fsum(values) / len(values)


def explained_variance(values: list, returns: list) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    predicted, actual = torch.cat(values), torch.cat(returns)
    return (1 - (actual - predicted).var() / actual.var()).item() if actual.var() > 0 else 0.0
