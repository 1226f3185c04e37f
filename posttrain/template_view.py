"""What `posttrain template list | show | check | diff` prints.

In: names or files of templates, folders of models. Out: text.
Run: posttrain template list
     posttrain template show llama3
     posttrain template check mine.jinja --tokenizer runs/tiny/pretrain
     posttrain template diff qwen3 qwen3_keep_thinking
"""

import difflib
from pathlib import Path

from posttrain import templates
from posttrain.chat import add_control, read_template, template_of
from posttrain.errors import UserError
from posttrain.template_render import declared_control, render

OPEN, CLOSE = "⟦", "⟧"  # around what the assistant is trained to write


def listing() -> str:
    """A table of the templates, a line each: what they render, read off their renders."""
    rows = [("name", "prefix-preserving", "system", "tools", "reasoning", "")]
    for name in templates.names():
        known = templates.facts(read_template(str(templates.find(name))))
        tools = "yes" if known.tools == known.calls == "yes" else "no"
        rows.append((name, "no" if known.diverges else "yes", known.system, tools, known.reasoning, known.title))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]] + [0]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show(name: str) -> str:
    """The source and a conversation rendered with it, the supervised part between ⟦ and ⟧."""
    path = templates.find(name)
    template = read_template(str(path))
    example = [templates.SYSTEM, *templates.TALK]
    if isinstance(templates.attempt(template, example), UserError):
        example = templates.TALK
    text, spans = render(template, example, special=templates.SPECIAL)
    for start, stop in reversed(spans):
        text = text[:start] + OPEN + text[start:stop] + CLOSE + text[stop:]
    prompt = render(template, example[:-1], add_generation_prompt=True, special=templates.SPECIAL)[0]
    return (
        f"{template.rstrip()}\n\n---- {path}: a conversation, what is learned between {OPEN} and {CLOSE}\n{text}\n\n"
        f"---- the prompt of its last reply\n{prompt}"
    )


def check(file: str, tokenizer_name: str | None = None) -> tuple[str, bool]:
    """(report, whether nothing is wrong). `tokenizer_name`: folder or Hub name; without one, a small byte-level
    tokenizer is made. UserError where the template is not safe to render."""
    path = templates.find(file)
    template = read_template(str(path))
    known = templates.facts(template)
    tokenizer = _tokenizer(tokenizer_name)
    tokenizer.chat_template = template
    tokenizer.name_or_path = str(path)
    added = add_control(tokenizer, declared_control(template))
    faults = templates.template_faults(tokenizer)
    means = {"yes": "rendered", "no": "refused with an error", "dropped": "dropped without a word"}
    lines = [
        f"{path}: {known.title}",
        f"control tokens      {' '.join(declared_control(template)) or 'none'}",
        f"new tokens          {' '.join(added) or 'none'} (to {tokenizer_name or 'a small ChatML tokenizer'})",
        f"system turns        {means[known.system]}",
        f"lists of tools      {means[known.tools]}",
        f"calls and answers   {means[known.calls]}",
        f"reasoning_content   {means[known.reasoning]}",
        f"faults              {len(faults) or 'none'}",
        *(f"  {number}. {fault}" for number, fault in enumerate(faults, 1)),
    ]
    return "\n".join(lines), not faults


def diff(left: str, right: str) -> str:
    """Unified diff of both templates' renders of a battery of conversations. Each side is a template's name or file,
    or a folder (or Hub name) with a tokenizer."""
    sides = [_side(left), _side(right)]
    special = next((special for _, special in sides if special), templates.SPECIAL)
    texts, same = [[], []], 0
    question = templates.BATTERY["a question"]
    cases = [(name, *each, False) for name, each in templates.BATTERY.items()]
    cases += [
        ("the prompt of a reply", *question, True),
        ("the prompt of a second reply", templates.TALK[:3], None, True),
    ]
    for name, messages, tools, prompt in cases:
        both = [_render(template, messages, tools, special, prompt) for template, _ in sides]
        same += both[0] == both[1]
        for lines, text in zip(texts, both, strict=True):
            lines += [f"# {name}", *text.splitlines(), ""]
    changed = list(difflib.unified_diff(*texts, left, right, lineterm="", n=3))
    return "\n".join([*changed, f"{same} of {len(cases)} renders are the same"])


def _render(template: str, messages: list[dict], tools, special: dict, prompt: bool) -> str:
    text = templates.attempt(template, messages, tools, special, add_generation_prompt=prompt)
    return f"(refused: {text})" if isinstance(text, UserError) else text


def _side(name: str) -> tuple[str, dict | None]:
    """(template, the tokenizer's special tokens or None)."""
    if Path(name).is_dir() or not (Path(name).is_file() or name in templates.names()):
        from posttrain.models import load_tokenizer

        tokenizer = load_tokenizer(name)
        return template_of(tokenizer), tokenizer.special_tokens_map
    return read_template(str(templates.find(name))), None


def _tokenizer(name: str | None):
    if name is not None:
        from posttrain.models import load_tokenizer

        return load_tokenizer(name)
    from posttrain.tokenizer import train_tokenizer

    texts = [str(message["content"]) for messages, _ in templates.BATTERY.values() for message in messages]
    return train_tokenizer(texts, 300)
