"""Render messages with a chat template as transformers does, within limits of time and size.

In: the template's text, messages, tools. Out: the text and the spans of it that the assistant wrote. What a template
that nobody knows can do here, and what it cannot, is in template_vet.py.
"""

import re
import signal
import threading
import time
from contextlib import contextmanager

from posttrain.errors import UserError
from posttrain.template_vet import vet

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the mark, not `add_generation_prompt`
DECLARED = re.compile(r"\{#-?\s*control:(.*?)-?#\}", re.DOTALL)
CONTROL = re.compile(r"<\|[^\s|<>]+\|>|<｜[^\s｜<>]+｜>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT)\]")

SECONDS = 0.8  # of CPU time, of one render; a conversation of 30 turns takes about a thousandth of it
MOST_CHARACTERS = 100_000_000


class TooSlow(Exception):
    """A render took longer than SECONDS."""


def render(
    template: str,
    messages: list[dict],
    *,
    tools=None,
    add_generation_prompt: bool = False,
    special: dict | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans (start, end) of the characters inside {% generation %} marks), equal to transformers' own render.

    `special`: the tokenizer's special_tokens_map, which templates read as bos_token and so on. UserError where the
    template refuses the messages, fails, or is not safe to render.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    vet(template)
    try:
        with time_limit(SECONDS):
            rendered, spans = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=GENERATION.search(template) is not None,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **(special or {}),
            )
    except Exception as error:  # a template is a program that somebody wrote: it can fail in any way
        roles = ", ".join(str(m.get("role")) for m in messages)
        said = f"{error}" or type(error).__name__
        raise UserError(f"the chat template refuses messages with roles {roles}: {said}") from error
    if len(rendered[0]) > MOST_CHARACTERS:
        raise UserError(f"the chat template wrote {len(rendered[0])} characters; expected {MOST_CHARACTERS} at most")
    return rendered[0], spans[0] if spans else []


@contextmanager
def time_limit(seconds: float):
    """Raise TooSlow inside the block after `seconds` of this thread's CPU time. Only in the main thread: Python runs
    no handler elsewhere. SIGVTALRM, because SIGALRM is pytest's and math-verify's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start = time.thread_time()

    def stop(_signal, _frame):  # the timer counts the CPU time of all threads, a deadline only ours
        if time.thread_time() - start >= seconds:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # once: it may come when the block has just ended
            raise TooSlow(f"it did not end within {seconds} s (an endless loop?)")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)  # None: set by no Python code


def declared_control(template: str) -> list[str]:
    """The control tokens a template needs besides the tokenizer's bos and eos: those of its line
    `{#- control: <a> <b> -#}`; without that line, whatever looks like one in the texts that it writes."""
    from jinja2 import nodes

    lines = DECLARED.findall(template)
    if lines:
        return list(dict.fromkeys(" ".join(lines).split()))
    found = []
    for node in parse(template).find_all((nodes.Const, nodes.TemplateData)):
        text = node.data if isinstance(node, nodes.TemplateData) else node.value
        found += CONTROL.findall(text) if isinstance(text, str) else []
    return list(dict.fromkeys(found))


def parse(template: str):
    """Jinja's syntax tree, comments left out."""
    from posttrain.template_vet import environment

    vet(template)
    return environment().parse(template)
