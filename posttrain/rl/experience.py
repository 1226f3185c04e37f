"""From rollouts to experience: rewards, then advantages. The statistics are those of all processes together.

In: rollouts, reward functions, what the models say of them. Out: an `Experience` with an advantage for every token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.rl.advantages import gae, group_advantages, rloo_advantages, shaped_rewards, to_go, whiten
from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
from posttrain.rl.scoring import call_rewards, total_rewards
from posttrain.rl.types import Experience, Rollouts

Reduce = Callable[[Tensor], Tensor]  # sum over all processes


def rewarded(rollouts: Rollouts, rewards, tokenizer, config: RLConfig, normalized: Reduce) -> Experience:
    """Rollouts with their rewards, `rewards` being [(name, function, weight)]; their sum goes through `normalized`."""
    by_name = call_rewards(rewards, rollouts, tokenizer, config.reward_timeout or None)
    cut = torch.tensor([c.stop == "length" for c in rollouts.completions])
    total = normalized(total_rewards(rewards, by_name, rollouts)) - config.missing_eos_penalty * cut.float()
    logps = [torch.tensor([c.logps[i] for i in c.sampled]) for c in rollouts.completions]
    return Experience(rollouts, total, by_name, logps)


def with_signal(experience: Experience) -> list[int]:
    """Groups whose rewards differ, by their place: only they have an advantage."""
    groups = experience.rewards.view(-1, experience.rollouts.num_generations)
    return (groups != groups[:, :1]).any(1).nonzero()[:, 0].tolist()


def join(first: Experience, second: Experience) -> Experience:
    """Both, one after the other; before anything but rewards is known of them."""
    a, b = first.rollouts, second.rollouts
    rollouts = Rollouts(a.rows + b.rows, a.prompt_ids + b.prompt_ids, a.completions + b.completions, a.num_generations)
    by_name = {name: values + second.rewards_by_name[name] for name, values in first.rewards_by_name.items()}
    return Experience(
        rollouts, torch.cat([first.rewards, second.rewards]), by_name, first.old_logps + second.old_logps
    )


def take_groups(experience: Experience, chosen: list[int]) -> Experience:
    """Some groups alone, in the order given."""
    n = experience.rollouts.num_generations
    indices = [g * n + k for g in chosen for k in range(n)]
    by_name = {name: [values[i] for i in indices] for name, values in experience.rewards_by_name.items()}
    logps = [experience.old_logps[i] for i in indices]
    return Experience(experience.rollouts.take(indices), experience.rewards[indices], by_name, logps)


def kl_of_replies(experience: Experience) -> list[float]:
    """log pi - log ref of each completion, summed over its tokens: an estimate of the KL a reply, in nats."""
    behaviour = experience.behaviour_logps or experience.old_logps
    return [(mine - ref).sum().item() for mine, ref in zip(behaviour, experience.ref_logps, strict=True)]


def add_advantages(
    experience: Experience, config: LossConfig, reduce: Reduce, beta: float, ppo: PPOConfig | None = None
) -> None:
    """Set `advantages` (and `returns` with a critic), (T_i,) each; `config` is a resolved one."""
    token_rewards = _token_rewards(experience, config, beta)
    if config.advantage == "gae":
        if ppo.whiten_rewards:
            token_rewards = _whitened(token_rewards, reduce, shift_mean=False)
        pairs = [gae(r, v, ppo.gamma, ppo.lam) for r, v in zip(token_rewards, experience.values, strict=True)]
        experience.advantages, experience.returns = [a for a, _ in pairs], [r for _, r in pairs]
    elif config.advantage == "reinforce_pp":
        experience.advantages = [to_go(r, 1.0) for r in token_rewards]
    else:
        scores = experience.rewards if config.kl_in == "loss" else torch.stack([r.sum() for r in token_rewards])
        n = experience.rollouts.num_generations
        if config.advantage == "rloo":
            scores = rloo_advantages(scores, n)
        elif config.scale_rewards == "batch":
            mean, var = _moments(scores, reduce)
            scores = group_advantages(scores, n, "none") / (var.sqrt() + 1e-4)
        else:
            scores = group_advantages(scores, n, config.scale_rewards)
        sizes = experience.rollouts.sampled_lengths
        experience.advantages = [a.expand(size) for a, size in zip(scores, sizes, strict=True)]
    if config.whiten_advantages and config.advantage in ("gae", "reinforce_pp"):
        experience.advantages = _whitened(experience.advantages, reduce)


def _token_rewards(experience: Experience, config: LossConfig, beta: float) -> list[Tensor]:
    """The reward after each token: the score on the last one and, where it is in the reward, the KL everywhere."""
    in_reward = config.kl_in == "reward" and beta != 0
    rewards = []
    for index, score in enumerate(experience.rewards):
        old = experience.old_logps[index]
        ref, weight = (experience.ref_logps[index], beta) if in_reward else (old, 0.0)
        rewards.append(shaped_rewards(score, old, ref, weight, config.kl_estimator))
    return rewards


def _whitened(pieces: list[Tensor], reduce: Reduce, shift_mean: bool = True) -> list[Tensor]:
    mean, var = _moments(torch.cat(pieces), reduce)
    return [whiten(piece, mean, var, shift_mean) for piece in pieces]


def _moments(flat: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over all processes, in fp32 from sums in fp64."""
    flat = flat.double()
    sums = torch.stack([flat.sum(), (flat**2).sum(), torch.tensor(float(len(flat)), dtype=torch.float64)])
    total, squares, count = reduce(sums)
    var = (squares - total**2 / count).clamp(min=0) / (count - 1).clamp(min=1)
    return (total / count).float(), var.float()
