"""Tiny's world with tools: the data, the rewards for calls, and the suite tools on a model that learned when to call.

Run: pytest tests/test_tiny_tools.py
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from recipe_runs import run
from rl_helpers import ROOT, tiny_llama

from posttrain import suite_tools
from posttrain.chat import encode_chat, set_template
from posttrain.cli import command
from posttrain.data import DataConfig, load_rows, tiny, tiny_tools
from posttrain.data.tiny_world import make_world
from posttrain.errors import UserError
from posttrain.models import save_pair
from posttrain.rewards import load_rewards
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Completion, Rollouts
from posttrain.tokenizer import train_tokenizer
from posttrain.tools import load_tools

CALLS = str(ROOT / "chat_templates" / "chatml_calls.jinja")


def rows_of(kind: str, split: str = "train", num: int | None = None, seed: int = 0) -> list[dict]:
    return load_rows(DataConfig("tiny", kind, max_rows=num), split, seed, ())[0]


def asked(row: dict) -> str:
    return (row.get("prompt") or row["messages"])[0]["content"]


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    return rows_of("tool_conversations", num=3000)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library as recipes/library.py writes it."""
    folder = tmp_path_factory.mktemp("tools")
    out, recipe = folder / "library", str(ROOT / "recipes" / "library.py")
    done = run([recipe, "--config", str(ROOT / "recipes/tools/library.yaml"), "--output_dir", out], folder)
    assert done.returncode == 0, done.stderr
    return out


# ---- data -----------------------------------------------------------------------------------------------------------


def test_only_the_library_knows_the_strangers(library):
    world = make_world(0)
    facts = [json.loads(line)["text"] for line in (library / "documents.jsonl").read_text().splitlines()]
    people = {re.match(r"\w+ \w+", fact)[0] for fact in facts}
    assert len(facts) == len(set(facts)) == 4 * len(people) == 4 * (len(world.people) + len(world.strangers) + 3000)
    assert people >= {*world.strangers, *(person.name for person in world.people)}
    read = " ".join(row["text"] for row in tiny.rows("documents", "train", 2000, 0))
    assert [name for name in world.strangers if name in read] == []
    assert [row["text"] for row in rows_of("library", seed=1)] != facts == [r["text"] for r in rows_of("library")]


def test_half_of_each_kind_is_answered_by_a_call_that_its_tool_answers_so(conversations, library):
    questions = [row for row in conversations if not asked(row).startswith("Please say: ")]
    assert 0.77 < len(questions) / len(conversations) < 0.83
    told = [row for row in questions if "tools" in row]
    assert 0.77 < len(told) / len(questions) < 0.83
    bare = [row["messages"] for row in conversations if "tools" not in row]
    assert all(len(messages) == 2 for messages in bare)
    echoes = [messages for messages in bare if messages[0]["content"].startswith("Please say: ")]
    assert all(f"Please say: {reply['content']}" == ask["content"] for ask, reply in echoes)
    calls = [row["messages"] for row in told if len(row["messages"]) == 4]
    assert 0.46 < len(calls) / len(told) < 0.54
    options = {"search": {"folder": str(library), "num_results": 1}}
    tools = {tool.name: tool for tool in load_tools(["calculator", "search", "python"], options)}
    seen = dict.fromkeys(tools, 0)
    for _, calling, answer, last in calls:
        function = calling["tool_calls"][0]["function"]
        seen[function["name"]] += 1
        if seen[function["name"]] <= (3 if function["name"] == "python" else 40):  # the sandbox takes its time
            assert tools[function["name"]].call(function["arguments"]) == answer["content"]
        core = last["content"].removeprefix("The answer is ")
        assert core.removesuffix(".") == answer["content"] or core in answer["content"]
    assert min(seen.values()) > 60


def test_what_is_asked_is_told_apart_by_split_and_by_stage(conversations):
    problems, held_out = rows_of("tool_problems", num=3000), rows_of("tool_problems", "test", 1200)
    stated = {asked(row) for row in conversations}
    for one, other in ((stated, held_out), ({asked(row) for row in problems}, held_out)):
        assert not one & {asked(row) for row in other}
    facts = {asked(row) for row in problems if row["kind"] in ("fact", "rare fact")}
    assert facts and not facts & stated
    kinds = [row["kind"] for row in held_out]
    assert {kind: kinds.count(kind) for kind in tiny_tools.QUESTIONS} == dict.fromkeys(tiny_tools.QUESTIONS, 200)


def test_the_answers_are_right():
    everybody = {person.name: person for person in tiny_tools.everybody(make_world(0), 0)}
    for row in rows_of("tool_problems", "test", 300):
        question, answer = asked(row), row["answer"]
        if row["kind"] == "letters":
            first, last = re.findall(r"[A-Z][a-z]+", question)[1:]
            assert int(answer) == len(first) + len(last)
        elif "sum" in row["kind"]:
            a, b = map(int, re.findall(r"\d+", question))
            assert int(answer) == a + b and (len(str(a)) > 2) == (row["kind"] == "long sum")
        else:
            (person,) = (person for name, person in everybody.items() if name in question)
            assert answer in (person.town, person.job, person.pet, person.dish) and answer not in row["others"]


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_a_call_costs_and_what_only_the_tool_says_is_no_answer(tokenizer):
    def reply(*turns: tuple[str, int], calls: int | None = None) -> Completion:
        pieces = [(tokenizer(text)["input_ids"], own) for text, own in turns]
        ids, mask = ([each for ids, own in pieces for each in (ids if part else [own] * len(ids))] for part in (1, 0))
        return Completion(ids, [0.0] * len(ids), "stop", mask, calls, 0)

    replies = [
        reply(("The answer is 42.", 1)),
        reply(("calculator 6*7", 1), ("42", 0), ("The answer is 42.", 1), calls=1),
        reply(("calculator 6*7", 1), ("42", 0), ("The answer is 41.", 1), calls=1),
        reply(("a", 1), ("42", 0), ("b", 1), ("42", 0), calls=2),
    ]
    row = {"prompt": [{"role": "user", "content": "6*7?"}], "answer": "42", "others": None}
    rollouts = Rollouts([row] * 4, [[1]] * 4, replies, 4)
    scores = call_rewards(load_rewards(["answered", "call_cost"], []), rollouts, tokenizer)
    assert scores == {"answered": [1.0, 1.0, 0.0, 0.0], "call_cost": [0.0, -1.0, -1.0, -2.0]}


@pytest.mark.parametrize(("name", "kind"), [("answered", "looks at content"), ("call_cost", "is a penalty")])
def test_no_known_hack_passes(name, kind, capsys):
    assert command(["attack-reward", name]) == 0
    assert kind in capsys.readouterr().out


# ---- the suite, on a model that calls only for what it cannot do ----------------------------------------------------

WORDS = ["one", "two", "three", "four", "five", "six"]
EASY = 2  # of WORDS: the model answers their sums at once, with tools or without; of the others it guesses without


def conversation(index: int, tools: bool) -> list[dict]:
    sum_, easy = f"{index}+{index}", index < EASY
    said = f"The answer is {2 * index if easy or tools else 9}."
    made = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": sum_}}}
    calling = [] if easy or not tools else [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "name": "calculator", "content": str(2 * index)},
    ]  # fmt: skip
    return [{"role": "user", "content": f"What is {sum_}?"}, *calling, {"role": "assistant", "content": said}]


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Path:
    told = [tool.schema for tool in load_tools(["calculator"])]
    text = "What is 1+1?\nThe answer is 2. calculator system user assistant Tools: (expression)\n"
    tokenizer = train_tokenizer([text] * 50, vocab_size=340)
    model = tiny_llama(initializer_range=0.05, max_position_embeddings=512, vocab_size=len(tokenizer))
    set_template(tokenizer, model, CALLS)
    rows = [(index, tools) for index in range(len(WORDS)) for tools in (True, False)]
    encoded = [encode_chat(tokenizer, conversation(*row), tools=told if row[1] else None) for row in rows]
    optimizer, draw = torch.optim.AdamW(model.train().parameters(), lr=5e-3), random.Random(0)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / 120)
        loss = 0
        for one in draw.sample(encoded, 6):
            ids, mask = torch.tensor([one.input_ids]), torch.tensor([one.assistant_mask])
            loss = loss + model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss / 6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("caller") / "model"
    save_pair(model.eval(), tokenizer, folder)
    return folder


def test_the_suite_tells_needed_calls_from_others(caller, tmp_path, capsys):
    rows = [
        {"prompt": conversation(index, True)[:1], "answer": str(2 * index), "kind": "easy" if index < EASY else "hard"}
        for index in range(len(WORDS))
    ]
    rows.insert(0, {**rows[0], "prompt": [{"role": "user", "content": "too long " * 200}]})  # it is left out
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--tools", "calculator", "--temperature", "0", "--num_generations", "1", "--use_vllm", "false")
    where = ("--data", str(file), "--split", "train", "--max_tokens", "48")
    assert (
        command(["eval", str(caller), "--suite", "tools", *where, *flags, "--json", str(tmp_path / "out.json")]) == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())
    figures = {name: figure["value"] for name, figure in found["metrics"].items()}
    assert figures["right with tools"] == 1 and figures["right without tools"] == pytest.approx(EASY / len(WORDS))
    assert figures["replies that call"] == pytest.approx(1 - EASY / len(WORDS))
    for group in (", call needed", ", hard"):
        assert figures[f"replies that call{group}"] == 1 and figures[f"right without tools{group}"] == 0
    for group in (", call not needed", ", easy"):
        assert figures[f"replies that call{group}"] == 0 and figures[f"right without tools{group}"] == 1
    assert found["details"]["groups"] == {"": 6, ", call needed": 4, ", call not needed": 2, ", easy": 2, ", hard": 4}
    called = next(sample for sample in found["samples"] if "<|call|>calculator 3+3<|end_call|>" in sample["reply"])
    assert called["row"] == 4 and called["right"] and called["calls"] == 1  # rows are counted with the one left out
    assert figures["replies that call without tools"] == 0
    said = capsys.readouterr().out
    assert "call needed      4" in said and "1 of 7 prompts are too long and left out" in said


def test_the_suite_wants_tools_and_answers(caller, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1?"}]}) + "\n")
    given = ["eval", str(caller), "--suite", "tools", "--data", str(file), "--split", "train"]
    for more, message in (([], "--tools: not given"), (["--tools", "calculator"], "row 0 has no answer")):
        with pytest.raises(UserError, match=message):
            command([*given, *more, "--debug"])


def test_means_of_groups_by_hand():
    rows = [{"kind": "a"}, {"kind": "a"}, {"kind": "b"}]
    groups = suite_tools.groups_of(rows, [0.49, 0.5, 1.0])
    assert groups[", call needed"] == [True, False, False] and groups[", b"] == [False, False, True]
    assert suite_tools.means({"x": [1, 0, 1, 1]}, 2) == {"x": [0.5, 1.0]}
