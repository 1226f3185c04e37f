"""Chat templates: find them, know what they can do, and say what is wrong with a tokenizer's.

In: a template's name or file, or a tokenizer that has one. Out: facts, and for each check None or a sentence that
names the fault. The gate calls the checks of a tokenizer; `posttrain template list | show | check | diff` prints all.
"""

from dataclasses import dataclass
from pathlib import Path

from posttrain.chat import PROBE, control_tokens, divergence, encode_chat, generation_matches_training, template_of
from posttrain.errors import UserError
from posttrain.template_render import DECLARED, GENERATION, declared_control, render
from posttrain.template_vet import vet

SHIPPED = Path(__file__).parents[1] / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}  # where there is no tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 3+4?"},
    {"role": "assistant", "content": "It is 7."},
]
THOUGHTS = [TALK[0], {**TALK[1], "reasoning_content": "Two and three."}, TALK[2], TALK[3]]
INLINE = [TALK[0], {**TALK[1], "content": "<think>\nTwo and three.\n</think>\n\nIt is 5."}, TALK[2], TALK[3]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum of two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 20, "b": 31}}}
ASKED = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
CALLS = [*ASKED, {"role": "tool", "name": "add", "content": "fifty-one"}, TALK[1], *TALK[2:]]

# name -> (messages, tools): what `check` and `diff` render
BATTERY = {
    "a question": (TALK[:1], None),
    "several turns": (TALK, None),
    "a system turn": ([SYSTEM, *TALK], None),
    "a system turn alone": ([SYSTEM], None),
    "two system turns": ([SYSTEM, {**SYSTEM, "content": "Be kind."}, *TALK], None),
    "white space around contents": ([{**m, "content": f" \n{m['content']}\n "} for m in [SYSTEM, *TALK]], None),
    "empty contents": ([{**m, "content": ""} for m in TALK], None),
    "reasoning_content": (THOUGHTS, None),
    "thoughts in the content": (INLINE, None),
    "a call and its answer": (CALLS, None),
    "a list of tools": (TALK, TOOLS),
    "tools, a call and its answer": ([SYSTEM, *CALLS], TOOLS),
    "two calls at once": ([TALK[0], {**ASKED[1], "tool_calls": [CALL, CALL]}, CALLS[2], CALLS[2], TALK[1]], TOOLS),
    "a call beside content": ([TALK[0], {**ASKED[1], "content": "I will add."}, CALLS[2], TALK[1]], TOOLS),
    "a reply first": (TALK[1:], None),
    "an unknown role": ([{"role": "narrator", "content": "Once"}, *TALK], None),
}


# ---- finding --------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """chat_templates/ of the working directory, else the one that comes with the package."""
    here = Path("chat_templates")
    return here if here.is_dir() else SHIPPED


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.jinja"))


def find(name: str) -> Path:
    """The file of a template given by name (`llama3`) or path. UserError names those there are."""
    for path in (Path(name), folder() / f"{name}.jinja"):
        if path.is_file():
            return path
    raise UserError(f"template: no file and no name {name!r}; there are {', '.join(names()) or 'none'} in {folder()}")


# ---- facts, without a tokenizer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a template does, read off its renders. Each of the middle four: "yes", "no" (an error says so), or
    "dropped" (rendered without a word of it)."""

    title: str  # first sentence of its header
    system: str
    tools: str
    calls: str
    reasoning: str
    diverges: str | None  # None: prefix-preserving


def facts(template: str) -> Facts:
    """UserError where it is not safe to render."""
    vet(template)
    reasoning = _takes(template, THOUGHTS[:2], None, "Two and three.")
    return Facts(
        title=title(template),
        system=_takes(template, [SYSTEM, *TALK], None, SYSTEM["content"]),
        tools=_takes(template, TALK, TOOLS, TOOLS[0]["function"]["name"]),
        calls=_takes(template, CALLS[:3], None, "31", "fifty-one"),
        reasoning=reasoning,
        diverges=next(filter(None, (_diverges(template, *each) for each in BATTERY.values())), None),
    )


def title(template: str) -> str:
    """The first sentence of the comment at the top; a template without one has none."""
    if not template.lstrip().startswith("{#"):
        return "(no header)"
    comment = " ".join(template.split("{#", 1)[1].split("#}")[0].strip("- \n").split())
    return comment.split(". ")[0].rstrip(".")


def attempt(template: str, messages: list[dict], tools=None, special=None, **kwargs) -> str | UserError:
    """The render, or the error that the template answered with."""
    try:
        return render(template, messages, tools=tools, special=special or SPECIAL, **kwargs)[0]
    except UserError as error:
        return error


def _takes(template: str, messages: list[dict], tools, *words: str) -> str:
    text = attempt(template, messages, tools)
    if isinstance(text, UserError):
        return "no"
    return "yes" if all(word in text for word in words) else "dropped"


def _diverges(template: str, messages: list[dict], tools) -> str | None:
    """Where a longer conversation's text leaves that of its beginning, cut after a reply."""
    whole = attempt(template, messages, tools)
    for turns in _cuts(messages) if isinstance(whole, str) else []:
        part = attempt(template, messages[:turns], tools)
        if isinstance(part, str) and not whole.startswith(part):
            place = next(i for i, (a, b) in enumerate(zip(part + "\0", whole, strict=False)) if a != b)
            return f"{part[place - 20 : place + 20]!r} is {whole[place - 20 : place + 20]!r} once more turns follow"
    return None


def _cuts(messages: list[dict]) -> list[int]:
    """Lengths of the beginnings that end with a reply, the whole left out."""
    return [turn for turn in range(1, len(messages)) if messages[turn - 1].get("role") == "assistant"]


# ---- checks of a tokenizer's template -------------------------------------------------------------------------------


def unmarked(tokenizer) -> str | None:
    """The template has no {% generation %}, so nothing would be learned."""
    if GENERATION.search(template_of(tokenizer)):
        return None
    return (
        f"the chat template of {tokenizer.name_or_path!r} has no generation marks: nothing would be learned; "
        "put {% generation %} ... {% endgeneration %} around the assistant's content and its end token, or pass "
        "--chat_template_path chat_templates/chatml.jinja"
    )


def end_token_outside(tokenizer) -> str | None:
    """The token that ends a reply is not supervised, so replies would never end. None, too, where nothing is marked
    or no control token ends a reply: those are other faults."""
    chat, special = encode_chat(tokenizer, PROBE), control_tokens(tokenizer)
    marked = [position for position, mask in enumerate(chat.assistant_mask) if mask]
    if not marked or any(chat.input_ids[position] in special for position in marked):
        return None
    after = [i for i in chat.input_ids[marked[-1] :] if i in special]
    if not after:
        return None
    return (
        f"the chat template of {tokenizer.name_or_path!r} leaves the turn's end token {special[after[0]]!r} outside "
        "the generation mark: it would never be learned; move it before {% endgeneration %}"
    )


def no_end_token(tokenizer) -> str | None:
    """No control token stands after a reply's content."""
    opened = encode_chat(tokenizer, PROBE[:1], add_generation_prompt=True).input_ids
    special = control_tokens(tokenizer)
    if any(i in special for i in encode_chat(tokenizer, PROBE).input_ids[len(opened) :]):
        return None
    return (
        f"the chat template of {tokenizer.name_or_path!r} ends a reply with no control token, so generation would not "
        "stop; end it with one, and name those that the tokenizer may lack in a line {#- control: <a> <b> -#}"
    )


def not_prefix_preserving(tokenizer, messages: list[dict] | None = None, tools=None) -> str | None:
    """Where a longer conversation's tokens leave those of its beginning, cut after each reply; `messages`: two plain
    questions and replies where none are given."""
    messages = TALK if messages is None else messages
    whole = encode_chat(tokenizer, messages, tools=tools).input_ids
    for turns in _cuts(messages):
        part = encode_chat(tokenizer, messages[:turns], tools=tools).input_ids
        if whole[: len(part)] != part:
            where = divergence(tokenizer, whole, part, "where the conversation ends there")
            return f"message {turns - 1} of {len(messages)} is rendered otherwise once more turns follow: {where}"
    return None


def template_faults(tokenizer) -> list[str]:
    """All that is wrong with a tokenizer's template, a sentence each; none for a template that may be trained on."""
    template = template_of(tokenizer)
    found = [unmarked(tokenizer), end_token_outside(tokenizer), no_end_token(tokenizer)]
    checks = {
        "not prefix-preserving": not_prefix_preserving,
        "generation differs from training": generation_matches_training,
    }
    for fault, check in checks.items():
        said = {
            name: check(tokenizer, *each)
            for name, each in BATTERY.items()
            if isinstance(attempt(template, *each, tokenizer.special_tokens_map), str)
        }
        where = [name for name, what in said.items() if what]
        more = f" and {len(where) - 1} more of {len(said)} conversations" if len(where) > 1 else ""
        found += [f"{fault}, with {where[0]}{more}: {said[where[0]]}"] if where else []
    known = facts(template)
    words = {"system": "system turns", "tools": "lists of tools", "calls": "tool calls or their answers"}
    words |= {"reasoning": "reasoning_content"}
    dropped = [what for key, what in words.items() if getattr(known, key) == "dropped"]
    found += [f"dropped without a word: {', '.join(dropped)}; refuse them with raise_exception"] if dropped else []
    return [*filter(None, found), *_undeclared(template)]


def _undeclared(template: str) -> list[str]:
    """Control tokens of the template's own line that no render of the battery has."""
    texts = [attempt(template, *each, add_generation_prompt=True) for each in BATTERY.values()]
    rendered = "".join(text for text in texts if isinstance(text, str))
    return [
        f"the control token {token!r} is declared but never written"
        for token in (declared_control(template) if DECLARED.search(template) else [])
        if token not in rendered
    ]
