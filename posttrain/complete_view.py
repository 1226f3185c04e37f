"""Tokens coloured by the probability that the model gave them, in the terminal and as one HTML page.

In: a model, a prompt's tokens and its continuations. Out: `Shown`, which `as_text` prints (a token above its -log p)
and `write` writes as a page without script or link out, whose tokens name what else was likely. Probabilities are the
model's own, at temperature 1, whatever the text was sampled with; logarithms are natural.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from posttrain.checkpoint import replacing
from posttrain.figures import number
from posttrain.xray_text import paint, plain, sentence, width_of

BOUNDS = (0.5, 0.2, 0.05, 0.01)  # lower ends of the classes that have a colour each; below the last is the fifth
COLOURS = ("30;48;5;157", "30;48;5;193", "30;48;5;229", "30;48;5;216", "30;48;5;210")  # black on green ... red
ALTERNATIVES = 5


@dataclass(frozen=True)
class Scored:
    """A token; `p` None for the very first one, which nothing stands before. `rank` 1 is the likeliest.

    `others`: (token, probability) of the likeliest tokens in its place, it may be among them.
    """

    text: str
    id: int
    p: float | None = None
    rank: int | None = None
    others: tuple[tuple[str, float], ...] = ()

    @property
    def nats(self) -> float | None:
        """-log p; None where there is no p, infinite where p is 0 in float32."""
        return None if self.p is None else (-math.log(self.p) if self.p > 0 else math.inf)

    @property
    def colour(self) -> int | None:
        """Which of the five classes, 0 the likeliest."""
        return None if self.p is None else sum(self.p < bound for bound in BOUNDS)


@dataclass(frozen=True)
class Passage:
    """The prompt, or a continuation: `end` says why it ended. `size` is in UTF-8 bytes."""

    name: str
    tokens: list[Scored]
    size: int
    end: str = ""

    def summary(self) -> str:
        """Tokens, mean -log p, bits a byte."""
        nats = [token.nats for token in self.tokens if token.nats is not None]
        words = [f"{len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}"]
        if nats:
            words.append(f"-log p {number(math.fsum(nats) / len(nats))} a token")
        if nats and self.size:
            words.append(f"{number(math.fsum(nats) / math.log(2) / self.size)} bits a byte")
        return ", ".join([*words, *([f"ended by {self.end}"] if self.end else [])])


def look(model, tokenizer, prompt: list[int], continuations: list[tuple[list[int], str]]) -> list[Passage]:
    """The prompt and each (ids, why it ended) with probabilities, from one forward pass over each whole sequence."""
    read, passages = _reader(tokenizer), []
    for index, (ids, end) in enumerate(continuations):
        tokens = score(model, prompt + ids, read)
        if index == 0:
            passages.append(_passage(tokenizer, "prompt", tokens[: len(prompt)]))
        name = "continuation" if len(continuations) == 1 else f"continuation {index + 1} of {len(continuations)}"
        passages.append(_passage(tokenizer, name, tokens[len(prompt) :], end))
    return passages


def _reader(tokenizer):
    from posttrain.conversations import token_reader

    return token_reader(tokenizer)


def _passage(tokenizer, name: str, tokens: list[Scored], end: str = "") -> Passage:
    text = tokenizer.decode([t.id for t in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Passage(name, tokens, len(text.encode()), end)


def score(model, ids: list[int], read) -> list[Scored]:
    """Each token of `ids` with its probability, rank and the likeliest others; `read(id)` spells a token."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    found = [Scored(read(ids[0]), ids[0])]
    for token, line in zip(ids[1:], logits, strict=True):
        probs = line.float().softmax(-1)
        p, top = probs[token], probs.topk(min(ALTERNATIVES, len(probs)))
        others = tuple(zip(map(read, top.indices.tolist()), top.values.tolist(), strict=True))
        found.append(Scored(read(token), token, p.item(), 1 + int((probs > p).sum()), others))
    return found


def classes() -> list[str]:
    """What the five colours stand for, the likeliest first."""
    percents = [f"{100 * bound:g} %" for bound in BOUNDS]
    return [f"p >= {percent}" for percent in percents] + [f"p < {percents[-1]}"]


# --- the terminal


def as_text(passages: list[Passage], width: int, colour: bool) -> str:
    """Lines of two: tokens, and -log p under them; a token that a line break ends closes its line."""
    key = "each token above its -log p, in nats; · is a space, ⏎ a line break"
    legend = " ".join(paint(f" {name} ", code, True) for name, code in zip(classes(), COLOURS, strict=True))
    lines = [key, *([legend] if colour else [])]
    for passage in passages:
        lines += ["", paint(f"{passage.name}: {passage.summary()}", "1", colour)]
        for part in _wrapped(passage.tokens, width):
            lines += _pair(part, colour)
    return "\n".join(lines) + "\n"


def _below(token: Scored) -> str:
    return "" if token.nats is None else f"{token.nats:.2f}"


def _size(token: Scored) -> int:
    return max(width_of(plain(token.text)), len(_below(token)))


def _wrapped(tokens: list[Scored], width: int) -> list[list[Scored]]:
    lines, room, closed = [], 0, True
    for token in tokens:
        if closed or _size(token) + 1 > room:
            lines.append([])
            room = width
        lines[-1].append(token)
        room -= _size(token) + 1
        closed = token.text.endswith("\n")
    return lines


def _pair(tokens: list[Scored], colour: bool) -> list[str]:
    above = below = ""
    for token in tokens:
        text, size = plain(token.text), _size(token)
        painted = text if token.colour is None else paint(text, COLOURS[token.colour], colour)
        above += painted + " " * (size - width_of(text) + 1)
        below += f"{_below(token):{size + 1}}"
    return [above.rstrip(), below.rstrip()]


# --- the page


def write(passages: list[Passage], model: str, settings: dict, path: Path) -> Path:
    """One page that needs nothing else, replaced in one step; what tokens contain stays text in it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = lambda text: sentence(str(text))
    page = environment.from_string(Path(__file__).with_name("complete.html.jinja").read_text("utf-8")).render(
        passages=passages, model=model, settings=settings, classes=classes(), title=title
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w", encoding="utf-8") as file:
        file.write(page)
    return path


def title(token: Scored) -> str:
    """What the page says of a token under the pointer: its probability, and what else was likely."""
    if token.p is None:
        return f"id {token.id}: the first token, which nothing stands before"
    lines = [f"p {100 * token.p:.2f} %, -log p {token.nats:.3f}, rank {token.rank}, id {token.id}"]
    return "\n".join(lines + [f"{100 * p:6.2f} %  {plain(text)}" for text, p in token.others])
