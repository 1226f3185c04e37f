"""Rollouts with tools: a completion that stops at a call gets the tool's answer as tokens and goes on.

In: any engine, tools (posttrain/tools), a tokenizer whose template writes calls (posttrain/tool_calls.py). Out: an
engine: the same `generate`, whose completions hold the model's turns and, with mask 0 and log-probability 0, the
answers.

    engine = ToolEngine(engine, load_tools(["calculator"]), tokenizer, max_tool_calls=4)

Token in, token out: the next turn's prompt is the ids so far plus the ids of the answer. What the model sampled is
decoded to find the call and never encoded again. Prompts have to show the tools: encode them with `schemas(tools)`.
"""

from dataclasses import dataclass, replace

from posttrain.rl.engine import Engine, Sampling, sample_seed
from posttrain.rl.types import Completion
from posttrain.tool_calls import ERROR, Call, ToolLimits, ToolRunner
from posttrain.tools import Tool


@dataclass(eq=False)
class _Sample:
    """One completion as it grows."""

    prompt: list[int]
    whole: Completion
    turn: list[int]  # what the model said last, what the prompt began included


class ToolEngine:
    """Any engine, with tools and the limits of `ToolLimits`.

    A completion ends where `ToolRunner` says so, and where the answer would leave no room within
    `sampling.max_tokens`, which count both (`stop` is then "length"). Where the prompt has begun the reply, its words
    are the model's: a call that they open is one.

    Same prompts, sampling, seed and weights give the same completions, if the tools do. Turns of all completions
    advance together; a completion's later turns are drawn with seeds of its place among those that still go on.
    """

    def __init__(self, engine: Engine, tools: list[Tool], tokenizer, **limits):
        """`limits`: the keys of `ToolLimits`. UserError where the tokenizer's template cannot write calls."""
        self.engine = engine
        self.runner = ToolRunner(tokenizer, tools, ToolLimits(**limits))

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def concurrent(self) -> bool:
        return self.engine.concurrent

    def sync_weights(self, model) -> None:
        self.engine.sync_weights(model)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """n completions for each prompt, side by side; each of at most `sampling.max_tokens` ids, answers included."""
        first = self.engine.generate(prompts, sampling, seed)
        begun = [self.runner.template.begun(prompt) for prompt in prompts]
        repeated = [pair for pair in zip(prompts, begun, strict=True) for _ in range(sampling.n)]
        samples = [_Sample(p, whole, [*b, *whole.ids]) for (p, b), whole in zip(repeated, first, strict=True)]
        for whole in first:
            whole.calls = whole.failed_calls = 0
        room = max(map(len, prompts), default=0) + sampling.max_tokens  # the engine's context holds so much for sure
        open_, turn = samples, 0
        while open_ := self._answer(open_, sampling.max_tokens):
            turn += 1
            self._go_on(open_, sampling, room, sample_seed(seed, turn))
        return [sample.whole for sample in samples]

    # ---- one turn of the tools --------------------------------------------------------------------------------------

    def _answer(self, samples: list[_Sample], max_tokens: int) -> list[_Sample]:
        """Run the calls of all samples' last turns, append the answers; the samples that go on."""
        asked = [(sample, calls) for sample in samples if (calls := self._calls(sample))]
        if not asked:
            return []
        texts = iter(self.runner.answers([call for _, calls in asked for call in calls]))
        goes_on = []
        for sample, calls in asked:
            whole, said = sample.whole, [next(texts) for _ in calls]
            whole.calls += len(calls)
            whole.failed_calls += sum(text.startswith(ERROR) for text in said)
            ids = self.runner.template.answer_ids(said)
            if len(whole.ids) + len(ids) >= max_tokens:
                whole.stop = "length"  # the model never saw the answer
                continue
            whole.mask = [*(whole.mask or [1] * len(whole.ids)), *[0] * len(ids)]
            whole.ids, whole.logps = [*whole.ids, *ids], [*whole.logps, *[0.0] * len(ids)]
            goes_on.append(sample)
        return goes_on

    def _calls(self, sample: _Sample) -> list[Call]:
        return self.runner.calls(sample.turn, sample.whole.calls) if sample.whole.stop == "stop" else []

    # ---- one turn of the model --------------------------------------------------------------------------------------

    def _go_on(self, samples: list[_Sample], sampling: Sampling, room: int, seed: int) -> None:
        """Sample each one's next turn. One call for all, but where that would ask the engine for a longer context."""
        waiting, call = list(samples), 0
        while waiting:
            budget = max(sampling.max_tokens - len(sample.whole.ids) for sample in waiting)
            now = [sample for sample in waiting if len(sample.prompt) + len(sample.whole.ids) + budget <= room]
            prompts = [[*sample.prompt, *sample.whole.ids] for sample in now]
            one = replace(sampling, n=1, max_tokens=budget)
            for sample, more in zip(now, self.engine.generate(prompts, one, sample_seed(seed, call)), strict=True):
                self._append(sample, more, sampling.max_tokens - len(sample.whole.ids))
            waiting, call = [sample for sample in waiting if sample not in now], call + 1

    @staticmethod
    def _append(sample: _Sample, more: Completion, left: int) -> None:
        """Of what the engine sampled, what the completion has room for."""
        whole, sample.turn = sample.whole, more.ids[:left]
        whole.mask = [*whole.mask, *[1] * len(sample.turn)]
        whole.ids, whole.logps = [*whole.ids, *sample.turn], [*whole.logps, *more.logps[:left]]
        whole.stop = more.stop if len(more.ids) <= left else "length"
