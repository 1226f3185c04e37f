"""Rollouts with tools: a completion that stops at a call gets the tool's answer as tokens and goes on.

In: any engine, tools (posttrain/tools), a tokenizer whose template writes calls as Hermes and Qwen do. Out: an engine:
the same `generate`, whose completions hold the model's turns and, with mask 0 and log-probability 0, the answers.

    engine = ToolEngine(engine, load_tools(["calculator"]), tokenizer, max_tool_calls=4)

Token in, token out: the next turn's prompt is the ids so far plus the ids of the answer. What the model sampled is
decoded to find the call and never encoded again. Prompts have to show the tools: encode them with `schemas(tools)`.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from posttrain.chat import encode_chat, reply_end_id
from posttrain.errors import UserError
from posttrain.rl.engine import Engine, Sampling, sample_seed
from posttrain.rl.types import Completion
from posttrain.tools import Tool

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
OPENED = "<tool_call>"
WORKERS = 16  # answers that are waited for side by side; the sandbox bounds by cores what runs
MEND = (
    "train the chat model (recipes/sft.py) with --chat_template_path chat_templates/chatml_tools.jinja, which writes "
    "<tool_call>{...}</tool_call>"
)


@dataclass(frozen=True)
class Call:
    """One call as the model wrote it; `error` says what is wrong with it."""

    name: str = ""
    arguments: dict = field(default_factory=dict)
    error: str | None = None


def schemas(tools: list[Tool]) -> list[dict]:
    """What `encode_chat(..., tools=)` takes."""
    return [tool.schema for tool in tools]


def read_calls(text: str) -> list[Call]:
    """The calls in a turn's text, in order; [] for a turn that calls nothing."""
    calls = [_read(found) for found in CALL.findall(text)]
    if OPENED in CALL.sub("", text):
        calls.append(Call(error="<tool_call> is never closed by </tool_call>"))
    return calls


def _read(found: str) -> Call:
    form = '{"name": <function-name>, "arguments": <args-json-object>}'
    try:
        value = json.loads(found)
        arguments = value["arguments"] if isinstance(value, dict) and "arguments" in value else {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        return Call(error=f"the call is no JSON ({error}); expected {form}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return Call(error=f"the call is {found.strip()[:80]}; expected {form}")
    return Call(value["name"], arguments)


@dataclass(eq=False)
class _Sample:
    """One completion as it grows."""

    prompt: list[int]
    whole: Completion
    turn: list[int]  # what the model said last
    calls: int = 0


class ToolEngine:
    """Any engine, with tools. `max_tool_calls` a completion; of an answer `max_tool_tokens` are kept.

    A completion ends without a further turn where its last one calls nothing, where it was cut, where it has made
    `max_tool_calls` calls, and where the answer would leave no room within `sampling.max_tokens`, which count both
    (`stop` is then "length"). A call that is malformed, unknown or wrong is answered by "error: ...".

    Same prompts, sampling, seed and weights give the same completions, if the tools do. Turns of all completions
    advance together; a completion's later turns are drawn with seeds of its place among those that still go on.
    """

    def __init__(
        self,
        engine: Engine,
        tools: list[Tool],
        tokenizer,
        *,
        max_tool_calls: int = 4,
        max_tool_tokens: int = 256,
        tool_timeout: float = 30.0,
    ):
        """UserError where the tokenizer's template cannot write a call and its answer behind what the model said."""
        self.engine, self.tools, self.tokenizer = engine, {tool.name: tool for tool in tools}, tokenizer
        self.max_tool_calls, self.max_tool_tokens, self.tool_timeout = max_tool_calls, max_tool_tokens, tool_timeout
        self.template = ToolTemplate(tokenizer, tools)

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
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        samples = [_Sample(prompt, whole, whole.ids) for prompt, whole in zip(repeated, first, strict=True)]
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
        with ThreadPoolExecutor(WORKERS) as pool:
            texts = iter(list(pool.map(self._run, [call for _, calls in asked for call in calls])))
        goes_on = []
        for sample, calls in asked:
            sample.calls += len(calls)
            ids = self.template.answer_ids([next(texts) for _ in calls])
            whole = sample.whole
            if len(whole.ids) + len(ids) >= max_tokens:
                whole.stop = "length"  # the model never saw the answer
                continue
            whole.mask = [*(whole.mask or [1] * len(whole.ids)), *[0] * len(ids)]
            whole.ids, whole.logps = [*whole.ids, *ids], [*whole.logps, *[0.0] * len(ids)]
            goes_on.append(sample)
        return goes_on

    def _calls(self, sample: _Sample) -> list[Call]:
        """Those to answer now: [] where the completion is at its end. Beyond max_tool_calls they are refused."""
        if (
            sample.whole.stop != "stop"
            or sample.turn[-1] != self.template.end_id
            or sample.calls >= self.max_tool_calls
        ):
            return []
        text = self.tokenizer.decode(sample.turn[:-1], skip_special_tokens=False)
        calls, left = read_calls(text), self.max_tool_calls - sample.calls
        refused = Call(error=f"no more than {self.max_tool_calls} calls are answered")
        return [*calls[:left], *[refused for _ in calls[left : left + 1]]]

    def _run(self, call: Call) -> str:
        if call.error:
            return f"error: {call.error}"
        if call.name not in self.tools:
            return f"error: there is no tool {call.name[:60]!r}; the tools are {', '.join(self.tools)}"
        return self._cut(self.tools[call.name].call(call.arguments, self.tool_timeout))

    def _cut(self, text: str) -> str:
        """The text's first `max_tool_tokens` tokens."""
        text = text[: 32 * self.max_tool_tokens]
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) <= self.max_tool_tokens:
            return text
        return self.tokenizer.decode(ids[: self.max_tool_tokens]).rstrip("\ufffd ") + " ... (cut)"

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


# ---- the tools' turn as the template writes it ----------------------------------------------------------------------

ASK = [{"role": "user", "content": "ask"}]
PROBE = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}


class ToolTemplate:
    """The ids that a tokenizer's template puts between a turn that calls and the model's next turn."""

    def __init__(self, tokenizer, tools: list[Tool]):
        """UserError where the template cannot show the tools, write a call as `read_calls` reads it, or its answer."""
        self.tokenizer, self.shown, self.calls = tokenizer, schemas(tools), {}
        self.end_id = reply_end_id(tokenizer)
        try:
            prompt = encode_chat(tokenizer, ASK, add_generation_prompt=True, tools=self.shown).input_ids
            called = self._called(1)
            answer = tokenizer.decode(self.answer_ids(["the probe's answer"]))
        except UserError as error:
            raise UserError(
                f"tools: the tokenizer's chat template cannot write tool calls: {error}; {MEND}"
            ) from error
        seen, written = tokenizer.decode(prompt), tokenizer.decode(called[len(prompt) :])
        if missing := [tool.name for tool in tools if tool.name not in seen]:
            raise UserError(f"tools: the chat template does not show the model the tool {missing[0]!r}; {MEND}")
        if called[: len(prompt)] != prompt:
            raise UserError(f"tools: the chat template's turn that calls does not begin as its prompt does; {MEND}")
        if read_calls(written) != [Call("probe", {"key": "value"})]:
            raise UserError(f"tools: the chat template writes a call as {written!r:.120}; {MEND}")
        if "the probe's answer" not in answer:
            raise UserError(f"tools: the chat template leaves a tool's answer out: it wrote {answer!r:.120}; {MEND}")

    def answer_ids(self, texts: list[str]) -> list[int]:
        """The answers' turn and the header of the model's next one; `texts` answer the calls of one turn, in order.

        Control tokens in `texts` stay text, as in every message (chat.encode_chat).
        """
        if len(texts) not in self.calls:
            self.calls[len(texts)] = self._called(len(texts))
        before = self.calls[len(texts)]
        results = [{"role": "tool", "name": "probe", "content": text} for text in texts]
        messages = [*_calling(len(texts)), *results]
        whole = encode_chat(self.tokenizer, messages, add_generation_prompt=True, tools=self.shown).input_ids
        if whole[: len(before)] != before:
            raise UserError(f"tools: the chat template writes a call differently once its answer follows; {MEND}")
        return whole[len(before) :]

    def _called(self, calls: int) -> list[int]:
        """A conversation up to and with the end token of a turn that calls."""
        ids = encode_chat(self.tokenizer, _calling(calls), tools=self.shown).input_ids
        if self.end_id not in ids:
            raise UserError("it ends a turn that calls by no end token")
        return ids[: len(ids) - ids[::-1].index(self.end_id)]


def _calling(calls: int) -> list[dict]:
    return [*ASK, {"role": "assistant", "content": "", "tool_calls": [PROBE] * calls}]
