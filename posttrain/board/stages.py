"""The models of the board: which there are, loaded when first asked for, sampled from for one or many at a time.

In: paths of runs, stages, Hugging Face folders or Hub ids. Out: an `Entry` for each causal language model, and a
`Pool` that streams replies as `Piece`s. Used by the rooms of `posttrain board`.

    pool = Pool(find(["runs/tiny"]))
    for piece in pool.stream("sft", [{"role": "user", "content": "Hi"}], Settings(max_new_tokens=64)):
        print(piece.text)          # grows; leave the loop or close the iterator and the sampling stops
"""

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import UserError
from posttrain.stage import read_manifest

KEEP = 4  # models in memory
MOST_NEW_TOKENS = 4096
MOST_CHARACTERS = 20_000  # of one text: a prompt, a system message
MOST_MESSAGES = 200


@dataclass(frozen=True)
class Entry:
    """A causal language model that the board offers. `name` is unique; `manifest` is None where it is no stage."""

    name: str
    path: str
    manifest: dict | None
    is_base: bool  # without a chat template: it completes text


@dataclass(frozen=True)
class Settings:
    """How to sample. Temperature 0 is greedy, `top_p` 1 and `top_k` 0 leave all tokens in, `seed` None: another one
    each time. A base model has no place for `system`, and the piece's note says so."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int | None = None
    system: str = ""

    def check(self) -> None:
        """Raises UserError for a setting out of range."""
        from posttrain.decoding import check_settings

        check_settings(self.temperature, self.top_p, self.max_new_tokens, self.top_k)
        if self.max_new_tokens > MOST_NEW_TOKENS:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected {MOST_NEW_TOKENS} at most")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; expected a whole number from 0 on")
        check_text(self.system, "the system message")


class Drawn(NamedTuple):
    """A token of a reply; `probability` is the model's own, at temperature 1, whatever it was sampled with, and None
    for what a tool said."""

    id: int
    text: str
    probability: float | None


@dataclass(frozen=True)
class Piece:
    """A reply so far. `text` is without the token that ended it and without unfinished characters; `tokens` (one list
    that grows) have all. `read` are the messages that `prompt_ids` render, without turns that the context has no room
    for, and `tools` the schemas beside them; none for a base model. `said` is the reply as messages, with calls of
    tools and their answers; `running` the call that is being answered. `ended`: this is the last piece; `note` then
    says why, where no end token came."""

    text: str
    tokens: list[Drawn]
    prompt_ids: list[int]
    read: list[dict]
    ended: bool = False
    note: str = ""
    said: list[dict] = field(default_factory=list)
    running: str = ""
    tools: list[dict] | None = None


def check_text(text: str, name: str) -> None:
    """Raises UserError for a text that is too long to be worth a model's time."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name} has {len(text):,} characters; expected {MOST_CHARACTERS:,} at most: shorten it")


# ---- which models there are -----------------------------------------------------------------------------------------


def find(paths: list[str]) -> list[Entry]:
    """All causal language models of `paths`, those of a run in the order of their making, each once.

    A path is a run's folder, a stage's, any Hugging Face folder or a Hub id. Raises UserError where one of them leads
    to no such model.
    """
    found: dict[str, Entry] = {}
    for path in paths:
        models = [stage for stage, why in in_run(path) if not why] or [_one(path)]
        found |= {entry.path: entry for entry in map(_entry, models) if entry.path not in found}
    return _named(list(found.values()))


def in_run(path: str) -> list[tuple[str, str]]:
    """(folder, "" or why it cannot chat) of each stage in a run's folder, oldest first; [] where `path` is no run."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return []
    found = []
    for stage in folder.iterdir():
        if any((stage / mark).is_file() for mark in ("stage.json", "run.json", "config.json")):
            why = _why_not(stage)
            created = "" if why == UNFINISHED else (read_manifest(stage) or {}).get("created", "")
            found.append((created, str(stage), why))
    return [(stage, why) for _, stage, why in sorted(found)]


UNFINISHED = "has not finished"


def _why_not(stage: Path) -> str:
    """Why a stage's folder is no model that replies; "" where it is one."""
    if not (stage / "stage.json").is_file() and (stage / "run.json").is_file():
        return UNFINISHED
    if not (stage / "config.json").is_file():
        return "has no model"
    kind = next(iter(_read(stage / "config.json").get("architectures") or []), "")
    if kind.endswith("ForSequenceClassification"):
        return "is a reward model: it scores replies and writes none"
    return f"is an encoder ({kind})" if kind.endswith("ForMaskedLM") else ""


def _one(path: str) -> str:
    """`path` as it is, a model's folder or a Hub id. UserError where it is neither."""
    from posttrain.serve import check_architecture, check_folder

    apart = in_run(path)
    if apart:
        said = "; ".join(f"{Path(stage).name} {why}" for stage, why in apart)
        raise UserError(f"{path}: no stage of this run can chat yet ({said}); finish its pretrain or sft stage first")
    check_folder(path)
    if Path(path).is_dir():
        check_architecture(path, _read(Path(path) / "config.json").get("architectures") or [])
    return path


def _entry(path: str) -> Entry:
    folder = Path(path)
    if folder.is_dir():
        path, manifest = str(folder), read_manifest(folder)
        template = (folder / "chat_template.jinja").is_file()
        config = folder / "tokenizer_config.json"
        has_template = template or (config.is_file() and bool(_read(config).get("chat_template")))
        return Entry(folder.resolve().name, path, manifest, not has_template)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers, huggingface_hub and tokenizers each raise their own kinds
        raise UserError(f"{path}: no such folder, and no model of that name on the Hub: {error}") from error
    return Entry(path, path, None, tokenizer.chat_template is None)


def _named(entries: list[Entry]) -> list[Entry]:
    """Names made unique: run/stage where two stages share one, the whole path where that is not enough."""
    for longer in (lambda e: "/".join(Path(e.path).absolute().parts[-2:]), lambda e: e.path):
        seen = Counter(entry.name for entry in entries)
        entries = [Entry(longer(e), e.path, e.manifest, e.is_base) if seen[e.name] > 1 else e for e in entries]
    return entries


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); save or copy the model again") from error


# ---- the models -----------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A model in memory. `lock` is held for one token at a time, so that replies side by side all move on."""

    model: object
    tokenizer: object
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class Pool:
    """The board's models, at most `keep` of them in memory; safe to use from several threads. `tools` are those that
    replies may call, within `limits` (tool_calls.ToolLimits)."""

    def __init__(self, entries: list[Entry], keep: int = KEEP, tools: list | None = None, limits=None):
        if keep < 1:
            raise UserError(f"--keep: found {keep}, expected 1 or more models in memory")
        self.entries, self.keep = {entry.name: entry for entry in entries}, keep
        self.tools, self.limits = tools or [], limits
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # the one used last stands last
        self.tokenizers: dict[str, object] = {}
        self.lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def entry(self, name: str) -> Entry:
        """Raises UserError for a name that is not offered: names come from the browser."""
        if name not in self.entries:
            raise UserError(f"no stage is called {str(name)[:80]!r}; there are {', '.join(self.entries)}")
        return self.entries[name]

    @contextmanager
    def use(self, name: str) -> Iterator[Loaded]:
        """The model `name`, which stays in memory meanwhile. Raises UserError where `keep` others are in use."""
        loaded = self._take(name)
        try:
            yield loaded
        finally:
            with self.lock:
                loaded.users -= 1

    def _take(self, name: str) -> Loaded:
        from posttrain.serve import load

        path = self.entry(name).path
        with self.lock:  # held while a model loads: two at once would need the memory of both, and of one twice
            if name not in self.loaded:
                idle = [other for other, each in self.loaded.items() if not each.users]
                for other in idle[: max(0, len(self.loaded) - self.keep + 1)]:
                    del self.loaded[other]
                if len(self.loaded) >= self.keep:
                    raise UserError(
                        f"{self.keep} models are in memory and in use, which is all that --keep {self.keep} allows; "
                        "wait for a reply to end, choose fewer stages, or start the board with a larger --keep"
                    )
                self.loaded[name] = Loaded(*load(path))
            self.loaded.move_to_end(name)
            self.loaded[name].users += 1
            return self.loaded[name]

    def tokenizer(self, name: str):
        """The tokenizer of stage `name`, which needs no model in memory. Raises UserError where it cannot be read."""
        from transformers import AutoTokenizer

        path = self.entry(name).path
        with self.lock:
            if name in self.loaded:
                return self.loaded[name].tokenizer
            if name not in self.tokenizers:
                try:
                    self.tokenizers[name] = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                except Exception as error:  # transformers and tokenizers each raise their own kinds
                    raise UserError(f"{path}: no tokenizer could be loaded: {error}") from error
            return self.tokenizers[name]

    def stream(self, name: str, prompt: str | list[dict], settings: Settings, tools: bool = False) -> Iterator[Piece]:
        """Yield the reply of stage `name` to a text or to messages [{"role", "content"}] that end with the user's.

        The first piece comes before the first token. A chat model takes a text as the user's message; a base model
        completes a text, and messages as one text with blank lines in between. With `tools` it may call the board's,
        where its chat template has them; the piece's note says where not. Closing the iterator stops the sampling.
        Raises UserError for a prompt or a setting that will not do.
        """
        settings.check()
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        check_messages(messages)
        with self.use(name) as loaded:
            given = (self.tools, self.limits) if tools and self.tools else None
            yield from _stream(loaded, self.entry(name).is_base, messages, settings, given)


def check_messages(messages: list[dict]) -> None:
    """Raises UserError unless these are turns that a model can reply to, of a size that is worth its time."""
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the conversation does not end with a message of the user's; add one")
    if len(messages) > MOST_MESSAGES:
        raise UserError(f"the conversation has {len(messages)} messages; expected {MOST_MESSAGES} at most: clear it")
    for message in messages:
        if message["role"] == "user":
            check_text(message["content"], "the message")


def _stream(loaded: Loaded, is_base: bool, messages: list[dict], settings: Settings, tools) -> Iterator[Piece]:
    from posttrain.complete import Completer
    from posttrain.conversations import token_reader
    from posttrain.reply import Reply, Use
    from posttrain.serve import Session, clean

    how = settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed
    session = Session(loaded.model, loaded.tokenizer, *how, top_k=settings.top_k)
    messages = [{**message, "content": clean(message["content"])} for message in messages]
    if is_base:
        text = "\n\n".join(message["content"] for message in messages)
        ids = Completer(loaded.model, loaded.tokenizer).encode(text)
        said = "a base model has no system message: it was left out" if settings.system else ""
    else:
        own = messages[0]["content"] if messages[0]["role"] == "system" else ""
        session.set_system(settings.system or own)
        session.messages = [message for message in messages[:-1] if message["role"] != "system"]
        without = _give_tools(session, tools)
        ids, said = session.fit(messages[-1]["content"])
        said = "; ".join(filter(None, [without, said]))
    head = [{"role": "system", "content": session.system}] if session.system else []
    given = [] if is_base else [*head, *session.messages, messages[-1]]
    reply, read, tokens = Reply(session, ids), token_reader(loaded.tokenizer), []
    told = session.runner and session.runner.template.shown
    yield Piece("", tokens, ids, given, note=said, tools=told)
    for event in _one_at_a_time(loaded.lock, iter(reply)):
        running = ""
        if isinstance(event, Use):
            running = event.title if event.answer is None else ""
        else:
            tokens.append(Drawn(event.token, read(event.token), event.probability))
        text = reply.stream.text[: reply.stream.shown]
        yield Piece(text, tokens, ids, given, note=said, said=reply.said, running=running, tools=told)
        if running:
            reply.carry_out(event)  # without the lock: others' replies go on meanwhile
    notes = [said, "" if reply.ended else reply.cut]
    remark = "; ".join(filter(None, notes))
    yield Piece(reply.stream.text, tokens, ids, given, ended=True, note=remark, said=reply.messages, tools=told)


def _give_tools(session, tools) -> str:
    """Let the session call `tools`, (tools, limits) or None; why it cannot, where it cannot."""
    if tools is None:
        return ""
    try:
        session.set_tools(*tools)
    except UserError:
        return "its chat template has no tools: it answers without them"
    return ""


def _one_at_a_time(lock: threading.Lock, items: Iterator) -> Iterator:
    end = object()
    while True:
        with lock:
            item = next(items, end)
        if item is end:
            return
        yield item
