"""Rows as tokens, with the role that wrote each and whether it is learned, and what the rows count up to.

In: a `Subject`: the conversations of a stage as it would train on them, with their masks. Out: an `Xray`, which
posttrain/xray_text.py prints and posttrain/xray_page.py writes as a page. Made by `posttrain inspect`.
"""

import re
from dataclasses import dataclass, field

from posttrain.chat import control_tokens, template_of
from posttrain.conversations import Conversation, token_reader, turn_bounds
from posttrain.gate import Checks, chosen
from posttrain.template_render import render

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Subject:
    """What a stage would train on. `masks`: 1 = what `marked` says; `packed`: rows of `sft_rows.pack_rows`."""

    stage: str
    model: str
    data: str
    tokenizer: object
    talks: list[Conversation]
    names: list[str]  # of each conversation: "row 3", "row 3, reply 2"
    masks: list[list[int]]
    marked: str  # "supervised" | "scored" | "" (prompts: the reply is still to be sampled)
    checks: Checks
    allow: tuple[str, ...]
    max_length: int | None = None
    packed: list[dict] = field(default_factory=list)
    unchecked: str = ""  # why a condition could not be looked at


@dataclass(frozen=True)
class Token:
    text: str
    id: int
    role: str  # one of ROLES, or "other"
    marked: bool
    control: bool
    begins: str = ""  # what begins here in a packed row, e.g. "row 12"


@dataclass(frozen=True)
class Shown:
    """A row to look at. Tokens from `kept` on are cut off. `other`: (text, id) under another tokenizer."""

    name: str
    tokens: list[Token]
    kept: int
    other: list[tuple[str, int]] | None = None

    @property
    def marked(self) -> int:
        return sum(token.marked for token in self.tokens[: self.kept])


@dataclass
class Xray:
    """Counts are of all rows, but for roles and bytes: of `sampled` rows, since those need rendering turn by turn."""

    subject: Subject
    rows: list[Shown]
    packed: Shown | None
    sizes: list[int]  # tokens of each row, whole
    marked: int
    cut: int
    sampled: int
    roles: dict[str, int]
    bytes_per_token: float
    against: str | None = None
    other_bytes_per_token: float | None = None

    @property
    def tokens(self) -> int:
        """Of all rows, without what is cut off."""
        most = self.subject.max_length
        return sum(self.sizes if most is None else (min(size, most) for size in self.sizes))

    @property
    def refused(self) -> Checks:
        return {name: said for name, said in self.subject.checks.items() if said and name not in self.subject.allow}


def look(subject: Subject, num: int, other=None, against: str | None = None) -> Xray:
    """The first `num` rows and those that the gate names, token by token; `other`: another tokenizer to compare."""
    tokenizer, talks = subject.tokenizer, subject.talks
    control = control_tokens(tokenizer)
    read = token_reader(tokenizer)
    sample = chosen(len(talks))
    roles: dict[str, int] = {}
    for index in sample:
        for name in token_roles(tokenizer, talks[index]):
            roles[name] = roles.get(name, 0) + 1
    texts = [str(m["content"]) for index in sample for m in talks[index].messages if m.get("content")]
    most = subject.max_length
    return Xray(
        subject=subject,
        rows=[
            show(subject, index, control, read, other)
            for index, talk in enumerate(talks)
            if talk.row < num or talk.row in named_rows(subject.checks)
        ],
        packed=show_packed(subject, control, read),
        sizes=[len(talk.ids) for talk in talks],
        marked=sum(sum(mask[:most]) for mask in subject.masks),
        cut=0 if most is None else sum(len(talk.ids) > most for talk in talks),
        sampled=len(sample),
        roles={name: roles[name] for name in (*ROLES, "other") if name in roles},
        bytes_per_token=bytes_per_token(tokenizer, texts),
        against=against,
        other_bytes_per_token=bytes_per_token(other, texts) if other is not None else None,
    )


def named_rows(checks: Checks) -> set[int]:
    """The row that each condition's text begins with."""
    found = (re.match(r"row (\d+)", said) for said in checks.values() if said)
    return {int(match[1]) for match in found if match}


def bytes_per_token(tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes of the messages' contents over their tokens, without the template's."""
    from posttrain.tokenizer import bytes_per_token

    return bytes_per_token(tokenizer, texts) if texts else 0.0


def token_roles(tokenizer, talk: Conversation) -> list[str]:
    """The role of each token's turn; what opens a reply is the assistant's."""
    roles = ["assistant"] * len(talk.ids)
    for (start, stop), message in zip(turn_bounds(tokenizer, talk), talk.messages, strict=True):
        role = message.get("role")
        roles[start:stop] = [role if role in ROLES else "other"] * (stop - start)
    return roles


def show(subject: Subject, index: int, control, read, other=None) -> Shown:
    talk, most = subject.talks[index], subject.max_length
    triples = zip(talk.ids, token_roles(subject.tokenizer, talk), subject.masks[index], strict=True)
    tokens = [Token(read(id), id, role, bool(marked), id in control) for id, role, marked in triples]
    kept = len(tokens) if most is None else min(most, len(tokens))
    compared = None if other is None else under(other, subject.tokenizer, talk)
    return Shown(subject.names[index], tokens, kept, compared)


def under(other, tokenizer, talk: Conversation) -> list[tuple[str, int]]:
    """The same text in the tokens of another tokenizer: to it, our control tokens are words."""
    template, special = template_of(tokenizer, talk.tools), tokenizer.special_tokens_map
    opened = {"tools": talk.tools, "add_generation_prompt": talk.opened}
    text, _ = render(template, talk.messages, special=special, **opened)
    read = token_reader(other)
    return [(read(id), id) for id in other(text, add_special_tokens=False)["input_ids"]]


def show_packed(subject: Subject, control, read) -> Shown | None:
    """The first packed row of several conversations: where each begins, and the padding at the end."""
    if not subject.packed:
        return None
    row = next((each for each in subject.packed if len(each["rows"]) > 1), subject.packed[0])
    tokens, members = [], row["rows"]
    roles = {talk.row: talk for talk in subject.talks if talk.row in set(members)}
    document = -1
    for id, position, label in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
        begins = ""
        if position == 0:
            document += 1
            begins = f"row {members[document]}" if document < len(members) else "padding"
            names = token_roles(subject.tokenizer, roles[members[document]]) if document < len(members) else []
        role = names[position] if position < len(names) else "other"
        tokens.append(Token(read(id), id, role, label != -100, id in control, begins))
    return Shown(f"1 of {len(subject.packed)} packed rows", tokens, len(tokens))
