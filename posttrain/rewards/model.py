"""Our reward model as a reward function. In: prompt and completion tokens. Out: a score each, normalised and clipped.

Tokens are scored as they were sampled: policy and reward model share a tokenizer (`stage.describe_parents` checks it).
"""

from dataclasses import replace

import torch

from posttrain.errors import UserError
from posttrain.models import ModelConfig, load_scalar_model
from posttrain.ranking_forward import find_layout, score_all
from posttrain.stage import read_manifest


class RewardModelScore:
    """`mean` and `std` are those of the model's scores on its held-out rankings, from its manifest."""

    def __init__(self, model, mean: float = 0.0, std: float = 1.0, clip: float = float("inf")):
        self.model, self.mean, self.std, self.clip = model.eval(), mean, std, clip
        self.layout, _ = find_layout(model, model.config.max_position_embeddings, ("packed", "padded"))

    def __call__(self, prompts, completions, completion_ids, *, prompt_ids, **columns) -> list[float]:
        sequences = [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
        scores = [(score - self.mean) / self.std for score in score_all(self.model, sequences, layout=self.layout)]
        return [max(-self.clip, min(self.clip, score)) for score in scores]


def load_reward_model(base: ModelConfig, ppo, device) -> RewardModelScore:
    """The reward model at `ppo.reward_model_path`, frozen. UserError where its manifest lacks mean and std."""
    model = load_scalar_model(replace(base, model_name_or_path=ppo.reward_model_path, model_revision=None))
    model = model.to(device).requires_grad_(False)
    if not ppo.normalize_rewards:
        return RewardModelScore(model, clip=ppo.reward_clip)
    metrics = (read_manifest(ppo.reward_model_path) or {}).get("metrics", {})
    if not {"score mean", "score std"} <= metrics.keys():
        raise UserError(
            f"reward_model_path: {ppo.reward_model_path} has no stage.json with the mean and std of its scores: "
            "train it with recipes/reward.py, or pass --normalize_rewards false"
        )
    return RewardModelScore(model, metrics["score mean"]["value"], metrics["score std"]["value"], ppo.reward_clip)


def load_critic(base: ModelConfig, ppo, device):
    """A critic on the reward model's backbone with a head of zeros, so that its first values are 0."""
    critic = load_scalar_model(replace(base, model_name_or_path=ppo.reward_model_path, model_revision=None))
    torch.nn.init.zeros_(critic.score.weight)
    return critic.to(device).eval()
