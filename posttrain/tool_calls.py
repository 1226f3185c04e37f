"""Calls of tools: read from the ids that a model sampled, carried out, answered as ids. One runtime for RL rollouts,
evaluation, `posttrain chat` and the board.

In: a tokenizer whose template writes calls, tools (posttrain/tools), limits. Out: `ToolRunner`: the calls of a turn,
their answers as text, and the ids between that turn and the model's next one.

Two formats, told apart by what the template makes of a call, so a template of yours needs no further word:
- Hermes' and Qwen's: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in the text of the turn;
- plain (chat_templates/chatml_calls.jinja): a control token, the tool's name, a space, its one text as it is, a
  control token: `<|call|>search Ann's town<|end_call|>`. Arguments of another kind stand there as JSON. It is read
  from ids: text that only spells the tokens is no call, and no text becomes one.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

from posttrain.chat import control_tokens, encode_chat, reply_end_id
from posttrain.errors import UserError
from posttrain.tools import Tool, schemas

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
OPENED = "<tool_call>"
WORKERS = 16  # answers that are waited for side by side; the sandbox bounds by cores what runs
ERROR = "error: "  # how the answer to a call that failed begins
MEND = (
    "train the chat model (recipes/sft.py) with --chat_template_path chat_templates/chatml_tools.jinja, which writes "
    "<tool_call>{...}</tool_call>, or chat_templates/chatml_calls.jinja, which needs fewer tokens"
)


@dataclass(frozen=True)
class Call:
    """One call as the model wrote it; `error` says what is wrong with it."""

    name: str = ""
    arguments: dict = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class ToolLimits:
    """The keys max_tool_calls (calls that one reply may make), max_tool_tokens (kept of an answer) and tool_timeout
    (seconds for one)."""

    max_tool_calls: int = 4
    max_tool_tokens: int = 256
    tool_timeout: float = 30.0

    def __post_init__(self):
        for key in ("max_tool_calls", "max_tool_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected at least 1")
        if not self.tool_timeout > 0:
            raise UserError(f"tool_timeout: found {self.tool_timeout}, expected seconds above 0")


def limits_of(given) -> dict:
    """The keys of `ToolLimits` with what `given`, flags or a config that has them all, says."""
    return {limit.name: getattr(given, limit.name) for limit in fields(ToolLimits)}


class ToolRunner:
    """Reads and answers the calls of one turn after another.

    A reply ends without a further turn where its last one calls nothing, where it was cut, and where it has made
    `max_tool_calls` calls. A call that is malformed, unknown or wrong is answered by "error: ...".
    """

    def __init__(self, tokenizer, tools: list[Tool], limits: ToolLimits | None = None):
        """UserError where the tokenizer's template cannot write a call and its answer behind what the model said, or a
        tool cannot run on this machine."""
        for tool in tools:
            if tool.require is not None:
                tool.require()
        self.tokenizer, self.tools = tokenizer, {tool.name: tool for tool in tools}
        self.limits = limits or ToolLimits()
        self.template = ToolTemplate(tokenizer, tools)

    def calls(self, turn: list[int], made: int) -> list[Call]:
        """Those of a finished turn to answer now, of a reply that has made `made` already; [] where the reply is at
        its end. The first call beyond the limit is answered that it is refused."""
        most = self.limits.max_tool_calls
        if not turn or turn[-1] != self.template.end_id or made >= most:
            return []
        calls, left = self.template.read(turn[:-1]), most - made
        refused = Call(error=f"no more than {most} calls are answered")
        return [*calls[:left], *[refused for _ in calls[left : left + 1]]]

    def answers(self, calls: list[Call]) -> list[str]:
        """What the tools say, side by side, in order."""
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(self.answer, calls))

    def answer(self, call: Call) -> str:
        """UserError for a fault of the machine or the run, not of the call."""
        if call.error:
            return f"{ERROR}{call.error}"
        if call.name not in self.tools:
            return f"{ERROR}there is no tool {call.name[:60]!r}; the tools are {', '.join(self.tools)}"
        return self._cut(self.tools[call.name].call(call.arguments, self.limits.tool_timeout))

    def _cut(self, text: str) -> str:
        """The text's first `max_tool_tokens` tokens."""
        most = self.limits.max_tool_tokens
        text = text[: 32 * most]
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) <= most:
            return text
        return self.tokenizer.decode(ids[:most]).rstrip("\ufffd ") + " ... (cut)"


# ---- what the template writes ---------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "ask"}]
PROBE = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}


class ToolTemplate:
    """How a tokenizer's template writes a call, and the ids that it puts between a turn that calls and the next."""

    def __init__(self, tokenizer, tools: list[Tool]):
        """UserError where the template cannot show the tools, write a call so that it can be read, or its answer."""
        self.tokenizer, self.shown, self.before = tokenizer, schemas(tools), {}
        self.tools = {tool.name: tool for tool in tools}
        self.control, self.end_id = control_tokens(tokenizer), reply_end_id(tokenizer)
        self.marks: tuple[int, int] | None = None  # control ids around a call of the plain format
        try:
            prompt = encode_chat(tokenizer, ASK, add_generation_prompt=True, tools=self.shown).input_ids
            asked = encode_chat(tokenizer, ASK, tools=self.shown).input_ids
            called = self._called(1)
            answer = tokenizer.decode(self.answer_ids(["the probe's answer"]))
        except UserError as error:
            raise UserError(
                f"tools: the tokenizer's chat template cannot write tool calls: {error}; {MEND}"
            ) from error
        self.header = prompt[len(asked) :]
        seen = tokenizer.decode(prompt)
        if missing := [tool.name for tool in tools if tool.name not in seen]:
            raise UserError(f"tools: the chat template does not show the model the tool {missing[0]!r}; {MEND}")
        if called[: len(prompt)] != prompt:
            raise UserError(f"tools: the chat template's turn that calls does not begin as its prompt does; {MEND}")
        self.marks = self._marks(called[len(prompt) : -1])
        if "the probe's answer" not in answer:
            raise UserError(f"tools: the chat template leaves a tool's answer out: it wrote {answer!r:.120}; {MEND}")

    def _marks(self, turn: list[int]) -> tuple[int, int] | None:
        """The control tokens around a call; None where it is written as Hermes and Qwen do."""
        inside = self.tokenizer.decode(turn[1:-1])
        if len(turn) > 2 and turn[0] in self.control and turn[-1] in self.control and inside == "probe value":
            return turn[0], turn[-1]
        written = self.tokenizer.decode(turn)
        if read_calls(written) != [Call("probe", {"key": "value"})]:
            raise UserError(f"tools: the chat template writes a call as {written!r:.120}; {MEND}")
        return None

    def read(self, turn: list[int]) -> list[Call]:
        """The calls in the ids of a turn, in order; [] for a turn that calls nothing."""
        if self.marks is None:
            return read_calls(self.tokenizer.decode(turn, skip_special_tokens=False))
        (first, last), calls, place = self.marks, [], 0
        while first in turn[place:]:
            start = turn.index(first, place) + 1
            stop = next((i for i in range(start, len(turn)) if turn[i] in self.control), len(turn))
            if turn[stop : stop + 1] == [last]:
                calls.append(self._plain(self.tokenizer.decode(turn[start:stop])))
            else:
                calls.append(Call(error=f"{self.control[first]} is never closed by {self.control[last]}"))
            place = stop
        return calls

    def words(self, turn: list[int]) -> tuple[str, int]:
        """(what the ids of a turn say beside calls, special tokens left out; how many characters at its end may yet
        turn out to begin a call)."""
        if self.marks is not None:
            outside = [id for id, inside in zip(turn, self._inside(turn), strict=True) if not inside]
            return decoded(self.tokenizer, outside), 0
        text = CALL.sub("", decoded(self.tokenizer, turn)).partition(OPENED)[0]
        return text, next((n for n in range(len(OPENED) - 1, 0, -1) if text.endswith(OPENED[:n])), 0)

    def _inside(self, turn: list[int]) -> list[bool]:
        """Which ids belong to a call of the plain format, marks included."""
        inside, found = False, []
        for id in turn:
            inside = inside or id == self.marks[0]
            found.append(inside)
            inside = inside and id != self.marks[1]
        return found

    def message(self, turn: list[int], num_calls: int) -> dict:
        """The turn as a message with its first `num_calls` calls. Where one of them cannot be read, its text stays in
        the content as it is."""
        calls = self.read(turn)[:num_calls]
        if any(call.error for call in calls):
            return {"role": "assistant", "content": self.tokenizer.decode(turn, skip_special_tokens=False)}
        listed = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        return {"role": "assistant", "content": self.words(turn)[0].strip(), "tool_calls": listed}

    def _plain(self, text: str) -> Call:
        name, _, rest = text.lstrip().partition(" ")
        if name not in self.tools:
            return Call(name)
        arguments = plain_arguments(self.tools[name].schema["function"].get("parameters") or {}, rest)
        if arguments is None:
            return Call(error=f"the call is {text[:80]!r}; expected {name} and its arguments as a JSON object")
        return Call(name, arguments)

    def begun(self, prompt: list[int]) -> list[int]:
        """What the reply's turn has already, where the prompt goes on after what opens it (eval_prefixes)."""
        size = len(self.header)
        places = range(len(prompt) - size, -1, -1) if size else ()
        start = next((place for place in places if prompt[place : place + size] == self.header), len(prompt))
        return prompt[start + size :]

    def answer_ids(self, texts: list[str]) -> list[int]:
        """The answers' turn and the header of the model's next one; `texts` answer the calls of one turn, in order.

        Control tokens in `texts` stay text, as in every message (chat.encode_chat).
        """
        if len(texts) not in self.before:
            self.before[len(texts)] = self._called(len(texts))
        before = self.before[len(texts)]
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


def decoded(tokenizer, ids: list[int]) -> str:
    """A turn's text without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _calling(calls: int) -> list[dict]:
    return [*ASK, {"role": "assistant", "content": "", "tool_calls": [PROBE] * calls}]


# ---- what the model writes ------------------------------------------------------------------------------------------


def read_calls(text: str) -> list[Call]:
    """Hermes' and Qwen's calls in a turn's text, in order; [] for a turn that calls nothing."""
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
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, as JSON can spell, is for no tokenizer
    except (ValueError, RecursionError) as error:
        return Call(error=f"the call is no JSON ({error}); expected {form}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return Call(error=f"the call is {found.strip()[:80]}; expected {form}")
    return Call(value["name"], arguments)


def plain_arguments(parameters: dict, text: str) -> dict | None:
    """Arguments of a plain call, as chatml_calls.jinja writes them, by the tool's JSON schema; None: not to be read.

    A tool of one text gets it as it is, whatever it looks like. Any other gets the JSON object; where that is none and
    one text is all that it must have, that text.
    """
    properties = parameters.get("properties") or {}
    texts = [name for name, schema in properties.items() if schema.get("type") == "string"]
    if len(properties) == len(texts) == 1:
        return {texts[0]: text}
    try:
        value = json.loads(text) if text.strip() else {}
        json.dumps(value, ensure_ascii=False).encode()  # as in _read
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    required = parameters.get("required") or []
    return {texts[0]: text} if texts and required == texts[:1] else None
