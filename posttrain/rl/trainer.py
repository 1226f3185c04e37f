"""One loop for PPO and GRPO: sample, score, advantages, update. Read `train` first.

In: a policy, an engine that samples from it, prompts (rows with `prompt_ids`), reward functions and, for PPO, a
critic. Out: the trained policy in place, log.jsonl and rollouts.jsonl in the stage's folder.
A critic makes it PPO (GAE, KL in the reward); without one it is GRPO (group advantage, KL in the loss).
"""

import math
import time
from contextlib import contextmanager

import torch

from posttrain.errors import UserError
from posttrain.models import ModelConfig, load_causal_lm
from posttrain.order import shuffled_indices
from posttrain.packing import by_tokens
from posttrain.progress import Progress
from posttrain.rl.advantages import gae, group_advantages, shaped_rewards, whiten
from posttrain.rl.batches import MicroBatch, micro_batches, pack_rollouts, token_lengths
from posttrain.rl.config import PPOConfig, RLConfig
from posttrain.rl.logprobs import TokenLogps, TokenValues
from posttrain.rl.losses import clipped_policy_loss, clipped_value_loss, kl_estimates, sequence_weights
from posttrain.rl.rollout import Sampling, model_logps, sample_seed
from posttrain.rl.scoring import call_rewards, sample_rows, total_rewards
from posttrain.rl.types import Experience, Rollouts
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state


class RLTrainer:
    """`policy`, `reference`, `critic` are transformers models; `rewards` is [(name, function, weight)]."""

    def __init__(
        self, stage, accelerator, config: RLConfig, optim: OptimConfig, *, policy, tokenizer, engine, prompts, rewards,
        stop_ids, reference=None, critic=None, ppo: PPOConfig | None = None,
    ):  # fmt: skip
        self.stage, self.accelerator, self.config, self.ppo = stage, accelerator, config, ppo
        self.policy, self.reference, self.critic, self.tokenizer = policy, reference, critic, tokenizer
        self.engine, self.prompts, self.rewards = engine, prompts, rewards
        self.sampling = Sampling(config.num_generations, config.max_completion_length, stop_ids, config.temperature)
        if critic is None and config.num_generations < 2:
            raise UserError("num_generations: found 1, expected at least 2: GRPO compares a prompt's completions")
        self.step, self.tokens, self.kl, self.seconds = 0, 0, 0.0, {}
        updates = config.max_steps * config.num_iterations * config.num_minibatches
        policy.eval()  # dropout off: the engine has none, and ratios would be noise
        self.policy_updater = Updater(TokenLogps(policy), accelerator, optim, updates)
        if critic is not None:
            critic.eval()
            self.critic_updater = Updater(TokenValues(critic), accelerator, optim, updates, ppo.critic_learning_rate)
        require_multiple(config, "num_prompts", accelerator.num_processes)
        if stage.resume_folder is not None:
            self._load(stage.resume_folder)

    def train(self) -> None:
        progress = Progress(self.stage.name, self.config.max_steps, initial=self.step)
        with self.stage.running():
            while self.step < self.config.max_steps and not self.stage.stopping:
                self.seconds, began = {}, time.perf_counter()
                with self._timed("sync"):
                    self.engine.sync_weights(self.policy)
                with self._timed("generate"):
                    rollouts = self.generate()
                experience = self.score(rollouts)
                self.add_advantages(experience)
                numbers = self.update(experience)
                self.step += 1
                self.log(experience, numbers, time.perf_counter() - began, progress)
                if self.stage.due(self.step, self.config.max_steps):
                    self._save()
                if self.kl > self.config.max_kl > 0:
                    self.stage.note(f"KL {self.kl:.1f} nats a reply passed max_kl {self.config.max_kl}: stopped here")
                    break
        progress.close()
        self.engine.sync_weights(self.policy)

    @contextmanager
    def _timed(self, part: str):
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def generate(self) -> Rollouts:
        """This process's share of the step's prompts, sampled by the engine."""
        n, rank, world = self.config.num_generations, self.accelerator.process_index, self.accelerator.num_processes
        seed = self.stage.config["seed"]
        mine = shuffled_indices(self.step, self.config.num_prompts, len(self.prompts), seed)[rank::world]
        prompt_ids = [self.prompts[i]["prompt_ids"] for i in mine]
        completions = self.engine.generate(prompt_ids, self.sampling, sample_seed(seed, self.step, rank))
        rows = [self.prompts[i] for i in mine for _ in range(n)]
        return Rollouts(rows, [row["prompt_ids"] for row in rows], completions, n)

    def score(self, rollouts: Rollouts) -> Experience:
        """Rewards, and without gradient the reference's log-probabilities and the critic's values."""
        with self._timed("reward"):
            by_name = call_rewards(self.rewards, rollouts, self.tokenizer)
            total = total_rewards(self.rewards, by_name, rollouts)
            cut = torch.tensor([c.stop == "length" for c in rollouts.completions])
            total = total - self.config.missing_eos_penalty * cut.float()
        experience = Experience(rollouts, total, by_name, [torch.tensor(c.logps) for c in rollouts.completions])
        with self._timed("score"):
            if self.reference is not None:
                completions = [c.ids for c in rollouts.completions]
                experience.ref_logps = model_logps(
                    self.reference, rollouts.prompt_ids, completions, self.config.temperature,
                    self.config.max_tokens_per_microbatch,
                )  # fmt: skip
            if self.critic is not None:
                experience.values = self._values(rollouts)
        return experience

    @torch.no_grad()
    def _values(self, rollouts: Rollouts) -> list[torch.Tensor]:
        """The critic's value before each completion token, (T_i,) each."""
        values: list[torch.Tensor] = [torch.empty(0)] * len(rollouts.rows)
        for indices in by_tokens(token_lengths(rollouts), self.config.max_tokens_per_microbatch):
            packed, select, _, sizes = pack_rollouts(rollouts, indices, self.accelerator.device)
            flat = self.critic_updater.model(packed.input_ids, packed.position_ids, select).cpu()
            for index, piece in zip(indices, flat.split(sizes), strict=True):
                values[index] = piece
        return values

    def add_advantages(self, experience: Experience) -> None:
        """GAE with the KL in the reward where there is a critic, else the group's advantage spread over its tokens."""
        lengths = experience.rollouts.lengths
        if self.critic is None:
            scores = group_advantages(experience.rewards, self.config.num_generations, self.config.scale_rewards)
            experience.advantages = [a.expand(n) for a, n in zip(scores, lengths, strict=True)]
            return
        experience.returns = []
        for i, score in enumerate(experience.rewards):
            old, ref = experience.old_logps[i], experience.ref_logps[i]
            shaped = shaped_rewards(score, old, ref, self.config.beta)
            advantages, returns = gae(shaped, experience.values[i], self.ppo.gamma, self.ppo.lam)
            experience.advantages.append(advantages)
            experience.returns.append(returns)
        flat = torch.cat(experience.advantages).double()
        sums = torch.stack([flat.sum(), (flat**2).sum(), torch.tensor(float(len(flat)), dtype=torch.float64)])
        total, squares, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()
        mean, var = (total / count).float(), (squares / count - (total / count) ** 2).clamp(min=0).float()
        experience.advantages = [whiten(a, mean, var) for a in experience.advantages]

    def update(self, experience: Experience) -> dict[str, float]:
        """num_iterations passes of num_minibatches optimizer steps; returns averaged numbers to log."""
        config, numbers = self.config, []
        with self._timed("update"):
            for iteration in range(config.num_iterations):
                for minibatch in self._minibatches(len(experience.rollouts.rows), iteration):
                    numbers.append(self._update_once(experience, minibatch, first=not numbers))
        keys = {key for n in numbers for key in n}
        return {key: mean([n[key] for n in numbers if key in n]) for key in sorted(keys)}

    def _minibatches(self, num_rows: int, iteration: int) -> list[list[int]]:
        """Seeded split of the rows; whole groups stay together so that every minibatch sees both signs."""
        n = self.config.num_generations
        generator = torch.Generator().manual_seed(sample_seed(self.stage.config["seed"], self.step, iteration))
        order = torch.randperm(num_rows // n, generator=generator).tolist()
        parts = [order[i :: self.config.num_minibatches] for i in range(self.config.num_minibatches)]
        if not all(parts):
            raise UserError(
                f"num_minibatches: found {self.config.num_minibatches} for {num_rows // n} prompts a process"
            )
        return [sorted(g * n + k for g in part for k in range(n)) for part in parts]

    def _update_once(self, experience: Experience, minibatch: list[int], *, first: bool) -> dict[str, float]:
        lengths = torch.tensor(experience.rollouts.lengths)
        local = torch.tensor([int(lengths[minibatch].sum()), len(minibatch)], device=self.accelerator.device)
        tokens, sequences = self.accelerator.reduce(local, "sum").tolist()
        limit = self.config.max_completion_length
        kind = "dapo" if self.critic is not None else self.config.loss_type
        weights = sequence_weights(kind, lengths, tokens, sequences, limit)
        indices = self._with_signal(experience, minibatch)
        batches = micro_batches(
            experience, indices, weights, self.config.max_tokens_per_microbatch, self.accelerator.device
        )
        sums: dict[str, float] = {}

        def policy_share(batch: MicroBatch):
            return self._policy_share(batch, sums)

        def rows() -> str:
            return ", ".join(str(experience.rollouts.rows[i].get("row", i)) for i in indices[:8])

        numbers = {}
        if self.critic is None or self.step >= self.ppo.critic_warmup_steps:
            numbers = self.policy_updater.step(batches, policy_share, rows)
            if first:
                self._check_engine(sums)
            else:
                del sums["mismatch"]  # from here on it would be the updates' doing
        if self.critic is not None:
            critic = self.critic_updater.step(batches, self._value_share, rows)
            numbers |= {"value_loss": critic["loss"], "value_grad_norm": critic["grad_norm"]}
        count = sums.pop("count", 0.0)
        return numbers | {key: value / count for key, value in sums.items() if count}

    def _with_signal(self, experience: Experience, minibatch: list[int]) -> list[int]:
        """Leave out rows whose every term is zero: exact, since the weights' denominators count them still."""
        if self.critic is not None or self.config.beta != 0:
            return minibatch
        kept = [i for i in minibatch if bool(experience.advantages[i].any())]
        return kept or minibatch[:1]  # a step without signal still runs, so that all processes stay together

    def _policy_share(self, batch: MicroBatch, sums: dict[str, float]):
        """This micro-batch's share of the policy loss; adds what is worth logging to `sums`."""
        logps, entropy = self.policy_updater.model(
            batch.packed.input_ids, batch.packed.position_ids, batch.select, batch.targets, self.config.temperature
        )
        low, high = self.config.epsilon, self.config.epsilon_high
        loss, clipped = clipped_policy_loss(
            logps, batch.old_logps, batch.advantages, low, low if high is None else high
        )
        if self.critic is None and self.config.beta != 0:
            loss = loss + self.config.beta * kl_estimates(logps, batch.ref_logps, self.config.kl_estimator)
        with torch.no_grad():
            gap = logps - batch.old_logps
            parts = {"clip_ratio": clipped, "entropy": entropy, "mismatch": gap.abs().exp(), "ratio": gap.exp()}
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value.sum().item()
            sums["count"] = sums.get("count", 0.0) + len(gap)
        return (loss * batch.weights).sum()

    def _value_share(self, batch: MicroBatch):
        values = self.critic_updater.model(batch.packed.input_ids, batch.packed.position_ids, batch.select)
        loss = clipped_value_loss(values, batch.values, batch.returns, self.ppo.cliprange_value)
        return (loss * batch.weights).sum()

    def _check_engine(self, sums: dict[str, float]) -> None:
        """The step's first log-probabilities come from the weights the engine sampled with: both must agree."""
        found = sums["mismatch"] / sums["count"]
        if found > self.config.max_mismatch:
            raise UserError(
                f"step {self.step + 1}: {self.engine.name} and the trainer disagree on the sampled tokens: mean "
                f"exp|log-probability difference| is {found:.3f}, max_mismatch is {self.config.max_mismatch}; "
                "the weights did not reach the engine, or its dtype differs (--dtype float32)"
            )

    def log(self, experience: Experience, numbers: dict, wall: float, progress: Progress) -> None:
        """One line of log.jsonl a step; a few rollouts with it."""
        rollouts = experience.rollouts
        groups = experience.rewards.view(-1, self.config.num_generations)
        local = {
            "reward": experience.rewards.mean().item(),
            "completion_length": mean(rollouts.lengths),
            "cut_share": mean([c.stop == "length" for c in rollouts.completions]),
        }
        if groups.shape[1] > 1:  # a group of one, as PPO may have, has no spread to speak of
            local["reward_std"] = groups.std(1).mean().item()
            local["zero_signal_groups"] = (groups == groups[:, :1]).all(1).float().mean().item()
        for name, values in experience.rewards_by_name.items():
            known = [v for v in values if v is not None]
            local[f"reward/{name}"] = mean(known) if known else 0.0
        if experience.ref_logps is not None:
            pairs = zip(experience.old_logps, experience.ref_logps, strict=True)
            local["kl"] = mean([(old - ref).sum().item() for old, ref in pairs])
        if experience.returns is not None:
            local["explained_variance"] = explained_variance(experience.values, experience.returns)
        averaged = self.accelerator.reduce(torch.tensor(list(local.values()), device=self.accelerator.device), "mean")
        local = dict(zip(local, averaged.tolist(), strict=True))
        total = self.accelerator.reduce(
            torch.tensor(sum(token_lengths(rollouts)), device=self.accelerator.device), "sum"
        ).item()
        self.tokens += total
        shares = {f"share/{part}": seconds / wall for part, seconds in self.seconds.items()}
        self.kl = local.get("kl", 0.0)
        if self.critic is None and local["zero_signal_groups"] == 1.0:
            same = "all answers of every prompt score the same, so there is no gradient"
            self.stage.note(f"step {self.step}: {same}: take easier or harder problems, or more num_generations")
        self.stage.log(self.step, **local, **numbers, **shares, tokens_per_second=total / wall)
        self.stage.append("rollouts.jsonl", sample_rows(experience, self.step, self.tokenizer))
        progress.update(reward=local["reward"], length=local["completion_length"])

    def _save(self) -> None:
        def write(folder):
            self.policy.save_pretrained(folder / "policy")
            state = {"policy": self.policy_updater.state(), "tokens": self.tokens, "step": self.step}
            if self.critic is not None:
                self.critic.save_pretrained(folder / "critic")
                state["critic"] = self.critic_updater.state()
            write_state(folder, **state)

        self.stage.save(self.step, write)

    def _load(self, folder) -> None:
        from safetensors.torch import load_model

        load_model(self.policy, folder / "policy" / "model.safetensors")
        state = read_state(folder)
        self.policy_updater.load_state(state["policy"])
        if self.critic is not None:
            load_model(self.critic, folder / "critic" / "model.safetensors")
            self.critic_updater.load_state(state["critic"])
        self.tokens, self.step = state["tokens"], state["step"]


def load_reference(base: ModelConfig, device):
    """The policy as it was before RL, frozen: what the KL is measured against."""
    return load_causal_lm(base).to(device).requires_grad_(False).eval()


def mean(values) -> float:
    return math.fsum(values) / len(values)


def explained_variance(values: list, returns: list) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    predicted, actual = torch.cat(values), torch.cat(returns)
    return (1 - (actual - predicted).var() / actual.var()).item() if actual.var() > 0 else 0.0
