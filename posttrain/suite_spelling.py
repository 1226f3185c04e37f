"""The suite spelling: counting and spelling, by how much of the word a token hides.

In: a chat model, or a base model (asked after solved examples), rows of the data set `spelling`
(posttrain/data/spelling.py) and `Settings`. Out: `Found`: the share right over all, by kind of question, and by tokens
a character of what is asked about, in the model's own tokenizer; with --tools all of it also with them. Launched by

    posttrain eval MODEL --suite spelling --rows 210
    posttrain eval MODEL --suite spelling --tools python

A word of few tokens for its characters is hard: its letters are nowhere in the prompt. A row of dots is counted from
tokens that hold several each. Prompts are the observations; the change that tools make is paired.
"""

from posttrain.errors import UserError
from posttrain.intervals import measured
from posttrain.suite_table import aligned, shown
from posttrain.suite_tools import CALLS, WITH, WITHOUT, Both, Settings, judged, means, samples, share, stored
from posttrain.suites import difference

EDGES = (0.15, 0.25, 0.35, 0.5)  # tokens a character: bins end there
TOOLS_CHANGE = "right with tools less without"


def measure(subject, rows: list[dict], settings: Settings):
    """Ask and judge. UserError for rows that are not of the data set `spelling`."""
    from posttrain.suite_replies import Found

    for index, row in enumerate(rows):
        if missing := [key for key in ("answer", "form", "kind", "word") if key not in row]:
            raise UserError(f"--suite spelling: row {index} has no {missing[0]} (its columns: {', '.join(row)}); take "
                            "--data spelling, or rows made as posttrain/data/spelling.py makes them")  # fmt: skip
    both, n = Both(subject, rows, settings), settings.num_generations
    asked = both.bare.rows
    subject.study.note(f"{len(asked)} prompts, {n} replies each{', with tools and without' if both.tools else ''}")
    replies = both.replies()
    scores = judged(replies, "spelled", subject.tokenizer)
    columns = means(scores, n)
    if both.tools:
        columns[CALLS] = share(replies[WITH], lambda one: one.calls > 0)
    densities = [tokens_per_character(subject.tokenizer, row, both.bare.chats) for row in asked]
    groups = groups_of(asked, densities)
    found = Found(rows=[row["row"] for row in asked])
    for place, members in groups.items():
        for name, column in columns.items():
            inside = [value if member else None for value, member in zip(column, members, strict=True)]
            found.by_row[f"{title(name, both)}{place}"] = inside
    first = WITH if both.tools else WITHOUT
    if both.bare.chats:
        found.by_row["replies that end"] = share(replies[first], lambda one: one.stop == "stop")
    found.metrics = {
        name: measured([v for v in column if v is not None], "%") for name, column in found.by_row.items()
    }
    if both.tools:
        gaps = [100 * (new - old) for new, old in zip(columns[WITH], columns[WITHOUT], strict=True)]
        found.metrics[TOOLS_CHANGE] = difference(gaps, "points")
    found.samples = samples(replies[first], scores[first], subject.tokenizer, both.bare.stops)
    found.more = {**stored(settings), "engine": subject.engine.name, "stop_ids": list(both.bare.stops)}
    found.more["groups"] = {place: sum(members) for place, members in groups.items()}
    found.more["density"] = points(densities, columns, groups)
    return found


def title(name: str, both: Both) -> str:
    """`right` alone where there are no tools to tell apart."""
    return "right" if name == WITHOUT and not both.tools else name


def tokens_per_character(tokenizer, row: dict, chats: bool) -> float:
    """Tokens that hold a character of the word where the question names it, over its characters."""
    text = row["prompt"][-1]["content"] if chats else row["few_shot"]
    start = text.rindex(row["word"])
    stop = start + len(row["word"])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sum(low < stop and high > start for low, high in offsets) / len(row["word"])


def groups_of(rows: list[dict], densities: list[float]) -> dict[str, list[bool]]:
    """Suffix of a figure's name -> which prompts it is over: all, each kind, each bin of tokens a character."""
    found = {"": [True] * len(rows)}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found[f", {kind}"] = [row["kind"] == kind for row in rows]
    for low, high in zip((0.0, *EDGES), (*EDGES, 2.0), strict=True):
        members = [low < density <= high for density in densities]
        if any(members):
            name = f"up to {high:g}" if low == 0 else f"above {low:g}" if high == 2 else f"{low:g} to {high:g}"
            found[f", {name} tokens a character"] = members
    return found


def points(densities: list[float], columns: dict[str, list[float]], groups: dict[str, list[bool]]) -> list[dict]:
    """The bins as points of a picture: {"density": mean tokens a character, label: figure, ...}."""
    found = []
    for place, members in groups.items():
        if place.endswith("tokens a character"):
            inside = [index for index, member in enumerate(members) if member]
            point = {"density": sum(densities[index] for index in inside) / len(inside)}
            found.append(point | {name: measured([c[i] for i in inside], "%") for name, c in columns.items()})
    return found


# --- shown


def lines(result) -> list[str]:
    """A table: a row a kind of question, then a row a bin."""
    found = result.found
    names = [name for name in (WITH, WITHOUT, "right", CALLS) if name in found.metrics]
    rows = [[result.target.name, "prompts", *names]]
    for place, count in found.more["groups"].items():
        cells = [shown(found.metrics[f"{name}{place}"]) for name in names]
        rows.append([place.removeprefix(", ") or "all", str(count), *cells])
    change = [f"{TOOLS_CHANGE}: {shown(found.metrics[TOOLS_CHANGE])} points"] if TOOLS_CHANGE in found.metrics else []
    return [*aligned(rows), *change]


EXPLAINED = "tokens a character: of the word or row of dots, in the model's own tokenizer; brackets: 95 % intervals"
