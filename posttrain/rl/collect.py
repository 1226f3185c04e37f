"""Which prompts a step takes and when they are sampled: at once, or one step ahead in the background.

In: prompts with `prompt_ids`, an engine. Out: `Rollouts`, a pure function of seed, step and the weights the engine
had. What was sampled ahead is part of the state, so a resumed run goes on exactly.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from posttrain.errors import UserError
from posttrain.order import taken_indices
from posttrain.rl.config import RLConfig
from posttrain.rl.rollout import Sampling, sample_seed
from posttrain.rl.types import Completion, Rollouts


class Collector:
    """Takes `num_prompts` prompts a time from an endless row of seeded shuffles; each process samples its share."""

    def __init__(self, config: RLConfig, engine, prompts: list[dict], sampling: Sampling, seed: int, rank=0, world=1):
        self.config, self.engine, self.prompts, self.sampling = config, engine, prompts, sampling
        self.seed, self.rank, self.world = seed, rank, world
        self.taken = 0  # prompts so far, of all processes
        self._thread = ThreadPoolExecutor(1) if config.rollout_ahead and engine.concurrent else None
        self._pending: tuple[list[int], Future] | None = None

    @property
    def waiting(self) -> bool:
        """Whether completions have been asked for and not been taken yet."""
        return self._pending is not None

    def begin(self, *key: int) -> None:
        """Ask for the completions of the next prompts; `key`, the step and what else tells draws apart, is hashed
        into their seed. In the background where the engine has weights of its own, else they are sampled now."""
        mine = taken_indices(self.taken, self.config.num_prompts, len(self.prompts), self.seed)
        mine = mine[self.rank :: self.world]
        self.taken += self.config.num_prompts
        prompt_ids = [self.prompts[i]["prompt_ids"] for i in mine]
        step, *rest = key
        seed = sample_seed(self.seed, step, self.rank, *rest)
        if self._thread is not None:
            self._pending = mine, self._thread.submit(self.engine.generate, prompt_ids, self.sampling, seed)
        else:
            self._pending = mine, _done(self.engine.generate(prompt_ids, self.sampling, seed))

    def wait(self) -> None:
        """Return once the engine is free: completions asked for are there, and stay to be taken."""
        if self._pending is not None:
            self._pending[1].result()

    def take(self) -> Rollouts:
        """The completions asked for, once they are there. Raises what the engine raised."""
        (mine, future), self._pending = self._pending, None
        rows = [self.prompts[i] for i in mine for _ in range(self.sampling.n)]
        return Rollouts(rows, [row["prompt_ids"] for row in rows], future.result(), self.sampling.n)

    def state(self) -> dict:
        """What a resumed run needs; waits for completions that are being sampled."""
        if self._pending is None:
            return {"taken": self.taken, "pending": None}
        mine, future = self._pending
        return {"taken": self.taken, "pending": {"prompts": mine, "completions": [vars(c) for c in future.result()]}}

    def load_state(self, state: dict) -> None:
        """Go on where `state()` was. UserError where the prompts are others."""
        self.taken, pending = state["taken"], state["pending"]
        if pending is not None:
            if max(pending["prompts"], default=0) >= len(self.prompts):
                raise UserError("the checkpoint's rollouts belong to prompts that are not there: the data has changed")
            self._pending = pending["prompts"], _done([Completion(**c) for c in pending["completions"]])


def _done(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
