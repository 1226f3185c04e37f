"""Settings of the RL loop. Names are TRL's where TRL has one; PPO adds the nouns of its critic.

In: a recipe's YAML and flags. Out: `RLConfig` (what is sampled and rewarded), `LossConfig` (advantages and loss: PPO,
GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++ are settings of it) and `PPOConfig` (the critic).
"""

import math
from dataclasses import dataclass, replace

from posttrain.args import arg, at_least, one_of
from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS
from posttrain.rl.advantages import ADVANTAGES
from posttrain.rl.kl import KL_ESTIMATORS
from posttrain.rl.losses import LEVELS, LOSS_TYPES
from posttrain.tools import check_tools


@dataclass
class RLConfig:
    """RL: rollouts, rewards, steps"""

    max_steps: int = arg(
        60, help="steps of the loop; each samples once and updates num_iterations x num_minibatches times"
    )
    num_prompts: int = arg(48, help="prompts a step, over all processes")
    num_generations: int = arg(8, help="completions sampled for each prompt")
    max_completion_length: int = arg(64, help="completions are cut at so many tokens, tools' answers included")
    max_prompt_length: int | None = arg(
        None, help="longer prompts are left out and counted; none = what the model's context has room for"
    )
    temperature: float = arg(1.0, help="sampling temperature; the same one is in every log-probability")
    reward_funcs: list[str] = arg(["correct"], help="reward functions: short names or dotted paths")
    reward_weights: list[float] = arg([], help="weight of each reward function; empty = all 1")
    reward_options: dict = arg({}, help="keywords of reward functions by name: {overlong: {cache: 16}}")
    reward_timeout: float = arg(
        300.0, help="seconds that a reward function has for a step's completions; 0 = no limit"
    )
    running_rewards: bool = arg(False, help="rewards minus their mean over their std, both over the whole run so far")
    missing_eos_penalty: float = arg(0.0, help="subtracted from the reward of a completion cut at the limit")
    tools: list[str] = arg(
        [], help="tools that completions may call: calculator, python, search, mcp:NAME or dotted paths"
    )
    tool_options: dict = arg({}, help="keywords of tools by name: {search: {folder: docs}}")
    dynamic_sampling: int = arg(
        0, help="sample up to so many times more a step, until num_prompts groups have differing rewards (DAPO)"
    )
    rollout_ahead: int = arg(
        0, help="1: sample the next step's completions while this one trains, one step off policy"
    )
    num_iterations: int = arg(1, help="passes over each step's rollouts")
    num_minibatches: int = arg(1, help="optimizer steps a pass")
    max_tokens_per_microbatch: int = arg(8192, help="tokens of one forward and backward; memory, not mathematics")
    layout: str = arg(
        "auto",
        help="prefix: a prompt's tokens once for its completions; packed; padded; auto: what the model can take",
    )
    offload: bool = arg(False, help="keep reference and critic in main memory while they are not used")
    max_kl: float = arg(0.0, help="stop where the mean KL to the start passes so many nats a reply; 0 = no bound")
    max_mismatch: float = arg(1.05, help="stop where mean exp |log-prob of trainer - of engine| passes this")

    def __post_init__(self):
        least = {"max_steps": 1, "num_prompts": 1, "num_generations": 1, "max_completion_length": 1}
        least |= {
            "num_iterations": 1,
            "num_minibatches": 1,
            "max_tokens_per_microbatch": 1,
        }
        at_least(self, **least, max_prompt_length=1, dynamic_sampling=0, reward_timeout=0)
        if self.temperature <= 0:
            raise UserError(
                f"temperature: found {self.temperature}, expected a number above 0 (greedy gives no signal)"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"reward_weights: found {len(self.reward_weights)} for {len(self.reward_funcs)} reward_funcs; one each"
            )
        check_tools(self.tools, self.tool_options)
        if self.rollout_ahead not in (0, 1):
            raise UserError(f"rollout_ahead: found {self.rollout_ahead}, expected 0 or 1")
        if self.rollout_ahead and self.dynamic_sampling:
            raise UserError("rollout_ahead: found 1 beside dynamic_sampling, which must see a step's rewards first")
        one_of(self, layout=("auto", *LAYOUTS))
        if self.max_mismatch <= 1:
            raise UserError(
                f"max_mismatch: found {self.max_mismatch}, expected more than 1, which is perfect agreement"
            )

    def layouts(self) -> tuple[str, ...]:
        """Those to try, in this order."""
        return LAYOUTS if self.layout == "auto" else (self.layout,)


@dataclass
class LossConfig:
    """RL: advantages and loss"""

    advantage: str = arg(
        "auto", help="gae (needs a critic), group (GRPO), rloo, reinforce_pp; auto: gae with a critic, else group"
    )
    scale_rewards: str = arg("group", help="group's advantage is divided by the std of the group, the batch, or none")
    loss_type: str = arg(
        "auto",
        help="grpo, dr_grpo, dapo, bnpo, gspo, cispo: how tokens are clipped and weighted; auto: dapo, PPO: bnpo",
    )
    importance_sampling_level: str = arg("token", help="ratio of each token, or one of the sequence (as gspo has)")
    epsilon: float = arg(0.2, help="ratio is clipped below at 1 - epsilon")
    epsilon_high: float | None = arg(
        None, help="and above at 1 + epsilon_high; none = epsilon; cispo: the bound itself, such as 5.0"
    )
    delta: float | None = arg(None, help="dual clip: bound of the ratio where the advantage is negative; above 1")
    beta: float = arg(0.0, help="weight of the KL to the starting policy")
    kl_in: str = arg("auto", help="reward or loss; auto: in the reward but for group advantages")
    kl_estimator: str = arg("auto", help="k1, k2 or k3; auto: k1 in the reward, k3 in the loss")
    use_bias_correction_kl: bool = arg(True, help="the KL in the loss is multiplied by the ratio (DeepSeek-V3.2)")
    kl_target: float = arg(0.0, help="nats a reply that beta is adapted to (Ziegler et al.); 0 = beta is fixed")
    kl_horizon: int = arg(10_000, help="completions over which beta adapts")
    entropy_coef: float = arg(0.0, help="weight of the entropy bonus, whose tokens weigh as the loss's do")
    mask_truncated_completions: bool = arg(False, help="completions cut at the limit teach nothing")
    whiten_advantages: bool = arg(True, help="gae, reinforce_pp: mean 0 and std 1 over all processes")
    old_logps: str = arg(
        "engine",
        help="what the ratio is against: the engine's own log-probabilities, or the trainer's (one more pass)",
    )
    vllm_importance_sampling_cap: float = arg(
        2.0, help="importance weights of single tokens are truncated at this; inf = not"
    )

    def __post_init__(self):
        one_of(
            self, advantage=("auto", *ADVANTAGES), loss_type=("auto", *LOSS_TYPES),
            scale_rewards=("group", "batch", "none"),
            kl_estimator=("auto", *KL_ESTIMATORS), kl_in=("auto", "reward", "loss"), old_logps=("engine", "trainer"),
            importance_sampling_level=LEVELS,
        )  # fmt: skip
        at_least(self, beta=0, kl_target=0, kl_horizon=1, epsilon=0)
        if self.delta is not None and self.loss_type == "cispo":
            raise UserError(f"delta: found {self.delta}, which cispo does not use: epsilon_high bounds its ratio")
        if self.delta is not None and not self.delta > 1 + self.high:
            raise UserError(f"delta: found {self.delta}, expected more than 1 + epsilon_high, {1 + self.high:g}")
        if not self.vllm_importance_sampling_cap >= 1:
            raise UserError(
                f"vllm_importance_sampling_cap: found {self.vllm_importance_sampling_cap}, expected 1 or more"
            )
        if self.kl_target and not self.beta:
            raise UserError("kl_target: found a target with beta 0; give the beta to begin with")

    def resolved(self, critic: bool) -> "LossConfig":
        """`auto` settled by whether there is a critic. UserError where the settings contradict each other."""
        advantage = self.advantage if self.advantage != "auto" else ("gae" if critic else "group")
        if (advantage == "gae") != critic:
            raise UserError(
                f"advantage: found {advantage!r} {'with' if critic else 'without'} a critic; gae is recipes/ppo.py's, "
                "the others are recipes/grpo.py's"
            )
        kl_in = self.kl_in if self.kl_in != "auto" else ("loss" if advantage == "group" else "reward")
        estimator = self.kl_estimator if self.kl_estimator != "auto" else ("k1" if kl_in == "reward" else "k3")
        loss_type = self.loss_type if self.loss_type != "auto" else ("bnpo" if critic else "dapo")
        if loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise UserError(
                f"epsilon_high: found {self.epsilon_high}; with loss_type cispo it bounds the ratio itself, say 5.0"
            )
        whole = loss_type == "gspo" or self.importance_sampling_level == "sequence"
        if whole and advantage in ("gae", "reinforce_pp"):
            raise UserError(
                f"importance_sampling_level: a sequence's ratio needs one advantage a sequence, {advantage} has one "
                "for each token: --importance_sampling_level token, and another loss_type than gspo"
            )
        return replace(self, advantage=advantage, kl_in=kl_in, kl_estimator=estimator, loss_type=loss_type)

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@dataclass
class PPOConfig:
    """PPO: critic and reward model"""

    reward_model_path: str = arg(help="folder of the reward model's stage")
    critic: str = arg(
        "reward_model",
        help="the critic begins as: reward_model; policy (both own networks); trunk (a head on the policy)",
    )
    critic_learning_rate: float = arg(1e-3, help="learning rate of a critic that is its own network")
    critic_warmup_steps: int = arg(0, help="first steps that train the critic alone")
    vf_coef: float = arg(0.1, help="critic: trunk: weight of the value loss beside the policy's")
    cliprange_value: float = arg(0.2, help="the value may move so far from the old one before its gradient is cut")
    gamma: float = arg(1.0, help="discount")
    lam: float = arg(0.95, help="lambda of generalised advantage estimation")
    normalize_rewards: bool = arg(True, help="reward model's score minus its mean over its std on its held-out set")
    reward_clip: float = arg(5.0, help="normalised scores are clipped to +- this")
    whiten_rewards: bool = arg(False, help="rewards of single tokens, KL included, over their std in the batch")

    def __post_init__(self):
        one_of(self, critic=("reward_model", "policy", "trunk"))
        at_least(self, critic_warmup_steps=0, vf_coef=0)
        for key in ("gamma", "lam"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected a number from 0 to 1")
        for key in ("critic_learning_rate", "cliprange_value", "reward_clip"):
            if not getattr(self, key) > 0 or math.isnan(getattr(self, key)):
                raise UserError(f"{key}: found {getattr(self, key)}, expected a number above 0")
