"""A small part of Go's text/template, enough to render the templates that modelfile.py writes, as Ollama would.

In:  a template of text, `{{ "constant" }}`, `{{ .Content }}`, `{{ range .Messages }}`, `{{ if eq X "role" }}` with
     `else if`, `else` and `end`, `{{ $before := "" }}` and `{{ $before = .Role }}`; and messages. Out: the text.
     Anything else raises ValueError. pytest tests/test_export_modelfile.py renders the same with Go itself.
"""

import json
import re

ACTION = re.compile(r'\{\{\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*\}\}')
TEST = re.compile(r'(?:else )?if eq (\.Role|\$before) "(\w*)"')
SET = re.compile(r'\$before :?= (?:"(\w*)"|(\.Role))')


def render_go(template: str, messages: list[dict]) -> str:
    """`template` of `messages`. ValueError for an action that is not of the part named above."""
    steps, end = [], 0
    for match in ACTION.finditer(template):
        steps += [("text", template[end : match.start()]), ("do", match[1])]
        end = match.end()
    steps.append(("text", template[end:]))
    nodes, rest = _parse(steps, 0)
    if rest != len(steps):
        raise ValueError(f"{{{{ {steps[rest][1]} }}}} without its beginning")
    out, names = [], {"$before": ""}
    _run(nodes, messages, None, names, out)
    return "".join(out)


def _parse(steps: list[tuple[str, str]], place: int) -> tuple[list, int]:
    """(nodes, place of the `end` or `else` that closes them)."""
    nodes = []
    while place < len(steps):
        kind, word = steps[place]
        if kind == "do" and (word == "end" or word.startswith("else")):
            return nodes, place
        place += 1
        if kind == "text" or word.startswith('"'):
            nodes.append(("text", word if kind == "text" else _constant(word)))
        elif word == "range .Messages":
            inside, place = _parse(steps, place)
            nodes.append(("range", inside))
            place += 1
        elif word.startswith("if "):
            branches, test = [], word
            while test != "end":
                inside, place = _parse(steps, place)
                branches.append((test, inside))
                test, place = steps[place][1], place + 1
            nodes.append(("if", branches))
        elif word == ".Content" or SET.fullmatch(word):
            nodes.append(("content" if word == ".Content" else "set", word))
        else:
            raise ValueError(f"{{{{ {word} }}}} is no action that is known here")
    return nodes, place


def _constant(word: str) -> str:
    return json.loads(re.sub(r"\\x([0-9a-f]{2})", r"\\u00\1", word))


def _run(nodes: list, messages: list[dict], message: dict | None, names: dict, out: list[str]) -> None:
    for kind, value in nodes:
        if kind == "text":
            out.append(value)
        elif kind == "content":
            out.append(message["content"])
        elif kind == "set":
            constant, role = SET.fullmatch(value).groups()
            names["$before"] = message["role"] if role else constant
        elif kind == "range":
            for each in messages:
                _run(value, messages, each, names, out)
        else:
            for test, inside in value:
                if test == "else" or _holds(test, message, names):
                    _run(inside, messages, message, names, out)
                    break


def _holds(test: str, message: dict | None, names: dict) -> bool:
    match = TEST.fullmatch(test)
    if match is None:
        raise ValueError(f"{{{{ {test} }}}} is no test that is known here")
    return (message["role"] if match[1] == ".Role" else names["$before"]) == match[2]
