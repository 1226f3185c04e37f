"""Two games whose optimum is known, reached by every algorithm from tables of logits and values: no language model.

A bandit of four arms; and a two-step game where what looks best at the first step is not. Advantages, losses and
weights are the package's; sampling, tables and optimizer are plain torch.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from posttrain.rl.advantages import ADVANTAGES, gae, group_advantages, rloo_advantages, shaped_rewards, to_go, whiten
from posttrain.rl.losses import LOSS_TYPES, clipped_value_loss, policy_loss, sequence_weights

GROUPS, GENERATIONS = 8, 8

# name: (advantage, loss type, scale of rewards, bound of the ratio above)
ALGORITHMS = {
    "ppo": ("gae", "bnpo", "none", 0.2),
    "grpo": ("group", "grpo", "group", 0.2),
    "dr_grpo": ("group", "dr_grpo", "none", 0.2),
    "dapo": ("group", "dapo", "group", 0.28),
    "bnpo": ("group", "bnpo", "batch", 0.2),
    "gspo": ("group", "gspo", "group", 0.2),
    "cispo": ("group", "cispo", "group", 2.0),
    "rloo": ("rloo", "bnpo", "none", 0.2),
    "reinforce_pp": ("reinforce_pp", "bnpo", "none", 0.2),
}


def test_every_advantage_and_every_loss_type_plays():
    assert {row[0] for row in ALGORITHMS.values()} == set(ADVANTAGES)
    assert {row[1] for row in ALGORITHMS.values()} == set(LOSS_TYPES)


@dataclass
class Episodes:
    """N episodes; lists hold one tensor an episode, a number a step."""

    states: list[Tensor]
    actions: list[Tensor]
    scores: Tensor  # (N,)


class Bandit:
    """One step, four arms, noisy rewards; the third pays best."""

    states, actions, means = 1, 4, torch.tensor([0.2, 0.5, 0.9, 0.4])
    best = {0: 2}

    def play(self, probabilities: Tensor, n: int, generator) -> Episodes:
        arms = torch.multinomial(probabilities[0], n, replacement=True, generator=generator)
        noise = 0.3 * torch.randn(n, generator=generator)
        return Episodes([torch.tensor([0])] * n, list(arms[:, None]), self.means[arms] + noise)

    def value(self, probabilities: Tensor) -> float:
        return (probabilities[0] * self.means).sum().item()


class TwoSteps:
    """Stop at once for 0.5; or go on for nothing, and then get -0.2 or 1. To a beginner, going on is worth 0.4."""

    states, actions, stop, last = 2, 2, 0.5, torch.tensor([-0.2, 1.0])
    best = {0: 1, 1: 1}

    def play(self, probabilities: Tensor, n: int, generator) -> Episodes:
        first, second = (torch.multinomial(p, n, replacement=True, generator=generator) for p in probabilities[:2])
        on = first == 1
        scores = torch.where(on, self.last[second], self.stop)
        states = [torch.tensor([0, 1]) if goes else torch.tensor([0]) for goes in on]
        pairs = torch.stack([first, second], 1)
        return Episodes(states, [pair[: 1 + goes] for pair, goes in zip(pairs, on.int(), strict=True)], scores)

    def value(self, probabilities: Tensor) -> float:
        stop, on = probabilities[0]
        return (stop * self.stop + on * (probabilities[1] * self.last).sum()).item()


def test_the_second_game_rewards_a_beginner_for_the_wrong_first_step():
    uniform = torch.full((2, 2), 0.5)
    stopping, going_on = uniform.clone(), uniform.clone()
    stopping[0], going_on[0] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    game = TwoSteps()
    assert game.value(stopping) == pytest.approx(0.5) and game.value(going_on) == pytest.approx(0.4)
    assert game.value(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 1.0


def advantages_of(kind: str, scale: str, episodes: Episodes, old: list[Tensor], values: list[Tensor], uniform: float):
    """(advantages, returns), a list of tensors each; without a critic the returns are of no use.

    PPO and REINFORCE++ have a KL in the reward, to the first policy; `uniform` is its log-probability of any action.
    """
    scores = episodes.scores
    if kind in ("group", "rloo"):
        n = GENERATIONS
        relative = rloo_advantages(scores, n) if kind == "rloo" else group_advantages(scores, n, scale)
        return [a.expand(len(x)) for a, x in zip(relative, old, strict=True)], values
    rewards = [shaped_rewards(s, x, torch.full_like(x, uniform), 0.01) for s, x in zip(scores, old, strict=True)]
    if kind == "gae":
        pairs = [gae(r, v, 1.0, 0.95) for r, v in zip(rewards, values, strict=True)]
        advantages, returns = [a for a, _ in pairs], [r for _, r in pairs]
    else:
        advantages, returns = [to_go(r, 1.0) for r in rewards], values
    flat = torch.cat(advantages)
    return [whiten(a, flat.mean(), flat.var()) for a in advantages], returns


def learn(game, algorithm: str, steps: int = 50) -> Tensor:
    """Probabilities (states, actions) after `steps` batches of 64 episodes, two passes of two minibatches each."""
    kind, loss_type, scale, high = ALGORITHMS[algorithm]
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(game.states, game.actions, requires_grad=True)
    table = torch.zeros(game.states, requires_grad=True)
    optimizer = torch.optim.Adam([logits, table], lr=0.1)
    n = GROUPS * GENERATIONS
    for _ in range(steps):
        logps, values = torch.log_softmax(logits.detach(), 1), table.detach().clone()
        episodes = game.play(logps.exp(), n, generator)
        old = [logps[s, a] for s, a in zip(episodes.states, episodes.actions, strict=True)]
        before = [values[s] for s in episodes.states]
        advantages, returns = advantages_of(kind, scale, episodes, old, before, -math.log(game.actions))
        for rows in [list(range(0, n // 2)), list(range(n // 2, n))] * 2:
            states, actions, mu, adv, ret, was = (
                torch.cat([pieces[i] for i in rows])
                for pieces in (episodes.states, episodes.actions, old, advantages, returns, before)
            )
            sizes = [len(old[i]) for i in rows]
            now = torch.log_softmax(logits, 1)[states, actions]
            terms = policy_loss(now, mu, adv, sizes, low=0.2, high=high, loss_type=loss_type, delta=3.0, cap=2.0)
            weights = sequence_weights(loss_type, torch.tensor(sizes), sum(sizes), len(rows), game.states)
            loss = (terms.loss * weights.repeat_interleave(torch.tensor(sizes))).sum()
            if kind == "gae":
                loss = loss + clipped_value_loss(table[states], was, ret, 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.softmax(logits.detach(), 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("game", [Bandit(), TwoSteps()], ids=["bandit", "two_steps"])
def test_the_optimum_is_reached(game, algorithm):
    found = learn(game, algorithm)
    for state, action in game.best.items():
        assert found[state, action] > 0.9, found
    optimum = game.means.max().item() if isinstance(game, Bandit) else 1.0
    assert game.value(found) > 0.95 * optimum
