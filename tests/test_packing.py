"""Packing: a packed forward gives what each sequence gives alone, and sequences never see each other.

Run: pytest tests/test_packing.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.packing import best_fit, by_tokens, pack
from posttrain.shapes import ShapeConfig, make_model

LENGTHS = [5, 1, 17, 30, 2, 9, 12, 3]


def sequences(vocabulary, lengths=LENGTHS, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=random).tolist() for n in lengths]


@torch.no_grad()
def logits_of(model, packed):
    """Logits (T_i, V) of each sequence of a packed forward."""
    logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits.flatten(0, 1)
    return [logits[start : start + n] for start, n in zip(packed.starts, packed.lengths, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_each_sequence_alone(tokenizer, attention):
    torch.manual_seed(0)
    model = make_model(ShapeConfig(32, 64, 2, 2, 128), tokenizer).eval()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # attention of a fresh model is flat, and would hide a leak
    rows = sequences(len(tokenizer))
    packed = pack(rows, 40)
    assert packed.input_ids.shape == (2, 40)
    for row, found in zip(rows, logits_of(model, packed), strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)


def test_changing_one_document_leaves_the_others_bit_equal(model, tokenizer):
    rows = sequences(len(tokenizer))
    changed = [sequences(len(tokenizer), LENGTHS, seed=1)[0], *rows[1:]]
    before, after = logits_of(model, pack(rows, 80)), logits_of(model, pack(changed, 80))
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_layout():
    packed = pack([[1, 2, 3], [4, 5], [6]], 4, pad_id=9)
    assert packed.input_ids.tolist() == [[1, 2, 3, 6], [4, 5, 9, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert (packed.starts, packed.lengths) == ([0, 4, 3], [3, 2, 1])


def test_a_sequence_longer_than_the_row_makes_it_wider():
    packed = pack([[1] * 7, [2, 3]], 4)
    assert packed.input_ids.shape == (2, 7) and packed.lengths == [7, 2]


lengths = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=lengths)
def test_best_fit_places_everything_once_in_no_more_rows_than_a_plain_search(lengths):
    rows = best_fit(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= 30 for row in rows)
    free = []  # best-fit decreasing, as its definition says it
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append(max(0, (min(fitting) if fitting else 30) - length))
    assert len(rows) == len(free) >= math.ceil(sum(min(length, 30) for length in lengths) / 30)


@given(lengths=lengths)
def test_micro_batches_hold_everything_once_within_the_limit(lengths):
    batches = by_tokens(lengths, 50)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 50 for batch in batches)


@settings(max_examples=50)
@given(rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=12))
def test_every_sequence_is_found_again_with_positions_from_zero(rows):
    packed = pack(rows, 12, pad_id=0)
    ids, positions = packed.input_ids.flatten().tolist(), packed.position_ids.flatten().tolist()
    for row, start, n in zip(rows, packed.starts, packed.lengths, strict=True):
        assert ids[start : start + n] == row and positions[start : start + n] == list(range(n))
    assert sum(i != 0 for i in ids) == sum(map(len, rows))
