"""One loop for PPO, GRPO and their kin: collect, score, advantages, update. Read `train` first.

In: a policy, an engine that samples from it, prompts (rows with `prompt_ids`), reward functions and, for PPO, a
critic. Out: the trained policy in place, log.jsonl and rollouts.jsonl in the stage's folder.
`LossConfig` says what is made of it: with a critic GAE and a KL in the reward, without one a group's advantage.
"""

import math
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch

from posttrain import processes, sharding
from posttrain.doctor import doctor_of
from posttrain.errors import UserError
from posttrain.layouts import common_layout
from posttrain.lora import has_adapter
from posttrain.progress import Progress
from posttrain.rl import state
from posttrain.rl.batches import MicroBatch, micro_batches
from posttrain.rl.collect import Collector
from posttrain.rl.config import LossConfig, PPOConfig, RLConfig
from posttrain.rl.experience import add_advantages, join, rewarded, take_groups, with_signal
from posttrain.rl.forward import CriticForward, PolicyForward, each_token, rollout_logps
from posttrain.rl.kl import AdaptiveKL, FixedKL, RunningMoments, kl_loss
from posttrain.rl.losses import clipped_value_loss, policy_loss, sequence_weights, token_total
from posttrain.rl.metrics import Arithmetic, TokenSums, experience_numbers, mean
from posttrain.rl.models import Networks, move
from posttrain.rl.rollout import EngineError, Sampling, sample_seed
from posttrain.rl.scoring import sample_rows
from posttrain.rl.sync import prove_sync
from posttrain.rl.types import Experience, Rollouts
from posttrain.rl.watch import Watch
from posttrain.training import OptimConfig, Updater, require_multiple


class RLTrainer:
    """`prompts` are rows with `prompt_ids`, `rewards` is [(name, function, weight)]; `ppo` comes with a critic;
    `watch` asks now and then who the policy is."""

    def __init__(
        self, stage, accelerator, config: RLConfig, loss: LossConfig, optim: OptimConfig, networks: Networks, engine,
        prompts: list[dict], rewards: list, ppo: PPOConfig | None = None, watch: Watch | None = None,
    ):  # fmt: skip
        self.stage, self.accelerator, self.config, self.ppo = stage, accelerator, config, ppo
        self.loss = loss.resolved(networks.critic is not None)
        policy, critic = self.policy, self.critic = networks.policy, networks.critic
        self.reference, self.tokenizer = networks.reference, networks.tokenizer
        self.engine, self.prompts, self.rewards, self.watch = engine, prompts, rewards, watch
        self._check(config)
        trunk = critic is not None and ppo.critic == "trunk"
        policy.eval()  # dropout off: the engine has none, and ratios would be noise
        models = [policy] if critic is None or trunk else [policy, critic.eval()]
        longest = max(len(row["prompt_ids"]) for row in prompts) + config.max_completion_length
        self.layout, why = common_layout(models, longest, config.layouts())
        if why:
            stage.note(f"completions are laid out {self.layout.name}: {why}")
        own = None if trunk else critic
        self.arithmetic = Arithmetic(policy, own, accelerator.device, torch.bfloat16 if optim.bf16 else policy.dtype)
        updates = config.max_steps * config.num_iterations * config.num_minibatches
        forward = PolicyForward(policy, critic if trunk else None, entropy_gradient=self.loss.entropy_coef > 0)
        self.policy_updater = Updater(forward, accelerator, optim, updates)
        self.critic_updater = None
        if critic is not None and not trunk:
            self.critic_updater = Updater(CriticForward(critic), accelerator, optim, updates, ppo.critic_learning_rate)
        self.pass_kind = "adapter" if has_adapter(policy) else "training"
        adaptive = self.loss.kl_target > 0
        self.moments = RunningMoments()
        self.kl_weight = AdaptiveKL(loss.beta, loss.kl_target, loss.kl_horizon) if adaptive else FixedKL(loss.beta)
        seed, rank, world = stage.config["seed"], accelerator.process_index, accelerator.num_processes
        sampling = Sampling(
            config.num_generations, config.max_completion_length, networks.stop_ids, config.temperature
        )
        self.collector = Collector(config, engine, prompts, sampling, seed, rank, world)
        self.step, self.tokens, self.kl, self.gap, self.seconds = 0, 0, 0.0, 1.0, {}
        self.doctor = doctor_of(stage)
        if stage.resume_folder is not None:
            state.load(self, stage.resume_folder)

    def _check(self, config: RLConfig) -> None:
        if self.critic is None and config.num_generations < 2 and self.loss.advantage != "reinforce_pp":
            raise UserError("num_generations: found 1, expected at least 2: GRPO compares a prompt's completions")
        if self.loss.beta and self.reference is None:
            raise UserError(f"beta: found {self.loss.beta}, but there is no reference to measure a KL against")
        how = processes.asked()
        if config.offload and how != "ddp":
            raise UserError(
                f"offload: found true beside {processes.NAMES[how]}, which spreads weights already: no offload"
            )
        if how == "zero3" and self.critic is not None and self.ppo.critic == "trunk" and self.ppo.critic_warmup_steps:
            raise UserError("critic_warmup_steps: DeepSpeed updates the trunk without gradient, too: 0, or fsdp2.yaml")
        require_multiple(config, "num_prompts", self.accelerator.num_processes)
        mine = config.num_prompts // self.accelerator.num_processes
        if config.num_minibatches > mine:
            raise UserError(f"num_minibatches: found {config.num_minibatches} for {mine} prompts a process")

    def train(self) -> None:
        progress = Progress(self.stage.name, self.config.max_steps, initial=self.step)
        with self.stage.running():
            while self.step < self.config.max_steps and not self.stage.stopping:
                self.seconds, began = {}, time.perf_counter()
                experience = self.collect()
                self.score(experience)
                self.add_advantages(experience)
                numbers = self.update(experience)
                self.step += 1
                numbers |= self.ask()
                self.log(experience, numbers, time.perf_counter() - began, progress)
                if self.stage.due(self.step, self.config.max_steps):
                    state.save(self)
                if self.kl > self.config.max_kl > 0:
                    self.stage.note(f"KL {self.kl:.1f} nats a reply passed max_kl {self.config.max_kl}: stopped here")
                    break
        progress.close()
        for updater in (self.policy_updater, self.critic_updater):
            if updater is not None:
                sharding.unshard(updater.model)
        self.engine.sync_weights(self.policy)

    @contextmanager
    def _timed(self, part: str):
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def _sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sums over all processes, on the CPU."""
        return self.accelerator.reduce(numbers.to(self.accelerator.device), "sum").cpu()

    @contextmanager
    def _whole(self):
        """Sharded networks gathered, for passes without gradient, of which processes make different numbers."""
        with ExitStack() as stack:
            for updater in (self.policy_updater, self.critic_updater):
                if updater is not None:
                    stack.enter_context(sharding.gathered(updater.model))
            yield

    def _precision(self):
        """What `bf16` asks for, as in the update; sharded networks bring theirs with them."""
        own = self.policy_updater.sharded and not self.policy_updater.by_deepspeed
        return nullcontext() if own else self.accelerator.autocast()

    def collect(self) -> Experience:
        """This step's completions with their rewards; rollout_ahead: those sampled while the last step trained."""
        try:
            if not self.collector.waiting:
                self._sync()
                with self._timed("generate"), self._whole():
                    self.collector.begin(self.step)
            with self._timed("generate"):
                rollouts = self.collector.take()
            if self.config.rollout_ahead and self.step + 1 < self.config.max_steps:
                self._sync()
                with self._timed("generate"), self._whole():
                    self.collector.begin(self.step + 1)
        except EngineError:
            state.save_alone(self)  # what was trained so far is not the engine's to lose
            raise
        experience = self.reward(rollouts)
        return self._resample(experience) if self.config.dynamic_sampling else experience

    def _sync(self) -> None:
        """Give the engine the policy's weights, and prove that it samples from them if it has weights of its own."""
        with self._timed("sync"):
            self.engine.sync_weights(self.policy)
        if self.engine.concurrent:
            prompts = [row["prompt_ids"] for row in self.prompts[:2]]
            bound, temperature = self.config.max_mismatch, self.config.temperature
            with self._timed("prove"), self._whole():
                self.gap = prove_sync(
                    self.engine, self.policy, prompts, bound=bound, seed=self.step, temperature=temperature
                )

    def _resample(self, experience: Experience) -> Experience:
        """DAPO's dynamic sampling (2503.14476): more prompts, until enough groups have rewards that differ."""
        n = self.config.num_generations
        want, began = len(experience.rewards) // n, self.collector.taken - self.config.num_prompts
        for attempt in range(1, self.config.dynamic_sampling + 1):
            missing = torch.tensor(float(max(0, want - len(with_signal(experience)))))
            if self._sum(missing).item() == 0:
                break
            with self._timed("generate"), self._whole():
                self.collector.begin(self.step, attempt)
                rollouts = self.collector.take()
            experience = join(experience, self.reward(rollouts))
        self.sampled_groups = self.collector.taken - began
        good = with_signal(experience)
        flat = sorted(set(range(len(experience.rewards) // n)) - set(good))
        return take_groups(experience, (good + flat)[:want])

    def reward(self, rollouts: Rollouts) -> Experience:
        with self._timed("reward"):
            return rewarded(rollouts, self.rewards, self.tokenizer, self.config, self._normalized)

    def _normalized(self, rewards: torch.Tensor) -> torch.Tensor:
        """running_rewards: by the mean and deviation of all rewards so far, of all processes."""
        if not self.config.running_rewards:
            return rewards
        self.moments.update(self.accelerator.gather(rewards.to(self.accelerator.device)).cpu())
        return self.moments.normalized(rewards)

    def score(self, experience: Experience) -> Experience:
        """Without gradient: the reference's log-probabilities, the critic's values, the policy's own if asked for."""
        config, rollouts, device = self.config, experience.rollouts, self.accelerator.device
        how = (self.layout, config.temperature, config.max_tokens_per_microbatch)
        passes = 1 + (self.loss.old_logps == "trainer") + (self.reference is not None)  # 1: the engine's own
        self.arithmetic.add(passes * rollouts.num_tokens, passes * len(rollouts.rows), "forward")
        with self._timed("score"), self._whole(), self._precision():
            if self.loss.old_logps == "trainer":
                experience.behaviour_logps = experience.old_logps
                experience.old_logps = rollout_logps(self.policy, rollouts, *how)
            if self.reference is not None:
                experience.ref_logps = self.reference.logps(rollouts, *how, device)
            if self.critic is not None:
                self.arithmetic.add(rollouts.num_tokens, len(rollouts.rows), "forward", critic=True)
                if self.critic_updater is not None and config.offload:
                    move(self.critic, self.critic_updater.optimizer, device)
                experience.values = each_token(
                    rollouts, self.layout, config.max_tokens_per_microbatch, device, self._values
                )
        return experience

    def _values(self, batch, select, targets):
        if self.critic_updater is None:
            return self.policy_updater.model(batch, select, targets, self.config.temperature)[2]
        return self.critic_updater.model(batch, select)

    def reply_kl(self, rollouts: Rollouts) -> list[float]:
        """log pi - log ref of completions sampled at temperature 1, summed over their tokens, in nats."""
        how = (self.layout, 1.0, self.config.max_tokens_per_microbatch)
        mine = rollout_logps(self.policy, rollouts, *how)
        start = self.reference.logps(rollouts, *how, self.accelerator.device)
        return [(a.sum() - b.sum()).item() for a, b in zip(mine, start, strict=True)]

    def add_advantages(self, experience: Experience) -> None:
        add_advantages(experience, self.loss, self._sum, self.kl_weight.beta, self.ppo)

    def update(self, experience: Experience) -> dict[str, float]:
        """num_iterations passes of num_minibatches optimizer steps; returns averaged numbers to log."""
        config, numbers, self.sums = self.config, [], TokenSums()
        with self._timed("update"):
            for iteration in range(config.num_iterations):
                for minibatch in self._minibatches(len(experience.rollouts.rows), iteration):
                    numbers.append(self._update_once(experience, minibatch, first=not numbers))
            if self.critic_updater is not None and config.offload:
                move(self.critic, self.critic_updater.optimizer, "cpu")
        keys = {key for n in numbers for key in n}
        found = {key: mean([n[key] for n in numbers if key in n]) for key in sorted(keys)} | self.sums.means(self._sum)
        self._check_mismatch(found)
        return found

    def _minibatches(self, num_rows: int, iteration: int) -> list[list[int]]:
        """Seeded split of the rows; whole groups stay together so that every minibatch sees both signs."""
        n = self.config.num_generations
        generator = torch.Generator().manual_seed(sample_seed(self.stage.config["seed"], self.step, iteration))
        order = torch.randperm(num_rows // n, generator=generator).tolist()
        parts = [order[i :: self.config.num_minibatches] for i in range(self.config.num_minibatches)]
        return [sorted(g * n + k for g in part for k in range(n)) for part in parts]

    def _update_once(self, experience: Experience, minibatch: list[int], *, first: bool) -> dict[str, float]:
        rollouts, kind, device = experience.rollouts, self.loss.loss_type, self.accelerator.device
        lengths = torch.tensor(rollouts.sampled_lengths)
        cut = torch.tensor([c.stop == "length" for c in rollouts.completions])
        counts = (~(cut & self.loss.mask_truncated_completions)).float()
        kept = lengths * counts
        sizes = [lengths[minibatch].sum(), kept[minibatch].sum(), kept.sum(), len(minibatch)]
        every, tokens, batch_tokens, sequences = self._sum(torch.tensor(sizes, dtype=torch.float64)).tolist()
        total = token_total(kind, tokens, batch_tokens, self.config.num_minibatches)
        weights = sequence_weights(kind, lengths, total, int(sequences), self.config.max_completion_length, counts)
        indices = self._with_signal(experience, minibatch, counts)
        limit = self.config.max_tokens_per_microbatch
        batches = micro_batches(experience, indices, weights, self.layout, limit, device)

        def rows() -> str:
            return ", ".join(str(rollouts.rows[i].get("row", i)) for i in indices[:8])

        tokens = sum(batch.tokens for batch in batches)
        numbers, warming = {}, self.critic is not None and self.step < self.ppo.critic_warmup_steps
        if self.critic_updater is None or not warming:
            self.arithmetic.add(tokens, len(indices), self.pass_kind)
            share = partial(self._policy_share, first=first, warming=warming, value_weight=1 / every)
            numbers = self.policy_updater.step(batches, share, rows)
        if self.critic_updater is not None:
            self.arithmetic.add(tokens, len(indices), "training", critic=True)
            critic = self.critic_updater.step(batches, partial(self._value_share, value_weight=1 / every), rows)
            numbers |= {"value_loss": critic["loss"], "value_grad_norm": critic["grad_norm"]}
        return numbers

    def _with_signal(self, experience: Experience, minibatch: list[int], counts) -> list[int]:
        """Leave out rows whose every term is zero: exact, since the weights' denominators count them still."""
        kl = self.kl_weight.beta != 0 and self.loss.kl_in == "loss"
        if self.critic is not None or kl or self.loss.entropy_coef:
            return minibatch
        kept = [i for i in minibatch if counts[i] and bool(experience.advantages[i].any())]
        return kept or minibatch[:1]  # a step without signal still runs, so that all processes stay together

    def _policy_share(self, batch: MicroBatch, *, first: bool, warming: bool, value_weight: float):
        """This micro-batch's share of the policy's loss, and of the value's where the head sits on its trunk."""
        loss = self.loss
        logps, entropy, values = self.policy_updater.model(
            batch.batch, batch.select, batch.targets, self.config.temperature, warming
        )
        terms = policy_loss(
            logps, batch.old_logps, batch.advantages, batch.sizes, low=loss.epsilon, high=loss.high,
            loss_type=loss.loss_type, level=loss.importance_sampling_level, delta=loss.delta,
            cap=loss.vllm_importance_sampling_cap, behaviour_logps=batch.behaviour_logps,
        )  # fmt: skip
        each = terms.loss
        if self.kl_weight.beta and loss.kl_in == "loss":
            kl = kl_loss(logps, batch.ref_logps, loss.kl_estimator, terms.ratio, loss.use_bias_correction_kl)
            each = each + self.kl_weight.beta * kl
        if loss.entropy_coef:
            each = each - loss.entropy_coef * entropy
        share = (each * batch.weights).sum() * (not warming)
        if values is not None:
            wrong = clipped_value_loss(values, batch.values, batch.returns, self.ppo.cliprange_value)
            share = share + self.ppo.vf_coef * value_weight * wrong.sum()
        if self.policy_updater.padding:
            return share
        up, sampled = batch.advantages > 0, batch.old_logps if batch.behaviour_logps is None else batch.behaviour_logps
        self.sums.add(
            clip_ratio=terms.clipped, clip_ratio_high=terms.clipped * up, clip_ratio_low=terms.clipped * ~up,
            importance_truncated=terms.truncated, entropy=entropy, ratio=terms.ratio,
        )  # fmt: skip
        if values is not None:
            self.sums.add(value_loss=wrong)
        if first:  # from here on it would be the updates' doing
            self.sums.add(mismatch=(logps - sampled).abs().exp())
        return share

    def _value_share(self, batch: MicroBatch, *, value_weight: float):
        values = self.critic_updater.model(batch.batch, batch.select)
        return value_weight * clipped_value_loss(values, batch.values, batch.returns, self.ppo.cliprange_value).sum()

    def ask(self) -> dict[str, float]:
        """Who the policy says it is, at steps where that is watched."""
        if self.watch is None or not self.watch.due(self.step):
            return {}
        self.collector.wait()  # what is sampled ahead is sampled with the weights it was begun with
        try:
            self._sync()
            with self._timed("watch"), self._whole():
                return self.watch.during()
        except EngineError:
            state.save_alone(self)  # as in `collect`
            raise

    def _check_mismatch(self, numbers: dict) -> None:
        """The step's first log-probabilities come from the weights the engine sampled with: both must agree. Sampled
        ahead they come from older ones: then what `_sync` proved stands in its place."""
        if self.config.rollout_ahead and "mismatch" in numbers:
            numbers["staleness"], numbers["mismatch"] = numbers["mismatch"], self.gap
        found = numbers.get("mismatch", 1.0)
        if found > self.config.max_mismatch:
            raise UserError(
                f"step {self.step + 1}: {self.engine.name} and the trainer disagree on the sampled tokens: mean "
                f"exp|log-probability difference| is {found:.3f}, max_mismatch is {self.config.max_mismatch}; "
                "the weights did not reach the engine, or its dtype differs (--dtype float32)"
            )

    def log(self, experience: Experience, numbers: dict, wall: float, progress: Progress) -> None:
        """One line of log.jsonl a step; a few rollouts with it."""
        local = experience_numbers(experience, tools=bool(self.config.tools))
        world = self.accelerator.num_processes
        averaged = self._sum(torch.tensor(list(local.values()), dtype=torch.float64)) / world
        local = dict(zip(local, averaged.tolist(), strict=True))
        tokens = int(self._sum(torch.tensor(float(experience.rollouts.num_tokens))).item())
        self.tokens += tokens
        self.kl = local.get("kl", 0.0)
        if self.loss.kl_target:
            local["beta"] = self.kl_weight.beta
            self.kl_weight.update(self.kl, self.config.num_prompts * self.config.num_generations)
        if self.config.dynamic_sampling:
            local["sampled_groups"] = float(self.sampled_groups)
        if not math.isfinite(self.kl):
            raise UserError(f"step {self.step}: the KL to the start is {self.kl}; lower learning_rate or raise beta")
        shares = {f"share/{part}": seconds / wall for part, seconds in self.seconds.items()}
        wall -= self.seconds.get("watch", 0.0)  # measuring is no part of the speed of training
        line = {**local, **numbers, **self.arithmetic.numbers(wall), "tokens_per_second": tokens / wall, **shares}
        self.stage.log(self.step, **line)
        for remark in self.doctor.look({"step": self.step, **line}):
            self.stage.note(str(remark))
        self.stage.append("rollouts.jsonl", sample_rows(experience, self.step, self.tokenizer))
        progress.update(reward=local["reward"], length=local["completion_length"])
