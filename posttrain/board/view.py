"""What the rooms show, as HTML made of text: nothing that a model or a user wrote comes out as markup.

In: texts, tokens, templates. Out: strings for `gr.HTML`. Every text passes through `said`, which escapes it and spells
out control and bidirectional characters, so a reply is shown letter by letter: no Markdown, no LaTeX, no links, no
images. Pure functions; the style sheet is in look.py.
"""

from collections.abc import Iterable

from markupsafe import Markup, escape

from posttrain.chat import control_tokens
from posttrain.complete_view import Scored, classes, title
from posttrain.conversations import PROBE_ROW, Conversation, token_reader
from posttrain.reply import Use
from posttrain.serve import printable
from posttrain.tool_calls import ERROR, Call
from posttrain.xray import ROLES, Token, token_roles
from posttrain.xray_text import runs, sentence

LONGEST = 4000  # tokens of one passage on the page


def said(text: str) -> Markup:
    """A text as it is, inert."""
    return escape(printable(str(text)))


def heading(run: str, entries: Iterable, apart: list[str]) -> str:
    """The run's name, its models in the order of their making, and what is no model that replies."""
    stages = " → ".join(entry.name for entry in entries)
    left = f"not here: {', '.join(apart)}" if apart else ""
    return str(
        Markup('<header class="board-head"><h1>{}</h1><span>{}</span><span>{}</span></header>').format(
            said(run), said(stages), said(left)
        )
    )


def note(text: str, kind: str = "note") -> Markup:
    """A line of the board's own; `kind` "error" for what went wrong."""
    role = ' role="alert"' if kind == "error" else ""
    return Markup('<p class="{}"{}>{}</p>').format(kind, Markup(role), said(text)) if text else Markup("")


def message(who: str, text: str, role: str, *, remark: str = "", writing: bool = False) -> Markup:
    """One message of a conversation. `role`: "user" or "assistant"; `writing`: more will come."""
    return Markup('<article class="message {}"{}><h4>{}</h4><div class="said" dir="auto">{}</div>{}</article>').format(
        role, Markup(' aria-busy="true"' if writing else ""), said(who), said(text), note(remark)
    )


def reply(who: str, messages: list[dict], running: str = "", *, remark: str = "", writing: bool = False) -> Markup:
    """A model's reply: its words, and each call of a tool as a block that unfolds to the answer. `running`: the call
    that has no answer yet."""
    parts, titles = [], []
    for message in messages:
        if message["role"] == "tool":
            title = titles.pop(0) if titles else Use(Call()).title
            parts.append(_call(title, message["content"]))
            continue
        if message["content"]:
            parts.append(Markup('<div class="said" dir="auto">{}</div>').format(said(message["content"])))
        functions = [call["function"] for call in message.get("tool_calls", [])]
        titles = [Use(Call(each["name"], each["arguments"])).title for each in functions]
    if running:
        parts.append(Markup('<p class="call" aria-busy="true">{} …</p>').format(said(running)))
    elif writing and not (messages and messages[-1]["role"] == "assistant" and messages[-1]["content"]):
        parts.append(Markup('<div class="said"></div>'))
    return Markup('<article class="message assistant"{}><h4>{}</h4>{}{}</article>').format(
        Markup(' aria-busy="true"' if writing else ""), said(who), Markup("").join(parts), note(remark)
    )


def _call(title: str, answer: str) -> Markup:
    kind = Markup(' class="call failed"' if answer.startswith(ERROR) else ' class="call"')
    return Markup('<details{}><summary>{}</summary><pre dir="auto">{}</pre></details>').format(
        kind, said(title), said(answer)
    )


def completion(who: str, text: str, more: str, *, remark: str = "", writing: bool = False) -> Markup:
    """A text and how a base model goes on with it: one text, the given part in grey."""
    return Markup(
        '<article class="message completion"{}><h4>{}</h4><div class="said" dir="auto"><em>{}</em>{}</div>{}</article>'
    ).format(Markup(' aria-busy="true"' if writing else ""), said(who), said(text), said(more), note(remark))


def talk(messages: Iterable[Markup], empty: str, error: str = "") -> str:
    """A conversation; `empty` is shown before the first message."""
    body = Markup("").join(messages) or Markup('<p class="empty">{}</p>').format(said(empty))
    return str(Markup('<div class="talk" role="log">{}{}</div>').format(body, note(error, "error")))


# ---- tokens ---------------------------------------------------------------------------------------------------------


def by_probability(tokens: list[Scored], name: str, remark: str) -> Markup:
    """Tokens on the colour of their probability; each tells its numbers, and what else was likely."""
    return _section(name, remark, Markup("").join(map(_scored, tokens[:LONGEST])), len(tokens))


def _scored(token: Scored) -> Markup:
    colour = "none" if token.colour is None else f"c{token.colour}"
    chance = "" if token.p is None else f"{100 * token.p:.0f}"
    return Markup('<span class="t {}" tabindex="0" data-more="{}"><b>{}</b><small>{}</small></span>{}').format(
        colour, title(token), sentence(token.text) or "∅", chance, _break(token.text)
    )


def by_role(tokens: list[Token], name: str, remark: str) -> Markup:
    """Tokens over their ids, a line a role; control tokens and what is learned stand out."""
    parts = []
    for role, run in runs(tokens[:LONGEST], len(tokens)):
        cells = Markup("").join(_token(token) for token in run)
        parts.append(Markup('<div class="turn {0}"><h5>{0}</h5><div>{1}</div></div>').format(role, cells))
    return _section(name, remark, Markup("").join(parts), len(tokens))


def conversation(
    tokenizer, messages: list[dict], ids: list[int], mask: list[int], opened: bool, tools=None
) -> list[Token]:
    """`ids`, which render `messages`, with their roles; `mask`: 1 = marked, one an id; `opened`: a reply's beginning
    stands at the end."""
    control, read = control_tokens(tokenizer), token_reader(tokenizer)
    roles = token_roles(tokenizer, Conversation(PROBE_ROW, messages, ids, tools, opened))
    return [Token(read(id), id, role, bool(m), id in control) for id, role, m in zip(ids, roles, mask, strict=True)]


def prompt(tokenizer, messages: list[dict], ids: list[int], tools=None) -> Markup:
    """The tokens that a chat model is given: `messages` rendered, and what opens its reply."""
    tokens = conversation(tokenizer, messages, ids, [0] * len(ids), opened=True, tools=tools)
    return by_role(tokens, "Prompt", f"{len(ids)} tokens, as the chat template renders it")


def plain(tokenizer, ids: list[int], remark: str) -> Markup:
    """A text's tokens over their ids."""
    read = token_reader(tokenizer)
    cells = Markup("").join(_token(Token(read(id), id, "other", False, False)) for id in ids[:LONGEST])
    return _section("Tokens", remark, cells, len(ids))


def _token(token: Token) -> Markup:
    kinds = " ".join(name for name, is_so in (("m", token.marked), ("c", token.control)) if is_so)
    return Markup('<span class="t {}"><b>{}</b><small>{}</small></span>{}').format(
        kinds, sentence(token.text) or "∅", token.id, _break(token.text)
    )


def _break(text: str) -> Markup:
    return Markup("<br>") if text.endswith("\n") else Markup("")


def _section(name: str, remark: str, cells: Markup, number: int) -> Markup:
    more = note(f"{number - LONGEST:,} more tokens are not shown") if number > LONGEST else ""
    return Markup('<section class="tokens"><h4>{} <span>{}</span></h4><div class="cells">{}</div>{}</section>').format(
        said(name), said(remark), cells, more
    )


def probability_legend() -> Markup:
    cells = (Markup('<span class="t c{}"><b>{}</b></span>').format(n, name) for n, name in enumerate(classes()))
    told = "below each token its probability in percent, the model's own, at temperature 1; touch one for more"
    return Markup('<p class="legend">{} <span>{}</span></p>').format(Markup("").join(cells), told)


def role_legend(marked: str = "") -> Markup:
    """What the colours of `by_role` say; `marked` names what is underlined."""
    cells = [Markup('<span class="turn {0}"><span class="t"><b>{0}</b></span></span>').format(role) for role in ROLES]
    cells.append(Markup('<span class="turn other"><span class="t c"><b>control token</b></span></span>'))
    if marked:
        cells.append(Markup('<span class="turn assistant"><span class="t m"><b>{}</b></span></span>').format(marked))
    return Markup('<p class="legend">{} <span>below each token its id</span></p>').format(Markup("").join(cells))


def source(text: str | None) -> str:
    """A chat template's own text."""
    if text is None:
        return str(note("no chat template: a base model, which completes text"))
    return str(Markup('<pre class="source" dir="ltr">{}</pre>').format(said(text)))
