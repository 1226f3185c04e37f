"""The room where one talks with a stage: streamed, with the tokens and the template behind it.

In: a `Pool`. Out: components in the open tab. Each browser tab has a `Talk` of its own in the server's memory, which
is written nowhere. A chat model sees the conversation so far; a base model completes each text by itself.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from posttrain.board import controls, view
from posttrain.board.stages import MOST_MESSAGES, Drawn, Piece, Pool, Settings, check_text
from posttrain.errors import UserError
from posttrain.reply import whole

EVERY = 0.05  # seconds between two looks at a reply that is being written
MOST_SCORED = 8192  # tokens whose alternatives are looked up, in one forward pass
EMPTY = "Write a message. A chat model replies; a base model goes on with the text."


@dataclass
class Turn:
    """A message and what came of it."""

    stage: str
    is_base: bool
    user: str
    reply: str = ""
    tokens: list[Drawn] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    read: list[dict] = field(default_factory=list)
    remark: str = ""
    writing: bool = True
    said: list[dict] = field(default_factory=list)  # the reply as messages, with calls of tools and their answers
    running: str = ""  # the call that is being answered
    tools: list[dict] | None = None  # schemas that the prompt told of

    def take(self, piece: Piece) -> None:
        self.reply, self.tokens, self.prompt_ids, self.read = piece.text, piece.tokens, piece.prompt_ids, piece.read
        self.remark, self.said, self.running, self.tools = piece.note, piece.said, piece.running, piece.tools

    def close(self, why: str, settings: Settings, seconds: float) -> None:
        """`why` it ended where that is worth a word."""
        self.writing, self.running = False, ""
        pace = f"{sum(token.probability is not None for token in self.tokens)} tokens in {seconds:.1f} s"
        self.remark = ", ".join(filter(None, [self.remark, why, pace, f"seed {settings.seed}"]))


@dataclass
class Talk:
    """A conversation of one browser tab. `ticket` counts what was begun: who holds an older one has to stop."""

    turns: list[Turn] = field(default_factory=list)
    ticket: int = 0
    error: str = ""

    def messages(self, is_base: bool) -> list[dict]:
        """What the last turn's model is given."""
        last = {"role": "user", "content": self.turns[-1].user}
        if is_base:
            return [last]
        past = [(turn.user, whole(turn.said)) for turn in self.turns[:-1] if not turn.is_base]
        pairs = [[{"role": "user", "content": user}, *said] for user, said in past if said and said[-1]["content"]]
        return [message for pair in pairs for message in pair] + [last]


def room(pool: Pool) -> None:
    """Build the room inside the open tab."""
    import gradio as gr

    talk = gr.State(Talk())
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            stage = gr.Dropdown(controls.choices(pool), value=controls.newest(pool), label="Stage", filterable=False)
            shown = gr.HTML(view.talk([], EMPTY), apply_default_css=False, elem_id="talk-box", autoscroll=True)
            controls.tools(pool)
            text = controls.message("Message")
            with gr.Row():
                send = gr.Button("Send", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
                again = gr.Button("Regenerate", min_width=80)
                clear = gr.Button("Clear", min_width=80)
            tokens_on = gr.Checkbox(False, label="Show tokens and their probabilities")
            tokens = gr.HTML("", apply_default_css=False)
            with gr.Accordion("Chat template", open=False) as drawer:
                template = gr.HTML("", apply_default_css=False)
        with gr.Column(scale=1, min_width=260):
            how = controls.settings()

    def said(talk: Talk, stage: str, text: str, show: bool, *how) -> Iterator[tuple]:
        yield from written(pool, talk, stage, text, show, how)

    def said_again(talk: Talk, stage: str, text: str, show: bool, *how) -> Iterator[tuple]:
        if not talk.turns:
            yield page(talk), text, ""
            return
        yield from written(pool, talk, stage, talk.turns.pop().user, show, how, keep=text)

    def tokens_or_none(talk: Talk, show: bool) -> str:
        return token_view(pool, talk) if show else ""

    inputs, outputs = [talk, stage, text, tokens_on, *how], [shown, text, tokens]
    gr.on([send.click, text.submit], said, inputs, outputs, trigger_mode="multiple", **controls.SAMPLING)
    again.click(said_again, inputs, outputs, trigger_mode="multiple", **controls.SAMPLING)
    stop.click(stopped, talk, None, **controls.QUICK)
    clear.click(cleared, talk, [shown, tokens], **controls.QUICK)
    tokens_on.change(tokens_or_none, [talk, tokens_on], tokens, **controls.QUICK)
    gr.on([drawer.expand, stage.change], lambda name: template_view(pool, name), stage, template, **controls.QUICK)


def written(pool: Pool, talk: Talk, stage: str, text: str, show: bool, how: tuple, keep: str = "") -> Iterator[tuple]:
    """Yield (conversation, message box, tokens) while the reply is written. `keep`: what the message box goes on with.

    A newer ticket in `talk`, which Stop, Clear or another message draws, ends it, as does closing the iterator.
    """
    talk.ticket += 1
    mine, talk.error = talk.ticket, ""
    try:
        settings, entry = controls.read(*how), pool.entry(stage)
        check_text(text, "the message")
        if not text.strip():
            raise UserError("the message is empty; write one")
        if 2 * len(talk.turns) >= MOST_MESSAGES:
            raise UserError(f"the conversation has {2 * len(talk.turns)} messages, the most there may be: clear it")
    except UserError as error:
        talk.error = str(error)
        yield page(talk), text, token_view(pool, talk) if show else ""
        return
    turn = Turn(stage, entry.is_base, text)
    talk.turns.append(turn)
    yield page(talk), keep, ""
    start = looked = time.monotonic()
    why = "stopped"
    try:
        with closing(pool.stream(stage, talk.messages(entry.is_base), settings, tools=True)) as pieces:
            for piece in pieces:
                if talk.ticket != mine:
                    break
                turn.take(piece)
                why = "" if piece.ended else why
                if time.monotonic() - looked >= EVERY and not piece.ended:
                    looked = time.monotonic()
                    yield page(talk), keep, live_tokens(turn) if show else ""
    except UserError as error:
        talk.error, why = str(error), "no reply"
    finally:  # also where the tab was closed: nobody asks for the next piece then
        turn.close(why, settings, time.monotonic() - start)
    if turn in talk.turns:
        yield page(talk), keep, token_view(pool, talk) if show else ""


def stopped(talk: Talk) -> None:
    talk.ticket += 1


def cleared(talk: Talk) -> tuple[str, str]:
    talk.ticket += 1
    talk.turns.clear()
    talk.error = ""
    return page(talk), ""


def page(talk: Talk) -> str:
    """The conversation."""
    parts = []
    for turn in talk.turns:
        if turn.is_base:
            parts.append(view.completion(turn.stage, turn.user, turn.reply, remark=turn.remark, writing=turn.writing))
            continue
        parts.append(view.message("You", turn.user, "user"))
        parts.append(view.reply(turn.stage, turn.said, turn.running, remark=turn.remark, writing=turn.writing))
    return view.talk(parts, EMPTY, talk.error)


# ---- what is behind a reply -----------------------------------------------------------------------------------------


def live_tokens(turn: Turn) -> str:
    """The reply's tokens while it is written; what else was likely comes when it has ended."""
    from posttrain.complete_view import Scored

    cells = [Scored(token.text, token.id, token.probability) for token in turn.tokens]
    return str(view.probability_legend() + view.by_probability(cells, "Reply", f"{len(cells)} tokens"))


def token_view(pool: Pool, talk: Talk) -> str:
    """Tokens of the last turn: the prompt by role, the reply by probability."""
    if not talk.turns or not talk.turns[-1].prompt_ids:
        return str(view.note("the tokens of a reply are shown here"))
    turn = talk.turns[-1]
    ids = turn.prompt_ids + [token.id for token in turn.tokens]
    if len(ids) > MOST_SCORED:
        return live_tokens(turn)
    try:
        prompt, reply = _scored(pool, turn, ids)
    except UserError as error:
        return str(view.note(str(error), "error"))
    first = len(turn.prompt_ids)
    if turn.is_base:
        before = view.by_probability(prompt, "Prompt", f"{first} tokens")
    else:
        before = view.role_legend() + view.prompt(pool.tokenizer(turn.stage), turn.read, turn.prompt_ids, turn.tools)
    return str(before + view.probability_legend() + view.by_probability(reply, "Reply", f"{len(reply)} tokens"))


def _scored(pool: Pool, turn: Turn, ids: list[int]):
    from posttrain.complete_view import score
    from posttrain.conversations import token_reader

    with pool.use(turn.stage) as loaded, loaded.lock:
        scored = score(loaded.model, ids, token_reader(loaded.tokenizer))
    return scored[: len(turn.prompt_ids)], scored[len(turn.prompt_ids) :]


def template_view(pool: Pool, stage: str) -> str:
    """The source of a stage's chat template."""
    try:
        tokenizer = pool.tokenizer(stage)
    except UserError as error:
        return str(view.note(str(error), "error"))
    return view.source(tokenizer.get_chat_template() if tokenizer.chat_template else None)
