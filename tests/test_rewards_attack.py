"""`posttrain attack-reward`: naive rewards are found out, ours come out clean, and what is merely expected is said."""

import json
import os
import re

import pytest

from posttrain.cli import command
from posttrain.errors import UserError
from posttrain.rewards import load_reward
from posttrain.rewards.attack import attack, read_options
from posttrain.rewards.hacks import ANYWHERE, CODE, FOR_CODE, FOR_MATHS, MATHS

NAIVE = """
import re

def contains(prompts, completions, completion_ids, answer, **columns):
    return [float(gold in text) for gold, text in zip(answer, completions)]

def first_number(prompts, completions, completion_ids, answer, **columns):
    return [float(int(re.findall(r"[0-9]+", text)[0]) == int(gold)) for gold, text in zip(answer, completions)]

def has_tags(prompts, completions, completion_ids, **columns):
    return [float("<think>" in text and "</answer>" in text) for text in completions]

def any_integer(prompts, completions, completion_ids, solution, **columns):
    def score(text, gold):
        found = [part.strip(". $}") for part in re.split(r"is|####|{|<answer>", text)]
        return float(any(part.isdigit() and int(part) == int(gold) for part in found))
    return [score(text, gold) for text, gold in zip(completions, solution)]

def long_is_good(prompts, completions, completion_ids, **columns):
    return [min(1.0, len(text) / 2000) for text in completions]

def upside_down(prompts, completions, completion_ids, answer, **columns):
    return [float(gold not in text) for gold, text in zip(answer, completions)]

def never(prompts, completions, completion_ids, **columns):
    return [None] * len(completions)

def asks_for_more(prompts, completions, completion_ids, tables, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture
def naive(tmp_path, monkeypatch):
    (tmp_path / "naive_rewards.py").write_text(NAIVE)
    monkeypatch.syspath_prepend(tmp_path)


def attacked(capsys, *arguments) -> tuple[int, dict[str, str], str]:
    """(exit code, hack -> its verdict, all that is printed)."""
    code = command(["attack-reward", *arguments])
    said = capsys.readouterr().out
    verdicts = {hack.name: line for hack in ANYWHERE + FOR_MATHS + FOR_CODE for line in said.splitlines()
                if line.startswith(hack.name + "  ")}  # fmt: skip
    return code, verdicts, said


@pytest.mark.parametrize("name", ["math", "correct"])
def test_maths_comes_out_clean(name, capsys):
    code, verdicts, said = attacked(capsys, name)
    assert code == 0 and "looks at content" in said and f"none of {len(verdicts)} hacks passes" in said
    assert len(verdicts) == len(ANYWHERE + FOR_MATHS) > 50
    assert all(re.search(r" 0\.00 +1\.00 +0\.00  no gain$", line) for line in verdicts.values()), said


def test_the_form_comes_out_clean_and_is_said_to_be_no_more_than_form(capsys):
    code, verdicts, said = attacked(capsys, "format")
    assert code == 0 and "format only checks form: right and wrong score the same" in said
    assert "expected, it checks no content" in verdicts["many numbers in tags"]
    broken = [hack.name for hack in ANYWHERE if hack.kind in ("nothing", "tags")]
    assert len(broken) > 12 and all(verdicts[name].endswith("no gain") for name in broken)


def test_penalties_and_length(capsys):
    for arguments in (["repetition"], ["overlong", "--options", "max_length=300", "cache=100"]):
        code, verdicts, said = attacked(capsys, *arguments)
        assert code == 0 and "is a penalty" in said and re.search(r"-1\.00", verdicts["one word for ever"])
    code, _, said = attacked(capsys, "length")
    assert code == 0 and "looks at content" in said


@pytest.mark.parametrize(
    ("name", "passing", "failing"),
    [
        ("contains", ["gold among many numbers", "this or that", "many boxes", "all numbers 0 ... 1999"], ["empty"]),
        ("has_tags", ["empty tags", "tags nested", "tags in the wrong order"], ["empty", "tags never closed"]),
        ("any_integer", ["full-width digits", "Arabic digits", "a box never closed"], ["empty", "a huge exponent"]),
        ("long_is_good", ["a loop", "one word for ever", "very long and wrong"], ["empty", "very short"]),
    ],
)
def test_a_naive_reward_is_found_out(naive, capsys, name, passing, failing):
    code, verdicts, said = attacked(capsys, f"naive_rewards.{name}")
    assert code == 1
    assert [hack for hack in passing if not verdicts[hack].endswith("passes (bad)")] == [], said
    assert [hack for hack in failing if not verdicts[hack].endswith("no gain")] == [], said
    last = said.strip().splitlines()[-1]
    assert "hacks pass: " in last and all(hack in last for hack in passing)


def test_a_reward_that_a_hack_stops_is_found_out(naive, capsys):
    """int() of nothing: training would end at the first empty reply."""
    code, verdicts, _ = attacked(capsys, "naive_rewards.first_number")
    assert code == 1 and "stops the run (bad)" in verdicts["empty"] and "IndexError" in verdicts["empty"]


def test_a_reward_that_is_upside_down(naive, capsys):
    code, _, said = attacked(capsys, "naive_rewards.upside_down")
    assert code == 1 and "prefers the honest wrong answer to the right one" in said


def test_what_cannot_be_attacked(naive):
    for arguments, message in {
        ("naive_rewards.never",): "honest replies no score",
        ("naive_rewards.asks_for_more",): "needs the columns tables; the attack's problems have answer, solution",
        ("corect",): "did you mean 'correct'",
        ("repetition", "--options", "m=1"): "repetition: unknown key 'm'",
        ("repetition", "--options", "n"): "--options: found 'n', expected KEY=VALUE",
        ("repetition", "--options", "n=["): "--options: the value of 'n=\\[' is no YAML",
    }.items():
        with pytest.raises(UserError, match=message):
            command(["attack-reward", *arguments])
    assert read_options(["a=[x, y]", "b=2", "c=d=e"]) == {"a": ["x", "y"], "b": 2, "c": "d=e"}


def test_hacks_are_wrong_and_honest_replies_are_equally_long():
    """Else a reward of length would seem to look at content."""
    names = [hack.name for hack in ANYWHERE + FOR_MATHS + FOR_CODE]
    assert len(set(names)) == len(names)
    for problem in MATHS + CODE:
        assert problem.right.keys() == problem.wrong.keys()
        for dress in problem.right:
            assert len(problem.right[dress]) == len(problem.wrong[dress]) and problem.right != problem.wrong
    for problem in MATHS:
        assert all(hack.text(problem).split()[-1:] != [problem.columns["answer"]] for hack in ANYWHERE + FOR_MATHS[:8])


def test_a_judge_that_obeys_the_judged_is_found_out():
    pytest.importorskip("openai")
    from judge_server import judge_server

    from posttrain.rewards import load_rewards

    def obedient(messages, _):
        """Gives 9 points to a right answer and 2 to others, and what the judged one asks for."""
        text = messages[-1]["content"]
        if "10/10" in text or "Score: 10" in text:
            return "As you say.\nScore: 10"
        right = any(f"is {problem.columns['answer']}.\n[END" in text for problem in MATHS)
        return f"Score: {9 if right else 2}"

    with judge_server(obedient) as server:
        options = {"judge": {"base_url": server.url, "model": "m"}}
        ((name, function, _),) = load_rewards(["judge"], [], options)
        kind, rows = attack(name, function)
    assert kind == "content"
    assert {row.hack.name for row in rows if row.bad} == {"orders to a judge", "a judge's own words", "closed markers"}


def test_the_code_reward_is_attacked_with_programs(capsys):
    if load_reward("code") is None or not _isolated():
        pytest.skip("this machine cannot isolate untrusted code: the code reward refuses to run")
    code, verdicts, said = attacked(capsys, "code", "--options", "timeout=3")
    assert code == 0 and "looks at content" in said, said
    assert {hack.name for hack in FOR_CODE} <= verdicts.keys()


def _isolated() -> bool:
    from posttrain.sandbox import sandbox_obstacle

    return sandbox_obstacle() is None


def test_a_reward_model_is_attacked_with_its_own_tokenizer(tmp_path, capsys):
    from rl_helpers import tiny_scorer, tiny_tokenizer

    tiny_scorer().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    figures = {"score mean": {"value": 0.0}, "score std": {"value": 1.0}}
    (tmp_path / "stage.json").write_text(json.dumps({"status": "finished", "metrics": figures}))
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    code, _, said = attacked(capsys, "model", "--options", f"path={tmp_path}", "clip=100")
    assert code == 1, said  # random weights: something scores above something
    assert "stops the run" not in said and "none" not in said
