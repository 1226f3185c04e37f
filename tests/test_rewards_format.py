"""The format reward, and how rewards get their options: what is refused, and by what name."""

import asyncio
import re

import pytest

from posttrain.errors import UserError
from posttrain.rewards import REWARDS, load_rewards
from posttrain.rewards.calls import run_rewards

GOOD = [
    "<think>48+24 is 72</think><answer>72</answer>",
    " <think>\n48+24\n is 72\n</think>\n\n<answer>\n72\n</answer>\n",
    "<think>if a < b and c > d, <b>bold</b></think><answer>$x<y$</answer>",
    "<think>the answer, I think</think><answer>answer</answer>",
]
BAD = [
    "",
    "72",
    "<think></think><answer></answer>",
    "<think> \n</think><answer>72</answer>",
    "<think>...</think><answer>72</answer>",
    "<think>a</think><answer>  </answer>",
    "<answer>72</answer><think>a</think>",
    "<think>a</think>",
    "<think>a</think><answer>72",
    "<think>a<answer>72</answer></think>",
    "<think>a</think><answer>72</answer> and more",
    "so <think>a</think><answer>72</answer>",
    "<think>a</think> so <answer>72</answer>",
    "<think>a</think><think>b</think><answer>72</answer>",
    "<think>a</think><answer>71</answer><answer>72</answer>",
    "<think>a<think>b</think></think><answer>72</answer>",
    "<think>a</think><answer><answer>72</answer></answer>",
    "<think>a</think><answer>72</think></answer>",
    "<think>a <THINK>b</THINK></think><answer>72</answer>",
    "<think>a </ think ></think><answer>72</answer>",
    '<think>a</think><answer>72<answer class="b"></answer>',
    "<Think>a</Think><Answer>72</Answer>",
    "<think>a</think><answer>72</answer>" * 2,
]


def test_form():
    score = REWARDS["format"]
    assert score(None, GOOD) == [1.0] * len(GOOD)
    assert [text for text, value in zip(BAD, score(None, BAD), strict=True) if value] == []
    messages = [[{"role": "assistant", "content": text}] for text in (GOOD[0], None)]
    assert score(None, [*messages, []]) == [1.0, 0.0, 0.0]


def test_options_of_the_form():
    score = REWARDS["format"]
    assert score(None, ["a</think><answer>72</answer>", GOOD[0]], opened=True) == [1.0, 0.0]
    assert score(None, ["<plan>p</plan><code>c</code><plan_b>d</plan_b>"], tags=["plan", "code", "plan_b"]) == [1.0]
    assert score(None, [GOOD[0]], tags=["answer"]) == [0.0]
    for wrong in ({"tags": "think"}, {"tags": []}, {"tags": ["a b"]}, {"tags": ["a", "A"]}, {"opened": 1}):
        with pytest.raises(UserError, match=f"format: {next(iter(wrong))}: found"):
            score(None, [], **wrong)


def test_a_long_reply_is_read_at_once():
    """No back-tracking: 200 kB of tags and of almost tags."""
    for text in ("<think>" * 30_000, "<think>a</think>" * 12_000, "< " * 100_000, "<think " * 30_000):
        assert REWARDS["format"](None, [text]) == [0.0]


REFUSED = [
    (
        ["overlong"],
        {"overlong": {"max_length": 64, "cach": 16}},
        "overlong: unknown key 'cach'; did you mean 'cache'?",
    ),
    (["overlong"], {"overlong": {"max_length": 64, "cache": 128}}, "cache: found 128, .*at least 1 and at most 64"),
    (["overlong"], {"overlong": {"max_length": 64.0, "cache": 8}}, "max_length: found 64.0, expected an integer"),
    (["overlong"], None, "overlong needs both"),
    (["overlong"], {"overlong": [1]}, "overlong: found [1], expected a mapping"),
    (["repetition"], {"repetition": {"n": 0}}, "repetition: n: found 0"),
    (["repetition"], {"repetition": {"n": True}}, "repetition: n: found True"),
    (["length"], {"length": {"of": "corect"}}, "did you mean 'correct'"),
    (["length"], {"length": {"of": "length"}}, "length: of: found 'length'"),
    (["correct"], {"corect": {}}, "'corect' is none of reward_funcs (correct); did you mean 'correct'?"),
    (["correct"], {"correct": {"answer": ["72"]}}, "correct: unknown key 'answer'"),
    (["correct", "correct"], None, "'correct' stands there twice"),
    (["model"], {"model": {"path": "x", "clip": -1}}, "model: clip: found -1"),
    (["model"], None, "model: path: found None"),
    (["reward_helpers.lengths"], {"reward_helpers.lengths": {"n": 1}}, "unknown key 'n'; it has no options"),
]


@pytest.mark.parametrize(("names", "options", "message"), REFUSED)
def test_options_that_are_refused_when_loaded(names, options, message):
    pattern = "".join(part if part == ".*" else re.escape(part) for part in re.split(r"(\.\*)", message))
    with pytest.raises(UserError, match=pattern):
        load_rewards(names, [], options)


def test_options_reach_the_function_and_columns_of_their_name_do_not():
    rewards = load_rewards(["repetition", "correct"], [1.0, 2.0], {"repetition": {"n": 1, "max_penalty": 4}})
    assert [(name, weight) for name, _, weight in rewards] == [("repetition", 1.0), ("correct", 2.0)]
    batch = {
        "prompts": ["?"] * 2,
        "completions": ["72", "73"],
        "completion_ids": [[1, 1], [1, 2]],
        "answer": ["72"] * 2,
    }
    columns = {"n": ["a column of the data"] * 2, "max_run": [1, 1]}
    assert run_rewards(rewards, {**batch, **columns}, [0, 1]) == {"repetition": [-2.0, 0.0], "correct": [1.0, 0.0]}
    assert REWARDS["math"](["?"], ["72"], [[1]], answer=["72"]) == [1.0]


def test_rewards_load_where_an_event_loop_runs():
    """In a notebook, say. The judge is tried on an empty batch: nobody is asked."""
    judge = {"judge": {"base_url": "http://localhost:9/v1", "model": "m"}}

    async def load():
        return load_rewards(["judge"], [], judge)

    assert len(asyncio.run(load())) == 1
