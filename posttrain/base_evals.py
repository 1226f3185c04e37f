"""Measure base models: bits per byte of held-out text, the byte-trigram floor, answers after solved examples.

In: a causal LM (or an engine) and texts or rows. Out: figures with intervals.
"""

import math
from collections import Counter, defaultdict

import torch

from posttrain.intervals import measured_ratio
from posttrain.rl.rollout import Sampling, model_logps
from posttrain.rl.types import Rollouts


def bits_per_byte(model, tokenizer, texts: list[str], max_length: int) -> dict:
    """Bits a byte of `texts` under `model`, each text begun after the end-of-text token; interval over texts.

    -log2 p(text) summed over all texts / bytes of all texts; the interval is that of a ratio of means.
    """
    bits, sizes = [], []
    for text in filter(None, texts):  # an empty one has no bytes
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[i : i + max_length - 1] for i in range(0, len(ids), max_length - 1)]
        logps = model_logps(model, [[tokenizer.eos_token_id]] * len(chunks), chunks, 1.0)
        bits.append(-torch.cat(logps).sum().item() / math.log(2))
        sizes.append(len(text.encode()))
    return measured_ratio(bits, sizes, "bits/byte")


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
