"""What pretraining starts from and what it gains: the model, texts as tokens, bits per byte, samples.

In: the configs of recipes/pretrain.py, and texts. Out: a model and its tokenizer, token shards; then metrics, gains
and samples as manifests store them: bits per byte of held-out text against a byte-trigram model of the training text,
or, where training went on from a checkpoint, against that.
"""

import json
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from posttrain import base_evals, intervals, shapes
from posttrain.data import Stream
from posttrain.environment import usable_cores
from posttrain.errors import UserError
from posttrain.evals import EVAL_SEED
from posttrain.models import ModelConfig, load_pair, load_tokenizer
from posttrain.pretrain import PretrainConfig
from posttrain.rl.rollout import HFEngine, Sampling
from posttrain.shards import INDEX, TokenShards, encode, require_same, write_shards

COLUMNS = ("text",)
TRIGRAM_BYTES = 20_000_000  # of training text that the byte-trigram model counts: about 20 s
BEGINNING = 8  # tokens of a held-out text that a sample continues


def start_model(shape: shapes.ShapeConfig, config: PretrainConfig):
    """(model, tokenizer): the checkpoint to go on from, or random weights of that shape."""
    if config.model_name_or_path is not None:
        return load_pair(ModelConfig(config.model_name_or_path, attn_implementation=config.attn_implementation))
    tokenizer = load_tokenizer(config.tokenizer_path)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has no end-of-text token (eos_token), which must stand before "
            "each document: set eos_token in its tokenizer_config.json"
        )
    return shapes.make_model(shape, tokenizer, config.attn_implementation), tokenizer


def token_shards(stage, rows: Iterable[dict], tokenizer, config: PretrainConfig) -> TokenShards:
    """The training texts as shards: those that are there already, or written now by the main process; the others wait,
    for as long as it takes."""
    folder = Path(config.shards_dir or stage.output_dir / "tokens")
    digest = stage.data[0]["sha256"]
    if stage.main:
        texts = (row["text"] for row in rows)
        began, there = time.monotonic(), (folder / INDEX).is_file()
        index = write_shards(folder, texts, tokenizer, digest, workers=config.shard_workers or usable_cores())
        stage.data[0] |= {key: index[key] for key in ("tokens", "documents", "bytes")}
        if isinstance(rows, Stream):
            stage.data[0] |= {"rows": index["documents"], **({} if there else _left_out(rows))}
        how = "are in" if there else f"took {time.monotonic() - began:.1f} s, in"
        stage.note(f"{index['tokens']:,} tokens of {index['documents']:,} documents {how} {folder}")
    else:
        while not (folder / INDEX).is_file():  # no collective: they give up after minutes, and this may take hours
            time.sleep(1.0)
        require_same(folder, tokenizer, digest, hashes=False)
    return TokenShards(folder)


def _left_out(stream: Stream) -> dict:
    facts = stream.description()
    return {key: facts[key] for key in ("skipped", "leaked") if facts.get(key)}


class Watch:
    """Measures one model while it learns and after: bits per byte of held-out texts, and samples."""

    def __init__(self, stage, model, tokenizer, test: list[dict], config: PretrainConfig):
        self.stage, self.model, self.tokenizer, self.config = stage, model, tokenizer, config
        self.texts = [row["text"] for row in test]
        self.length = config.sequence_length
        self.prompts = config.sample_prompts or [self._beginning(text) for text in self.texts[:2]]
        self.start = self.bits() if config.model_name_or_path is not None and stage.main else None

    def _beginning(self, text: str) -> str:
        (ids,) = encode(self.tokenizer, [text])
        return self.tokenizer.decode(ids[:BEGINNING])

    def bits(self) -> dict:
        """Bits a byte of the held-out texts, with its interval."""
        return base_evals.bits_per_byte(self.model, self.tokenizer, self.texts, self.length)

    def samples(self) -> list[str]:
        """A continuation of each prompt at temperature 0.8; the same seed each time."""
        prompts = [[self.tokenizer.eos_token_id, *ids] for ids in encode(self.tokenizer, self.prompts)]
        sampling = Sampling(1, self.config.sample_tokens, (self.tokenizer.eos_token_id,), temperature=0.8)
        found = HFEngine(self.model, self.tokenizer).generate(prompts, sampling, EVAL_SEED)
        return [self.tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in found]

    def during(self, step: int) -> None:
        """A line of log.jsonl and lines of samples.jsonl."""
        self.stage.log(step, **{"held_out_bits_per_byte": self.bits()["value"]})
        lines = zip(self.prompts, self.samples(), strict=True)
        self.stage.append("samples.jsonl", [{"step": step, "prompt": p, "text": text} for p, text in lines])

    def after(self, rows: Iterable[dict], goal: float) -> tuple[dict, list[dict], list[dict]]:
        """(metrics, gains, samples) of the trained model. `goal`: share of the bits per byte that is to go."""
        if not self.stage.main:
            return {}, [], []
        self.model.eval()
        bits, metrics = self.bits(), {}
        if self.start is not None:
            before, label = self.start, "start"
        else:
            texts, whole = some_texts(rows, TRIGRAM_BYTES)
            before = base_evals.ByteTrigram(texts).bits_per_byte(self.texts)
            label = "byte trigram" if whole else f"byte trigram of the first {TRIGRAM_BYTES // 1_000_000} MB"
            metrics["trigram"] = before
        gain = intervals.gain(
            "bits per byte", before, bits, labels=(label, "base model"), better="lower", goal=f">= {goal:.0%} fewer",
            passed=bits["high"] <= (1 - goal) * before["low"],
        )  # fmt: skip
        return {"bits per byte": bits, **metrics}, [gain], self._as_it_learned()

    def _as_it_learned(self) -> list[dict]:
        """What the model made of each prompt, first, in the middle and last."""
        file, by_prompt = self.stage.output_dir / "samples.jsonl", {prompt: [] for prompt in self.prompts}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            row = json.loads(line)
            by_prompt[row["prompt"]].append({"by": f"base model, step {row['step']}", "text": row["text"]})
        for prompt, text in zip(self.prompts, self.samples(), strict=True):
            seen = by_prompt[prompt]
            kept = [seen[0], seen[len(seen) // 2]] if len(seen) > 2 else seen
            by_prompt[prompt] = [*kept, {"by": "base model", "text": text}]
        return [{"prompt": prompt, "replies": replies} for prompt, replies in by_prompt.items()]


def some_texts(rows: Iterable[dict], most: int) -> tuple[list[str], bool]:
    """(texts from the first on, of `most` bytes or a little more, whether these are all)."""
    texts, size, source = [], 0, iter(rows)
    for row in source:
        texts.append(row["text"])
        size += len(row["text"].encode())
        if size >= most:
            return texts, not list(islice(source, 1))
    return texts, True
