"""An `Xray` for the terminal: each token above its id, in the colour of its role, and the gate's verdict.

In: an `Xray` and the width. Out: lines of text. Colours only where asked for; without them a `*` behind an id says
the same. What rows contain cannot move the cursor: characters that do not print are spelled out.
"""

import os
import sys
import textwrap
import unicodedata

from posttrain.conditions import CONDITIONS
from posttrain.figures import number
from posttrain.xray import Shown, Token, Xray

LONGEST = 600  # tokens of a row that are printed; the page has more
LABEL = 11
INDENT = " " * LABEL
COLOURS = {"system": "35", "user": "34", "assistant": "32", "tool": "33", "other": "90"}
BARS = " ▁▂▃▄▅▆▇█"


def wants_colour(stream=None) -> bool:
    """A terminal that was not told otherwise (https://no-color.org)."""
    stream = sys.stdout if stream is None else stream
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str) -> str:
    """Text on one line with every character that does not print, or that turns the writing round, spelled out."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return "".join(marks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def sentence(text: str) -> str:
    """As `plain`, with blanks as they are."""
    return plain(text.replace("·", "\0")).replace("·", " ").replace("\\x00", "·")


def width_of(text: str) -> int:
    """Columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def report(xray: Xray, width: int, colour: bool) -> str:
    """All of it; the verdict comes last."""
    parts = [heading(xray), *(row(each, xray, width, colour) for each in xray.rows)]
    if xray.packed is not None:
        parts.append(row(xray.packed, xray, width, colour))
    return "\n\n".join([*parts, counts(xray, width), verdict(xray, width, colour)])


def heading(xray: Xray) -> str:
    subject = xray.subject
    key = "each token above its id; · is a space, ⏎ a line break"
    marked = f"; * = {subject.marked}" if subject.marked else ""
    return f"{subject.stage}: {sentence(subject.data)}\nmodel {sentence(subject.model)}\n{key}{marked}"


def row(shown: Shown, xray: Xray, width: int, colour: bool) -> str:
    """A row in lines of two: tokens and ids; a new line where the role changes."""
    marked = f", {shown.marked} {xray.subject.marked}" if xray.subject.marked else ""
    title = f"{shown.name}: {len(shown.tokens)} tokens{marked}"
    if shown.kept < len(shown.tokens):
        title += f", cut after {shown.kept}"
    lines = [paint(title, "1", colour)]
    shown_tokens = shown.tokens[:LONGEST]
    for role, tokens in runs(shown_tokens, shown.kept):
        if tokens[0].begins:
            lines.append(paint(f"--- {tokens[0].begins}", "1", colour))
        label = role
        for part in wrapped(tokens, width - LABEL, role):
            lines += [x.rstrip() for x in pair(label, part, role, colour)]
            label = ""
    if len(shown.tokens) > LONGEST:
        lines.append(f"{'':{LABEL}}... {len(shown.tokens) - LONGEST} more tokens")
    if shown.other is not None:
        lines += ["", paint(f"{shown.name} under {xray.against}: {len(shown.other)} tokens", "1", colour)]
        other = [Token(text, id, "other", False, False) for text, id in shown.other[:LONGEST]]
        for part in wrapped(other, width - LABEL, "other"):
            lines += [x.rstrip() for x in pair("", part, "other", False)]
    return "\n".join(lines)


def runs(tokens: list[Token], kept: int) -> list[tuple[str, list[Token]]]:
    """Neighbours of one role (or that are cut off), each conversation of a packed row by itself."""
    found: list[tuple[str, list[Token]]] = []
    for place, token in enumerate(tokens):
        role = token.role if place < kept else "cut"
        if not found or found[-1][0] != role or token.begins:
            found.append((role, []))
        found[-1][1].append(token)
    return found


def cell(token: Token, role: str) -> tuple[str, str]:
    return plain(token.text), f"{token.id}{'*' if token.marked and role != 'cut' else ''}"


def wrapped(tokens: list[Token], width: int, role: str) -> list[list[Token]]:
    """Lines of tokens that fit, one column between two."""
    lines, room = [[]], width
    for token in tokens:
        text, id = cell(token, role)
        size = max(width_of(text), len(id)) + 1
        if lines[-1] and size > room:
            lines.append([])
            room = width
        lines[-1].append(token)
        room -= size
    return lines


def pair(label: str, tokens: list[Token], role: str, colour: bool) -> tuple[str, str]:
    above, below = f"{label:{LABEL}}", " " * LABEL
    for token in tokens:
        text, id = cell(token, role)
        size = max(width_of(text), len(id))
        code = "9;90" if role == "cut" else COLOURS[token.role] + (";4" if token.marked else "")
        code += ";1" if token.control else ""
        above += paint(text, code, colour) + " " * (size - width_of(text) + 1)
        below += paint(id, "90", colour) + " " * (size - len(id) + 1)
    return above, below


def counts(xray: Xray, width: int) -> str:
    """Counts of all rows, a histogram of their lengths in one line, tokens by role."""
    lengths, subject = sorted(xray.sizes), xray.subject
    lines = [f"{many(len(lengths), 'row')}, {xray.tokens:,} tokens"]
    if subject.marked:
        lines[0] += f", {xray.marked:,} {subject.marked} ({xray.marked / max(1, xray.tokens):.1%})"
    if xray.cut:
        lines[0] += f"; {many(xray.cut, 'row')} cut at {subject.max_length}"
    if subject.packed:
        full = sum(len(row["input_ids"]) for row in subject.packed)
        lines[0] += f"; {many(len(subject.packed), 'packed row')}, {xray.tokens / full:.1%} full"
    if lengths:
        low, middle, high = lengths[0], lengths[len(lengths) // 2], lengths[-1]
        whole = ", cut or not" if xray.cut else ""
        lines.append(f"tokens a row: {low} {bars(lengths, min(48, width - 40))} {high}, median {middle}{whole}")
    total = max(1, sum(xray.roles.values()))
    roles = ", ".join(f"{name} {count / total:.1%}" for name, count in xray.roles.items())
    lines.append(f"tokens by role: {roles} (of {many(xray.sampled, 'row')})")
    text = f"bytes a token, contents alone: {number(xray.bytes_per_token)}"
    if xray.other_bytes_per_token is not None:
        text += f"; under {xray.against} {number(xray.other_bytes_per_token)}"
    return "\n".join([*lines, text])


def many(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def bars(lengths: list[int], num: int) -> str:
    """Counts of equally wide classes between the shortest and the longest."""
    low, span = lengths[0], max(1, lengths[-1] - lengths[0] + 1)
    classes = [0] * max(1, min(num, span))
    for length in lengths:
        classes[(length - low) * len(classes) // span] += 1
    top = max(classes)
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in classes)


def verdict(xray: Xray, width: int, colour: bool) -> str:
    """Every condition and, where it does not hold, what was found and how to mend it."""
    subject, lines = xray.subject, []
    for name, said in subject.checks.items():
        state = "ok" if not said else "allowed" if name in subject.allow else "REFUSED"
        code = {"ok": "32", "allowed": "33", "REFUSED": "31;1"}[state]
        lines.append(f"  {paint(f'{state:8}', code, colour)} {name}")
        if said:
            means, mend = CONDITIONS[name]
            for part in (said, means, f"to mend: {mend}"):
                lines += textwrap.wrap(sentence(part), width, initial_indent=INDENT, subsequent_indent=INDENT)
    if subject.unchecked:
        lines.append(f"  not checked: {subject.unchecked}")
    refused = len(xray.refused)
    end = f"the gate refuses: {refused} of {len(subject.checks)} conditions not met; --allow NAME lets one pass"
    passes = f"the gate lets this stage train: {len(subject.checks)} conditions looked at"
    return "\n".join(["the gate", *lines, paint(end if refused else passes, "1", colour)])
