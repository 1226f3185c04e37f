"""What the trainers of pretrain_speed.py start from: sizes, weights, tokens; and the proof that both compute the same.

In: a size's name and an empty folder. Out: in it gpt2/ and llama/ (random weights and a tokenizer), tokens/ and held/
(shards of the tiny world's documents, or of random tokens).
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from pretrain_speed_plain import PlainGPT, plain_copy, twin
from transformers.utils.logging import disable_progress_bar

from posttrain.checkpoint import write_json
from posttrain.models import ModelConfig, load_causal_lm, save_pair
from posttrain.pretrain import ChunkLoss
from posttrain.shapes import ShapeConfig, make_model
from posttrain.shards import INDEX, TokenShards, write_shards
from posttrain.tokenizer import train_tokenizer

SIZES = {  # width, layers, heads, vocabulary, length, batch, steps of a turn
    "smallest": (32, 1, 1, 512, 32, 4, 2),
    "tiny": (128, 4, 4, 1024, 256, 16, 4),
    "small": (384, 6, 6, 8192, 256, 8, 2),
}
SHARD_TOKENS = 10_000_000


def prepare(size: str, work: Path) -> None:
    """Both models, and the tiny world's documents as tokens."""
    from posttrain.data import tiny

    disable_progress_bar()
    width, layers, heads, vocabulary, length, *_ = SIZES[size]
    num = {"smallest": 200}.get(size, 4000)
    texts = {split: [row["text"] for row in tiny.rows("documents", split, num, 0)] for split in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"], min(vocabulary, 1024))
    for name, split in (("tokens", "train"), ("held", "test")):
        index = write_shards(work / name, texts[split], tokenizer, "the tiny world", workers=1)
        assert (len(index["shards"]), index["dtype"]) == (1, "<u2"), "the plain loop reads one file of uint16"
    for kind, inner in (("gpt2", 4 * width), ("llama", 3 * width)):
        torch.manual_seed(0)
        shape = ShapeConfig(width, inner, layers, heads, length, model_type=kind, vocab_multiple=vocabulary)
        save_pair(make_model(shape, tokenizer), tokenizer, work / kind)


def random_shards(folder: Path, tokens: int, vocabulary: int) -> None:
    """Shards of random tokens in the format of `posttrain.shards`: to read them takes as long as to read text."""
    folder.mkdir(parents=True)
    generator, shards = np.random.default_rng(0), []
    for number, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - start)
        path = folder / f"shard-{number:05d}.bin"
        generator.integers(0, vocabulary, count, dtype=np.uint16).astype("<u2").tofile(path)
        shards.append({"name": path.name, "tokens": count, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    index = {"format": 1, "dtype": "<u2", "eos_token_id": 0, "tokens": tokens, "shards": shards}
    write_json(folder / INDEX, index)


def sample_chunks(folder: Path, length: int, most: int) -> torch.Tensor:
    """(up to `most`, length) tokens: a folder's first chunks."""
    tokens = TokenShards(folder)
    count = min(most, tokens.num_chunks(length))
    return torch.stack([torch.from_numpy(tokens.chunk(index, length)) for index in range(count)])


def require_equal(work: Path, size: str) -> dict[str, float]:
    """Check that the trainers' models are one function; see `compare_models`."""
    model = load_causal_lm(ModelConfig(str(work / "gpt2")))
    return compare_models(model, plain_copy(model), sample_chunks(work / "tokens", SIZES[size][4], 4))


def compare_models(model, plain: PlainGPT, chunks: torch.Tensor) -> dict[str, float]:
    """Loss and gradients of a transformers GPT-2 and its plain copy on chunks (B, S), in fp32.

    Returns the loss and the largest difference of a gradient, over the largest gradient of its tensor. SystemExit
    naming what differs where it is not rounding.
    """
    ours, theirs = ChunkLoss(model)(chunks) / chunks[:, 1:].numel(), plain(chunks[:, :-1], chunks[:, 1:])
    if not torch.isclose(ours, theirs, rtol=1e-5):
        sys.exit(f"the models differ: a loss of {ours.item():.6f} for ours, {theirs.item():.6f} for the plain one")
    ours.backward()
    theirs.backward()
    gradients, worst = {name: p.grad for name, p in model.named_parameters()}, 0.0
    for name, parameter in plain.named_parameters():
        expected = twin(name, gradients)
        apart = ((parameter.grad - expected).abs().max() / expected.abs().max()).item()
        if not apart < 1e-3:
            sys.exit(f"the models differ: in the gradient of {name}, by {apart:.2g} of its largest")
        worst = max(worst, apart)
    return {"loss": ours.item(), "gradients": worst}
