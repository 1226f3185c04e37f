"""Talk to a model in the terminal, token by token.

In:  a stage folder, any Hugging Face folder or a Hub id of a causal language model.
Out: the reply on stdout, as it is sampled; all else (notes, prompt tokens, errors) on stderr, so it can be piped.
Run: posttrain chat runs/tiny/grpo
     posttrain chat runs/tiny/grpo --prompt "What is 17 + 25?" --temperature 0
     posttrain chat runs/tiny/pretrain --prompt "Once upon"        # no chat template: completes plain text
     posttrain chat MODEL --tools search calculator --tool_options '{search: {folder: docs}}'    # calls on stderr
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.decoding import check_settings
from posttrain.errors import UserError
from posttrain.reply import Reply, Use, whole
from posttrain.stage import read_manifest
from posttrain.tool_calls import ToolLimits, ToolRunner

HELP = """\
/system TEXT  set the system message (/system alone removes it)
/reset        forget the conversation, keep the system message
/raw          show the tokens (on/off): [text]id(probability), the prompt's tokens first
/help         this list
/quit         leave (as does Ctrl-D); Ctrl-C stops a reply and keeps the conversation
A message that begins with a slash: put a space before it."""

DIM, SPECIAL = "2", "33"  # ANSI colours: faint, yellow

# Everything a terminal could act on: C0 and C1 controls but newline and tab, line separators, bidirectional overrides.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    raw: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int | None = None,
    tools: list | None = None,
    limits: ToolLimits | None = None,
) -> int:
    """Chat with `model` in the terminal, or with `prompt` answer once; return the exit code 0.

    `temperature` 0 is greedy decoding; `top_p` is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).
    A model without a chat template completes `prompt` as plain text. `tools`: those that it may call (tools.Tool).
    Raises UserError for a folder that holds no causal language model, settings out of range, or a chat template that
    writes no calls of tools.
    """
    check_settings(temperature, top_p, max_new_tokens)
    session = Session(*load(model), temperature, top_p, max_new_tokens, seed, raw=raw)
    if tools:
        session.set_tools(tools, limits)
    if system is not None:
        session.set_system(system)
    if prompt is not None:
        try:
            session.turn(prompt)
        except BrokenPipeError:  # `| head`: nobody reads on, and Python's own flush at exit must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    note(f"{model}: {session.describe()}; /help lists the commands")
    return converse(session)


def load(name: str):
    """Return (causal language model in eval mode, tokenizer). Raises UserError that says what `name` holds instead."""
    check_folder(name)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # A folder or repository of code must never run, nor ask on stdin whether it may.
    safe = {"trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **safe)
        check_architecture(name, config.architectures or [])
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
        causal_lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map="auto", output_loading_info=True, **safe
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own kinds
        where = "in the folder" if Path(name).is_dir() else "on the Hub (no folder of that name is here)"
        raise UserError(f"{name}: no causal language model could be loaded {where}: {error}") from error
    if info["missing_keys"]:
        raise UserError(
            f"{name}: the checkpoint lacks {len(info['missing_keys'])} of the model's weights, "
            f"among them {sorted(info['missing_keys'])[0]}; expected all. Save or copy the model again."
        )
    return causal_lm.eval(), tokenizer


def check_folder(name: str) -> None:
    """Raise UserError when `name` is a local path without a finished model; a name that may be a Hub id passes."""
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"{name} is a file; expected the folder of a model (the one that holds config.json)")
    if not folder.exists():
        # runs/tny: its parent is here, so it is a mistyped path, and asking the Hub would only cost time.
        may_be_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not ("/" in name and folder.parent.is_dir())
        if may_be_hub_id:
            return
        raise UserError(f"{name}: no such folder. {choices(folder.parent)}")
    started = [mark for mark in ("checkpoints", "run.json") if (folder / mark).exists()]
    if started and not (folder / "stage.json").exists():
        raise UserError(
            f"{name} is a stage that has not finished ({started[0]} but no stage.json); "
            "run the stage again: it goes on from its last checkpoint"
        )
    if not (folder / "config.json").exists():
        if models_in(folder):
            raise UserError(f"{name} is a run. {choices(folder)}")
        manifest = read_manifest(folder)
        what = (
            f"is a finished '{manifest['stage']}' stage, which leaves no model" if manifest else "has no config.json"
        )
        raise UserError(f"{name} {what}. {choices(folder.parent)}")


def check_architecture(name: str, architectures: list[str]) -> None:
    for architecture in architectures:
        if architecture.endswith("ForSequenceClassification"):
            parents = (read_manifest(name) or {}).get("parents")
            mend = "Choose a causal language model."
            if parents:
                path = next(iter(parents.values()))["path"]
                mend = f"It was trained from {path}: try posttrain chat {path}"
            raise UserError(f"{name} is a reward model ({architecture}): it scores replies and writes none. {mend}")
        if architecture.endswith("ForMaskedLM"):
            raise UserError(f"{name} is an encoder ({architecture}): it fills gaps. Choose a causal language model.")


def models_in(folder: Path) -> list[str]:
    """Folders directly under `folder` that can chat, oldest stage first."""
    found = []
    for config in folder.glob("*/config.json"):
        if "ForSequenceClassification" not in config.read_text(encoding="utf-8"):
            found.append(((read_manifest(config.parent) or {}).get("created", ""), str(config.parent)))
    return [path for _, path in sorted(found)]


def choices(folder: Path) -> str:
    models = models_in(folder)
    if not models:
        return "Expected the folder of a model (the one with config.json) or a Hub id such as openai-community/gpt2."
    return f"Choose one of {', '.join(models)}" if len(models) > 1 else f"Choose {models[0]}"


@dataclass
class Session:
    """A model, how it is sampled and the conversation so far: whole turns of user, assistant, user, ..., with those
    that called a tool and its answers in between."""

    model: object
    tokenizer: object
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None
    raw: bool = False
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    top_k: int = 0

    def __post_init__(self):
        import torch

        self.generator = torch.Generator()
        self.generator.seed() if self.seed is None else self.generator.manual_seed(self.seed)
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.stop_ids = {token for token in [*ends, self.tokenizer.eos_token_id] if token is not None}
        # Models without position limit (state space models) have no such key.
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = limit or sys.maxsize
        self.runner: ToolRunner | None = None

    @property
    def is_base(self) -> bool:
        return self.tokenizer.chat_template is None

    def describe(self) -> str:
        kind = "no chat template, so it completes plain text" if self.is_base else "chat template found"
        tools = f", tools: {', '.join(self.runner.tools)}" if self.runner else ""
        millions = self.model.num_parameters() / 1e6
        return f"{type(self.model).__name__}, {millions:.1f}M parameters on {self.model.device}, {kind}{tools}"

    def set_system(self, text: str | None) -> None:
        if self.is_base:
            raise UserError("the model has no chat template, so no place for a system message; put it in the prompt")
        self.system = clean(text) if text else None

    def set_tools(self, tools: list, limits: ToolLimits | None = None) -> None:
        """UserError where the model's chat template cannot show them or write a call."""
        if self.is_base:
            raise UserError("tools: the model has no chat template, so it cannot call any; leave --tools out")
        self.runner = ToolRunner(self.tokenizer, tools, limits)

    def turn(self, text: str) -> None:
        """Stream the reply to `text` and remember both; after Ctrl-C what was said so far is remembered."""
        text = clean(text)
        prompt_ids, dropped = self.fit(text)
        if dropped:
            note(f"[{dropped}]")
        if self.raw:
            note(f"prompt, {len(prompt_ids)} tokens:")
            print(*(raw_token(self.tokenizer, token, sys.stderr) for token in prompt_ids), file=sys.stderr, flush=True)
        reply = Reply(self, prompt_ids)
        try:
            for event in reply:
                self._show(reply, event)
        finally:
            write(("" if self.raw else printable(reply.stream.end())) + "\n")
            if not self.is_base and (said := whole(reply.messages)):
                self.messages += [{"role": "user", "content": text}, *said]
        if not reply.ended:
            note(f"[{reply.cut}]")

    def _show(self, reply: Reply, event) -> None:
        if isinstance(event, Use):
            if event.answer is None and not self.raw:
                rest, text = printable(reply.stream.end()), reply.stream.text
                write(rest + ("\n" if text and not text.endswith("\n") else ""))
            note(f"[{printable(event.title)}]" if event.answer is None else f"[-> {printable(event.answer)}]")
        elif self.raw:
            write(raw_token(self.tokenizer, event.token, sys.stdout, event.probability) + " ")
        else:
            write(printable(event.text))

    def fit(self, text: str) -> tuple[list[int], str]:
        """Token ids of the prompt, and a sentence where the oldest turns were forgotten, which leaves a quarter of the
        context for the reply. Raises UserError where the prompt alone is too long."""
        reserve = min(self.max_new_tokens, self.context // 4)
        prompt_ids, dropped = self.encode(text), 0
        while len(prompt_ids) + reserve > self.context and self.messages:
            del self.messages[: self._oldest()]
            prompt_ids, dropped = self.encode(text), dropped + 1
        if len(prompt_ids) >= self.context:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; the model's context holds {self.context}, reply included. "
                "Shorten the prompt or the system message."
            )
        said = f"the context holds {self.context} tokens: the oldest {dropped} turn(s) were dropped" if dropped else ""
        return prompt_ids, said

    def _oldest(self) -> int:
        """Messages up to the second one of the user's."""
        users = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        return users[1] if len(users) > 1 else len(self.messages)

    def encode(self, text: str) -> list[int]:
        if self.is_base:
            # A control token spelt out in the text stays text; the tokenizer adds its own begin token.
            ids = self.tokenizer(text, split_special_tokens=True).input_ids
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # some tokenizers also close the text, and the model is asked to go on
            if not ids:
                raise UserError("the prompt is empty; give the model some text to complete")
            return ids
        import jinja2

        from posttrain.chat import encode_chat

        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.messages, {"role": "user", "content": text}]
        try:
            tools = self.runner and self.runner.template.shown
            return encode_chat(self.tokenizer, messages, add_generation_prompt=True, tools=tools).input_ids
        except jinja2.TemplateError as error:  # e.g. "System role not supported"
            raise UserError(f"the model's chat template refuses the conversation: {error}") from error


def converse(session: Session) -> int:
    """Read messages and commands from stdin until /quit or its end."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if not line.strip():
                continue
            if line.startswith("/"):
                if not command(session, line):
                    return 0
            else:
                session.turn(line if session.is_base else line.strip())
        except EOFError:
            note("")  # the shell's prompt starts on its own line
            return 0
        except KeyboardInterrupt:
            note("\n[stopped; /quit or Ctrl-D leaves]")
        except UserError as error:  # one message that cannot be answered does not end the conversation
            note(f"error: {error}")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not {sys.stdin.encoding} text: {error}") from error


def command(session: Session, line: str) -> bool:
    """Carry out a /command; False means leave."""
    name, _, rest = line.strip().partition(" ")
    if name == "/quit":
        return False
    if name == "/system":
        session.set_system(rest.strip())
        note("[system message set]" if session.system else "[no system message]")
    elif name == "/reset":
        session.messages.clear()
        note("[conversation forgotten]")
    elif name == "/raw":
        session.raw = not session.raw
        note(f"[tokens {'shown' if session.raw else 'hidden'}]")
    elif name == "/help":
        note(HELP)
    else:
        note(f"unknown command {printable(name)}; /help lists them")
    return True


def raw_token(tokenizer, token: int, stream, prob: float | None = None) -> str:
    """`[text]id(probability)`, coloured for `stream`; part of a character is spelt as in the vocabulary."""
    # The second of two: SentencePiece decoders drop the space a text starts with.
    once, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = twice[len(once) :]
    if "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token)
    text = printable(text.replace("\n", "\\n").replace("\t", "\\t"))
    if token in tokenizer.added_tokens_decoder:
        text = paint(text, SPECIAL, stream)
    return f"[{text}]" + paint(f"{token}" if prob is None else f"{token}({prob:.2f})", DIM, stream)


def printable(text: str) -> str:
    """`text` with everything a terminal would act on spelt out, so that a model cannot move the cursor or worse."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def clean(text: str) -> str:
    """Bytes of an argument that were no UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def paint(text: str, colour: str, stream) -> str:
    plain = not stream.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


def write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal that lacks a character gets its escape, not a crash
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def note(text: str) -> None:
    print(paint(text, DIM, sys.stderr), file=sys.stderr, flush=True)
