"""A reply as it is sampled, for the terminal and the board: token by token, with the calls of tools in between.

In: a `serve.Session` and a prompt's token ids. Out: events, in order: a `Step` for each token, a `Use` for each call,
once before it is carried out and once with its answer; in the end the reply as messages of the Hub's layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from posttrain.decoding import sample
from posttrain.tool_calls import Call, decoded

LONGEST_TITLE = 300  # characters


class Step(NamedTuple):
    """A token, its probability (None: the tools' text, not the model's) and the text that it completes."""

    token: int
    probability: float | None
    text: str


@dataclass
class Use:
    """A call, and what the tool said; None while it is not carried out."""

    call: Call
    answer: str | None = None

    @property
    def title(self) -> str:
        """The call in one line: `search(query="Ann's town")`."""
        if not self.call.name:
            return "a call that cannot be read"
        given = ", ".join(f"{key}={value!r}" for key, value in self.call.arguments.items())
        title = f"{self.call.name}({given})"
        return title if len(title) <= LONGEST_TITLE else f"{title[:LONGEST_TITLE]} ..."


class Reply:
    """A reply to `prompt_ids`, sampled while it is iterated over. Leave the loop and the sampling stops.

    Then `ended` says whether a token that ends replies came and nothing was left to answer, `stream` has the text of
    the turn that was written last, `cut` says why there is no more. `max_new_tokens` counts the tools' text, too.
    """

    def __init__(self, session, prompt_ids: list[int]):
        self.session, self.prompt_ids, self.runner = session, prompt_ids, session.runner
        self.stream, self.ended = self._new_stream(), False
        self.room = self._left = min(session.max_new_tokens, session.context - len(prompt_ids))
        self._calls, self._past, self._turn, self._uses = 0, [], [], []

    def _new_stream(self) -> "TextStream":
        return TextStream(self.session.tokenizer, self.runner and self.runner.template)

    def __iter__(self) -> Iterator[Step | Use]:
        ids = self.prompt_ids
        while True:
            yield from self._sampled(ids)
            calls = self.runner.calls(self._turn, self._calls) if self.runner and self.ended else []
            if not calls:
                return
            self.ended, self._calls = False, self._calls + len(calls)
            for call in calls:
                self._uses.append(Use(call))
                yield self._uses[-1]
                self.carry_out(self._uses[-1])
                yield self._uses[-1]
            answer = self.runner.template.answer_ids([use.answer for use in self._uses])
            if len(answer) >= self._left:
                return  # no room for the answer and a word on it
            yield from (Step(id, None, "") for id in answer)
            ids = [*ids, *self._turn, *answer]
            self._left -= len(answer)
            self._past, self.stream, self._turn, self._uses = self.messages, self._new_stream(), [], []

    def _sampled(self, ids: list[int]) -> Iterator[Step]:
        session = self.session
        settings = session.temperature, session.top_p, session.generator, session.top_k
        for token, probability in sample(session.model, ids, session.stop_ids, self._left, *settings):
            self._turn.append(token)
            self._left -= 1
            self.ended = token in session.stop_ids
            yield Step(token, probability, "" if self.ended else self.stream.add(token))

    def carry_out(self, use: Use) -> None:
        """Call the tool, once. Who iterates may do so where nobody waits for the model's lock."""
        if use.answer is None:
            use.answer = self.runner.answer(use.call)

    @property
    def messages(self) -> list[dict]:
        """The reply so far: turns of the assistant, and of the tools that have answered."""
        answered = [use for use in self._uses if use.answer is not None]
        if not answered:
            return [*self._past, {"role": "assistant", "content": self.stream.text}] if self._turn else self._past
        tools = [{"role": "tool", "name": use.call.name or "tool", "content": use.answer} for use in answered]
        return [*self._past, self.runner.template.message(self._turn[:-1], len(answered)), *tools]

    @property
    def said(self) -> list[dict]:
        """`messages`, without what may yet turn out to be half a character or the beginning of a call."""
        found = self.messages
        if found and found[-1]["role"] == "assistant":
            found = [*found[:-1], {**found[-1], "content": self.stream.text[: self.stream.shown]}]
        return found

    @property
    def cut(self) -> str:
        if self.room < self.session.max_new_tokens:
            return f"cut: the context of {self.session.context} tokens is full"
        return f"cut at max_new_tokens {self.room}"


def whole(said: list[dict]) -> list[dict]:
    """A reply's messages as a conversation can go on from them. One that broke off before the model could go on from a
    tool's answer is kept as its words."""
    if not said or said[-1]["role"] != "tool":
        return said
    words = [message["content"] for message in said if message["role"] == "assistant" and message["content"]]
    return [{"role": "assistant", "content": "\n".join(words)}] if words else []


class TextStream:
    """Token ids in, text out; a character whose bytes are spread over several tokens comes out when it is whole.

    With `template`, a `ToolTemplate`, calls are left out of the text.
    """

    def __init__(self, tokenizer, template=None):
        self.tokenizer, self.template, self.ids, self.text, self.shown = tokenizer, template, [], "", 0

    def add(self, token: int) -> str:
        """Return the text that `token` completes, often none."""
        self.ids.append(token)
        held = 0
        if self.template is None:
            self.text = decoded(self.tokenizer, self.ids)
        else:
            self.text, held = self.template.words(self.ids)
        # An unfinished UTF-8 character (at most three of its four bytes) decodes to up to three U+FFFD at the end.
        tail = self.text[-3:]
        whole = len(self.text) - len(tail) + len(tail.rstrip("\ufffd"))
        return self.take(min(whole, len(self.text) - held))

    def end(self) -> str:
        """Return what was held back: bytes that never became a character, words that never became a call."""
        return self.take(len(self.text))

    def take(self, stop: int) -> str:
        new, self.shown = self.text[self.shown : stop], max(self.shown, stop)
        return new
