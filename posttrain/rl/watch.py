"""What RL is measured by: replies to held-out prompts before and after, and whether the model forgets who it is.

In: a policy's engine, held-out prompts, an identity.yaml. Out: metrics with 95 % intervals, samples, and the gain
"keeps who it is"; in log.jsonl `identity/right`, `identity/kept` and `identity/yields` every `eval_steps` steps, which
the report draws over the steps and over the root of the KL. Keys of recipes/ppo.py, grpo.py and rejection.py (which
asks after every round, and has no eval_steps):

    identity: recipes/identity/identity.yaml
    eval_steps: 4
"""

from dataclasses import dataclass, replace

from posttrain import evals
from posttrain.args import arg, at_least
from posttrain.data.identity import read_identity
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.identity_eval import Asked, kept_gains, log_numbers, measure_identity


@dataclass
class IdentityConfig:
    """Identity: who the model is, and whether it forgets that"""

    identity: str | None = arg(None, help="YAML of who the model is: asked before and after, in held-out wordings")

    def __post_init__(self):
        if self.identity is not None:
            read_identity(self.identity)


@dataclass
class DriftConfig(IdentityConfig):
    """Identity: who the model is, and whether it forgets that"""

    eval_steps: int = arg(0, help="ask who it is every so many steps, one reply a question; 0: only before and after")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, eval_steps=0)
        if self.eval_steps and self.identity is None:
            raise UserError(
                f"eval_steps: found {self.eval_steps} without an identity, and nothing else is asked while RL trains: "
                "add --identity identity.yaml, or leave eval_steps"
            )


class Watch:
    """Measures a policy through its engine before (when made), during and after its training.

    `before` has the metrics of the start, `samples` its replies for the report. `judges` are reward functions without
    a name, as [(name, function, weight)].
    """

    def __init__(
        self, engine, tokenizer, stops, test: list[dict], replies: ReplyConfig, config: IdentityConfig, judges=()
    ):  # fmt: skip
        self.engine, self.tokenizer, self.stops, self.test = engine, tokenizer, stops, test
        self.replies, self.identity, self.judges = replies, config.identity, judges
        self.eval_steps = config.eval_steps if isinstance(config, DriftConfig) else 0
        self.first = self.last = self._ask(replies.eval_num_generations)
        metrics, samples = self._replies()
        self.before, self.samples = metrics | self.first.metrics, samples + self.first.samples

    def measure(self, reply_kl=None, prefixes: bool = True) -> tuple[dict, list[dict]]:
        """(metrics, samples) of the policy whose weights the engine has; arguments as of `evals.measure_replies`."""
        metrics, samples = self._replies(reply_kl, prefixes)
        self.last = self._ask(self.replies.eval_num_generations)
        return metrics | self.last.metrics, samples + self.last.samples

    def due(self, step: int) -> bool:
        """Whether the policy is asked who it is after this step, in the middle of training."""
        return self.eval_steps > 0 and step % self.eval_steps == 0

    def during(self) -> dict[str, float]:
        """What a line of the log says of it; the engine must have the policy's weights."""
        return log_numbers(self._ask(1))

    def gains(self, label: str) -> list[dict]:
        """Who it says it is, the last time against the first; [] where no identity is asked for."""
        return kept_gains(self.first, self.last, ("SFT", label))

    def _replies(self, reply_kl=None, prefixes: bool = True) -> tuple[dict, list[dict]]:
        replies = self.replies if prefixes else replace(self.replies, eval_prefixes={})
        return evals.measure_replies(
            self.engine, self.tokenizer, self.test, replies, self.stops, self.judges, reply_kl
        )

    def _ask(self, num: int) -> Asked:
        size = self.replies.eval_max_tokens
        return measure_identity(self.engine, self.tokenizer, self.identity, self.stops, num, size)
