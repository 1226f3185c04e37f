"""Rejection sampling: sample solutions, keep the right ones, learn them, and again.

In: a chat model, problems with `prompt_ids`, reward functions that say what is right, an engine. Out: the model taught
its own right answers, in place; a table by round. Launched by
`accelerate launch recipes/rejection.py --config recipes/tiny/rejection.yaml`.

One round: `num_generations` solutions of each problem; of those that are right and ended by themselves, the distinct
ones, and of these `max_kept` of a problem (`choice`); supervised training on their very tokens. `shortest` also takes
what was right by luck, since a guess is short; `common` takes the answer sampled most often, which luck seldom is.
`start_from: first` trains the model that was given anew in each round, as STaR (2203.14465) and RFT (2308.01825, one
round) do; `last` goes on from the round before, as expert iteration does. `pool: all` also keeps what earlier rounds
found. Training is `training.Updater` over packed token ids rather than TRL's trainer: sampled tokens are not decoded
and encoded again, and a round can be continued in its middle, bit for bit.

A step, in log.jsonl and of a checkpoint, is one sampling, one update or one measurement. What was sampled is saved at
once, and so is each round; in between every `save_steps` steps.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from posttrain.chat import decode
from posttrain.doctor import doctor_of
from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS, common_layout
from posttrain.order import shuffled_indices
from posttrain.progress import Progress
from posttrain.rl.forward import PolicyForward, lay_out, split
from posttrain.rl.rollout import Sampling, sample_seed
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Completion, Rollouts
from posttrain.solutions import Problem, RejectionConfig, Solution, are_right, mean, select
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state


class RejectionTrainer:
    """`prompts` are rows with `prompt_ids`; `rewards` is [(name, function, weight)], weights do not count here.

    `measure(ends)` gives (metrics, samples for the report) of held-out replies; `ends`: first or last measurement.
    `before` is what it would give of the policy as it comes, where that has been measured.
    """

    def __init__(
        self, stage, accelerator, config: RejectionConfig, optim: OptimConfig, *, policy, tokenizer, engine, prompts,
        stop_ids, rewards, measure: Callable[[bool], tuple[dict, list[dict]]], before: tuple | None = None,
    ):  # fmt: skip
        self.stage, self.accelerator, self.config = stage, accelerator, config
        self.policy, self.tokenizer, self.engine = policy, tokenizer, engine
        self.prompts, self.rewards, self.measure_replies = prompts, rewards, measure
        self.before = before
        self.sampling = Sampling(config.num_generations, config.max_completion_length, stop_ids, config.temperature)
        self.size = len(prompts) if config.num_prompts is None else min(config.num_prompts, len(prompts))
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        require_multiple(config, "batch_size", self.world)
        if self.size < self.world:
            raise UserError(f"num_prompts: found {self.size} problems a round, fewer than the {self.world} processes")
        self.round = self.step = self.saved = self.tokens = self.sampled = 0
        self.table: list[dict] = []  # one line a measurement: what was sampled and kept, and held-out metrics
        self.samples: list[dict] = []
        self.found: dict = {}  # the running round's counts
        self.kept: list[tuple[int, Solution]] | None = None  # (row, solution); None: the round is to be sampled
        self.earlier: list[tuple[int, Solution]] = []
        first = config.start_from == "first"
        self.first = {k: v.detach().cpu().clone() for k, v in policy.state_dict().items()} if first else {}
        longest = max(len(row["prompt_ids"]) for row in prompts) + config.max_completion_length
        self.layout, why = common_layout([policy], longest, LAYOUTS[1:])  # a prompt has one solution a batch
        if why:
            stage.note(f"solutions are laid out {self.layout.name}: {why}")
        self.updater, self.doctor = Updater(PolicyForward(policy), accelerator, optim, 1), doctor_of(stage)
        if stage.resume_folder is not None:
            self._load(stage.resume_folder)

    def train(self) -> None:
        """All rounds, or as many as a signal leaves time for: then a checkpoint is written and the process ends."""
        progress = Progress(self.stage.name, self.config.num_rounds, "round", initial=self.round)
        with self.stage.running():
            if not self.table:
                self.measure()
            while self.round < self.config.num_rounds and not self.stage.stopping:
                if self.kept is None:
                    self.sample()
                self.learn(progress)
                if not self.stage.stopping:
                    self.measure()
                    progress.update()
            if self.stage.stopping and self.saved < self.step:  # the signal came after the step's own look
                self._save()
        progress.close()
        if self.stage.main:
            print(markdown(self.table), flush=True)

    # ---- one round --------------------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Solutions of this round's problems, the right ones chosen from, on every process alike."""
        from accelerate.utils import gather_object

        seed = self.stage.config["seed"]
        rows = shuffled_indices(self.round, self.size, len(self.prompts), seed)
        self.policy.eval()
        self.engine.sync_weights(self.policy)
        problems = sorted(gather_object(self._solve(rows[self.rank :: self.world])), key=lambda each: each.row)
        new = [(each.row, solution) for each in problems for solution in each.solutions]
        self.kept = select([*self.earlier, *new], self.config, sample_seed(seed, self.round))
        if self.config.pool == "all":
            self.earlier += new
        prompt_tokens = sum(len(self.prompts[row]["prompt_ids"]) for row in rows)
        count = self.size * self.config.num_generations
        self.sampled += count
        self.tokens += sum(each.tokens for each in problems) + prompt_tokens * self.config.num_generations
        self.found = {
            "right": sum(each.right for each in problems) / count,
            "solved": sum(bool(each.solutions) for each in problems) / self.size,
            "kept": len(self.kept),
            "kept length": mean([len(solution.ids) for _, solution in self.kept]),
        }
        self.step += 1
        self._log(
            reward=self.found["right"], solved=self.found["solved"], kept=len(self.kept),
            completion_length=sum(each.tokens for each in problems) / count,
            cut_share=sum(each.cut for each in problems) / count,
        )  # fmt: skip
        if not self.kept:
            raise UserError(
                f"round {self.round + 1}: none of {count} solutions of {self.size} problems is right and ended by "
                "itself: take easier problems, more num_generations or max_completion_length, or a better model"
            )
        self._write_solutions()
        self._end_step(save=True)

    def _solve(self, rows: list[int]) -> list[Problem]:
        """This process's share of the problems, sampled and judged."""
        n = self.config.num_generations
        seed = sample_seed(self.stage.config["seed"], self.round, self.rank)
        completions = self.engine.generate([self.prompts[row]["prompt_ids"] for row in rows], self.sampling, seed)
        data = [self.prompts[row] for row in rows for _ in range(n)]
        rollouts = Rollouts(data, [each["prompt_ids"] for each in data], completions, n)
        right = are_right(call_rewards(self.rewards, rollouts, self.tokenizer), self.config.threshold, data)
        problems = []
        for place, row in enumerate(rows):
            group = list(zip(completions, right, strict=True))[place * n : place * n + n]
            good = [c for c, ok in group if ok and c.stop != "length"]
            problems.append(
                Problem(
                    row,
                    sum(ok for _, ok in group),
                    sum(c.stop == "length" for c, _ in group),
                    sum(len(c.ids) for c, _ in group),
                    [Solution(list(c.ids), c.mask, decode(self.tokenizer, c.ids)) for c in good],
                )
            )
        return problems

    def learn(self, progress: Progress) -> None:
        """Updates on the kept solutions: cross-entropy of the tokens that the model wrote, their mean over a batch."""
        config, updater = self.config, self.updater
        updates = math.ceil(len(self.kept) * config.num_epochs / config.batch_size)
        updater.total_steps = updates
        self.policy.train()
        while updater.updates < updates and not self.stage.stopping:
            if updater.updates == 0 and self.first:
                self.policy.load_state_dict(self.first)
            seed = sample_seed(self.stage.config["seed"], self.round)
            indices = shuffled_indices(updater.updates, config.batch_size, len(self.kept), seed)
            numbers = self._update([self.kept[i] for i in indices[self.rank :: self.world]])
            self.step += 1
            progress.update(0, loss=numbers["loss"])
            if updater.updates % self.stage.config["logging_steps"] == 0 or updater.updates == updates:
                self._log(**numbers)
            self._end_step()

    def _update(self, batch: list[tuple[int, Solution]]) -> dict[str, float]:
        rows = [self.prompts[row] for row, _ in batch]
        written = [Completion(solution.ids, [], "stop", solution.mask) for _, solution in batch]
        rollouts = Rollouts(rows, [row["prompt_ids"] for row in rows], written, 1)
        device, limit = self.accelerator.device, self.config.max_tokens_per_microbatch
        local = torch.tensor([sum(rollouts.sampled_lengths), rollouts.num_tokens], device=device)
        count, total = self.accelerator.reduce(local, "sum").tolist()
        self.tokens += total
        groups = split(rollouts, list(range(len(batch))), self.layout, limit)
        micro_batches = [lay_out(rollouts, group, self.layout) for group in groups]

        def share(micro_batch) -> torch.Tensor:
            laid_out, select, targets, _ = micro_batch
            logps, *_ = self.updater.model(laid_out.to(device), select.to(device), targets.to(device), 1.0)
            return -logps.sum() / count

        return self.updater.step(micro_batches, share, lambda: ", ".join(str(row) for row, _ in batch[:8]))

    def measure(self) -> None:
        """Held-out replies of the model as it is now: the table's next line. It ends a round and its optimizer."""
        done = 0 if not self.table else self.round + 1
        self.policy.eval()
        self.engine.sync_weights(self.policy)
        first = self.before if done == 0 else None
        metrics, self.samples = first or self.measure_replies(done in (0, self.config.num_rounds))
        line = {"round": done, "sampled": self.sampled, **self.found, "updates": self.updater.updates}
        self.table.append({**line, "metrics": metrics})
        self.step += 1
        self._log(**{f"eval/{name}": metrics[name]["value"] for name in shown(metrics)})
        told = ", ".join(f"{name} {figure(metrics[name])}" for name in shown(metrics))
        share = f"{self.found['right']:.1%} of the samples right, {len(self.kept)} kept; " if done else ""
        self.stage.note(f"round {done}: {share}held out: {told}")
        self.round, self.kept, self.found = done, None, {}
        self.updater.updates = 0
        self.updater.optimizer.state.clear()  # moments of a finished round say nothing of the next one's data
        self._end_step(save=bool(done))

    def result(self, replies, goal: float, more_gains: Sequence[dict] = ()) -> dict:
        """What the manifest gets: metrics before, after and by round, the first reward's gain and `more_gains`,
        samples, the table."""
        from posttrain.evals import before_and_after, merge_samples, metric_of, reply_gain

        before, after = self.table[0]["metrics"], self.table[-1]["metrics"]
        metrics = before_and_after(before, after)
        for line in self.table[1:-1]:
            metrics |= {f"{name}, round {line['round']}": entry for name, entry in line["metrics"].items()}
        first = [metric_of(name) for name in replies.eval_reward_funcs[:1]]
        gains = [reply_gain(f"problems, {m}", m, before, after, ("SFT", "rejection"), goal) for m in first]
        samples = merge_samples({self.stage.name: self.samples})
        return {"metrics": metrics, "gains": [*gains, *more_gains], "samples": samples, "rounds": self.table}

    # ---- steps, log, checkpoints ------------------------------------------------------------------------------------

    def _log(self, **numbers: float) -> None:
        self.stage.log(self.step, round=self.round, **numbers)
        for remark in self.doctor.look({"step": self.step, **numbers}):
            self.stage.note(str(remark))

    def _end_step(self, *, save: bool = False) -> None:
        if self.stage.due(self.step, -1) or save:  # asked first, for all processes ask alike
            self._save()

    def _write_solutions(self) -> None:
        """What is kept as conversations in samples.jsonl (a data set for recipes/sft.py), some as rollouts."""
        lines, shown = [], []
        for row, solution in self.kept:
            prompt, answer = self.prompts[row]["prompt"], {"role": "assistant", "content": solution.text}
            facts = {"step": self.step, "round": self.round, "row": row, "tokens": len(solution.ids)}
            lines.append({**facts, "messages": [*prompt, answer]})
            text = self.tokenizer.decode(self.prompts[row]["prompt_ids"])
            shown.append({**facts, "prompt": text, "completion": solution.text, "stop": "stop"})
        self.stage.append("samples.jsonl", lines)
        self.stage.append("rollouts.jsonl", shown[:8])

    def _save(self) -> None:
        place = ("round", "step", "tokens", "sampled", "table", "samples", "found")
        progress = {key: getattr(self, key) for key in place}
        pools = {key: pool and [[row, asdict(each)] for row, each in pool] for key, pool in self._pools().items()}

        def write(folder):
            self.policy.save_pretrained(folder / "policy")
            (folder / "rounds.json").write_text(json.dumps({**progress, **pools}), encoding="utf-8")
            write_state(folder, updater=self.updater.state())

        self.stage.save(self.step, write)
        self.saved = self.step

    def _pools(self) -> dict:
        return {"kept": self.kept, "earlier": self.earlier}

    def _load(self, folder) -> None:
        from safetensors.torch import load_model

        load_model(self.policy, folder / "policy" / "model.safetensors")
        self.updater.load_state(read_state(folder)["updater"])
        for key, value in json.loads((folder / "rounds.json").read_text(encoding="utf-8")).items():
            if key in self._pools() and value is not None:
                value = [(row, Solution(**each)) for row, each in value]
            setattr(self, key, value)
        self.saved = self.step


# ---- the table ------------------------------------------------------------------------------------------------------


def shown(metrics: dict) -> list[str]:
    """Metrics that stand in the table: all but those of replies made to begin in some way."""
    return [name for name in metrics if ", " not in name]


def figure(entry: dict) -> str:
    """`43.4 % [41.0, 45.8]`"""
    from posttrain.figures import measure

    return " ".join(measure(entry, entry.get("unit") or "")).strip()


def markdown(table: list[dict]) -> str:
    """The rounds as a table: held-out metrics with 95 % intervals over problems, beside what was sampled and kept."""
    names = shown(table[0]["metrics"])
    lines = ["| round | samples | right | kept | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for line in table:
        right = f"{line['right']:.1%}" if "right" in line else "–"
        cells = [figure(line["metrics"][name]) for name in names]
        start = [str(line["round"]), f"{line['sampled']:,}", right, f"{line.get('kept', 0):,}"]
        lines.append("| " + " | ".join([*start, *cells]) + " |")
    return "\n".join(lines)
