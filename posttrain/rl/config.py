"""Settings of the RL loop. Names are TRL's where TRL has one; PPO adds the nouns of its critic."""

from dataclasses import dataclass

from posttrain.args import arg
from posttrain.errors import UserError
from posttrain.rl.losses import LOSS_TYPES


@dataclass
class RLConfig:
    """RL: rollouts, rewards, loss"""

    max_steps: int = arg(
        60, help="steps of the loop; each samples once and updates num_iterations x num_minibatches times"
    )
    num_prompts: int = arg(48, help="prompts a step, over all processes")
    num_generations: int = arg(8, help="completions sampled for each prompt")
    max_completion_length: int = arg(64, help="completions are cut at so many tokens")
    max_prompt_length: int | None = arg(
        None, help="longer prompts are left out and counted; none = what the model's context has room for"
    )
    temperature: float = arg(1.0, help="sampling temperature; the same one is in every log-probability")
    reward_funcs: list[str] = arg(["correct"], help="reward functions: short names or dotted paths")
    reward_weights: list[float] = arg([], help="weight of each reward function; empty = all 1")
    missing_eos_penalty: float = arg(0.0, help="subtracted from the reward of a completion cut at the limit")
    beta: float = arg(0.0, help="weight of the KL to the starting policy: in PPO's reward (k1), in GRPO's loss")
    kl_estimator: str = arg("k3", help="estimator of the KL in GRPO's loss: k1, k2 or k3")
    epsilon: float = arg(0.2, help="ratio is clipped below at 1 - epsilon")
    epsilon_high: float | None = arg(None, help="and above at 1 + epsilon_high; none = epsilon")
    loss_type: str = arg(
        "dapo", help="weight of tokens: grpo (mean of sequence means), dapo (mean of tokens), dr_grpo"
    )
    scale_rewards: str = arg("group", help="GRPO's advantage is divided by the std of the group, the batch, or none")
    num_iterations: int = arg(1, help="passes over each step's rollouts")
    num_minibatches: int = arg(1, help="optimizer steps a pass")
    max_tokens_per_microbatch: int = arg(8192, help="tokens of one forward and backward; memory, not mathematics")
    max_kl: float = arg(0.0, help="stop where the mean KL to the start passes so many nats a reply; 0 = no bound")
    max_mismatch: float = arg(1.05, help="stop where mean exp |log-prob of trainer - of engine| passes this")

    def __post_init__(self):
        choices = {
            "loss_type": LOSS_TYPES,
            "scale_rewards": ("group", "batch", "none"),
            "kl_estimator": ("k1", "k2", "k3"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"{key}: found {getattr(self, key)!r}, expected one of {', '.join(allowed)}")
        for key in ("max_steps", "num_prompts", "num_generations", "max_completion_length", "num_minibatches"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected at least 1")
        if self.temperature <= 0:
            raise UserError(
                f"temperature: found {self.temperature}, expected a number above 0 (greedy gives no signal)"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"reward_weights: found {len(self.reward_weights)} for {len(self.reward_funcs)} reward_funcs; one each"
            )


@dataclass
class PPOConfig:
    """PPO: critic and reward model"""

    reward_model_path: str = arg(help="folder of the reward model's stage")
    critic_learning_rate: float = arg(1e-3, help="learning rate of the critic")
    critic_warmup_steps: int = arg(0, help="first steps that train the critic alone")
    cliprange_value: float = arg(0.2, help="the value may move so far from the old one before its gradient is cut")
    gamma: float = arg(1.0, help="discount")
    lam: float = arg(0.95, help="lambda of generalised advantage estimation")
    normalize_rewards: bool = arg(True, help="reward model's score minus its mean over its std on its held-out set")
    reward_clip: float = arg(5.0, help="normalised scores are clipped to +- this")
