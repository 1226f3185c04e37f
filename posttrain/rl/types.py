"""What flows through the RL loop: `Rollouts` from the engine, `Experience` once scored. N completions, lengths differ.

Everything is kept per sequence, as lists of 1-d tensors, and packed only for a forward pass: nothing is padded.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Completion:
    """One sampled continuation. `ids` includes the end token where the model ended by itself (`stop` "stop")."""

    ids: list[int]
    logps: list[float]  # of each id under the sampling distribution (temperature applied)
    stop: str  # "stop": an end token; "length": cut at the limit


@dataclass
class Rollouts:
    """N = prompts x num_generations completions, those of one prompt side by side."""

    rows: list[dict]  # N; the data row each completion belongs to (its columns reach the reward functions)
    prompt_ids: list[list[int]]  # N
    completions: list[Completion]  # N
    num_generations: int

    @property
    def lengths(self) -> list[int]:
        return [len(c.ids) for c in self.completions]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass
class Experience:
    """Rollouts with what training needs; lists have N entries, tensors are (T_i,) over completion tokens, float32."""

    rollouts: Rollouts
    rewards: Tensor  # (N,) total reward of each completion, missing-EOS penalty included
    rewards_by_name: dict[str, list[float | None]]
    old_logps: list[Tensor]  # behaviour policy's, from the engine
    ref_logps: list[Tensor] | None = None  # where a KL term or report asks for them
    values: list[Tensor] | None = None  # critic's, PPO only
    advantages: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] | None = None  # PPO only
