"""The tokenizer's part of `posttrain forecast`: two trainings on few texts, and the line through both.

In: its YAML as `forecast_plan.Asked`. Out: bytes a second and the time of all texts.
"""

import math
import time
from dataclasses import replace

from posttrain.forecast_plan import Asked

ROWS = 4000


def forecast(asked: Asked, data, found: dict, say, measure: bool) -> dict:
    """Print and return the figures: reading grows with the text, learning merges hardly does."""
    config, source = asked.configs["TokenizerConfig"], asked.configs["DataConfig"]
    size = data.available
    found |= {"data": {"unit": "bytes", "available": size}, "hours": None, "measured": None, "seconds_a_step": None}
    about = f"about {size:,.0f} bytes in {data.rows:,} texts" if size else f"unknown ({data.why})"
    say("data", about)
    say("vocabulary", f"{config.vocab_size:,} tokens at most")
    if not measure:
        say("time", "not computed: it is not bound by arithmetic; leave out --no-measure")
        return found
    _timed(config, ["warm up"])
    points = [_timed(config, texts) for texts in _samples(source, asked.key("seed"))]
    rate, fixed = line(points)
    (small, few), (large, many) = points
    found["measured"] = {"bytes": [small, large], "seconds": [few, many], "bytes_per_second": rate}
    say("measured", f"{small:,} and {large:,} bytes in {few:.3g} and {many:.3g} s: {rate / 1e6:,.3g} MB/s on this CPU")
    if size:
        read = size if config.max_chars is None else min(size, config.max_chars)
        found["hours"] = (fixed + read / rate) / 3600
        say("time", f"{found['hours'] * 3600:,.3g} s without reading the data and comparing tokenizers")
    return found


def line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(bytes a second, seconds that no text takes) of two (bytes, seconds). Where the larger took no longer, noise has
    hidden the slope: then all of its time counts as reading, which errs on the side of too long."""
    (small, few), (large, many) = points
    if many <= few:
        return large / many, 0.0
    rate = (large - small) / (many - few)
    return rate, max(0.0, many - large / rate)


def _samples(source, seed: int) -> tuple[list[str], list[str]]:
    """Half of the texts of a sample, and all of them."""
    from posttrain.data import load_rows

    taken = source if source.dataset_mixture else replace(source, max_rows=min(ROWS, source.max_rows or ROWS))
    texts = [row["text"] for row in load_rows(taken, source.dataset_train_split, seed, ("text",))[0][:ROWS]]
    return texts[: math.ceil(len(texts) / 2)], texts


def _timed(config, texts: list[str]) -> tuple[int, float]:
    """(bytes, seconds) of a training by the stage's own function: the fastest of three."""
    from posttrain.tokenizer import special_tokens, train_tokenizer

    special = special_tokens(config.special_tokens, config.reserved_tokens)
    options = {"split": config.split, "special": special, "min_frequency": config.min_frequency}
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        train_tokenizer(texts, config.vocab_size, **options)
        seconds.append(time.perf_counter() - began)
    return sum(len(text.encode()) for text in texts), min(seconds)
