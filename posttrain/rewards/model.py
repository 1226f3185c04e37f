"""Our reward model as a reward function. In: prompt and completion tokens. Out: a score each, normalised and clipped.

Tokens are scored as they were sampled: policy and reward model share a tokenizer (`stage.describe_parents` checks it).
With `share_prompt` the prompt of a group stands once before its completions, where the model can take that.
"""

from dataclasses import replace

from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS, find_layout
from posttrain.models import ModelConfig, load_scalar_model
from posttrain.ranking_forward import score_groups
from posttrain.rewards.text import groups
from posttrain.stage import read_manifest


class RewardModelScore:
    """`mean` and `std` are those of the model's scores on its held-out rankings, from its manifest."""

    def __init__(
        self, model, mean: float = 0.0, std: float = 1.0, clip: float = float("inf"), share_prompt: bool = False
    ):
        self.model, self.mean, self.std, self.clip = model.eval(), mean, std, clip
        wanted = LAYOUTS if share_prompt else ("packed", "padded")
        self.layout, _ = find_layout(model, model.config.max_position_embeddings, wanted)

    def __call__(self, prompts, completions, completion_ids, *, prompt_ids, **columns) -> list[float]:
        sequences = [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
        longest, room = max(map(len, sequences), default=0), self.model.config.max_position_embeddings
        if longest > room:
            raise UserError(
                f"a prompt with its completion has {longest} tokens, but the reward model's context has {room} "
                "positions: lower max_completion_length or max_prompt_length"
            )
        shared = self.layout.name == "prefix"
        members = groups(prompts, prompt_ids) if shared else [[index] for index in range(len(sequences))]
        found = score_groups(self.model, [[sequences[i] for i in group] for group in members], self.layout)
        scores = [(score - self.mean) / self.std for group in found for score in group]
        return [max(-self.clip, min(self.clip, score)) for score in scores]


def load_reward_model(base: ModelConfig, ppo, device) -> RewardModelScore:
    """The reward model at `ppo.reward_model_path`, frozen. UserError where its manifest lacks mean and std."""
    mean, std = 0.0, 1.0
    if ppo.normalize_rewards:
        mean, std = score_statistics(ppo.reward_model_path, "reward_model_path", "--normalize_rewards false")
    model = load_scalar_model(replace(base, model_name_or_path=ppo.reward_model_path, model_revision=None))
    return RewardModelScore(model.to(device).requires_grad_(False), mean, std, ppo.reward_clip)


def score_statistics(path: str, key: str, otherwise: str) -> tuple[float, float]:
    """(mean, std) of a reward model's scores on its held-out rankings, from its manifest. UserError where it has none:
    names the config's `key` and what to do `otherwise`."""
    metrics = (read_manifest(path) or {}).get("metrics", {})
    if not {"score mean", "score std"} <= metrics.keys():
        raise UserError(
            f"{key}: {path} has no stage.json with the mean and std of its scores: "
            f"train it with recipes/reward.py, or pass {otherwise}"
        )
    return metrics["score mean"]["value"], metrics["score std"]["value"]
