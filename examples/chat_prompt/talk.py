r"""A chat prompt for a base model: the transcript of a helpful assistant, which it goes on with.

In: nothing but the seed of tiny's world. Out, in a folder: `interviews.jsonl`, documents in which two people of ever
other names ask and answer, for the base model to read, which tiny's documents lack; `facts.jsonl` and `sums.jsonl`,
each eight turns to show, facts and sums by turns, and forty questions that neither they nor SFT have. `answer` is what
a right reply states, `others` what else it could be. A reply ends at its line's end, where "Human:" would speak next.

    python -m examples.chat_prompt.talk runs/examples/chat_prompt
    accelerate launch recipes/pretrain.py --config examples/chat_prompt/pretrain.yaml
    posttrain complete runs/examples/chat_prompt/base --few_shot runs/examples/chat_prompt/facts.jsonl \
        --num_fewshot 4 --few_shot_format 'Human: {input}\nAssistant: {output}' \
        --prompt 'Where does Safin Holtton live?'
    posttrain eval runs/examples/chat_prompt/base --few_shot runs/examples/chat_prompt/facts.jsonl \
        --num_fewshot 0 1 4 8 --few_shot_format 'Human: {input}\nAssistant: {output}'
    posttrain eval runs/tiny/sft --few_shot runs/examples/chat_prompt/facts.jsonl --num_fewshot 0 --as_turns
"""

import json
import random
import sys
from pathlib import Path

from posttrain.data.tiny import FACT_QUESTIONS, SUM_QUESTIONS, questions, sums
from posttrain.data.tiny_world import ATTRIBUTES, World, fact_sentence, make_world, steps_of_sum, values_of

EXAMPLES, QUESTIONS = 8, 40
INTERVIEWS, TURNS = 3000, 4
NAMES = ("Tom", "Anna", "Sue", "Ben", "Lily", "Max", "Clerk", "Visitor", "Teacher", "Pupil", "Baker", "Guest")


def fact(world: World, person, attribute: str, rng: random.Random) -> dict:
    """A question about a person, the sentence that answers it, its value and all others."""
    values = values_of(world)[attribute]
    answer = getattr(person, attribute)
    return {
        "input": rng.choice(FACT_QUESTIONS[attribute]).format(name=person.name),
        "output": fact_sentence(person, attribute),
        "answer": answer,
        "others": [value for value in values if value != answer],
    }


def addition(a: int, b: int, rng: random.Random) -> dict:
    """A question for a sum, worked in steps."""
    question, steps = rng.choice(SUM_QUESTIONS).format(a=a, b=b), steps_of_sum(a, b)
    return {"input": question, "output": f"{steps} The answer is {a + b}.", "answer": str(a + b)}


def rows(kind: str, seed: int = 0) -> list[dict]:
    """EXAMPLES of both kinds, of what training rows ask, too; then QUESTIONS of `kind`, "facts" or "sums", held out.

    The facts are those of the people that most is written about: a base model can only say what it has read."""
    world, rng = make_world(seed), random.Random(f"talk {seed}")
    known = sorted(world.people, key=lambda person: -person.weight)
    shown = [fact(world, person, rng.choice(ATTRIBUTES), rng) for person in known[: EXAMPLES // 2]]
    pairs = rng.sample(sums("train"), len(shown))
    turns = [turn for one, pair in zip(shown, pairs, strict=True) for turn in (one, addition(*pair, rng))]
    if kind == "sums":
        return turns + [addition(*pair, rng) for pair in rng.sample(sums("test"), QUESTIONS)]
    asked = sorted(questions(world, "test"), key=lambda pair: -pair[0].weight)
    told = {turn["output"] for turn in turns}
    facts = [fact(world, *pair, rng) for pair in asked]
    return turns + [row for row in facts if row["output"] not in told][:QUESTIONS]


def interview(world: World, asked: list, pairs: list, rng: random.Random) -> str:
    """Two people talk: of the facts `asked` and the sums of `pairs`."""
    first, second = rng.sample(NAMES, 2)
    lines = []
    for _ in range(rng.randint(1, TURNS)):
        person, attribute = rng.choice(asked)
        turn = addition(*rng.choice(pairs), rng) if rng.random() < 0.5 else fact(world, person, attribute, rng)
        lines.append(f"{first}: {turn['input']}\n{second}: {turn['output']}\n")
    return "".join(lines)


def write(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    world, rng = make_world(seed), random.Random(f"interviews {seed}")
    asked, pairs = questions(world, "train"), sums("train")
    texts = [{"text": interview(world, asked, pairs, rng)} for _ in range(INTERVIEWS)]
    for name, lines in {"interviews": texts, **{kind: rows(kind, seed) for kind in ("facts", "sums")}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
