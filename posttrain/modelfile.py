"""An Ollama Modelfile for a GGUF: its chat template in Go's text/template, what stops a reply, how it is sampled.

In:  a tokenizer with a chat template. Out: `Turns`, what stands between the messages of a conversation, read off the
     template's own renders; and the Modelfile with the Go template that writes the same. Used by `posttrain export`.
     A template that is not the same turn by turn is refused by `NotByTurns`, which says why: for it there is no
     Modelfile, and the GGUF's own Jinja template still serves LM Studio and llama-server.
Ollama's semantics: docs/template.md and template/template.go of github.com/ollama/ollama.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.modelfile_render import render_go

ROLES = ("system", "user", "assistant")
LONGEST = 4  # conversations of so many turns are rendered, with every order of roles that the template takes
MOST_CONTEXT = 8192  # of num_ctx, which Ollama sets memory aside for
CONTENTS = ("plain", "", "two\n\nparagraphs", '{"a": [1]}', '{{ .Content }} """ \'', "é 🙂", "<b>bold</b> & co.")
THOUGHTS = ("<think>\nfirst this\n</think>\n\nthen that", "a </think> b", "<tool_response>\nx\n</tool_response>")
SPACED = (" x", "x ", "\nx", "x\n\n", "\t x\n ")
FRAMES = (("user", "assistant", "user"), ("system", "user"), ("system",))  # where contents are tried


class NotByTurns(Exception):
    """The template is not the same text around each message; says why."""


@dataclass(frozen=True)
class Turns:
    """A chat template as the strings between contents.

    `between[before, role]`: what stands before the content of a turn of `role`; before is the role of the turn before
    it, "" at the beginning. `tail[role]`: what follows the last content, up to where the reply begins. `trims`: the
    roles whose contents lose the white space around them, which Go's templates cannot.
    """

    between: dict[tuple[str, str], str]
    tail: dict[str, str]
    trims: tuple[str, ...]


def read_turns(render) -> Turns:
    """Read off `render(messages) -> text with the generation prompt`, which raises UserError for what it refuses."""
    between, tail = {}, {}
    for roles in itertools.chain.from_iterable(itertools.product(ROLES, repeat=n) for n in range(1, LONGEST + 1)):
        marks = [chr(0xE000 + place) * 3 for place in range(len(roles))]
        text = _rendered(render, [_message(*pair) for pair in zip(roles, marks, strict=True)])
        if text is None:
            continue
        if any(text.count(mark) != 1 for mark in marks) or sorted(marks, key=text.find) != marks:
            raise NotByTurns(f"it does not write each content once and in order (roles {', '.join(roles)})")
        for before, role, mark in zip(("", *roles), roles, marks, strict=False):
            piece, _, text = text.partition(mark)
            _same(between, (before, role), piece, roles)
        _same(tail, roles[-1], text, roles)
    if ("", "user") not in between or "user" not in tail:
        raise NotByTurns("it refuses a conversation of one user message")
    return Turns(between, tail, tuple(role for role in ROLES if _trims(render, role)))


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _rendered(render, messages: list[dict]) -> str | None:
    try:
        return render(messages)
    except UserError:
        return None


def _same(found: dict, key, piece: str, roles: tuple[str, ...]) -> None:
    if found.setdefault(key, piece) != piece:
        raise NotByTurns(
            f"what stands around a message depends on more than the one before it (roles {', '.join(roles)}): "
            f"{found[key]!r} and {piece!r}"
        )


def write_turns(turns: Turns, messages: list[dict]) -> str:
    """`messages` as the template would write them, white space around contents left as it is."""
    text, before = "", ""
    for message in messages:
        text += turns.between[before, message["role"]] + message["content"]
        before = message["role"]
    return text + turns.tail[before]


def _trims(render, role: str) -> bool:
    """Whether white space around contents of `role` is cut. NotByTurns where contents are changed otherwise."""

    def talk(frame, content):
        place = frame.index(role)
        return [_message(other, content if n == place else "x") for n, other in enumerate(frame)]

    mark = chr(0xE000) * 3
    frame = next((f for f in FRAMES if role in f and _rendered(render, talk(f, mark)) is not None), None)
    if frame is None:
        return False
    head, tail = render(talk(frame, mark)).split(mark)
    trims = False
    for content in (*CONTENTS, *THOUGHTS, *SPACED):
        text = render(talk(frame, content))
        written = text[len(head) : len(text) - len(tail)]
        trims = trims or written != content
        if text != head + written + tail or written not in (content, content.strip(), content.rstrip(" ")):
            raise NotByTurns(f"it changes what a message of role {role} says: {content!r}")
    return trims


# ---- the Go template ------------------------------------------------------------------------------------------------


def go_template(turns: Turns, without: str = "") -> str:
    """Ollama's TEMPLATE. `without`: the begin token's text, where llama.cpp itself puts that token first."""
    between = {key: piece.removeprefix(without) if key[0] == "" else piece for key, piece in turns.between.items()}
    return _turn_by_turn(between, turns.tail) or _by_pairs(between, turns.tail)


def literal(text: str) -> str:
    """`text` inside a Go template; as a string constant where it would not stay as it is."""
    if any(mark in text for mark in ("{{", "}}", '"""', "\r")) or text.endswith(("{", '"')) or text.startswith('"'):
        return "{{ " + constant(text) + " }}"
    return text


def constant(text: str) -> str:
    """A string constant of Go without the three quotation marks that would end a Modelfile's text."""
    return '"' + json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', "\\x22") + '"'


def _turn_by_turn(between: dict, tail: dict) -> str | None:
    """The template with one text before and one after each content of a role, where it can be cut so; else None."""
    for cut in (_by_opening, _by_closing):
        opening, closing = cut(between, tail)
        begin = {piece.removesuffix(opening[role]) for (before, role), piece in between.items() if before == ""}
        ends = {tail[role].removeprefix(closing[role]) for role in tail}
        whole = all(
            piece == (next(iter(begin)) if before == "" else closing[before]) + opening[role]
            for (before, role), piece in between.items()
        )
        if len(begin) == 1 and len(ends) == 1 and whole and all(tail[r].startswith(closing[r]) for r in tail):
            branches = _cases(
                ".Role", {r: f"{literal(opening[r])}{{{{ .Content }}}}{literal(closing[r])}" for r in opening}
            )
            loop = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
            return literal(begin.pop()) + loop + literal(ends.pop())
    return None


def _by_opening(between: dict, tail: dict) -> tuple[dict, dict]:
    """What is the same before each content of a role opens it; the rest closes the turn before."""
    opening = {
        role: _common([p[::-1] for (_, r), p in between.items() if r == role])[::-1] for role in _roles(between)
    }
    closing = {}
    for role in opening:
        rests = [p.removesuffix(opening[r]) for (before, r), p in between.items() if before == role]
        closing[role] = rests[0] if rests else tail.get(role, "")
    return opening, closing


def _by_closing(between: dict, tail: dict) -> tuple[dict, dict]:
    """What is the same after each content of a role closes it; the rest opens the next turn."""
    closing = {
        role: _common([*(p for (before, _), p in between.items() if before == role), tail.get(role, "")])
        for role in _roles(between)
    }
    opening = {}
    for role in closing:
        after = [p.removeprefix(closing[before]) for (before, r), p in between.items() if r == role and before]
        opening[role] = min(after, key=len) if after else between["", role]
    return opening, closing


def _roles(between: dict) -> list[str]:
    return [role for role in ROLES if any(role == known for _, known in between)]


def _common(texts: list[str]) -> str:
    """The longest common beginning."""
    shortest = min(texts, key=len)
    same = next((n for n in range(len(shortest)) if len({text[n] for text in texts}) > 1), len(shortest))
    return shortest[:same]


def _by_pairs(between: dict, tail: dict) -> str:
    """The template that remembers the role before, for formats where a turn's opening depends on it."""
    roles = {}
    for role in _roles(between):
        pieces = {before: piece for (before, known), piece in between.items() if known == role}
        roles[role] = _chosen(pieces) + "{{ .Content }}"
    loop = f"{{{{ range .Messages }}}}{_cases('.Role', roles)}{{{{ end }}}}{{{{ $before = .Role }}}}{{{{ end }}}}"
    return '{{ $before := "" }}' + loop + _chosen(tail)


def _chosen(pieces: dict[str, str]) -> str:
    """The piece that belongs to the role before; the most frequent one needs no test."""
    usual = max(pieces.values(), key=list(pieces.values()).count)
    others = {before: literal(piece) for before, piece in pieces.items() if piece != usual}
    if not others:
        return literal(usual)
    return _cases("$before", others) + f"{{{{ else }}}}{literal(usual)}{{{{ end }}}}"


def _cases(what: str, texts: dict[str, str]) -> str:
    """An `if` of many branches, without its end."""
    words = ["if", *["else if"] * len(texts)]
    return "".join(f'{{{{ {word} eq {what} "{value}" }}}}{text}'
                   for word, (value, text) in zip(words, texts.items(), strict=False))  # fmt: skip


# ---- the file -------------------------------------------------------------------------------------------------------


def template_of_turns(tokenizer, adds_bos: bool) -> tuple[str, Turns]:
    """(Go template, turns) of the tokenizer's chat template, proved on conversations. Raises NotByTurns."""
    from posttrain.chat import template_of
    from posttrain.template_render import render

    template, special = template_of(tokenizer), tokenizer.special_tokens_map

    def whole(messages):
        return render(template, messages, add_generation_prompt=True, special=special)[0]

    turns = read_turns(whole)
    bos = tokenizer.bos_token if adds_bos else ""
    written = go_template(turns, bos)
    for messages in conversations():
        expected = _rendered(whole, messages)
        if expected is None:
            continue
        got = bos + render_go(written, messages)
        if got != expected:
            raise NotByTurns(f"roles {', '.join(m['role'] for m in messages)}: {expected!r}, in Go {got!r}")
    return written, turns


def conversations() -> list[list[dict]]:
    """With and without a system message, one to three questions, all CONTENTS in every place."""
    found = []
    for shift in range(len(CONTENTS)):
        words = itertools.cycle(CONTENTS[shift:] + CONTENTS[:shift])
        for start, rounds in itertools.product(((), ("system",)), (1, 2, 3)):
            roles = (*start, *("user", "assistant") * (rounds - 1), "user")
            found.append([_message(role, next(words)) for role in roles])
    return found


def make(model, tokenizer, folder: Path) -> tuple[str | None, str | None, list[str]]:
    """(Modelfile, its Go template, remarks for the user); no Modelfile where the chat template cannot be one, and no
    Go template of conversations where there is no chat template."""
    from posttrain.chat import stop_ids
    from posttrain.gguf_tokenizer import adds_bos

    stops = [tokenizer.decode([id]) for id in stop_ids(tokenizer, model)]
    if not tokenizer.chat_template:
        return text("{{ .Prompt }}", model, stops, licence(folder)), None, []
    remarks = ["in Ollama and llama.cpp a control token that somebody types becomes one; in posttrain it stays text"]
    try:
        template, turns = template_of_turns(tokenizer, adds_bos(tokenizer))
    except NotByTurns as reason:
        return None, None, [
            *remarks,
            f"no Modelfile: Ollama's templates cannot say this chat template: {reason}. LM Studio and llama-server "
            "use the file's own template",
        ]  # fmt: skip
    if turns.trims:
        remarks.append(
            f"the chat template cuts white space around contents ({', '.join(turns.trims)}); Ollama's cannot: send "
            "them without"
        )
    return text(template, model, stops, licence(folder)), template, remarks


def text(template: str, model, stops: list[str], license: str | None) -> str:
    """The Modelfile. Sampling is that of the generation config, or what the model gives by itself, in place of
    Ollama's defaults (temperature 0.8, top_k 40, top_p 0.9, repeat_penalty 1.1), which change replies."""
    given = model.generation_config
    sampling = {
        "temperature": 1.0 if given.temperature is None else given.temperature,
        "top_k": given.top_k or 0,
        "top_p": 1.0 if given.top_p is None else given.top_p,
        "repeat_penalty": given.repetition_penalty or 1.0,
        "num_ctx": min(model.config.max_position_embeddings, MOST_CONTEXT),
    }
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    lines += [f'LICENSE """{license}"""'] if license else []
    return "\n".join(lines) + "\n"


def licence(folder: Path) -> str | None:
    """The text of a LICENSE file beside the checkpoint, or the licence that the model card names."""
    from posttrain.export import facts

    if (folder / "LICENSE").is_file():
        return (folder / "LICENSE").read_text(encoding="utf-8").replace('"""', "'''")
    return facts(folder).get("license")
