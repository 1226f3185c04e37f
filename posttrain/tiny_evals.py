"""What a base model has learned of the embedded world: its sentences, its facts by how often they were read, sums.

In: a model, an engine and the world's seed. Out: figures with intervals.
Run: posttrain eval runs/tiny/pretrain --suite tiny

A fact is asked for by the beginning of its own sentence ("Babon Ashby lives in"), and is right where the value stands
next, as a whole word. How often a fact was read is counted in the training documents that the seed makes.
"""

import re
from collections import Counter

from posttrain.base_evals import ByteTrigram, bits_per_byte, few_shot_answers
from posttrain.data import tiny
from posttrain.data.tiny_world import ATTRIBUTES, fact_sentence, make_world, values_of
from posttrain.intervals import measured
from posttrain.regurgitation import bucket

BUCKETS = ((0, 0), (1, 9), (10, 99), (100, 999), (1000, None))
FACT_TOKENS, SUM_TOKENS = 12, 64


def facts(seed: int, documents: list[str]) -> list[dict]:
    """{"prompt", "answer", "values", "times"} of each fact: `values` can be guessed from, `times` counts its sentence
    in the documents. The people most is written about come first."""
    world = make_world(seed)
    values = values_of(world)
    sentences = {
        fact_sentence(person, attribute): (getattr(person, attribute), attribute)
        for person in world.people
        for attribute in ATTRIBUTES
    }
    times = Counter(
        part for text in documents for part in re.findall(r"\w+ \w+ (?:lives|works|has|likes) [^.]*\.", text)
    )
    return [
        {"prompt": sentence[: sentence.rindex(answer) - 1], "answer": answer, "times": times[sentence],
         "values": list(values[attribute])}
        for sentence, (answer, attribute) in sentences.items()
    ]  # fmt: skip


def says(answer: str, continuation: str) -> bool:
    """Whether a continuation begins with the answer as whole words."""
    return re.match(rf"{re.escape(answer)}(?!\w)", continuation) is not None


def measure(model, engine, tokenizer, seed: int, room: int, rows: int | None = None) -> dict[str, dict]:
    """name -> figure. `room`: tokens of the model's context; `rows`: documents and problems at most, None: the world's
    own numbers. Held-out documents that stand in training are left out."""
    documents = [row["text"] for row in tiny.rows("documents", "train", rows, seed)]
    read = set(documents)
    held_out = [row["text"] for row in tiny.rows("documents", "test", rows and min(rows, 400), seed)]
    held_out = [text for text in held_out if text not in read]
    metrics = {
        "bits per byte": bits_per_byte(model, tokenizer, held_out, min(room, 1024)),
        "bits per byte, byte trigram": ByteTrigram(documents).bits_per_byte(held_out),
    }
    asked = facts(seed, documents)
    answers = few_shot_answers(engine, tokenizer, [fact["prompt"] for fact in asked], FACT_TOKENS, room, seed)
    for fact, answer in zip(asked, answers, strict=True):
        fact["right"] = float(says(fact["answer"], answer))
    metrics["facts"] = measured([fact["right"] for fact in asked], "%")
    groups: dict[str, list[float]] = {}
    for fact in sorted(asked, key=lambda fact: fact["times"]):
        groups.setdefault(bucket(fact["times"], BUCKETS), []).append(fact["right"])
    metrics |= {f"facts, read {name} times": measured(right, "%") for name, right in groups.items()}
    metrics["facts, guessed"] = measured([1 / len(fact["values"]) for fact in asked], "%")
    problems = list(tiny.rows("problems", "test", rows and min(rows, 200), seed))
    lines = few_shot_answers(engine, tokenizer, [row["few_shot"] for row in problems], SUM_TOKENS, room, seed)
    right = [tiny.judged_right("sum", row["answer"], line) for row, line in zip(problems, lines, strict=True)]
    return metrics | {"sums after 4 examples": measured(list(map(float, right)), "%")}
