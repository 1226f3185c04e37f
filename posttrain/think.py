"""Tokens to think: replies that answer at once, in steps, after at most so many tokens of thought, or at least many.

In: any engine, prompts as token ids, and the words that a reply is made to say (`Words`). Out: completions as token
ids, whose mask is 0 where a token was put there and 1 where the model sampled it. Token in, token out: what the model
sampled is decoded only to find where its thoughts end, and never encoded again. Launched by `posttrain eval MODEL
--suite think` (posttrain/suite_think.py).

Budget forcing (Muennighoff et al. 2501.19393, section 3.1): thoughts that reach the budget are cut there, and the
answer's opening is appended; thoughts that end too early are made to go on by a word such as "Wait" in place of their
end. Qwen3's thinking budget (2505.09388, section 4.7) cuts in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from posttrain.chat import template_of
from posttrain.errors import UserError
from posttrain.rl.engine import Engine, Sampling, sample_seed
from posttrain.rl.types import Completion
from posttrain.template_render import render

MOST_WAITS = 8  # times that a reply is made to go on; s1 reads two, four and six
ASK = [{"role": "user", "content": "ask"}]
THOUGHTS, ANSWER = "its thoughts", "the answer"


@dataclass(frozen=True)
class Tags:
    """What a template writes around thoughts: `opening` behind the generation prompt ("" where that opens them
    already), `closing` before the answer."""

    opening: str
    closing: str


def tags_of(tokenizer) -> Tags | None:
    """The tags of a template that has a place for thoughts, such as qwen3.jinja; None of one that has none."""
    template, special = template_of(tokenizer), tokenizer.special_tokens_map
    prompt, _ = render(template, ASK, add_generation_prompt=True, special=special)
    if prompt.rstrip().endswith("<think>"):  # DeepSeek's own template drops the thoughts of turns that are over
        return Tags("", "\n</think>\n\n")
    turn = {"role": "assistant", "reasoning_content": THOUGHTS, "content": ANSWER}
    try:
        whole, _ = render(template, [*ASK, turn], special=special)
    except UserError:  # most templates refuse thoughts
        return None
    before, found, after = whole.removeprefix(prompt).partition(THOUGHTS)
    closing = after.partition(ANSWER)[0]
    return Tags(before, closing) if found and closing.strip() and whole.startswith(prompt) else None


@dataclass(frozen=True)
class Words:
    """What replies are made to say: `at_once` opens the answer of one without thoughts, `in_steps` opens thoughts,
    `answer` ends them and opens the answer, `go_on` stands in place of an end that comes too early."""

    at_once: str
    in_steps: str
    answer: str
    go_on: str


@dataclass(frozen=True)
class Frame:
    """The same as token ids. `mark`: the text by which a reply says that its thoughts are over: the closing tag, or,
    without tags, the answer's opening; `opens`: the tag by which it says that it thinks, "" where nothing
    need say so."""

    at_once: list[int]
    in_steps: list[int]
    answer: list[int]
    go_on: list[int]
    mark: str
    opens: str
    tags: bool
    decode: Callable[[list[int]], str]

    @classmethod
    def of(cls, tokenizer, words: Words) -> "Frame":
        """UserError where nothing would tell the answer from the thoughts."""

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        tags = tags_of(tokenizer)
        mark = (tags.closing if tags else words.at_once).strip()
        if not mark:
            raise UserError("--at_once: found an empty text, and the template has no tags for thoughts: nothing would "
                            "tell the answer from them; give its opening, such as 'The answer is'")  # fmt: skip
        if tags and mark not in words.answer:
            raise UserError(f"--answer: found {words.answer!r}, which does not close the template's thoughts; it has "
                            f"to hold {mark!r}, such as {tags.closing + words.at_once!r}")  # fmt: skip
        opening, closing = (tags.opening, tags.closing) if tags else ("", "")
        return cls(
            at_once=ids(opening + closing + words.at_once),
            in_steps=ids(opening + words.in_steps),
            answer=ids(words.answer),
            go_on=ids(words.go_on),
            mark=mark,
            opens=opening.strip(),
            tags=tags is not None,
            decode=lambda some: tokenizer.decode(some, skip_special_tokens=False),
        )

    def end_of_thoughts(self, completion: Completion) -> int:
        """The place of the first id that belongs to the mark, behind the words that the reply was made to begin with;
        of a reply without the mark its length, its end token not counted; of one that opened no thoughts its start."""
        ids, start = completion.ids, self.start(completion)
        if self.opens and self.opens not in self.decode(ids):
            return start
        place = self.decode(ids[start:]).find(self.mark)
        if place < 0:
            return len(ids) - (completion.stop == "stop")
        low, high = start, len(ids)  # the most ids whose text ends at or before the mark
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.decode(ids[start:middle])) <= place else (low, middle - 1)
        return low

    @staticmethod
    def start(completion: Completion) -> int:
        """How many ids were put before the first that was sampled."""
        mask = completion.mask or []
        return next((place for place, sampled in enumerate(mask) if sampled), len(mask))

    def through(self, completion: Completion) -> bool:
        """Whether the model ended its thoughts itself: by the mark, or with the reply."""
        return completion.stop == "stop" or self.mark in self.decode(completion.ids[self.start(completion) :])


@dataclass(frozen=True)
class Parts:
    """Tokens of a reply: sampled before the answer, put there, sampled from there on with the end token. Their sum is
    the reply's length."""

    thinking: int
    forced: int
    answer: int


def parts(frame: Frame, completion: Completion, at_once: bool = False) -> Parts:
    """What a reply's tokens were spent on; `at_once`: all that it sampled is its answer."""
    mask = completion.mask or [1] * len(completion.ids)
    forced = len(mask) - sum(mask)
    end = 0 if at_once else frame.end_of_thoughts(completion)
    thinking = sum(mask[:end])
    return Parts(thinking, forced, sum(mask) - thinking)


# --- ways to reply


def begin(engine: Engine, prompts: list, opening: list[int], sampling: Sampling, seed: int) -> list[Completion]:
    """`sampling.n` replies to each prompt, made to begin with `opening`."""
    found = engine.generate([prompt + opening for prompt in prompts], sampling, seed)
    return [_joined(opening, Completion([], [], ""), each) for each in found]


def within(
    engine: Engine, frame: Frame, prompts: list, thoughts: list[Completion], budget: int, sampling: Sampling, seed: int
) -> list[Completion]:
    """Each of `thoughts` (one for each of `prompts`) as it is where it ended by itself after at most `budget` tokens
    of thought; else cut there and made to answer, in at most `sampling.max_tokens` more."""
    late = []
    for place, thought in enumerate(thoughts):
        start = frame.start(thought)
        if not frame.through(thought) or frame.end_of_thoughts(thought) - start > budget:
            late.append((place, _cut(thought, start + budget)))
    asked = [prompts[place] + cut.ids + frame.answer for place, cut in late]
    found = engine.generate(asked, replace(sampling, n=1), sample_seed(seed, budget)) if asked else []
    replies = list(thoughts)
    for (place, cut), answer in zip(late, found, strict=True):
        replies[place] = _joined(frame.answer, cut, answer)
    return replies


def at_least(
    engine: Engine, frame: Frame, prompts: list, thoughts: list[Completion], least: int, sampling: Sampling, seed: int
) -> list[Completion]:
    """Each of `thoughts`, made to go on where it would end before `least` tokens of thought, `go_on`'s own counted;
    at most MOST_WAITS times, and not beyond `sampling.max_tokens` tokens of thought and answer together."""
    replies = list(thoughts)
    for wait in range(MOST_WAITS):
        early = []
        for place, reply in enumerate(replies):
            start, end = frame.start(reply), frame.end_of_thoughts(reply)
            room = sampling.max_tokens - (end - start) - len(frame.go_on)
            if frame.through(reply) and end - start < least and room > 0:
                early.append((place, _cut(reply, end), room))
        if not early:
            break
        most = replace(sampling, n=1, max_tokens=max(room for _, _, room in early))
        asked = [prompts[place] + cut.ids + frame.go_on for place, cut, _ in early]
        found = engine.generate(asked, most, sample_seed(seed, least, wait))
        for (place, cut, room), more in zip(early, found, strict=True):
            kept = more if len(more.ids) <= room else Completion(more.ids[:room], more.logps[:room], "length")
            replies[place] = _joined(frame.go_on, cut, kept)
    return replies


def _cut(completion: Completion, size: int) -> Completion:
    mask = completion.mask or [1] * len(completion.ids)
    return Completion(completion.ids[:size], completion.logps[:size], "length", mask[:size])


def _joined(words: list[int], before: Completion, after: Completion) -> Completion:
    """`before`, the words, and what was sampled behind them."""
    mask = [*(before.mask or []), *[0] * len(words), *[1] * len(after.ids)]
    logps = [*before.logps, *[0.0] * len(words), *after.logps]
    return Completion([*before.ids, *words, *after.ids], logps, after.stop, mask)
