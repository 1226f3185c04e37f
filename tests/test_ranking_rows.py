"""Rows of preferences -> rankings: layouts, ranks, ties, margins, lengths, and errors that name the row.

Run: pytest tests/test_ranking_rows.py
"""

import pytest
from rl_helpers import tiny_tokenizer

from posttrain.errors import UserError
from posttrain.layouts import shared_length
from posttrain.ranking_rows import Ranking, encode_rankings


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def ranking_rows() -> list[dict]:
    prompt = [{"role": "user", "content": "q"}]
    return [
        {"prompt": prompt, "completions": [say("best"), say("good"), say("so-so")], "ranks": [0, 1, 1]},
        {"prompt": prompt, "chosen": say("yes"), "rejected": say("a no that is much too long")},
        {"prompt": prompt, "completions": [say("x"), say("y")]},
    ]


def test_rankings_are_encoded_with_their_prompt_to_the_end_token():
    tokenizer = tiny_tokenizer()
    rankings, too_long = encode_rankings(tokenizer, ranking_rows(), 1000)
    assert too_long == 0
    assert [r.ranks for r in rankings] == [[0, 1, 1], [0, 1], [0, 1]]
    assert [r.margins for r in rankings] == [[], [], []]
    text = "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>yes<|im_end|>"
    assert rankings[1].sequences[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_too_long_rankings_are_left_out_and_counted():
    rankings, too_long = encode_rankings(tiny_tokenizer(), ranking_rows(), 30)
    assert ([r.row for r in rankings], too_long) == ([0, 2], 1)
    with pytest.raises(UserError, match="all 3 rankings.*max_length 5"):
        encode_rankings(tiny_tokenizer(), ranking_rows(), 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"completions": [say("alone")]}, "1 completions"),
        ({"completions": []}, "0 completions"),
        ({"ranks": [0, 1]}, r"ranks \[0, 1\]"),
        ({"ranks": [1, 0, 2]}, "rising order"),
        ({"ranks": ["a", "b", "c"]}, "rising order"),
        ({"ranks": [False, True, True]}, "rising order"),
        ({"completions": [say("a"), "b", say("c")]}, "found 'b'"),
        ({"margin": -1.0}, "margin -1.0"),
        ({"margin": "much"}, "margin 'much'"),
        ({"margin": [1.0, 1.0]}, "each of the 1 steps"),
        ({"margin": float("nan")}, "margin nan"),
    ],
)
def test_a_malformed_ranking_is_named(changes, words):
    rows = ranking_rows()
    rows[0] = {**rows[0], **changes}
    with pytest.raises(UserError, match=f"row 0: .*{words}"):
        encode_rankings(tiny_tokenizer(), rows, 1000)


def test_a_margin_counts_once_for_each_step_down():
    rows = ranking_rows()
    rows[0] |= {"ranks": [0, 0, 3], "margin": 0.5}  # a gap in the ranks is no step of its own
    rows[1] |= {"margin": 2}
    rows[2] = {**rows[2], "completions": [say(c) for c in "abcd"], "ranks": [0, 1, 1, 2], "margin": [0.5, 0.25]}
    rankings, _ = encode_rankings(tiny_tokenizer(), rows, 1000)
    assert [r.margins for r in rankings] == [[0, 0, 0.5], [0, 2], [0, 0.5, 0.5, 0.75]]


def test_more_ties_than_can_be_averaged_are_refused():
    rows = [{"prompt": [{"role": "user", "content": "q"}], "completions": [say("a")] * 13, "ranks": [1] * 13}]
    with pytest.raises(UserError, match="row 0: 13 completions share a rank; .*at most 12.*--ties breslow"):
        encode_rankings(tiny_tokenizer(), rows, 1000)
    assert encode_rankings(tiny_tokenizer(), rows, 1000, ties="breslow")[0][0].ranks == [1] * 13


def test_what_sequences_share_leaves_each_its_last_token():
    assert shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_length([[1, 2], [1, 2, 3]]) == 1 and shared_length([[1, 2], [1, 2]]) == 1
    assert shared_length([[1], [1, 2]]) == 0 and shared_length([[2, 2], [1, 2]]) == 0
    assert shared_length([[1, 2, 3]]) == 0
    assert Ranking([[1, 2, 3], [1, 2, 4, 5], [1, 2]], [0, 1, 2], 0).size == 1 + 2 + 3 + 1
