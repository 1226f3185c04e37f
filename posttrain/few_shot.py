r"""Solved examples before a question: how a base model, which knows no turns, is told what is wanted of it.

In: a file, JSONL with {"input", "output"} a row (or {"prompt", "answer"}), or a block of plain text (.txt).
Out: the text that stands before a question. A row becomes one line, input, a space, output, or what `Form` makes of
it, such as a talk, 'Human: {input}\nAssistant: {output}'; an answer ends at the first line break. Used by `posttrain
complete --few_shot FILE` and `posttrain eval --few_shot FILE`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError

NAMES = (("input", "output"), ("prompt", "answer"))


@dataclass(frozen=True)
class Example:
    """A question and its answer, which is one line; where the row has them, what a right reply states (`answer`) and
    what it must not state besides (`others`; None: the answer is a number or a formula)."""

    input: str
    output: str
    answer: str | None = None
    others: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Form:
    """How a row is written: `head`, the input, `middle`, the output, a line break."""

    head: str = ""
    middle: str = " "

    @classmethod
    def read(cls, text: str | None) -> "Form":
        r"""From 'Human: {input}\nAssistant: {output}', \n a line break; None: the usual form, '{input} {output}'."""
        if text is None:
            return cls()
        head, first, rest = text.replace("\\n", "\n").partition("{input}")
        middle, second, tail = rest.partition("{output}")
        if not (first and second and middle) or tail or "{input}" in middle:
            raise UserError(
                f"--few_shot_format: found {text!r}, expected {{input}}, text between, and {{output}} at the end, "
                r"such as 'Human: {input}\nAssistant: {output}'"
            )
        return cls(head, middle)

    def example(self, row: Example) -> str:
        return f"{self.head}{row.input}{self.middle}{row.output}\n"

    def question(self, text: str) -> str:
        """Up to where the output begins; the blank before it belongs to the answer's first token."""
        return f"{self.head}{text}{self.middle.rstrip(' ')}"


def before_prompt(path: str, num: int | None = None, form: Form | None = None) -> str:
    """The text to put before a prompt: each of the first `num` rows (None: all) in its form, or the block of a .txt
    file, closed by a line break. Raises UserError for a file that cannot be read or is neither.
    """
    if Path(path).suffix == ".txt":
        if num is not None:
            raise UserError(f"--num_fewshot: found {num}, but {path} is a block of text without rows; leave it out")
        block = read_text(path, "--few_shot")
        return block if block.endswith("\n") else block + "\n"
    return "".join(map((form or Form()).example, take(read_examples(path), num, path)))


def read_examples(path: str) -> list[Example]:
    """The rows of a JSONL file. Raises UserError naming file and line of the first row that cannot be used."""
    examples = []
    for number, line in enumerate(read_text(path, "--few_shot").splitlines(), 1):
        if line.strip():
            examples.append(_example(line, f"{path}, line {number}"))
    if not examples:
        raise UserError(f"{path}: no rows; expected JSONL with 'input' and 'output' in each row")
    return examples


def take(examples: list[Example], num: int | None, path: str) -> list[Example]:
    """The first `num`, None: all. UserError where there are not so many."""
    if num is not None and not 1 <= num <= len(examples):
        raise UserError(f"--num_fewshot: found {num}, expected 1 to {len(examples)}, the rows of {path}")
    return examples[:num]


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: no JSON ({error}); expected a row such as "
            '{"input": "2+2=", "output": "4"}, or name a block of plain text .txt'
        ) from error
    keys = next((pair for pair in NAMES if isinstance(row, dict) and set(pair) <= row.keys()), None)
    if keys is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: found {found or 'nothing'}, expected the keys input and output (or prompt, answer)")
    texts = [row[key].strip() if isinstance(row[key], str) else "" for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if not text:
            raise UserError(f"{where}: {key} is {row[key]!r}, expected text")
    if "\n" in texts[1]:
        raise UserError(f"{where}: {keys[1]} has a line break, but answers are cut at the first one; make it one line")
    if keys[1] == "answer":  # the pair prompt, answer: its answer is the output
        return Example(*texts)
    return Example(*texts, _answer(row, where), _others(row, where))


def _answer(row: dict, where: str) -> str | None:
    answer = row.get("answer")
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise UserError(f"{where}: answer is {answer!r}, expected the text that a right reply states, or none at all")
    return answer


def _others(row: dict, where: str) -> tuple[str, ...] | None:
    others = row.get("others")
    if others is not None and not (isinstance(others, list) and all(isinstance(each, str) for each in others)):
        raise UserError(f"{where}: others is {others!r:.80}, expected a list of texts, or none at all")
    return None if others is None else tuple(others)


def first_line(text: str) -> str:
    """A continuation cut at its first line break, without blanks around it: the answer."""
    return text.split("\n")[0].strip()


def read_text(path: str, flag: str) -> str:
    """A UTF-8 file. Raises UserError, naming `flag`, where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 text ({error})"
        raise UserError(f"{flag}: {path}: {reason}; expected a text file") from error
