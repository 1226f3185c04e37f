"""What the arena asks of its models: which reply to which prompt, and who stands behind which label.

In: a `Pool` of models, prompts typed or drawn from a data set. Out: an `Item` for `Votes`: one prompt and its replies
in an order of its own, so that neither label nor speed tells who wrote what. No page here: that is arena_room.py.
"""

import random
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from posttrain.board.stages import MOST_CHARACTERS, Entry, Pool, Settings
from posttrain.board.votes import MOST_REPLIES, Item, Votes
from posttrain.data import DataConfig, load_rows
from posttrain.data.validate import find_bad_text, find_fault, row_key
from posttrain.errors import UserError

MOST_PROMPTS = 2000  # of a data set, kept in memory


class Prompts:
    """Prompts of a data set, those that were voted on least first, in an order drawn once; safe in several threads."""

    def __init__(self, rows: list[dict], source: str, votes: Votes, seed: int = 0):
        self.rows, self.source, self.lock = [row["prompt"] for row in rows], source, threading.Lock()
        random.Random(seed).shuffle(self.rows)
        asked = Counter(row_key(vote["prompt"]) for vote in votes.read())
        self.asked = [asked[row_key(prompt)] for prompt in self.rows]

    def draw(self) -> list[dict]:
        """The messages of one prompt."""
        with self.lock:
            index = min(range(len(self.rows)), key=self.asked.__getitem__)
            self.asked[index] += 1
            return self.rows[index]


def load_prompts(data: DataConfig, split: str, seed: int, votes: Votes) -> Prompts:
    """Held-out prompts of any data set with a `prompt`. Raises UserError where there are none."""
    rows, _ = load_rows(data, split, seed, ("prompt",))
    kind = f" ({data.dataset_config})" if data.dataset_config else ""
    return Prompts(rows, f"{data.dataset_name}{kind}, {split}", votes, seed)


def prompts_of(entries: list[Entry], split: str, votes: Votes) -> Prompts | None:
    """tiny's prompts, of the same world, where a stage learned from tiny; else None."""
    for entry in entries:
        manifest = entry.manifest or {}
        if any(source.get("name") == "tiny" for source in manifest.get("data", ())):
            config = manifest["config"]
            seed = config["seed"] if config.get("dataset_seed") is None else config["dataset_seed"]
            return load_prompts(DataConfig("tiny", "prompts", max_rows=MOST_PROMPTS), split, seed, votes)
    return None


def typed(text: str) -> list[dict]:
    """A text from the browser as messages. UserError for one that no stage could learn from."""
    messages = [{"role": "user", "content": str(text).encode("utf-8", "replace").decode()}]
    row = {"prompt": messages}
    fault = find_fault(row, ("prompt",)) or find_bad_text(row, row_key(row), MOST_CHARACTERS)
    if fault:
        raise UserError("the prompt is empty; type one" if fault[0] == "empty_content" else f"the prompt: {fault[1]}")
    return messages


def line_up(names: list[str], num: int, rng: random.Random) -> list[str]:
    """Who replies: `num` of several stages, each once, or one stage `num` times; in the order they are shown in.

    Raises UserError where there is nothing to compare.
    """
    if not isinstance(names, list) or not names:
        raise UserError("no stage is chosen; choose two or more, or one to rank several of its replies")
    if not isinstance(num, int) or not 2 <= num <= MOST_REPLIES:
        raise UserError(f"replies: found {num}, expected 2 to {MOST_REPLIES}")
    names = list(dict.fromkeys(names))
    return rng.sample(names, min(num, len(names))) if len(names) > 1 else names * num


def ask(
    pool: Pool, names: list[str], num: int, prompt: list[dict], settings: Settings, source: str
) -> Iterator[int | Item]:
    """Yield how many replies are there after each, then the `Item`. Closing the iterator stops the sampling.

    Every reply has a seed of its own, counted up from the item's. Raises UserError as `Pool.stream` does.
    """
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    shown = []
    for index, name in enumerate(line_up(names, num, random.Random(seed))):
        stream = pool.stream(name, prompt, Settings(**asdict(settings) | {"seed": seed + index}))
        try:
            text = ""
            for piece in stream:
                text = piece.text
                yield index
        finally:
            stream.close()
        shown.append((name, text))
    facts = asdict(settings) | {"models": {name: _model_facts(pool.entry(name)) for name, _ in shown}}
    del facts["seed"]
    yield Item(prompt, shown, seed, facts, source)


def _model_facts(entry: Entry) -> dict:
    """Which weights replied, so that a vote still means something when the run is gone."""
    files = (entry.manifest or {}).get("files", {})
    weights = {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}
    return {"path": entry.path, "sha256": weights}
