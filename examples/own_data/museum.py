"""Your own data: a JSONL file with columns of its own, and the two small functions that turn its rows into ours.

    posttrain inspect --config examples/own_data/sft.yaml --html rows.html
    accelerate launch recipes/sft.py --config examples/own_data/sft.yaml

What came out: of 24 questions, worded as none that it learned, 0 % [0, 14] -> 66 % [48, 84] answered right.

In: rows of museum.jsonl, {"visitor", "clerk", "stars", "desk"}: what visitors asked at a museum's desk, what the clerk
said, how the visitor liked it; some answers are wrong or rude. museum_held_out.jsonl, {"visitor", "number"}: the same
things asked in other words. Out: {"messages"} to learn from, {"prompt", "answer"} to be asked.
"""

from collections.abc import Iterable, Iterator


def chats(rows: Iterable[dict], min_stars: int = 3) -> Iterator[dict]:
    """A conversation of each row that the visitor gave `min_stars` or more: the YAML's `dataset_adapter`."""
    for row in rows:
        if row["stars"] >= min_stars:
            asked, said = row["visitor"], row["clerk"]
            yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def questions(rows: Iterable[dict]) -> Iterator[dict]:
    """A prompt and the number that a right reply ends with: the YAML's `eval_dataset_adapter`."""
    for row in rows:
        yield {"prompt": [{"role": "user", "content": row["visitor"]}], "answer": row["number"]}
