"""Our reward model as a reward by name, loaded once when it is first called.

In: prompt and completion tokens, of the reward model's own tokenizer. Out: a score each, normalised and clipped.

    reward_funcs: [correct, model]
    reward_options: {model: {path: runs/tiny/reward, clip: 5.0, normalize: true}}
"""

import math

from posttrain.errors import UserError
from posttrain.rewards.options import bad_option, number


class ModelReward:
    """A reward function; `loaded` keeps the models, by path."""

    def __init__(self):
        self.loaded: dict = {}

    def __call__(
        self,
        prompts,
        completions,
        completion_ids,
        *,
        prompt_ids,
        path: str | None = None,
        clip: float = 5.0,
        normalize: bool = True,
        **columns,
    ) -> list[float]:
        """(score - mean) / std of each prompt with its completion, clipped; mean and std from the model's manifest.

        Completions of one prompt that stand side by side are scored with the prompt read once.

        Args:
            path: folder of the reward model's stage, or its name on the Hub.
            clip: scores are cut to +- this.
            normalize: false takes the scores as they are.

        Raises:
            UserError: no path, another kind of option, a folder without a reward model or without mean and std.
        """
        if not isinstance(path, str) or not path:
            raise bad_option("model", "path", path, "the folder of a reward model's stage")
        if not isinstance(normalize, bool):
            raise bad_option("model", "normalize", normalize, "true or false")
        number("model", "clip", clip, low=0, high=math.inf)
        if not completions:
            return []
        score = self._load(path, normalize)
        score.clip = clip
        return score(prompts, completions, completion_ids, prompt_ids=prompt_ids)

    def _load(self, path: str, normalize: bool):
        from posttrain.models import ModelConfig, load_scalar_model
        from posttrain.rewards.model import RewardModelScore, score_statistics

        if (path, normalize) not in self.loaded:
            mean, std = 0.0, 1.0
            if normalize:
                mean, std = score_statistics(path, "reward_options: model: path", "normalize: false")
            model = load_scalar_model(ModelConfig(model_name_or_path=path)).to(_device()).requires_grad_(False)
            self.loaded[path, normalize] = RewardModelScore(model, mean, std, share_prompt=True)
        return self.loaded[path, normalize]


def _device():
    """This process's device, as Accelerate has it."""
    import accelerate
    from accelerate.utils import parse_flag_from_env

    return accelerate.PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def reward_parents(config) -> dict[str, str]:
    """{"reward": path} where `model` is among the rewards, for `stage.start` and `stage.describe_parents`: they refuse
    an unfinished stage and a tokenizer that is not the policy's, and write the path and its hash into the manifest."""
    path = (config.reward_options.get("model") or {}).get("path")
    if "model" in config.reward_funcs and not path:
        raise UserError("reward model needs its folder: reward_options: {model: {path: runs/tiny/reward}}")
    return {"reward": path} if "model" in config.reward_funcs else {}


model_reward = ModelReward()
