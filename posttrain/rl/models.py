"""The networks of the RL loop: policy with adapters or without, its reference, the critic; and what samples from it.

In: the keys of a recipe. Out: models on their device, in eval mode: dropout is off in RL, since the engine has none.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from posttrain.chat import stop_ids
from posttrain.evals import ReplyConfig
from posttrain.layouts import Layout
from posttrain.lora import LoraArgs, add_adapter
from posttrain.models import ModelConfig, load_causal_lm, load_pair, load_scalar_model
from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
from posttrain.rl.forward import rollout_logps
from posttrain.rl.rollout import Engine, EngineConfig, make_engine
from posttrain.rl.tools import ToolEngine
from posttrain.rl.types import Rollouts
from posttrain.tools import load_tools


@dataclass
class Reference:
    """The policy as it was before RL, frozen: what the KL is measured against.

    With adapters it is the policy itself while they are off, which takes no memory; `adapters` is peft's wrapper.
    """

    model: nn.Module
    adapters: object = None
    offload: bool = False

    def logps(self, rollouts: Rollouts, layout: Layout, temperature: float, max_tokens: int, device) -> list[Tensor]:
        """Log-probabilities of the sampled tokens, N tensors (T_i,)."""
        off = nullcontext() if self.adapters is None else self.adapters.disable_adapter()
        with off, visiting(self.model, device, self.offload):
            return rollout_logps(self.model, rollouts, layout, temperature, max_tokens)


@contextmanager
def visiting(model: nn.Module, device, offload: bool):
    """`model` on `device`; with `offload` it came from main memory and goes back there."""
    if offload:
        model.to(device)
    yield
    if offload:
        model.to("cpu")


@dataclass
class Networks:
    """`trained` is what is saved: the policy, or peft's wrapper around the same object; `critic` a scalar model, or a
    head on the policy's trunk."""

    policy: nn.Module
    tokenizer: object
    trained: nn.Module
    reference: Reference | None = None
    critic: nn.Module | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return tuple(sorted(stop_ids(self.tokenizer, self.policy)))


def load_networks(
    base: ModelConfig, lora: LoraArgs, config: RLConfig, loss: LossConfig, device, ppo: PPOConfig | None = None
) -> Networks:
    """The networks of a stage: a reference where there is a KL, with `ppo` that and a critic. UserError where the
    settings of the loss contradict each other."""
    reference = loss.resolved(ppo is not None).beta > 0 or ppo is not None
    policy, tokenizer = load_pair(base, device, lora)
    trained = add_adapter(policy.eval(), lora) if lora.use_peft else policy
    networks = Networks(policy, tokenizer, trained)
    if reference and lora.use_peft:
        networks.reference = Reference(policy, trained)
    elif reference:
        start = load_causal_lm(base).requires_grad_(False).eval()
        networks.reference = Reference(start.to("cpu" if config.offload else device), None, config.offload)
    if ppo is not None:
        networks.critic = load_critic(base, ppo, policy, device)
    return networks


def load_engine(
    engines: EngineConfig, networks: Networks, config: RLConfig, replies: ReplyConfig, length: int, run
) -> Engine:
    """What samples, with room for `length` tokens: vLLM or `generate`, and the tools that the config names."""
    engine = make_engine(engines, networks.policy, networks.tokenizer, length, run)
    if not config.tools:
        return engine
    tools = load_tools(config.tools, config.tool_options)
    return ToolEngine(engine, tools, networks.tokenizer, **replies.tool_limits)


def load_critic(base: ModelConfig, ppo: PPOConfig, policy, device) -> nn.Module:
    """A scalar model on the reward model's or the policy's backbone, or a head for the policy's trunk; its head is 0,
    so that the first values are."""
    if ppo.critic == "trunk":
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(head.weight)
        return head.to(device)
    source = ppo.reward_model_path if ppo.critic == "reward_model" else base.model_name_or_path
    revision = None if ppo.critic == "reward_model" else base.model_revision
    critic = load_scalar_model(replace(base, model_name_or_path=source, model_revision=revision))
    nn.init.zeros_(critic.score.weight)
    return critic.to(device).eval()


@torch.no_grad()
def move(module: nn.Module, optimizer: torch.optim.Optimizer, device) -> None:
    """Weights and optimizer state to another device, in place."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[key] = value.to(device)
