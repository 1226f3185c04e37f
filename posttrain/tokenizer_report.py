"""What a tokenizer is worth: bytes per token by language and by domain, beside other tokenizers.

In: a trained tokenizer, held-out rows, names of others. Out: metrics and a gain for the manifest, its entry
`compression`, and that as a table for the terminal:

    {"tokenizers": [{"name", "size"}], "missing": {name: why},
     "groups": [{"kind": "held-out" | "language" | "domain", "name", "texts", "bytes", "tokens": {tokenizer: count}}]}

Bytes per token is compression alone: text in fewer tokens is cheaper to train on and leaves more room in the context,
but whether a model learns more from it, only its bits per byte say.
"""

from collections.abc import Callable

from posttrain.data.sample_texts import DOMAINS, LANGUAGES
from posttrain.intervals import clearly_higher, gain, measured_ratio
from posttrain.tokenizer import BYTES
from posttrain.tokenizer_peers import NotAtHand, Peer, gpt2, load_peers, of_transformers

OURS = "this one"
MOST_GROUPS = 12  # of a column's values; the rest, of fewer bytes each, is one group
BATCH = 256  # texts encoded at a time
UNIT = "bytes/token"


def measure(
    tokenizer, special: int, rows: list[dict], column: str | None, names: list[str], goal: float = 0.0
) -> dict:
    """`metrics`, `gains` and `compression` for `Stage.finish`.

    `special` is the number of special tokens; `column` groups the held-out `rows`; `names` are `compare_tokenizers`;
    `goal` is the share by which bytes per token should be higher than those of GPT-2 at the same number of merges.
    Intervals are over held-out texts.
    """
    peers, missing = load_peers(names)
    peers = [of_transformers(OURS, tokenizer), *peers]
    texts = [row["text"] for row in rows]
    counts = {peer.name: count_tokens(peer, texts) for peer in peers}
    sizes = [len(text.encode()) for text in texts]
    groups = [_group("held-out", "all", sizes, counts)]
    if column is not None:
        groups += by_column(column, [str(row[column]) for row in rows], sizes, counts)
    for kind, samples in (("language", LANGUAGES), ("domain", DOMAINS)):
        for name, text in samples.items():
            found = {peer.name: peer.count([text]) for peer in peers}
            groups.append(_group(kind, name, [len(text.encode())], found))
    metrics = {_metric(name): measured_ratio(sizes, found, UNIT) for name, found in counts.items()}
    facts = {
        "tokenizers": [{"name": peer.name, "size": peer.size} for peer in peers],
        "missing": missing,
        "groups": groups,
    }
    merges = len(tokenizer) - BYTES - special
    before = _same_size(merges, sizes, lambda peer: count_tokens(peer, texts))
    metrics |= {_metric(name): figure for name, figure in before.items()}
    (label, start), ours = next(iter(before.items())), metrics[_metric(OURS)]
    compared = gain(
        "bytes per token", start, ours, labels=(label, "as many of its own"),
        goal=f">= {goal:.0%} more" if goal else "higher by more than the intervals",
        passed=clearly_higher(start, ours) and ours["value"] >= (1 + goal) * start["value"],
    )  # fmt: skip
    return {"metrics": metrics, "gains": [compared], "compression": facts}


def count_tokens(peer: Peer, texts: list[str]) -> list[int]:
    """Tokens of each text."""
    return [count for at in range(0, len(texts), BATCH) for count in peer.count(texts[at : at + BATCH])]


def by_column(column: str, values: list[str], sizes: list[int], counts: dict[str, list[int]]) -> list[dict]:
    """A group for each value of a column, most bytes first; after MOST_GROUPS one for the rest."""
    total: dict[str, int] = {}
    for value, size in zip(values, sizes, strict=True):
        total[value] = total.get(value, 0) + size
    order = sorted(total, key=lambda value: (-total[value], value))
    own = set(order if len(order) <= MOST_GROUPS else order[: MOST_GROUPS - 1])
    rest = f"{len(order) - len(own)} others"
    members: dict[str, list[int]] = {value: [] for value in order if value in own}
    for index, value in enumerate(values):
        members.setdefault(value if value in own else rest, []).append(index)
    return [
        _group(
            "held-out", f"{column} {value}", [sizes[i] for i in indices],
            {name: [found[i] for i in indices] for name, found in counts.items()},
        )
        for value, indices in members.items()
    ]  # fmt: skip


def _group(kind: str, name: str, sizes: list[int], counts: dict[str, list[int]]) -> dict:
    tokens = {tokenizer: sum(found) for tokenizer, found in counts.items()}
    return {"kind": kind, "name": name, "texts": len(sizes), "bytes": sum(sizes), "tokens": tokens}


def _metric(name: str) -> str:
    return "bytes per token" if name == OURS else f"bytes per token, {name}"


def _same_size(merges: int, sizes: list[int], count: Callable[[Peer], list[int]]) -> dict[str, dict]:
    """{label: figure} of what a tokenizer learned elsewhere reaches with as many merges: GPT-2's first ones; where its
    files are not at hand, single bytes, which no training at all would give."""
    try:
        peer = gpt2(merges)
    except NotAtHand:
        return {"single bytes": {"value": 1.0, "low": 1.0, "high": 1.0, "n": len(sizes), "unit": UNIT}}
    return {peer.name: measured_ratio(sizes, count(peer), UNIT)}


def table(compression: dict) -> str:
    """Bytes per token of each group as plain text; of languages in brackets the tokens against the same in English."""
    names = [each["name"] for each in compression["tokenizers"]]
    english = next(g["tokens"] for g in compression["groups"] if (g["kind"], g["name"]) == ("language", "English"))
    head = [f"{each['name']} ({each['size']:,})" for each in compression["tokenizers"]]
    rows = [["bytes per token", "bytes", *head]]
    for group in compression["groups"]:
        cells = []
        for name in names:
            ratio = group["bytes"] / max(1, group["tokens"][name])
            times = group["tokens"][name] / english[name]
            cells.append(f"{ratio:.2f}" + (f" (x{times:.2f})" if group["kind"] == "language" else " " * 8))
        rows.append([f"{group['kind']}: {group['name']}", f"{group['bytes']:,}", *cells])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    lines.append("(x...): tokens against the same sentences in English")
    return "\n".join(lines + [f"{name} is not compared: {why}" for name, why in compression["missing"].items()])
