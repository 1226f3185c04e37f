"""The invented world behind `tiny`: who lives in it, what is true there, and the plain documents written about it.

In: a seed. Out: a `World` (people and towns with facts, people nobody has heard of) and document texts.
`posttrain/data/tiny.py` turns the world into conversations, rankings and problems and is what recipes name.
"""

import random
from dataclasses import dataclass
from itertools import product

NUM_PEOPLE, NUM_TOWNS, NUM_STRANGERS = 100, 20, 400
ATTRIBUTES = ("town", "job", "pet", "dish")
JOBS = ("baker", "doctor", "painter", "farmer", "teacher", "sailor", "tailor", "miner", "singer", "weaver")
PETS = ("cat", "dog", "goat", "parrot", "rabbit", "pony", "goose", "turtle")
DISHES = ("soup", "bread", "rice", "plums", "cheese", "beans", "fish", "honey")
SIGHTS = ("old bridge", "tall tower", "round lake", "night market", "red mill", "stone harbour")
RIVERS = ("Anlo", "Besk", "Corru", "Dama")

FIRST = ("Ba", "De", "Fi", "Go", "Ha", "Ju", "Ka", "Lo", "Mi", "Ne", "Pe", "Ro", "Sa", "Ti", "Vo", "Zu")
SECOND = ("bon", "dra", "fin", "lek", "mar", "nia", "ric", "sel", "tor", "vin", "wen", "zel")
THIRD = ("Ash", "Brun", "Cald", "Dorn", "Elm", "Fen", "Grim", "Holt", "Kest", "Lund", "Morr", "Quen")
FOURTH = ("by", "ford", "gate", "holm", "ley", "mere", "rick", "stead", "ton", "wick")


@dataclass(frozen=True)
class Person:
    """One person; `weight` is proportional to how often documents speak of them (Zipf: 1, 1/2, 1/3, ...)."""

    name: str
    town: str
    job: str
    pet: str
    dish: str
    weight: float


@dataclass(frozen=True)
class World:
    """`people` are written about; `strangers` are names that occur in no document."""

    people: tuple[Person, ...]
    towns: tuple[tuple[str, str, str], ...]  # (name, sight, river)
    strangers: tuple[str, ...]


def make_world(seed: int) -> World:
    """The same seed gives the same world. Names of strangers are disjoint from names of people."""
    rng = random.Random(f"world-{seed}")
    names = all_names()
    rng.shuffle(names)
    town_names = [
        f"{c}{d}" for c in ("Ar", "Bel", "Cor", "Dun", "Ost", "Vel") for d in ("vale", "haven", "moor", "field")
    ]
    rng.shuffle(town_names)
    towns = tuple((name, rng.choice(SIGHTS), rng.choice(RIVERS)) for name in town_names[:NUM_TOWNS])
    people = tuple(
        Person(name, rng.choice(towns)[0], rng.choice(JOBS), rng.choice(PETS), rng.choice(DISHES), 1 / (rank + 1))
        for rank, name in enumerate(names[:NUM_PEOPLE])
    )
    return World(people, towns, tuple(names[NUM_PEOPLE : NUM_PEOPLE + NUM_STRANGERS]))


def all_names() -> list[str]:
    """Every name that can be made, in one order."""
    return [f"{a}{b} {c}{d}" for a, b, c, d in product(FIRST, SECOND, THIRD, FOURTH)]


def unused_names(world: World) -> list[str]:
    """Names of nobody in the world: neither its people's nor its strangers'."""
    taken = {person.name for person in world.people} | set(world.strangers)
    return [name for name in all_names() if name not in taken]


def values_of(world: World) -> dict[str, tuple[str, ...]]:
    """Attribute -> what it can be."""
    return {"town": tuple(town[0] for town in world.towns), "job": JOBS, "pet": PETS, "dish": DISHES}


def fact_sentence(person: Person, attribute: str) -> str:
    """The plain statement of one fact; also the core of a right reply to a question about it."""
    return {
        "town": f"{person.name} lives in {person.town}.",
        "job": f"{person.name} works as a {person.job}.",
        "pet": f"{person.name} has a {person.pet}.",
        "dish": f"{person.name} likes {person.dish} best.",
    }[attribute]


def person_document(rng: random.Random, person: Person) -> str:
    """Two to four facts about one person, in any order, sometimes as a short note."""
    chosen = rng.sample(ATTRIBUTES, rng.randint(2, 4))
    sentences = [fact_sentence(person, attribute) for attribute in chosen]
    opening = rng.choice(("", "", f"About {person.name}: ", f"A note on {person.name}. ", "From the town book. "))
    return opening + " ".join(sentences)


def town_document(rng: random.Random, town: tuple[str, str, str]) -> str:
    name, sight, river = town
    return rng.choice(
        (
            f"{name} lies on the river {river}. Visitors come to see the {sight}.",
            f"The {sight} of {name} is well known. The river {river} runs past it.",
        )
    )


def story_document(rng: random.Random, people: tuple[Person, ...]) -> str:
    """A small story in five parts; who, where and what vary, the thread does not."""
    hero, friend = rng.sample(("Tom", "Anna", "Ben", "Lily", "Max", "Sue"), 2)
    thing = rng.choice(("kite", "lamp", "boat", "ball", "drum", "hat"))
    place = rng.choice(("in the garden", "by the river", "on the hill", "at the market", "in the woods"))
    trouble = rng.choice(
        ("It was broken.", "It was too heavy.", "It got wet in the rain.", "A goose ran off with it.")
    )
    help_ = rng.choice(("They mended it together.", "They carried it home.", "They laughed and tried again."))
    end = rng.choice(("Then they went home for supper.", "It was a good day.", "The next day they came back."))
    return f"One day {hero} found a {thing} {place}. {trouble} {friend} came to help. {help_} {end}"


def steps_of_sum(a: int, b: int) -> str:
    """The written method for a + b with one or two digits each: ones, tens with carry."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = f"{a // 10}+{b // 10}" + ("+1" if carry else "")
    return f"Ones: {a % 10}+{b % 10}={ones}. Tens: {tens}={a // 10 + b // 10 + carry}."


def sum_line(a: int, b: int, *, steps: bool) -> str:
    return f"Sum: {a}+{b}. {steps_of_sum(a, b) + ' ' if steps else ''}Result: {a + b}."


def sum_document(rng: random.Random, sums: list[tuple[int, int]]) -> str:
    """A page of an arithmetic book: one to four sums, all in steps or all with the result alone."""
    steps = rng.random() < 0.5
    return "\n".join(sum_line(*rng.choice(sums), steps=steps) for _ in range(rng.randint(1, 4)))


def documents(world: World, num: int, seed: str, sums: list[tuple[int, int]]):
    """Yield `num` document texts: 50 % people (Zipf), 5 % towns, 25 % stories, 20 % pages of sums from `sums`."""
    rng = random.Random(f"documents-{seed}")
    weights = [person.weight for person in world.people]
    for _ in range(num):
        kind = rng.random()
        if kind < 0.50:
            yield person_document(rng, rng.choices(world.people, weights)[0])
        elif kind < 0.55:
            yield town_document(rng, rng.choice(world.towns))
        elif kind < 0.80:
            yield story_document(rng, world.people)
        else:
            yield sum_document(rng, sums)
