"""Train a byte-level BPE tokenizer with the chain's special tokens.

In: texts (any iterable, read once), a vocabulary size. Out: a `PreTrainedTokenizerFast` that round-trips every byte
string. Ids: 0 the end of a text, 1 padding, 2-4 the chat tokens, then `special_tokens`, then the reserved ones, the
256 bytes, and merges in the order they were learned.
Launched by `accelerate launch recipes/tokenizer.py --config recipes/tiny/tokenizer.yaml`.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain.args import arg, at_least, one_of
from posttrain.data.stream import Stream
from posttrain.errors import UserError

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
RESERVED = "<|reserved_{}|>"
BYTES = 256

# How text is cut before merges are learned: no token reaches over such a cut.
# gpt4, gpt2: the patterns of cl100k_base and r50k_base in OpenAI's tiktoken (tiktoken_ext/openai_public.py).
# gpt4_one_digit: GPT-4's with one digit a token instead of up to three: arithmetic on digit tokens is learned from far
# fewer examples (Singh & Strouse 2024, arXiv 2402.14903).
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt4_one_digit": GPT4.replace(r"\p{N}{1,3}", r"\p{N}"),
    "gpt4": GPT4,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


@dataclass
class TokenizerConfig:
    """Tokenizer: size, split, special tokens, how much text it is trained on, what it is compared with"""

    vocab_size: int = arg(1024, help="tokens, special ones and the 256 bytes included; an upper bound for little text")
    split: str = arg("gpt4_one_digit", help="how text is cut before merges: gpt4_one_digit, gpt4 (3 digits) or gpt2")
    special_tokens: list[str] = arg([], help="more special tokens, such as '<|tool_call|>', after the chat's own")
    reserved_tokens: int = arg(0, help="unused special tokens <|reserved_0|> ... for templates to come")
    min_frequency: int = arg(0, help="merge only pairs that occur so often")
    max_chars: int | None = arg(None, help="read so many characters of training text in all")
    max_document_chars: int | None = arg(None, help="of a longer text only so many characters are read")
    eval_group_by: str | None = arg(
        None, help="column of the held-out rows, such as lang: bytes per token by its value"
    )
    compare_tokenizers: list[str] = arg(
        ["gpt2"], help="others to measure beside it: gpt2, tekken, cl100k_base, o200k_base, a folder, a Hub name"
    )

    def __post_init__(self):
        at_least(self, vocab_size=1, reserved_tokens=0, min_frequency=0, max_chars=1, max_document_chars=1)
        one_of(self, split=SPLITS)
        require_size(self.vocab_size, special_tokens(self.special_tokens, self.reserved_tokens))

    @property
    def eval_columns(self) -> tuple[str, ...]:
        """The columns that held-out rows need."""
        return ("text",) if self.eval_group_by is None else ("text", self.eval_group_by)


def special_tokens(more: Iterable[str] = (), reserved: int = 0) -> list[str]:
    """All special tokens in the order of their ids. UserError for one that is blank or comes twice."""
    tokens = [END_OF_TEXT, PAD, *CHAT_TOKENS, *more, *(RESERVED.format(number) for number in range(reserved))]
    for number, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"special_tokens: found {token!r}, expected some text such as '<|tool_call|>'")
        if token in tokens[:number]:
            raise UserError(f"special_tokens: {token!r} comes twice; it is special already: leave it out")
    return tokens


def require_size(vocab_size: int, special: list[str]) -> None:
    """UserError where bytes and special tokens alone are more than `vocab_size`."""
    if vocab_size < BYTES + len(special):
        raise UserError(
            f"vocab_size: found {vocab_size}, expected at least {BYTES + len(special)} (256 bytes + special tokens)"
        )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    split: str = "gpt4_one_digit",
    special: list[str] | None = None,
    min_frequency: int = 0,
):
    """Byte-level BPE over `texts`; all 256 bytes are in the alphabet, so nothing is ever unknown.

    `vocab_size` counts the special tokens; of too little text there come fewer. The same texts give the same file, in
    whatever order and number of threads: pairs that occur equally often are merged by their ids. Memory holds the
    distinct pieces of the split and what the iterator hands out, 256 texts at a time. What looks like a special token
    in a text is learned from as text.

    Raises UserError where the size is too small for bytes and special tokens, and whatever `texts` raises; a lone
    surrogate is a UnicodeEncodeError (the data's own checks refuse it before).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = special_tokens() if special is None else special
    require_size(vocab_size, special)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )


def _interruptible(work) -> None:
    """Run `work` in a thread and wait: Python handles signals between two steps of the main thread alone, and merging
    is one step that may take minutes."""
    raised = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class Limited:
    """The texts of rows within the limits of a config, counted while they are read.

    `facts` has rows, bytes (UTF-8), `cut` (texts cut at max_document_chars) and `ended` (why reading ended early).
    """

    def __init__(self, rows: Iterable[dict], config: TokenizerConfig):
        self.rows, self.most, self.longest = rows, config.max_chars, config.max_document_chars
        self.facts = {"rows": 0, "chars": 0, "bytes": 0, "cut": 0, "ended": None}

    def __iter__(self) -> Iterator[str]:
        facts = self.facts
        for row in self.rows:
            text = row["text"][: self.longest]
            facts["cut"] += len(text) < len(row["text"])
            if self.most is not None:
                text = text[: self.most - facts["chars"]]
            facts["rows"] += 1
            facts["chars"] += len(text)
            facts["bytes"] += len(text.encode())
            yield text
            if facts["chars"] == self.most:
                facts["ended"] = f"max_chars {self.most:,}"
                return

    def describe(self, data: dict) -> None:
        """Add to the rows' entry in the manifest what was read; of a stream also what it left out meanwhile."""
        if isinstance(self.rows, Stream):
            data |= self.rows.description() | {"rows": self.facts["rows"]}
        data["read"] = self.facts


def bytes_per_token(tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes of `texts` over the number of tokens they become."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, ids)))
