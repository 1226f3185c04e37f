"""The embedded world `tiny` with tools: what to look up, what to work out by a tool, and what needs none.

In: a kind, a split, a seed. Out: rows. Use in a config: `dataset_name: tiny`, `dataset_config: tool_conversations`.

- `library`: {"title", "text"}, a fact a row, of the world's people, of the strangers and of MORE others. No document
  of pretraining speaks of the latter two: a model can only look them up. recipes/library.py writes the rows to a
  folder for the tool `search`.
- `tool_conversations`: {"messages", "tools"}. Labellers differ: half of each kind of question is answered by a call,
  half at once; where no tools are told (WITHOUT of them, no column `tools`), all are answered at once. In ECHOES of
  the rows words are only said again.
- `tool_problems`: {"prompt", "answer", "others", "subject", "kind"} for RL and evaluation (posttrain/suite_tools.py).

The kinds of questions, in equal shares among held-out problems: `fact` (the people most is written about),
`rare fact` (the others), `stranger`, `sum` of two digits, `long sum` of three or four, `letters` (of a name).
Facts that these conversations state, those of the problems to train on and the held-out ones are three different
sets: a policy trained on what SFT has just taught it would find itself surer than it is. Conversations look up the
many others and each of them hardly twice, so that what they teach is to read the result and not to remember it.
"""

import random
from itertools import islice

from posttrain.data import tiny
from posttrain.data.tiny_world import (
    ATTRIBUTES,
    DISHES,
    FIRST,
    FOURTH,
    JOBS,
    PETS,
    SECOND,
    THIRD,
    Person,
    World,
    fact_sentence,
    make_world,
    steps_of_sum,
    unused_names,
    values_of,
)

KINDS = ("library", "tool_conversations", "tool_problems")
DEFAULT_ROWS = {
    "library": {"train": None, "test": None},
    "tool_conversations": {"train": 20_000, "test": 600},
    "tool_problems": {"train": 4_000, "test": 300},
}
QUESTIONS = ("fact", "rare fact", "stranger", "sum", "long sum", "letters")
# Among the questions about people that RL trains on as many can be known as have to be looked up: where most have to,
# what is learned first is to look up everybody.
TRAINED_ON = ("fact", "rare fact", "fact", "stranger", "sum", "long sum", "letters", "sum")
TOOL_OF = {
    "fact": "search", "rare fact": "search", "stranger": "search", "sum": "calculator", "long sum": "calculator",
    "letters": "python",
}  # fmt: skip
FAMOUS = 10  # of the people, by how much is written about them: 56 % of all that is written
ANY = {"search": {"url": "http://localhost"}}  # only the tools' schemas are asked for, which no option changes
NOT_AT_ONCE = "I do not know."  # what labellers say to long sums without a calculator
WEIGHTS = (3, 1, 2, 2, 3, 1)  # of QUESTIONS in conversations: what takes longer to learn comes more often
ECHOES = 0.2  # share of conversations in which words are only said again: pretraining never repeats a town or a dish
MORE = 3000  # people of the library beside those that the world knows by name
WITHOUT = 0.2  # share of conversations without tools
LETTERS = ("How many letters are in {name}?", "How many letters does {name} have?")


def rows(kind: str, split: str, num: int | None, seed: int):
    """Yield `num` rows (None: the kind's default number) of a kind and split of the world of `seed`."""
    world = make_world(seed)
    num = DEFAULT_ROWS[kind][split] if num is None else num
    if kind == "library":
        return islice(library(world, seed), num)
    return (conversations if kind == "tool_conversations" else problems)(world, split, num, seed)


# ---- the library ----------------------------------------------------------------------------------------------------


def everybody(world: World, seed: int) -> list[Person]:
    """The people, then the strangers and MORE others with facts drawn by the seed; `weight` 0: nothing is written."""
    rng, towns = random.Random(f"library-{seed}"), [town[0] for town in world.towns]
    others = rng.sample(unused_names(world), MORE)
    drawn = [
        Person(name, rng.choice(towns), rng.choice(JOBS), rng.choice(PETS), rng.choice(DISHES), weight=0)
        for name in (*world.strangers, *others)
    ]
    return [*world.people, *drawn]


def library(world: World, seed: int):
    """Yield {"title", "text"}, a row a fact."""
    for person in everybody(world, seed):
        for attribute in ATTRIBUTES:
            yield {"title": f"{person.name}, {attribute}", "text": fact_sentence(person, attribute)}


# ---- questions ------------------------------------------------------------------------------------------------------


class Asker:
    """Draws questions of one split. A task is a dict: `kind`, `question`, `answer`, `others` (wrong values of the same
    kind; None for what is worked out), `subject` (whom a fact is of, else ""), `tool` and `argument` (of the call that
    answers it), `result` (what the tool says), `said` (the reply after it), `at_once` (one without, right or not)."""

    def __init__(self, world: World, split: str, seed: int, rng: random.Random, *, taught: bool):
        """`taught`: of the training facts those that conversations state, else those of the problems."""
        self.rng, self.split, self.sums = rng, split, tiny.sums(split)
        part = "test" if split == "test" else "taught" if taught else "problems"
        known = [(p, a) for p in world.people for a in ATTRIBUTES if part_of(p, a) == part]
        famous = {person.name for person in world.people[:FAMOUS]}
        shelf = everybody(world, seed)
        unheard = shelf[-MORE:] if taught and split == "train" else self._strangers(world, shelf)
        self.facts = {
            "fact": [(p, a) for p, a in known if p.name in famous],
            "rare fact": [(p, a) for p, a in known if p.name not in famous],
            "stranger": [(p, a) for p in unheard for a in ATTRIBUTES],
        }
        self.values = values_of(world)

    def _strangers(self, world: World, shelf: list[Person]) -> list[Person]:
        names = set(tiny.strangers(world, self.split))
        return [person for person in shelf if person.name in names]

    def draw(self, kind: str) -> dict:
        if kind in self.facts:
            task = self.fact(kind)
        else:
            task = {"sum": self.sum, "long sum": self.long_sum, "letters": self.letters}[kind]()
        return {"kind": kind, "tool": TOOL_OF[kind], **task}

    def fact(self, kind: str) -> dict:
        """A fact is looked up by its title's words, "Titor Ashby town"."""
        person, attribute = self.rng.choice(self.facts[kind])
        answer, said = getattr(person, attribute), fact_sentence(person, attribute)
        return {
            "question": self.rng.choice(tiny.FACT_QUESTIONS[attribute]).format(name=person.name),
            "subject": person.name, "answer": answer,
            "others": [value for value in self.values[attribute] if value != answer],
            "argument": f"{person.name} {attribute}", "result": f"{person.name}, {attribute}: {said}", "said": said,
            "at_once": tiny.UNKNOWN.format(name=person.name) if kind == "stranger" else said,
        }  # fmt: skip

    def sum(self) -> dict:
        a, b = self.rng.choice(self.sums)
        return self._addition(a, b, f"{steps_of_sum(a, b)} The answer is {a + b}.")

    def long_sum(self) -> dict:
        while True:
            a, b = (self.rng.randrange(10 ** (n - 1), 10**n) for n in (self.rng.randint(3, 4), self.rng.randint(3, 4)))
            if self._is_mine(f"sum {min(a, b)} {max(a, b)}"):
                return self._addition(a, b, NOT_AT_ONCE)

    def _addition(self, a: int, b: int, at_once: str) -> dict:
        question = self.rng.choice(tiny.SUM_QUESTIONS).format(a=a, b=b)
        return _worked(question, str(a + b), f"{a}+{b}", at_once)

    def letters(self) -> dict:
        """The letters of any two names that are made as the world makes them."""
        while True:
            name = " ".join("".join(map(self.rng.choice, parts)) for parts in ((FIRST, SECOND), (THIRD, FOURTH)))
            if self._is_mine(f"letters {name}"):
                break
        count = len(name) - 1
        at_once = f"The answer is {count + self._slip((-2, -1, 1, 2))}."
        return _worked(self.rng.choice(LETTERS).format(name=name), str(count), f"len('{name}')-1", at_once)

    def echo(self) -> list[dict]:
        """Three to eight words that answers have, to be said again: what a model needs that is to read a result."""
        words = [self.rng.choice(self.values[self.rng.choice(ATTRIBUTES)]) for _ in range(self.rng.randint(3, 8))]
        text = " ".join(words) + "."
        return [{"role": "user", "content": f"Please say: {text}"}, {"role": "assistant", "content": text}]

    def _is_mine(self, key: str) -> bool:
        return tiny.in_test(key) == (self.split == "test")

    def _slip(self, errors: tuple[int, ...]) -> int:
        """0, or what somebody is off by who answers at once."""
        return self.rng.choice(errors) if self.rng.random() < tiny.SLIPS else 0


def part_of(person: Person, attribute: str) -> str:
    """Who may ask for a fact: by hash, a third each."""
    key = f"tools {person.name} {attribute}"
    return "test" if tiny.in_test(key, 1 / 3) else "taught" if tiny.in_test(key, 2 / 3) else "problems"


def _worked(question: str, answer: str, argument: str, at_once: str) -> dict:
    said = f"The answer is {answer}."
    return {
        "question": question, "answer": answer, "others": None, "argument": argument, "result": answer, "said": said,
        "at_once": at_once, "subject": "",
    }  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------------------


def conversations(world: World, split: str, num: int, seed: int):
    """Yield `{"messages", "tools"}` of one exchange each, or `{"messages"}` without tools."""
    from posttrain.tools import load_tools, schemas

    rng = random.Random(f"tool_conversations-{split}-{seed}")
    asker, told = Asker(world, split, seed, rng, taught=True), schemas(load_tools(sorted(set(TOOL_OF.values())), ANY))
    keys = {tool["function"]["name"]: next(iter(tool["function"]["parameters"]["properties"])) for tool in told}
    for _ in range(num):
        if rng.random() < ECHOES:
            yield {"messages": asker.echo()}
            continue
        task = asker.draw(rng.choices(QUESTIONS, WEIGHTS)[0])
        messages = [{"role": "user", "content": task["question"]}]
        tools = rng.random() >= WITHOUT
        if tools and rng.random() < 0.5:
            call = {"name": task["tool"], "arguments": {keys[task["tool"]]: task["argument"]}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": task["tool"], "content": task["result"]},
                {"role": "assistant", "content": task["said"]},
            ]
        else:
            messages.append({"role": "assistant", "content": task["at_once"]})
        yield {"messages": messages, "tools": told} if tools else {"messages": messages}


def problems(world: World, split: str, num: int, seed: int):
    """Yield the rows of `tool_problems`: the kinds in turn, a question once while new ones last."""
    rng = random.Random(f"tool_problems-{split}-{seed}")
    asker, seen = Asker(world, split, seed, rng, taught=False), set()
    asked = QUESTIONS if split == "test" else TRAINED_ON
    for index in range(num):
        kind = asked[index % len(asked)]
        task = asker.draw(kind)
        for _ in range(20):  # tries to find a question not asked yet
            if task["question"] not in seen:
                break
            task = asker.draw(kind)
        seen.add(task["question"])
        prompt = [{"role": "user", "content": task["question"]}]
        yield {"prompt": prompt, **{key: task[key] for key in ("answer", "others", "subject", "kind")}}
