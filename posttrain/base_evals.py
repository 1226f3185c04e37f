"""Measure base models: bits per byte of held-out text, the byte-trigram floor, answers after solved examples.

In: a causal LM (or an engine) and texts or rows. Out: figures with intervals.
"""

import math
from collections import Counter, defaultdict

import torch

from posttrain.errors import UserError
from posttrain.few_shot import first_line
from posttrain.intervals import measured_ratio
from posttrain.layouts import Layout
from posttrain.rl.forward import rollout_logps
from posttrain.rl.rollout import Sampling
from posttrain.rl.types import Completion, Rollouts
from posttrain.shards import encode

MICRO_BATCH = 4096  # tokens of a forward pass that reads texts; their logits are what takes memory


def begin_id(tokenizer) -> int | None:
    """The token that a document begins with: begin-of-text, or end-of-text where a tokenizer has only that."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def document_start(tokenizer) -> list[int]:
    """`begin_id` as what stands before a text; nothing where the tokenizer names no such token."""
    begin = begin_id(tokenizer)
    return [] if begin is None else [begin]


def rolling_windows(ids: list[int], begin: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(context, tokens to predict) pairs that predict each of `ids` once, `size` tokens or fewer to predict each.

    The first window's context is `begin`, later ones see the token before, and the last one as many tokens before as
    fill it: the convention of lm-evaluation-harness (its `get_rolling_token_windows` with a context of 1).
    """
    windows = [([begin], ids[:size])] if ids else []
    for start in range(size, len(ids), size):
        stop = min(start + size, len(ids))
        windows.append((ids[stop - size - 1 : start], ids[start:stop]))
    return windows


def bits_per_byte(model, tokenizer, texts: list[str], max_length: int) -> dict:
    """Bits a byte of `texts` under `model`, each text begun after the begin token; interval over texts.

    -log2 p(text) summed over all texts / bytes of all texts; the interval is that of a ratio of means. Windows hold
    `max_length` tokens, context included, so a text of fewer tokens is read as a whole. UserError where the tokenizer
    has no begin token, without which a text's first token has no probability.
    """
    return measured_ratio(*bits_and_bytes(model, tokenizer, texts, max_length), "bits/byte")


def bits_and_bytes(model, tokenizer, texts: list[str], max_length: int) -> tuple[list[float], list[int]]:
    """(bits, bytes) of each text that is not empty, read as `bits_per_byte` reads them."""
    begin, texts = begin_id(tokenizer), list(filter(None, texts))  # an empty one has no bytes
    if begin is None:
        raise UserError("bits per byte: the tokenizer names neither a begin-of-text nor an end-of-text token")
    contexts, windows, owners = [], [], []
    for owner, text in enumerate(texts):
        for context, window in rolling_windows(_ids(tokenizer, text), begin, max_length - 1):
            contexts.append(context)
            windows.append(Completion(window, [], "length"))
            owners.append(owner)
    # Windows are nearly all of one length: rows padded to the longest waste little, and every architecture takes them.
    rollouts = Rollouts([{}] * len(windows), contexts, windows, 1)
    logps = rollout_logps(model, rollouts, Layout("padded"), 1.0, MICRO_BATCH)
    bits = [0.0] * len(texts)
    for owner, values in zip(owners, logps, strict=True):
        bits[owner] -= values.sum(dtype=torch.float64).item() / math.log(2)
    return bits, [len(text.encode()) for text in texts]


def _ids(tokenizer, text: str) -> list[int]:
    """As pretraining encodes it: what looks like a control token in a text is text."""
    return encode(tokenizer, [text])[0]


class ByteTrigram:
    """Byte-trigram model with Witten-Bell interpolation down to bytes and the uniform distribution: the floor that a
    pretrained model is held against (Witten & Bell 1991)."""

    def __init__(self, texts: list[str]):
        self.counts = [defaultdict(Counter) for _ in range(3)]
        for text in texts:
            data = text.encode()
            for position, byte in enumerate(data):
                for order in range(3):
                    if position >= order:
                        self.counts[order][data[position - order : position]][byte] += 1
        self.totals = [{context: sum(c.values()) for context, c in table.items()} for table in self.counts]

    def probability(self, context: bytes, byte: int) -> float:
        p = 1 / 256
        for order in range(min(2, len(context)) + 1):
            suffix = context[len(context) - order :]
            seen = self.counts[order].get(suffix)
            if seen is None:
                break
            total, kinds = self.totals[order][suffix], len(seen)
            p = (seen[byte] + kinds * p) / (total + kinds)
        return p

    def bits_per_byte(self, texts: list[str]) -> dict:
        bits, sizes = [], []
        for text in texts:
            data = text.encode()
            bits.append(-sum(math.log2(self.probability(data[max(0, i - 2) : i], b)) for i, b in enumerate(data)))
            sizes.append(len(data))
        return measured_ratio(bits, sizes, "bits/byte")


def sample_after_examples(engine, tokenizer, rows: list[dict], n: int, max_tokens: int, seed: int) -> Rollouts:
    """n continuations of each row's `few_shot` text (solved examples, then the question), each cut at its first line
    break: what a base model, which has no turns, answers."""
    prompts = [tokenizer(row["few_shot"], add_special_tokens=False)["input_ids"] for row in rows]
    completions = engine.generate(prompts, Sampling(n, max_tokens, (tokenizer.eos_token_id,)), seed)
    for completion in completions:
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        if "\n" in text:
            completion.ids = tokenizer(text.split("\n")[0], add_special_tokens=False)["input_ids"]
    return Rollouts([r for r in rows for _ in range(n)], [p for p in prompts for _ in range(n)], completions, n)


def few_shot_answers(engine, tokenizer, prompts: list[str], max_tokens: int, room: int, seed: int) -> list[str]:
    """The greedy answer to each prompt, solved examples in front: the first line of what follows, without blanks.

    UserError where a prompt and its answer are more than `room` tokens.
    """
    ids = [document_start(tokenizer) + _ids(tokenizer, text) for text in prompts]
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    found = greedy_replies(engine, ids, max_tokens, ends, room, seed)
    return [first_line(tokenizer.decode(c.ids, skip_special_tokens=True)) for c in found]


def greedy_replies(engine, prompts: list[list[int]], max_tokens: int, ends, room: int, seed: int) -> list[Completion]:
    """The likeliest continuation of each prompt. UserError where one and its answer are more than `room` tokens."""
    longest = max(map(len, prompts)) + max_tokens
    if longest > room:
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the model's context has {room}: show fewer or shorter "
            "examples, or ask for shorter answers (--max_tokens)"
        )
    return engine.generate(prompts, Sampling(1, max_tokens, tuple(ends), temperature=0.0), seed)
