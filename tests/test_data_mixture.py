"""Mixtures: exact counts, seeded order, nothing repeated that need not be; what users get wrong in them.

Run: pytest tests/test_data_mixture.py
"""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import DataConfig, check, load_rows, stream_rows
from posttrain.data.mixture import apportion, largest_total, picks, schedule, shares
from posttrain.errors import UserError

WEIGHTS = st.lists(st.floats(0.01, 100).map(lambda x: round(x, 2)), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 5000))
def test_counts_add_up_and_are_less_than_one_from_their_share(weights, total):
    counts = apportion(weights, total)
    whole = sum(Fraction(str(w)) for w in weights)
    assert sum(counts) == total
    assert all(abs(n - Fraction(str(w)) / whole * total) < 1 for n, w in zip(counts, weights, strict=True))


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([0.7, 0.3], 1000, [700, 300]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),  # in binary fractions 0.1 + 0.2 + 0.7 is less than 1
        ([1, 1, 1], 10, [4, 3, 3]),
        ([47_000, 16_000, 15_900, 12_000, 6_000, 3_100], 10, [5, 2, 1, 1, 1, 0]),  # Hamilton's, from the textbooks
        ([5], 7, [7]),
    ],
)
def test_counts_worked_by_hand(weights, total, expected):
    assert apportion(weights, total) == expected


@given(WEIGHTS, st.data())
def test_without_a_total_no_source_repeats_and_one_is_used_up(weights, data):
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=len(weights), max_size=len(weights)))
    total = largest_total(weights, sizes)
    counts = apportion(weights, total)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    more = [share * (total + 1) for share in shares(weights)]
    assert any(share > size for share, size in zip(more, sizes, strict=True))


def test_weights_are_the_numbers_that_are_written():
    assert largest_total([0.1, 0.9], [1, 9]) == 10  # the binary number nearest to 0.1 is more than a tenth
    assert largest_total([1, 1], [10, 11]) == largest_total([50.0, 50.0], [11, 10]) == 20


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=5), st.integers(0, 9))
def test_each_source_gives_exactly_its_count_and_all_rows_before_any_again(sources, seed):
    sizes, counts = zip(*sources, strict=True)
    order = picks(sizes, counts, seed)
    assert order == picks(sizes, counts, seed)
    assert [sum(source == i for source, _ in order) for i in range(len(sizes))] == list(counts)
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times = Counter(dict.fromkeys(range(size), 0))
        times.update(index for taken, index in order if taken == source)
        assert len(times) == size and set(times.values()) <= {count // size, -(-count // size)}


def test_the_order_is_shuffled_and_depends_on_the_seed():
    orders = [picks([50, 50], [30, 50], seed) for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    first = [sum(source == 0 for source, _ in order[:40]) for order in orders]
    assert 12 < sum(first) / 20 < 18  # 15 of 40 at random; unshuffled 30
    assert len({tuple(sorted(i for source, i in order if source == 0)) for order in orders}) == 20  # other samples
    chosen = Counter(i for order in orders for source, i in order if source == 0)
    assert len(chosen) == 50  # and not always the beginning


@given(WEIGHTS, st.integers(1, 400))
def test_a_schedule_is_near_its_shares_after_any_number_of_rows(weights, num):
    taken = Counter(islice(schedule(weights), num))
    ahead = [taken[i] - share * num for i, share in enumerate(shares(weights))]
    assert max(ahead) < 1 and min(ahead) > -max(1, len(weights) - 1)


# ---- from files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """a.jsonl, b.jsonl, c.jsonl with 10, 20 and 5 rows: {"text": "a0"} and so on."""
    for name, size in (("a", 10), ("b", 20), ("c", 5)):
        rows = [{"text": f"{name}{i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mixed(files, *entries, seed=0, split="train", columns=("text",), **keys):
    entries = [{"dataset_name": str(files / f"{name}.jsonl"), **more} for name, more in entries]
    return load_rows(DataConfig(dataset_mixture=entries, **keys), split, seed, columns)


def first_letters(rows):
    return Counter(row["text"][0] for row in rows)


def test_by_weight(files, caplog):
    rows, description = mixed(files, ("a", {"weight": 1}), ("b", {"weight": 3}))
    assert first_letters(rows) == {"a": 7, "b": 19} and len({row["text"] for row in rows}) == 26  # 6.5 and 19.5
    assert f"data: mixture of 26 rows: 7 of {files}/a.jsonl (10 rows), 19 of {files}/b.jsonl (20 rows)" in caplog.text
    rows, description = mixed(files, ("a", {"weight": 1}), ("b", {"weight": 3}), max_rows=101)
    assert first_letters(rows) == {"a": 25, "b": 76} and description["rows"] == 101
    assert "25 of " in caplog.text and "a.jsonl (10 rows, 2.50 times over)" in caplog.text
    assert [entry["epochs"] for entry in description["mixture"]] == [2.5, 3.8]


def test_by_count_and_what_the_manifest_says(files):
    rows, description = mixed(files, ("a", {"count": 25}), ("b", {"count": 7}), ("c", {"count": 5}))
    assert first_letters(rows) == {"a": 25, "b": 7, "c": 5}
    times = Counter(row["text"] for row in rows)
    assert {times[f"a{i}"] for i in range(10)} == {2, 3} and {times[f"c{i}"] for i in range(5)} == {1}
    facts = [(entry["rows"], entry["taken"], entry["epochs"]) for entry in description["mixture"]]
    assert facts == [(10, 25, 2.5), (20, 7, 0.35), (5, 5, 1.0)]
    alone = load_rows(DataConfig(str(files / "a.jsonl")), "train", 0, ("text",))[1]
    assert description["mixture"][0].items() >= alone.items() and description["rows"] == 37
    again = mixed(files, ("a", {"count": 25}), ("b", {"count": 7}), ("c", {"count": 5}))
    assert again == (rows, description)
    other = mixed(files, ("a", {"count": 25}), ("b", {"count": 7}), ("c", {"count": 5}), seed=1)
    assert other[1]["sha256"] != description["sha256"]
    assert [entry["sha256"] for entry in other[1]["mixture"]] == [entry["sha256"] for entry in description["mixture"]]


def test_an_entry_has_its_own_split_adapter_and_number_of_rows(files):
    reverse = {"dataset_adapter": "test_data.reversed_rows", "dataset_train_split": "train[2:8]"}
    rows, description = mixed(files, ("a", {"count": 6, **reverse}), ("b", {"count": 3, "max_rows": 3}))
    assert sorted(row["text"] for row in rows) == ["2a", "3a", "4a", "5a", "6a", "7a", "b0", "b1", "b2"]
    assert [entry["split"] for entry in description["mixture"]] == ["train[2:8]", "train"]
    options = {"dataset_adapter": "test_data.careful_rows", "dataset_adapter_options": {"word": "!", "least": 1}}
    rows, _ = mixed(files, ("c", {"count": 5, **options}), ("b", {"count": 1}))
    assert sorted(row["text"] for row in rows)[-5:] == [f"c{i}!" for i in range(5)]


def test_what_is_skipped_or_a_duplicate_in_the_entries(files, caplog):
    (files / "a.jsonl").write_text('{"text": "a0"}\n{\n{"text": "b1"}\n{"text": "A0 ", "message_id": "m"}\n')
    (files / "c.jsonl").write_text('{"text": "b2"}\n{"text": "c0", "message_id": "m"}\n{"text": ""}\n{"text": "c1"}\n')
    rows, description = mixed(
        files, ("a", {"weight": 1}), ("b", {"weight": 1}), ("c", {"weight": 1}), on_bad_row="skip", dedup="both"
    )
    assert description["skipped"] == {"malformed_json": 1, "empty_content": 1}
    assert [entry["skipped"] for entry in description["mixture"]] == [{"malformed_json": 1}, {}, {"empty_content": 1}]
    assert [entry["duplicates"] for entry in description["mixture"]] == [{"text": 1}, {"text": 1}, {"text": 1}]
    assert [entry["rows"] for entry in description["mixture"]] == [2, 19, 2] and description["duplicates"] == {
        "text": 3
    }
    assert first_letters(rows).total() == 6


def test_ids_of_two_sources_are_not_the_same_messages_unless_they_say_so(files):
    for name in "ac":
        rows = [{"text": f"{name}{i}", "id": i, "message_id": None} for i in range(5)]
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [("a", {"weight": 1}), ("c", {"weight": 1})]
    for dedup in ("check", "id"):
        assert len(mixed(files, *entries, dedup=dedup)[0]) == 10
    text = (files / "a.jsonl").read_text().replace("null", '"m"')
    (files / "a.jsonl").write_text(text.splitlines()[0] + "\n")
    (files / "c.jsonl").write_text(text.replace('"a', '"c').splitlines()[1] + '\n{"text": "c9"}\n')
    rows, description = mixed(files, *entries, dedup="id")
    assert [entry["duplicates"] for entry in description["mixture"]] == [{}, {"id": 1}] and len(rows) == 2


@pytest.mark.parametrize(
    ("entries", "keys", "words"),
    [
        ([{"weight": 1}], {}, "entry 1: dataset_name is missing; found weight"),
        ([{"dataset_name": "a", "wieght": 1}], {}, "entry 1: unknown key 'wieght'; did you mean 'weight'?"),
        (
            [{"dataset_name": "a", "colour": 1}],
            {},
            "unknown key 'colour'; an entry takes dataset_name, dataset_config",
        ),
        ([{"dataset_name": "a"}], {}, "entry 1: found neither, expected a weight or a count"),
        ([{"dataset_name": "a", "weight": 1, "count": 1}], {}, "found count and weight, expected a weight or a count"),
        (
            [{"dataset_name": "a", "weight": 1}, {"dataset_name": "b", "count": 1}],
            {},
            "some entries have a weight, oth",
        ),
        ([{"dataset_name": "a", "weight": 0}], {}, "entry 1: weight: found 0, expected more than 0"),
        ([{"dataset_name": "a", "weight": float("inf")}], {}, "entry 1: weight: found inf, expected more than 0"),
        ([{"dataset_name": "a", "weight": "1"}], {}, "entry 1: weight: found '1', expected a number"),
        ([{"dataset_name": "a", "weight": True}], {}, "entry 1: weight: found True, expected a number"),
        ([{"dataset_name": "a", "count": 1.5}], {}, "entry 1: count: found 1.5, expected a whole number"),
        ([{"dataset_name": 5, "count": 1}], {}, "entry 1: dataset_name: found 5, expected text"),
        ([{"dataset_name": "a", "count": 1, "max_rows": 0}], {}, "entry 1: max_rows: found 0, expected more than 0"),
        (
            [{"dataset_name": "a", "count": 1, "dataset_adapter_options": {"a": 1}}],
            {},
            "entry 1: dataset_adapter_opti",
        ),
        (
            [{"dataset_name": "a", "count": 1}],
            {"max_rows": 5},
            "max_rows: with counts in dataset_mixture the total is",
        ),
        ([{"dataset_name": "a", "count": 1}], {"dataset_name": "b"}, "dataset_name: with dataset_mixture it must not"),
        ([{"dataset_name": "a", "count": 1}], {"dataset_adapter": "gsm8k"}, "dataset_adapter: with dataset_mixture"),
        (
            [{"dataset_name": "a", "count": 1}],
            {"dataset_config": "main"},
            "dataset_config: with dataset_mixture it be",
        ),
    ],
)
def test_mixtures_that_are_none(entries, keys, words):
    with pytest.raises(UserError) as refused:
        DataConfig(dataset_mixture=entries, **keys)
    assert words in str(refused.value)


def test_an_entry_that_would_have_no_row(files):
    with pytest.raises(
        UserError, match=r"entry 2 \(.*b.jsonl\) with weight 0.001 has none of 10 rows: raise its weight"
    ):
        mixed(files, ("a", {"weight": 1}), ("b", {"weight": 0.001}))


def test_a_dry_run_looks_at_every_entry(files):
    def checked(*entries):
        entries = [{"dataset_name": name, "weight": 1, **more} for name, more in entries]
        check(DataConfig(dataset_mixture=entries), "train", 0, ("text",))

    good = (str(files / "a.jsonl"), {})
    checked(good, ("user/name", {}), ("tiny", {"dataset_config": "documents"}))
    for bad, words in [
        (("nope.jsonl", {}), "no file or folder 'nope.jsonl'"),
        (("tiny", {"dataset_config": "document"}), "dataset_config: found 'document'"),
        ((good[0], {"dataset_adapter": "no_such"}), "no function 'no_such'"),
        (
            (good[0], {"dataset_adapter": "test_data.careful_rows", "dataset_adapter_options": {"x": 1}}),
            "not take 'x'",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            checked(good, bad)


# ---- read while training --------------------------------------------------------------------------------------------


def streamed(files, *entries, **keys):
    entries = [{"dataset_name": str(files / f"{name}.jsonl"), **more} for name, more in entries]
    return stream_rows(DataConfig(dataset_mixture=entries, streaming=True, **keys), "train", 0, ("text",))


def test_a_stream_of_a_mixture(files):
    stream = streamed(files, ("a", {"weight": 1}), ("b", {"weight": 3}))
    texts = [row["text"] for row in stream]
    assert texts == [row["text"] for row in stream] and len(set(texts)) == len(texts) == 27  # b has ended
    assert [first_letters(stream.skip(num)).total() for num in (0, 20)] == [27, 7]
    assert first_letters(list(stream)[:8]) == {"a": 2, "b": 6}
    assert [text for text in texts if text[0] == "a"] == [f"a{i}" for i in range(7)]
    counted = streamed(files, ("a", {"count": 25}), ("c", {"count": 5}))
    assert first_letters(counted) == {"a": 25, "c": 5} and counted.description()["rows"] == 30
    assert max(Counter(row["text"] for row in counted).values()) == 3
    assert first_letters(streamed(files, ("a", {"weight": 1}), ("b", {"weight": 1}), max_rows=50)) == {
        "a": 25,
        "b": 25,
    }
    names = [entry["name"] for entry in counted.description()["mixture"]]
    assert names == [f"{files}/a.jsonl", f"{files}/c.jsonl"]


def test_rows_of_a_streamed_mixture(files):
    rows, description = mixed(files, ("a", {"count": 3}), ("b", {"count": 6}), streaming=True)
    assert first_letters(rows) == {"a": 3, "b": 6} and description["rows"] == 9
    with pytest.raises(UserError, match="max_rows: not set, and streaming is for what does not fit in memory"):
        mixed(files, ("a", {"weight": 3}), streaming=True)
