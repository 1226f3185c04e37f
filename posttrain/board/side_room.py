"""The room where one prompt goes to several stages, whose replies are written side by side.

In: a `Pool`. Out: components in the open tab. The stages take turns, a token each, and all have the same settings and
seed. Nothing is kept.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from markupsafe import Markup

from posttrain.board import controls, view
from posttrain.board.chat_room import EVERY, Turn
from posttrain.board.stages import Pool, check_text
from posttrain.errors import UserError

EMPTY = "Choose two stages or more and write a prompt."


@dataclass
class Beside:
    """What one browser tab looks at. `ticket` counts what was begun: who holds an older one has to stop."""

    turns: list[Turn] = field(default_factory=list)
    ticket: int = 0


def room(pool: Pool) -> None:
    """Build the room inside the open tab."""
    import gradio as gr

    beside = gr.State(Beside())
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            stages = gr.Dropdown(
                controls.choices(pool), value=pool.names[-pool.keep :], multiselect=True, max_choices=pool.keep,
                label="Stages", info=f"{pool.keep} at most are in memory (--keep)",
            )  # fmt: skip
            text = controls.message("Prompt")
            with gr.Row():
                send = gr.Button("Ask all", variant="primary", min_width=80)
                stop = gr.Button("Stop all", min_width=80)
            shown = gr.HTML(view.talk([], EMPTY), apply_default_css=False)
        with gr.Column(scale=1, min_width=260):
            how = controls.settings()

    def asked(beside: Beside, stages: list[str], text: str, *how) -> Iterator[str]:
        yield from written(pool, beside, stages, text, how)

    inputs = [beside, stages, text, *how]
    gr.on([send.click, text.submit], asked, inputs, shown, trigger_mode="multiple", **controls.SAMPLING)
    stop.click(stopped, beside, None, **controls.QUICK)


def stopped(beside: Beside) -> None:
    beside.ticket += 1


def written(pool: Pool, beside: Beside, stages: list[str], text: str, how: tuple) -> Iterator[str]:
    """Yield the replies of all stages while they are written; a newer ticket or closing the iterator ends it."""
    beside.ticket += 1
    mine = beside.ticket
    try:
        settings = controls.read(*how)
        check_text(text, "the prompt")
        if not text.strip():
            raise UserError("the prompt is empty; write one")
        if len(set(stages)) < 2:
            raise UserError("choose two stages or more; for one there is the chat")
        if len(set(stages)) > pool.keep:
            raise UserError(
                f"{len(set(stages))} stages are chosen; --keep lets {pool.keep} be in memory: choose fewer"
            )
        turns = [Turn(name, pool.entry(name).is_base, text) for name in dict.fromkeys(stages)]
    except UserError as error:
        yield view.talk([], EMPTY, str(error))
        return
    beside.turns = turns
    yield page(turns)
    start = looked = time.monotonic()
    with ExitStack() as stack:
        for turn in turns:
            stack.callback(lambda turn=turn: turn.writing and turn.close("stopped", settings, _since(start)))
        pieces = {
            turn.stage: stack.enter_context(closing(pool.stream(turn.stage, text, settings, True))) for turn in turns
        }
        while any(turn.writing for turn in turns) and beside.ticket == mine:
            for turn in turns:
                if turn.writing:
                    _advance(turn, pieces[turn.stage], settings, start)
            if time.monotonic() - looked >= EVERY:
                looked = time.monotonic()
                yield page(turns)
    if beside.turns is turns:
        yield page(turns)


def _advance(turn: Turn, pieces: Iterator, settings, start: float) -> None:
    """One piece more of a reply; what goes wrong with one stage is said in its place, the others go on."""
    try:
        piece = next(pieces)
    except UserError as error:
        turn.close(f"no reply: {error}", settings, _since(start))
        return
    turn.take(piece)
    if piece.ended:
        turn.close("", settings, _since(start))


def _since(start: float) -> float:
    return time.monotonic() - start


def page(turns: list[Turn]) -> str:
    """The prompt, and the replies in columns, or one below the other where there is no room."""
    columns = [
        view.completion(turn.stage, turn.user, turn.reply, remark=turn.remark, writing=turn.writing)
        if turn.is_base
        else view.reply(turn.stage, turn.said, turn.running, remark=turn.remark, writing=turn.writing)
        for turn in turns
    ]
    asked = view.message("You", turns[0].user, "user")
    grid = Markup('<div class="beside">{}</div>').format(Markup("").join(columns))
    return view.talk([asked, grid], EMPTY)
