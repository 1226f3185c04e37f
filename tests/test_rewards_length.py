"""Rewards of length and repetition against closed forms and TRL's functions of the same formulas."""

import random

import pytest
from trl.rewards import get_soft_overlong_punishment

from posttrain.errors import UserError
from posttrain.rewards import REWARDS


def ids(*lengths):
    return [list(range(n)) for n in lengths]


def length_of(texts, sizes, **columns):
    columns = {"answer": ["72"] * len(texts), **columns}
    prompts = columns.pop("prompts", ["?"] * len(texts))
    return REWARDS["length"](prompts, texts, ids(*sizes), **columns)


def test_short_and_right():
    """Four right replies of 10, 20, 30, 50 tokens: 0.5 - (l - 10) / 40; wrong ones -0.5, however short or long."""
    texts = ["72", "72", "5", "72", "72", "no"]
    assert length_of(texts, [20, 10, 1, 50, 30, 400]) == pytest.approx([0.25, 0.5, -0.5, -0.5, 0.0, -0.5])


def test_a_wrong_reply_gains_nothing_by_its_length():
    before = length_of(["72", "5", "72"], [9, 30, 12])
    for size in (0, 1, 10_000):
        assert length_of(["72", "5", "72"], [9, size, 12]) == before
    assert length_of(["5", "6"], [1, 100]) == [-0.5, -0.5]


def test_groups_are_the_completions_of_one_prompt():
    two = length_of(["72"] * 4, [1, 3, 100, 300], prompt_ids=[[1], [1], [2], [2]])
    assert two == [0.5, -0.5, 0.5, -0.5]
    assert length_of(["72"] * 4, [1, 3, 100, 300], prompts=["a", "a", "b", "b"]) == two
    assert length_of(["72", "72"], [5, 5]) == [0.0, 0.0] and length_of(["72"], [5]) == [0.0]


def test_rows_without_an_answer_and_tokens_of_tools():
    assert length_of(["72", "72", "x"], [5, 9, 1], answer=["72", "72", None]) == [0.5, -0.5, None]
    masks = [[1] * 5, [1, 0, 0, 0, 0, 0, 0, 0, 1]]
    assert length_of(["72", "72"], [5, 9], completion_mask=masks) == [-0.5, 0.5]
    found = REWARDS["length"](
        None, ["ab", "c"], ids(2, 1), of="reward_helpers.lengths", right=2, prompt_ids=[[1], [1]]
    )
    assert found == [0.0, -0.5]


def test_overlong_is_trls():
    lengths = list(range(0, 140))
    ours = REWARDS["overlong"](None, [""] * 140, ids(*lengths), max_length=100, cache=20)
    assert ours == pytest.approx(get_soft_overlong_punishment(100, 20)(ids(*lengths)))
    assert ours[80] == 0.0 and ours[90] == -0.5 and ours[100] == ours[139] == -1.0


def repetition(*completions, **options):
    return REWARDS["repetition"](None, [""] * len(completions), list(completions), **options)


def test_repetition_by_hand():
    # 7 tokens hold 6 bigrams: 12 23 31 12 23 34, 4 of them distinct
    assert repetition([1, 2, 3, 1, 2, 3, 4], n=2) == pytest.approx([-2 / 6])
    assert repetition([1, 2, 3, 1, 2, 3, 4], n=2, max_penalty=3.0) == pytest.approx([-1.0])
    assert repetition([], [1], [1, 1, 1], [1, 2, 3, 4, 5], n=4) == [0.0] * 4
    words = REWARDS["repetition"](None, ["No no NO", [{"role": "assistant", "content": "a b c"}]], n=1)
    assert words == pytest.approx([-2 / 3, 0.0])


def test_repetition_is_that_of_the_paper():
    """1 - distinct / all n-grams, counted here as text."""
    rng = random.Random(0)
    for _ in range(50):
        tokens, n = [rng.randrange(4) for _ in range(rng.randrange(5, 60))], rng.randrange(1, 5)
        grams = [" ".join(map(str, tokens[i : i + n])) for i in range(len(tokens) - n + 1)]
        expected = len(set(grams)) / len(grams) - 1
        assert repetition(tokens, n=n, max_run=100) == pytest.approx([expected])


def test_loops_of_one_token():
    """A run of 20 among 40 tokens is half of the reply, though none of its 32-grams stands there twice."""
    reply = list(range(20)) + [7] * 20
    assert repetition(reply, n=32, max_run=16) == [-0.5]
    assert repetition(reply, n=32, max_run=20) == [0.0]
    assert repetition([7] * 400) == pytest.approx([-1.0], abs=0.01)


def test_a_tools_text_is_not_the_models_repetition():
    reply = [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert repetition(reply, n=2) < [-0.3]
    assert repetition(reply, n=2, completion_mask=[[1, 1, 1, 1, 0, 0, 0, 0, 1]]) == [0.0]
    # no n-gram goes across what the tool said
    assert repetition([1, 9, 2, 1, 2], n=2, completion_mask=[[1, 0, 1, 0, 1]]) == [0.0]


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2.5}, {"max_penalty": -1}, {"max_run": None}])
def test_options_out_of_range(wrong):
    with pytest.raises(UserError, match=f"repetition: {next(iter(wrong))}: found"):
        repetition([1], **wrong)
