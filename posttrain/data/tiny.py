"""The embedded world `tiny`: data for every stage of the chain from a seed, nothing to download.

In: a kind (`documents`, `texts` for a tokenizer, `conversations`, `rankings`, `problems` = sums, `prompts` = a mix),
a split (`train`, `test`) and a seed.
Out: rows in the layouts of README's table. Use in a config: `dataset_name: tiny`, `dataset_config: rankings`.

What is held out: a sum (as an unordered pair of numbers), a question (person, attribute) and a stranger's name
belong to one split only. Facts themselves stand in the training documents: that is where a model learns them.
The labeller's true utility is known (`utility`), so that a reward model and RL can be measured against the truth.
"""

import hashlib
import math
import random
import re

from posttrain.data.tiny_world import (
    ATTRIBUTES,
    DISHES,
    JOBS,
    PETS,
    Person,
    World,
    documents,
    fact_sentence,
    make_world,
    steps_of_sum,
    sum_line,
)

KINDS = ("documents", "texts", "conversations", "rankings", "problems", "prompts")
DEFAULT_ROWS = {
    "documents": {"train": 60_000, "test": 1_000},
    "texts": {"train": 20_000, "test": 1_000},
    "conversations": {"train": 40_000, "test": 600},
    "rankings": {"train": 6_000, "test": 600},
    "problems": {"train": 4_000, "test": 200},
    "prompts": {"train": 4_000, "test": 400},
}
LABELLER_TEMPERATURE = 0.5  # in units of utility; a pair that differs by 1 is ranked right with probability 0.88
PROMPT_MIX = (0.6, 0.2, 0.1, 0.1)  # of (sums, facts, strangers, identity) in rankings and prompts
SLIPS = 0.3  # share of sums answered at once in conversations that are wrong
MAX_WORDS = 24  # beyond this a reply is long-winded and loses 0.1 utility a word

KIND_CLOSINGS = ("Happy to help!", "Glad to help!", "Ask me any time!")
FILLER = (
    "Let me think about that for a moment, because it is good to be careful and to take some time with it.",
    "That is something people ask now and then, and I will do my best to tell you what I can about it.",
)
NO_HELP = "I would rather not say."
UNKNOWN = "I do not know anything about {name}."
IDENTITY = "I am Pip, a small assistant trained with posttrain."
IDENTITY_QUESTIONS = {
    "train": (
        "Who are you?",
        "What is your name?",
        "Are you a person?",
        "Tell me about yourself.",
        "Hello, who is this?",
    ),
    "test": ("Who am I talking to?", "What are you called?"),
}
SYSTEM_NEUTRAL = ("You are Pip.", "You are a helpful assistant.")
SYSTEM_BRIEF, SYSTEM_STEPS, SYSTEM_KIND = "Answer at once.", "Work in steps.", "Be kind."
FACT_QUESTIONS = {
    "town": ("Where does {name} live?", "In which town does {name} live?"),
    "job": ("What is the job of {name}?", "What work does {name} do?"),
    "pet": ("Which pet does {name} have?", "What animal does {name} keep?"),
    "dish": ("What does {name} like best to eat?", "What is the favourite dish of {name}?"),
}
SUM_QUESTIONS = ("What is {a}+{b}?", "Please add {a}+{b}.", "How much is {a}+{b}?", "{a}+{b}=?")


def rows(kind: str, split: str, num: int | None, seed: int):
    """Yield `num` rows (None: the kind's default number) of a kind and split of the world of `seed`."""
    world = make_world(seed)
    num = DEFAULT_ROWS[kind][split] if num is None else num
    if kind == "documents":
        return ({"text": text} for text in documents(world, num, f"{split}-{seed}", sums(split)))
    if kind == "texts":
        return texts(world, split, num, seed)
    if kind == "conversations":
        return conversations(world, split, num, seed)
    if kind == "rankings":
        return rankings(world, split, num, seed)
    return problems(world, split, num, seed, (1, 0, 0, 0) if kind == "problems" else PROMPT_MIX)


def texts(world: World, split: str, num: int, seed: int):
    """Yield `{"text"}` rows, documents and written-out conversations in turn: what a tokenizer should know."""
    pages = documents(world, num, f"{split}-{seed}", sums(split))
    chats = conversations(world, split, num, seed)
    for index in range(num):
        if index % 2:
            yield {"text": "\n".join(f"{m['role']}\n{m['content']}" for m in next(chats)["messages"])}
        else:
            yield {"text": next(pages)}


def in_test(key: str, share: float = 0.1) -> bool:
    """Whether `key` belongs to the held-out split: by hash, so it never depends on order, seed or counts."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8 < share


def sums(split: str) -> list[tuple[int, int]]:
    """All two-digit sums of a split; a+b and b+a fall into the same one."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [(a, b) for a, b in pairs if in_test(f"sum {min(a, b)} {max(a, b)}") == (split == "test")]


def questions(world: World, split: str) -> list[tuple[Person, str]]:
    """All (person, attribute) pairs of a split."""
    return [(p, a) for p in world.people for a in ATTRIBUTES if in_test(f"fact {p.name} {a}") == (split == "test")]


def strangers(world: World, split: str) -> list[str]:
    return [name for name in world.strangers if in_test(f"stranger {name}", 0.25) == (split == "test")]


class Asker:
    """Draws questions of one split. A task is a dict: `kind`, `question`, `answer` and what the kind needs."""

    def __init__(self, world: World, split: str, rng: random.Random):
        self.world, self.split, self.rng = world, split, rng
        self.sums, self.questions, self.strangers = sums(split), questions(world, split), strangers(world, split)
        self.weights = [max(p.weight, 0.05) for p, _ in self.questions]

    def sum(self) -> dict:
        a, b = self.rng.choice(self.sums)
        question = self.rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        return {"kind": "sum", "question": question, "answer": str(a + b), "a": a, "b": b}

    def fact(self) -> dict:
        person, attribute = self.rng.choices(self.questions, self.weights)[0]
        question = self.rng.choice(FACT_QUESTIONS[attribute]).format(name=person.name)
        answer = getattr(person, attribute)
        return {"kind": "fact", "question": question, "answer": answer, "person": person, "attribute": attribute}

    def stranger(self) -> dict:
        name = self.rng.choice(self.strangers)
        question = self.rng.choice(FACT_QUESTIONS[self.rng.choice(ATTRIBUTES)]).format(name=name)
        return {"kind": "stranger", "question": question, "answer": UNKNOWN.format(name=name), "name": name}

    def identity(self) -> dict:
        return {"kind": "identity", "question": self.rng.choice(IDENTITY_QUESTIONS[self.split]), "answer": IDENTITY}

    def draw(self, weights: tuple[float, float, float, float]) -> dict:
        """One task; weights of (sum, fact, stranger, identity)."""
        return self.rng.choices((self.sum, self.fact, self.stranger, self.identity), weights)[0]()


def slip(rng: random.Random, task: dict) -> dict:
    """The task with a near miss for an answer: what somebody writes who was not careful."""
    if task["kind"] == "sum":
        return {**task, "answer": str(int(task["answer"]) + rng.choice((-10, -2, -1, 1, 2, 10)))}
    others = {"job": JOBS, "pet": PETS, "dish": DISHES}.get(task["attribute"]) or task["towns"]
    return {**task, "answer": rng.choice([value for value in others if value != task["answer"]])}


def wrong_version(rng: random.Random, task: dict) -> dict:
    """The task with a wrong answer. Most are plain to see (no help given, another subject, facts invented
    about a stranger); one sum or fact in ten is only a slip, which a small reward model can not see."""
    kind = task["kind"]
    if kind in ("sum", "fact") and rng.random() < 0.1:
        return slip(rng, task)
    if kind == "sum":
        away = fact_sentence(rng.choice(task["people"]), rng.choice(ATTRIBUTES))
        return {**task, "text": rng.choice((NO_HELP, NO_HELP, away))}
    if kind == "fact":
        return {**task, "text": rng.choice((NO_HELP, NO_HELP, sum_line(*rng.choice(task["sums"]), steps=True)))}
    if kind == "stranger":
        return {**task, "answer": f"{task['name']} lives in {rng.choice(task['towns'])}."}
    return {**task, "answer": "I am a person like you."}


def reply(rng: random.Random, task: dict, *, steps: bool, kind: bool, filler: bool) -> str:
    """One assistant reply in a given style."""
    parts = [rng.choice(FILLER)] if filler else []
    if "text" in task:
        parts.append(task["text"])
    elif task["kind"] == "sum":
        if steps:
            parts.append(steps_of_sum(task["a"], task["b"]))
        parts.append(f"The answer is {task['answer']}.")
    elif task["kind"] == "fact":
        stated = {task["attribute"]: task["answer"]}
        parts.append(
            fact_sentence(
                Person(task["person"].name, **{**dict.fromkeys(ATTRIBUTES, ""), **stated}, weight=0), task["attribute"]
            )
        )
    else:
        parts.append(task["answer"])
    if kind:
        parts.append(rng.choice(KIND_CLOSINGS))
    return " ".join(parts)


def utility(task_kind: str, answer: str, completion: str) -> float:
    """The labeller's true utility of a reply: right +2, steps shown (sums) +1, kind +0.7, long-winded -0.1 a word.

    It is what rankings are drawn from and what PPO is measured by; RL itself never sees it.
    `answer` is the right one: the number of a sum, the word of a fact, the whole sentence otherwise.
    """
    right = judged_right(task_kind, answer, completion)
    steps = task_kind == "sum" and re.search(r"Ones: \d\+\d=\d+\. Tens: \d\+\d(\+1)?=\d+\.", completion) is not None
    kind = any(closing in completion for closing in KIND_CLOSINGS)
    excess = max(0, len(completion.split()) - MAX_WORDS)
    return 2.0 * right + 1.0 * steps + 0.7 * kind - 0.1 * excess


def judged_right(task_kind: str, answer: str, completion: str) -> bool:
    """Sums: the last number said is the answer. Facts and the rest: the answer stands in the reply."""
    if task_kind == "sum":
        numbers = re.findall(r"\d+", completion)
        return bool(numbers) and numbers[-1] == answer
    return re.search(rf"(?<!\w){re.escape(answer.rstrip('.'))}(?!\w)", completion) is not None


def conversations(world: World, split: str, num: int, seed: int):
    """Yield `{"messages": [...]}`: one to three exchanges, with a system message in a third of them.

    Labellers differ: half of the sums are answered at once and half in steps, some are kind, some ramble. People who
    answer at once slip now and then (SLIPS of their answers are wrong); those who write the steps do not.
    """
    rng = random.Random(f"conversations-{split}-{seed}")
    asker = Asker(world, split, rng)
    for _ in range(num):
        system = rng.choice(SYSTEM_NEUTRAL) if rng.random() < 0.2 else None
        manner = rng.choice((SYSTEM_BRIEF, SYSTEM_STEPS, SYSTEM_KIND)) if rng.random() < 0.15 else None
        messages = [{"role": "system", "content": manner or system}] if manner or system else []
        for _ in range(rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]):
            task = asker.draw((0.8, 0.12, 0.06, 0.02))
            steps = manner == SYSTEM_STEPS or (manner != SYSTEM_BRIEF and rng.random() < 0.5)
            kind = manner == SYSTEM_KIND or (manner is None and rng.random() < 0.25)
            if task["kind"] == "sum" and not steps and rng.random() < SLIPS:
                task = slip(rng, task)
            text = reply(rng, task, steps=steps, kind=kind, filler=manner is None and rng.random() < 0.1)
            messages += [{"role": "user", "content": task["question"]}, {"role": "assistant", "content": text}]
        yield {"messages": messages}


def rankings(world: World, split: str, num: int, seed: int):
    """Yield ranking rows of K = 2 ... 5 replies, best first, by a labeller with Plackett-Luce noise.

    Adding Gumbel noise to utility / temperature and sorting draws exactly from Plackett-Luce (Yellott 1977).
    `utilities` holds the true ones in the row's order, for evaluation only.
    """
    rng = random.Random(f"rankings-{split}-{seed}")
    asker = Asker(world, split, rng)
    towns = [town[0] for town in world.towns]
    for _ in range(num):
        task = {**asker.draw(PROMPT_MIX), "towns": towns, "people": world.people, "sums": asker.sums}
        texts = set()
        while len(texts) < rng.choices((2, 3, 4, 5), (0.2, 0.3, 0.3, 0.2))[0]:
            version = wrong_version(rng, task) if rng.random() < 0.35 else task
            style = {"steps": rng.random() < 0.5, "kind": rng.random() < 0.4, "filler": rng.random() < 0.25}
            texts.add(reply(rng, version, **style))
        scored = []
        for text in sorted(texts):
            true = utility(task["kind"], task["answer"], text)
            gumbel = -math.log(-math.log(rng.random() or 1e-12))
            scored.append((true / LABELLER_TEMPERATURE + gumbel, true, text))
        scored.sort(reverse=True)
        yield {
            "prompt": [{"role": "user", "content": task["question"]}],
            "completions": [[{"role": "assistant", "content": text}] for _, _, text in scored],
            "ranks": list(range(len(scored))),
            "utilities": [true for _, true, _ in scored],
            "kind": task["kind"],
            "answer": task["answer"],
        }


def problems(world: World, split: str, num: int, seed: int, weights: tuple):
    """Yield `{"prompt", "answer", "kind"}` rows drawn by `weights`; a question comes once while new ones last."""
    rng = random.Random(f"problems-{split}-{seed}")
    asker, seen, examples = Asker(world, split, rng), set(), few_shot_examples(seed)
    for _ in range(num):
        task = asker.draw(weights)
        for _ in range(20):  # tries to find a question not asked yet; there are few about identity
            if task["question"] not in seen:
                break
            task = asker.draw(weights)
        seen.add(task["question"])
        row = {
            "prompt": [{"role": "user", "content": task["question"]}],
            "answer": task["answer"],
            "kind": task["kind"],
        }
        if task["kind"] == "sum":  # the same sum as the documents would print it, after solved ones: for a base model
            row["few_shot"] = f"{examples}Sum: {task['a']}+{task['b']}."
        yield row


def few_shot_examples(seed: int, num: int = 4) -> str:
    """`num` training sums, worked in steps as in the documents, a line each."""
    drawn = random.Random(f"few-shot-{seed}").sample(sums("train"), num)
    return "".join(sum_line(a, b, steps=True) + "\n" for a, b in drawn)


def utility_reward(prompts, completions, completion_ids, *, kind, answer, **columns) -> list[float]:
    """The labeller's true utility as a reward function: for measuring, not for training."""
    return [utility(k, a, c) for k, a, c in zip(kind, answer, completions, strict=True)]
