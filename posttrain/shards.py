"""Texts as tokens on disk, made once, in parallel, and mapped into memory by training.

In: texts (a list, or a stream larger than memory) and a tokenizer. Out: a folder of `shard-00000.bin`, ... and an
index, `tokens.json`. A shard holds little-endian uint16 tokens (uint32 where the vocabulary needs it), document after
document, each behind an end-of-text token. Read end to end, all shards are one row of tokens; training takes chunks
of it (`TokenShards.chunk`), wherever shards begin and end.

Where shards are cut depends on the texts alone: any number of workers writes the same files. The index comes last; a
folder without it is unfinished, and its finished shards are kept by the next run if their texts are still the same.

    write_shards(folder, texts, tokenizer, data_sha256, workers=8)
    tokens = TokenShards(folder)
    tokens.chunk(0, 1024)  # the first 1024 tokens
"""

import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from posttrain import checkpoint
from posttrain.errors import UserError
from posttrain.progress import Progress

INDEX = "tokens.json"
SHARD_CHARS = 1 << 25  # characters of a shard: about 8M tokens of English, 16 MB
BATCH = 512  # texts that are tokenized at a time: what bounds a worker's memory beside its shard


def tokenizer_sha256(tokenizer) -> str:
    """The hash of what decides its tokens: vocabulary, merges, split and added tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts. What looks like a control token in a text is text: only we set the ends of documents."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def blocks(texts: Iterable[str], size: int = SHARD_CHARS) -> Iterator[list[str]]:
    """The texts of each shard: a new one begins when the last has `size` characters or more. Empty texts are left
    out. What is cut depends on the texts alone."""
    block, held = [], 0
    for text in texts:
        if text:
            block.append(text)
            held += len(text)
        if held >= size:
            yield block
            block, held = [], 0
    if block:
        yield block


def write_shard(path: Path, texts: list[str], tokenizer, dtype: str) -> dict:
    """Tokenize texts into `path`, whole or not at all; returns the facts that stand beside it in a .json file, too. A
    shard of the same texts and tokenizer that is there already is kept."""
    facts_file, own = path.with_suffix(".json"), _texts_sha256(texts)
    if facts_file.is_file() and path.is_file():
        facts = json.loads(facts_file.read_text())
        if facts["texts_sha256"] == own and path.stat().st_size == facts["tokens"] * np.dtype(dtype).itemsize:
            return facts
    digest, count = hashlib.sha256(), 0
    with checkpoint.replacing(path) as file:
        for start in range(0, len(texts), BATCH):
            ids: list[int] = []
            for document in encode(tokenizer, texts[start : start + BATCH]):
                ids.append(tokenizer.eos_token_id)
                ids += document
            piece = np.array(ids, dtype=dtype).tobytes()
            file.write(piece)
            digest.update(piece)
            count += len(ids)
    size = sum(len(text.encode()) for text in texts)
    facts = {"name": path.name, "tokens": count, "documents": len(texts), "bytes": size}
    facts |= {"sha256": digest.hexdigest(), "texts_sha256": own}
    checkpoint.write_json(facts_file, facts)
    return facts


def _texts_sha256(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


_worker: dict = {}


def _start_worker(tokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker a core already
    _worker["tokenizer"] = tokenizer


def _in_worker(path: Path, texts: list[str], dtype: str) -> dict:
    return write_shard(path, texts, _worker["tokenizer"], dtype)


def write_shards(
    folder: Path, texts: Iterable[str], tokenizer, data_sha256: str, *, workers: int, shard_chars: int = SHARD_CHARS
) -> dict:
    """Write the shards that are missing, then the index, which is returned. Up to `workers` processes, each with one
    shard in memory and one waiting; a single shard is written by this process.

    Raises UserError where the tokenizer has no end-of-text token, where there is nothing to tokenize, and where the
    folder holds tokens of other texts or another tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        return require_same(folder, tokenizer, data_sha256)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token), which must stand before each document")
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    # What an earlier run with another tokenizer left has other tokens for the same texts.
    mark, own = folder / "tokenizer.sha256", tokenizer_sha256(tokenizer)
    if not mark.is_file() or mark.read_text() != own:
        for old in folder.glob("shard-*"):
            old.unlink()
        mark.write_text(own)
    shards = list(_all(folder, blocks(texts, shard_chars), tokenizer, dtype, workers))
    if not shards:
        raise UserError("there is no text to train on: all rows are empty")
    for old in set(folder.glob("shard-*.bin")) - {folder / facts["name"] for facts in shards}:
        old.unlink()
    index = {
        "format": 1,
        "dtype": dtype,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": own,
        "data_sha256": data_sha256,
        **{key: sum(facts[key] for facts in shards) for key in ("tokens", "documents", "bytes")},
        "shards": shards,
    }
    checkpoint.write_json(folder / INDEX, index)
    return index


def _all(folder: Path, found: Iterator[list[str]], tokenizer, dtype: str, workers: int) -> Iterator[dict]:
    """Facts of all shards in order. Processes start with the second shard: most first tries have one."""
    first, second = next(found, None), next(found, None)
    if first is None:
        return
    if second is None or workers <= 1:
        rest = [first] if second is None else chain([first, second], found)
        for number, texts in enumerate(rest):
            yield write_shard(_path(folder, number), texts, tokenizer, dtype)
        return
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, and perhaps a GPU
    progress, waiting = _Told(), deque()
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer,))
    try:
        for number, texts in enumerate(chain([first, second], found)):
            waiting.append(pool.submit(_in_worker, _path(folder, number), texts, dtype))
            if len(waiting) > workers:
                yield progress.count(waiting.popleft().result())
        while waiting:
            yield progress.count(waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)  # a signal waits for the shards that are being written, not for the next
    progress.close()


def _path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


class _Told:
    """Tokens so far; how many there will be is not known before the end, so the total grows with them."""

    def __init__(self):
        self.progress = Progress("tokenize", 0, "token")

    def count(self, facts: dict) -> dict:
        self.progress.total += facts["tokens"]
        self.progress.update(facts["tokens"])
        return facts

    def close(self) -> None:
        self.progress.close()


def read_index(folder: Path) -> dict:
    """The index of finished shards. UserError where it is missing or damaged."""
    file = folder / INDEX
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: the shards were not finished; run the stage again") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): remove {folder} to have it made again") from error


def require_same(folder: Path, tokenizer, data_sha256: str, *, hashes: bool = True) -> dict:
    """The index of a folder that is there, of these texts and this tokenizer, its files whole; else UserError. Without
    `hashes` the files are not read: one process of several does that."""
    index = read_index(folder)
    wanted = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "data_sha256": data_sha256}
    for key, value in wanted.items():
        if index[key] != value:
            raise UserError(
                f"shards_dir: {folder} holds tokens of another {key.split('_')[0]} ({key} {index[key][:12]}, this run "
                f"has {value[:12]}): name another folder, or remove it"
            )
    itemsize = np.dtype(index["dtype"]).itemsize
    files = {s["name"]: {"sha256": s["sha256"], "bytes": s["tokens"] * itemsize} for s in index["shards"]}
    if hashes:
        checkpoint.verify(folder, files, mend=f"remove {folder} to have it made again")
    return index


class TokenShards:
    """All shards of a folder as one row of tokens. Nothing is read before it is asked for."""

    def __init__(self, folder: Path):
        self.folder, self.index = Path(folder), read_index(Path(folder))
        self.tokens, self.eos_token_id = self.index["tokens"], self.index["eos_token_id"]
        self.starts = np.cumsum([0, *(facts["tokens"] for facts in self.index["shards"])])
        self._open = lru_cache(maxsize=128)(self._map)  # each map holds a file descriptor

    def _map(self, number: int) -> np.ndarray:
        with open(self.folder / self.index["shards"][number]["name"], "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # a chunk is 2 KB, of which the system would make 128 KB
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=self.index["dtype"])

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: tokens from place `start`. IndexError past the end."""
        if start < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.tokens}")
        pieces, end = [], start + count
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < end:
            stop = min(end, int(self.starts[number + 1]))
            first = int(self.starts[number])
            pieces.append(self._open(number)[start - first : stop - first])
            start, number = stop, number + 1
        return np.concatenate(pieces).astype(np.int64)

    def num_chunks(self, length: int) -> int:
        """Whole chunks of `length` tokens; UserError where there is none."""
        if self.tokens < length:
            raise UserError(
                f"the texts have {self.tokens} tokens, fewer than one chunk: lower sequence_length ({length})"
            )
        return self.tokens // length

    def chunk(self, number: int, length: int) -> np.ndarray:
        """(length,) int64: tokens [number x length, (number + 1) x length)."""
        return self.read(number * length, length)
