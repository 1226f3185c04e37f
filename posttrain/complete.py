"""`posttrain complete MODEL`: text that goes on from a prompt, as a base model does; no turns, no template.

In:  a stage folder, any Hugging Face folder or a Hub id of a causal language model; a prompt as a flag, a file or on
     stdin; solved examples to put before it.
Out: the continuation on stdout, as it is sampled (several ones each under a line that numbers them), all else on
     stderr. With --probs the tokens of prompt and continuations, coloured by their probability, in place of the text.
Run: posttrain complete runs/tiny/pretrain --prompt "One day Tom found" --n 3 --top_k 20
     posttrain complete runs/tiny/pretrain --few_shot examples/few_shot_facts.jsonl --num_fewshot 4 --probs \\
         --prompt "Netor Grimton works as a"
     echo "Once upon a time" | posttrain complete openai-community/gpt2 --temperature 0.7 --html probs.html

The text begins where a document begins: after the token that texts begin with in training, where there is one.
"""

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import UserError


def add_verb(verbs, debug: argparse.ArgumentParser) -> None:
    """The verb `complete` and its flags."""
    verb = verbs.add_parser("complete", parents=[debug], help="continue a text; token probabilities as colours")
    verb.set_defaults(call=lambda options: run(options))
    verb.add_argument("model", metavar="MODEL", help="folder of a stage, or a name on the Hub")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to go on from; default: what stdin gives")
    source.add_argument("--prompt_file", metavar="FILE", help="the same from a file; its last line break is left out")
    verb.add_argument(
        "--few_shot", metavar="FILE", help="solved examples before the prompt: JSONL rows or a .txt block"
    )
    verb.add_argument("--num_fewshot", type=int, help="the first so many rows of it; default: all")
    verb.add_argument(
        "--few_shot_format", metavar="TEXT", help=r"of its rows and the prompt: 'Human: {input}\nAssistant: {output}'"
    )
    verb.add_argument("--n", type=int, default=1, help="continuations; default: %(default)s")
    verb.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: %(default)s")
    verb.add_argument("--top_k", type=int, default=0, help="draw from the K likeliest tokens; default: 0, all")
    verb.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling; default: %(default)s, all tokens")
    verb.add_argument("--max_new_tokens", type=int, default=128, help="default: %(default)s")
    verb.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text (\n: a line break); may be repeated; with --few_shot a line break always ends",
    )
    verb.add_argument("--seed", type=int, help="default: another one each time, which is told")
    verb.add_argument("--probs", action="store_true", help="show tokens, coloured by probability, over their -log p")
    verb.add_argument("--html", metavar="FILE", help="write them as a page, too; it names what else was likely")


@dataclass(frozen=True)
class Decoding:
    """How to sample: `top_k` 0 and `top_p` 1 leave all tokens in, temperature 0 is greedy; `stops` end the text."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    stops: tuple[str, ...] = ()


@dataclass
class Continuation:
    """What one sample came to. `ids` hold all that was drawn, an end token or the stop text included; `text` does not.

    `end`: "end token", "stop text", "max_new_tokens" or "context".
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    end: str = ""


def run(options) -> int:
    """Complete as the flags say; returns the exit code 0. Raises UserError for what cannot be."""
    from posttrain.decoding import check_settings
    from posttrain.few_shot import Form, before_prompt

    check_settings(options.temperature, options.top_p, options.max_new_tokens, options.top_k)
    if options.n < 1:
        raise UserError(f"--n: found {options.n}, expected 1 or more")
    if options.n > 1 and options.temperature == 0:
        raise UserError(f"--n: found {options.n} at --temperature 0, where all are alike; leave one of them out")
    form = Form.read(options.few_shot_format)
    if options.few_shot_format is not None and not (options.few_shot or "").endswith(".jsonl"):
        raise UserError(f"--few_shot_format: needs --few_shot with a .jsonl file, found {options.few_shot}")
    examples = before_prompt(options.few_shot, options.num_fewshot, form) if options.few_shot else ""
    prompt = read_prompt(options.prompt, options.prompt_file)
    prompt = prompt if options.few_shot_format is None else form.question(prompt)
    stops = [*map(unescaped, options.stop), *(["\n"] if examples else [])]
    decoding = Decoding(options.temperature, options.top_p, options.top_k, options.max_new_tokens, tuple(stops))
    seed = secrets.randbits(31) if options.seed is None else options.seed
    completer = Completer.load(options.model)
    ids = completer.encode(examples + prompt)
    try:
        found = _show(completer, ids, prompt, decoding, options.n, seed, quiet=options.probs)
        if options.probs or options.html:
            _show_probabilities(options, completer, ids, found, seed)
    except BrokenPipeError:  # `| head`: nobody reads on, and Python's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(completer, ids: list[int], prompt: str, decoding: Decoding, n: int, seed: int, quiet: bool) -> list:
    """Draw n continuations and, unless `quiet`, write each as it comes."""
    from posttrain.serve import DIM, note, paint, printable, write

    if sys.stderr.isatty() and not quiet and n == 1:
        sys.stderr.write(paint(printable(prompt), DIM, sys.stderr))
        sys.stderr.flush()
    found = []
    for number in range(n):
        continuation = Continuation()
        if n > 1 and not quiet:
            write(f"--- {number + 1} of {n}\n")
        for piece in completer.draw(ids, decoding, seed, number, continuation):
            if not quiet:
                write(printable(piece))
        if not quiet:
            write("\n")
        if continuation.end in ("max_new_tokens", "context") and not quiet:
            limit = decoding.max_new_tokens if continuation.end == "max_new_tokens" else completer.context
            note(f"[cut: {continuation.end} {limit}]")
        found.append(continuation)
    if decoding.temperature > 0:
        note(f"[seed {seed}]")
    return found


def _show_probabilities(options, completer, ids: list[int], found: list, seed: int) -> None:
    """The same tokens with their probabilities, on stdout and as a page."""
    from posttrain import complete_view as view
    from posttrain.serve import note, write
    from posttrain.xray_text import wants_colour

    shown = view.look(completer.model, completer.tokenizer, ids, [(c.ids, c.end) for c in found])
    if options.probs:
        write(view.as_text(shown, shutil.get_terminal_size((100, 24)).columns, wants_colour()))
    if options.html:
        names = ("temperature", "top_k", "top_p", "max_new_tokens")
        settings = {name: getattr(options, name) for name in names} | {"seed": seed}
        note(f"page  {view.write(shown, options.model, settings, Path(options.html))}")


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt of a flag as it is, of a file or stdin without its last line break, which editors and `echo` add."""
    from posttrain.few_shot import read_text
    from posttrain.serve import clean

    if prompt is not None:
        return clean(prompt)
    if file is not None:
        return read_text(file, "--prompt_file").removesuffix("\n")
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT or --prompt_file FILE, or pipe a text in")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not {sys.stdin.encoding} text: {error}") from error


def unescaped(stop: str) -> str:
    r"""A stop text as typed in a shell: \n and \t stand for a line break and a tab. UserError where it is empty."""
    if not stop:
        raise UserError("--stop: found an empty text, which stands everywhere; expected some characters")
    return stop.replace("\\n", "\n").replace("\\t", "\t")


class Completer:
    """A causal language model that goes on from token ids."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.stop_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        # Models without position limit (state space models) have no such key.
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @classmethod
    def load(cls, name: str) -> "Completer":
        """From a folder or the Hub. Raises UserError where `name` is no causal language model."""
        from posttrain.serve import load

        return cls(*load(name))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins a document; a control token spelt out in it stays text.

        The tokenizer's own begin token stands first; where it adds none and knows no turns, the token that the
        beginning of a document is known by (`base_evals.begin_id`). UserError where nothing is left to go on from.
        """
        from posttrain.base_evals import begin_id

        ids = self.tokenizer(text, split_special_tokens=True).input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers also close the text, and the model is asked to go on
        begin = begin_id(self.tokenizer)
        if begin is not None and ids[:1] != [begin] and (self.tokenizer.chat_template is None or not ids):
            ids = [begin, *ids]
        if not ids:
            raise UserError("the prompt is empty, and the tokenizer has no begin token; give some text to complete")
        if len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, examples included; the model's context holds {self.context}, "
                "continuation included. Shorten the prompt or show fewer examples."
            )
        return ids

    def draw(self, ids: list[int], how: Decoding, seed: int, number: int, found: Continuation) -> Iterator[str]:
        """Yield the text of sample `number` in pieces and fill `found`. A sample depends on seed and number alone."""
        import torch

        from posttrain.decoding import sample
        from posttrain.reply import TextStream
        from posttrain.rl.engine import sample_seed

        generator = torch.Generator().manual_seed(sample_seed(seed, number))
        stream, gate = TextStream(self.tokenizer), StopGate(how.stops)
        room = min(how.max_new_tokens, self.context - len(ids))
        settings = how.temperature, how.top_p, generator, how.top_k
        found.end = "max_new_tokens" if room == how.max_new_tokens else "context"
        for token, _ in sample(self.model, ids, self.stop_ids, room, *settings):
            found.ids.append(token)
            if token in self.stop_ids:
                found.end = "end token"
                break
            yield gate.add(stream.add(token))
            if gate.stopped:
                found.end = "stop text"
                break
        yield gate.add(stream.end()) + gate.end()
        found.text = gate.text


class StopGate:
    """Lets text through up to the first of the `stops`, and holds back what may still become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.text, self.stopped = stops, "", "", False

    def add(self, text: str) -> str:
        """The part of all text so far that is sure to stand before a stop, without what was given out already."""
        if self.stopped:
            return ""
        self.held += text
        places = [place for place in map(self.held.find, self.stops) if place >= 0]
        if places:
            self.stopped = True
            return self._out(min(places))
        unsure = max((size for stop in self.stops for size in range(1, len(stop)) if self.held.endswith(stop[:size])),
                     default=0)  # fmt: skip
        return self._out(len(self.held) - unsure)

    def end(self) -> str:
        """What was held back and became no stop."""
        return "" if self.stopped else self._out(len(self.held))

    def _out(self, size: int) -> str:
        out, self.held = self.held[:size], self.held[size:]
        self.text += out
        return out
