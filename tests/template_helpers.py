"""Conversations, as hypothesis makes them, and tokenizers that the tests of templates share."""

from copy import deepcopy
from functools import lru_cache

from conftest import REPOSITORY
from hypothesis import strategies as st

from posttrain.chat import add_control
from posttrain.template_render import declared_control

FOLDER = REPOSITORY / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
THINKING = {"qwen3", "qwen3_keep_thinking", "deepseek_r1"}
TOOL_FORMATS = {"chatml_tools", "chatml_calls", "qwen3", "qwen3_keep_thinking", "llama3_1", "mistral"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

WORDS = (
    "a",
    " b",
    "\n",
    "  ",
    "é🙂",
    "<think>",
    "</think>\n\n",
    "<think>\n\n</think>\n\n",
    "\n</tool_response>",
    "<tool_response>\n",
    '"',
    "\\",
    "｜",
)
words = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
texts = st.text(max_size=12) | words
names = st.text("abcXYZ_019", min_size=1, max_size=8)
numbers = st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
tools = st.lists(
    st.builds(
        lambda name, text: {
            "type": "function",
            "function": {"name": name, "description": text, "parameters": {"type": "object", "properties": {}}},
        },
        names,
        texts,
    ),
    min_size=1,
    max_size=2,
)


def turn(role: str, content=texts, **more):
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional=more)


def flat(rounds):
    return st.tuples(*rounds).map(lambda parts: [message for part in parts for message in part])


def rounds(content=texts, **assistant):
    """user, assistant, user, assistant, ...; often with a last question."""
    pair = st.tuples(turn("user", content), turn("assistant", content, **assistant))
    start = st.lists(pair, max_size=3).map(lambda pairs: [message for pair in pairs for message in pair])
    return flat([start, st.lists(turn("user", content), max_size=1)]).filter(len)


def talks(content=texts, **assistant):
    return flat([st.lists(turn("system", content), max_size=1), rounds(content, **assistant)])


def calls_about(content=texts, keys=names):
    """A call with `keys` for its name and arguments."""
    values = content | numbers | st.booleans() | st.none() | st.lists(content, max_size=2)
    given = st.dictionaries(keys, values, max_size=3)
    return st.builds(
        lambda name, given: {"type": "function", "function": {"name": name, "arguments": given}}, keys, given
    )


calls = calls_about()


def tool_talks(content=texts, most_calls=2, keys=names, **assistant):
    """system?, (user, (assistant with calls, tool answers)*, assistant)*, user"""

    def step(made):
        call = {"role": "assistant", "content": made[1], "tool_calls": made[0]}
        return [call, *({"role": "tool", "name": "f", "content": answer} for answer in made[2][: len(made[0])])]

    called = st.tuples(
        st.lists(calls_about(content, keys), min_size=1, max_size=most_calls),
        st.just("") if most_calls == 1 else st.just("") | st.none() | content,
        st.lists(content, min_size=most_calls, max_size=most_calls),
    ).map(step)
    asked = flat([turn("user", content).map(lambda m: [m]), st.lists(called, max_size=2).map(lambda s: sum(s, []))])
    answered = flat([asked, turn("assistant", content, **assistant).map(lambda m: [m])])
    body = flat([st.lists(answered, min_size=1, max_size=2).map(lambda s: sum(s, [])), st.just([]) | asked])
    return flat([st.lists(turn("system", content), max_size=1), body])


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache
def with_template(tokenizer, template: str):
    """A copy with the template and the control tokens it declares. Do not change it: it is shared."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    add_control(tokenizer, declared_control(template))
    return tokenizer


@lru_cache
def gpt2_like():
    """Byte-level BPE that cuts white space before a word as GPT-2's does, with merges over line breaks. It puts its
    begin token before each text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["assistant\n\nIt is\n\n\n", "\n\n", "\n\n\n", " user system  hello  world\n\n"] * 20, trainer
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@lru_cache
def spaced(scheme: str):
    """BPE with a space added as SentencePiece does: at the start of each piece of text ("always"), as Llama 2's in
    its legacy form, or of the whole text ("first"), as Mistral's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(["assistant user system hello world It is a b"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert ("▁" in tokenizer.tokenize("<s>a")[1]) == (scheme == "always")
    return tokenizer
