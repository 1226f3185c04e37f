"""What flows through the RL loop: `Rollouts` from the engine, `Experience` once scored. N completions, lengths differ.

Everything is kept per sequence, as lists of 1-d tensors, and packed only for a forward pass: nothing is padded.
T_i counts the tokens that the model sampled itself; a tool's text stands between them in `Completion.ids`.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Completion:
    """One sampled continuation. `ids` includes the end token where the model ended by itself (`stop` "stop").

    With tools it holds their answers, too, between the model's own turns: `mask` tells them apart. `calls` counts
    those that were answered, `failed_calls` the ones whose answer is an error; None where there are no tools.
    """

    ids: list[int]
    logps: list[float]  # of each id under the sampling distribution (temperature applied); 0 where the mask is 0
    stop: str  # "stop": an end token; "length": cut at the limit
    mask: list[int] | None = None  # 1 = sampled by the model, 0 = a tool's text; None = all sampled
    calls: int | None = None
    failed_calls: int | None = None

    @property
    def sampled(self) -> list[int]:
        """Places in `ids` of the tokens that the model sampled itself."""
        return [i for i in range(len(self.ids)) if self.mask is None or self.mask[i]]


@dataclass
class Rollouts:
    """N = prompts x num_generations completions, those of one prompt side by side."""

    rows: list[dict]  # N; the data row each completion belongs to (its columns reach the reward functions)
    prompt_ids: list[list[int]]  # N
    completions: list[Completion]  # N
    num_generations: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, tools' answers included."""
        return [len(c.ids) for c in self.completions]

    @property
    def sampled_lengths(self) -> list[int]:
        """Tokens of each completion that the model sampled itself: T_i."""
        return [len(c.ids) if c.mask is None else sum(c.mask) for c in self.completions]

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and completions."""
        return sum(map(len, self.prompt_ids)) + sum(self.lengths)

    def take(self, indices: list[int]) -> "Rollouts":
        """Some completions, whole groups of them."""
        parts = ([values[i] for i in indices] for values in (self.rows, self.prompt_ids, self.completions))
        return Rollouts(*parts, self.num_generations)


@dataclass
class Experience:
    """Rollouts with what training needs; lists have N entries, tensors are (T_i,) over sampled tokens, float32."""

    rollouts: Rollouts
    rewards: Tensor  # (N,) total reward of each completion, missing-EOS penalty included
    rewards_by_name: dict[str, list[float | None]]
    old_logps: list[Tensor]  # what the ratio is against: the engine's, or the trainer's own before the update
    behaviour_logps: list[Tensor] | None = None  # the engine's, where old_logps are the trainer's
    ref_logps: list[Tensor] | None = None  # where a KL term or report asks for them
    values: list[Tensor] | None = None  # critic's, PPO only
    advantages: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] | None = None  # PPO only
