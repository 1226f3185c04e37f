"""The settings of sampling as components, and what a browser sent as settings.

In: nothing, or the values of the components. Out: components in the order of `read`'s arguments, or `Settings`. Shared
by the rooms that sample.
"""

import math
import secrets

from posttrain.board.stages import MOST_CHARACTERS, MOST_NEW_TOKENS, Pool, Settings
from posttrain.errors import UserError

# Events: those that sample take turns, four at once in all rooms; the others never wait.
SAMPLING = {
    "concurrency_id": "sampling", "concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"
}  # fmt: skip
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


def message(label: str):
    """The box that a prompt is written into."""
    import gradio as gr

    return gr.Textbox(
        label=label, lines=1, max_lines=12, max_length=MOST_CHARACTERS,
        placeholder="Enter sends, Shift+Enter begins a line",
    )  # fmt: skip


def tools(pool: Pool) -> None:
    """A line inside the open container on what the stages may call."""
    import gradio as gr

    from posttrain.board import view

    if pool.tools:
        names = ", ".join(tool.name for tool in pool.tools)
        gr.HTML(str(view.note(f"stages whose chat template has tools may call {names}")), apply_default_css=False)


def settings(system: bool = True) -> list:
    """Components inside the open container: system message, temperature, top-p, top-k, most tokens, seed."""
    import gradio as gr

    return [
        gr.Textbox(
            label="System message", lines=2, max_lines=8, max_length=MOST_CHARACTERS, visible=system,
            placeholder="none",
        ),
        gr.Slider(0, 2, value=1.0, step=0.05, label="Temperature", info="0 is greedy"),
        gr.Slider(0.01, 1, value=1.0, step=0.01, label="Top-p", info="1 leaves all tokens in"),
        gr.Number(value=0, minimum=0, precision=0, label="Top-k", info="0 leaves all tokens in"),
        gr.Slider(1, MOST_NEW_TOKENS, value=256, step=1, label="Most new tokens"),
        gr.Textbox(label="Seed", max_length=20, placeholder="a whole number", info="empty: another one each time"),
    ]  # fmt: skip


def read(system, temperature, top_p, top_k, max_new_tokens, seed) -> Settings:
    """The settings with a seed, drawn here where none was given, so that what was shown can be had again.

    Raises UserError for what is out of range or no number: a browser can send anything.
    """
    found = Settings(
        temperature=_number("temperature", temperature),
        top_p=_number("top_p", top_p),
        top_k=_whole("top_k", top_k),
        max_new_tokens=_whole("max_new_tokens", max_new_tokens),
        seed=_seed(seed),
        system=str(system or ""),
    )
    found.check()
    return found


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} is {str(value)[:40]!r}; expected a number")
    return float(value)


def _whole(name: str, value) -> int:
    number = _number(name, value)
    if number != int(number):
        raise UserError(f"{name} is {number:g}; expected a whole number")
    return int(number)


def _seed(text) -> int:
    # A text box: Gradio's number box turns what is left empty into a 0.
    text = str(text or "").strip()
    if text and not (text.isascii() and text.isdecimal()):
        raise UserError(f"seed is {text[:40]!r}; expected a whole number from 0 on, or nothing")
    return int(text) if text else secrets.randbits(31)


def choices(pool: Pool) -> list[tuple[str, str]]:
    """(what the list shows, name) of each stage."""
    return [(f"{e.name} (base model)" if e.is_base else e.name, e.name) for e in pool.entries.values()]


def newest(pool: Pool) -> str:
    """The stage that a room begins with: the last that chats, a stage of ours before another model."""
    chats = [entry for entry in pool.entries.values() if not entry.is_base] or list(pool.entries.values())
    return ([entry for entry in chats if entry.manifest] or chats)[-1].name
