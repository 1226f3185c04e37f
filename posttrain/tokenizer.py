"""Train a byte-level BPE tokenizer with the chain's special tokens.

In: texts (any iterable), a vocabulary size. Out: a `PreTrainedTokenizerFast` that round-trips every byte string.
Launched by `accelerate launch recipes/tokenizer.py --config recipes/tiny/tokenizer.yaml`.
"""

from collections.abc import Iterable

from posttrain.errors import UserError

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")

# GPT-4's split (tiktoken's cl100k_base pattern), with one digit a token instead of up to three: arithmetic on
# digit tokens is learned from far fewer examples (Singh & Strouse 2024, arXiv 2402.14903).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE over `texts`; all 256 bytes are in the alphabet, so nothing is ever unknown.

    `vocab_size` counts the special tokens. UserError where it is too small for bytes and specials.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, PAD, *CHAT_TOKENS]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"vocab_size: found {vocab_size}, expected at least {256 + len(special)} (256 bytes + special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(CHAT_TOKENS),
        clean_up_tokenization_spaces=False,
    )


def bytes_per_token(tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes of `texts` over the number of tokens they become."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, ids)))
