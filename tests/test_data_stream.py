"""Rows read while they are used: memory stays small, reading stops early, order is seeded and can be continued.

Run: pytest tests/test_data_stream.py
"""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import DataConfig, EvalIndex, Stream, check, load_rows, shuffled, stream_rows
from posttrain.data.stream import interleaved
from posttrain.errors import UserError


def stream_of(size):
    return Stream(lambda: iter(range(size)))


@pytest.fixture
def file(tmp_path):
    """100 rows {"text": "0"} ... and after them a broken line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(100)) + "{broken\n")
    return path


def config(path, **keys):
    return DataConfig(str(path), streaming=True, **keys)


def texts(rows):
    return [row["text"] for row in rows]


# ---- the shuffle ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 60), st.integers(0, 5), st.integers(0, 3), st.integers(0, 210))
def test_a_shuffle_gives_every_row_once_and_goes_on_exactly_where_it_was(size, buffer, seed, epoch, num):
    rows = shuffled(stream_of(size), buffer, seed, epoch)
    order = list(rows)
    assert sorted(order) == list(range(size)) and list(rows) == order
    assert list(rows.skip(num)) == order[num:]
    assert all(index > value - buffer for index, value in enumerate(order))  # nothing that is not read yet


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = {
        (buffer, seed, epoch): tuple(shuffled(stream_of(50), buffer, seed, epoch))
        for buffer in (1, 10, 100) for seed in range(3) for epoch in range(3)
    }  # fmt: skip
    assert {orders[key] for key in orders if key[0] == 1} == {tuple(range(50))}
    assert len(set(orders.values())) == 1 + 2 * 9


def test_a_large_buffer_is_a_fair_shuffle():
    """Each row comes first equally often: 2000 shuffles of 4 rows, expected 500 each, standard deviation 19."""
    first = Counter(next(iter(shuffled(stream_of(4), 4, seed))) for seed in range(2000))
    assert all(abs(count - 500) < 100 for count in first.values())
    positions = Counter(list(shuffled(stream_of(4), 2, seed)).index(3) for seed in range(2000))
    assert positions[0] == positions[1] == 0 and positions[2] and positions[3]  # a buffer of 2 reads 2 ahead


def test_no_buffer():
    with pytest.raises(UserError, match="shuffle buffer: found 0"):
        shuffled(stream_of(3), 0, 0)


def test_interleaved_streams_begin_again_where_a_total_asks_for_it():
    streams = [stream_of(2), Stream(lambda: iter("abcdef"))]
    assert list(interleaved(streams, [1, 1], None)) == [0, "a", 1, "b"]
    assert list(interleaved(streams, [1, 1], 9)) == [0, "a", 1, "b", 0, "c", 1, "d", 0]
    with pytest.raises(UserError, match="entry 2 has no rows"):
        list(interleaved([stream_of(2), stream_of(0)], [1, 1], 9))


# ---- from files -----------------------------------------------------------------------------------------------------


def test_load_rows_reads_no_further_than_max_rows(file):
    rows, description = load_rows(config(file, max_rows=100), "train", 0, ("text",))
    assert texts(rows) == [str(i) for i in range(100)] and description["rows"] == 100
    plain = file.with_name("good.jsonl")
    plain.write_text(file.read_text().replace("{broken\n", ""))
    assert load_rows(DataConfig(str(plain)), "train", 0, ("text",))[1]["sha256"] == description["sha256"]
    for broken in (config(file, max_rows=101), DataConfig(str(file), max_rows=5)):  # the whole file is checked
        with pytest.raises(UserError, match="rows.jsonl:101: not valid JSON"):
            load_rows(broken, "train", 0, ("text",))
    with pytest.raises(UserError, match="max_rows: not set, and streaming .* eval_max_rows"):
        load_rows(config(file), "train", 0, ("text",))


def test_slices_of_a_stream(file):
    def sliced(split, **keys):
        return texts(stream_rows(config(file, **keys), split, 0, ("text",)))

    assert sliced("train[:3]") == ["0", "1", "2"] and sliced("train[97:100]") == ["97", "98", "99"]
    assert sliced("train[5:]", max_rows=2) == ["5", "6"]
    for split in ("train[:90%]", "train[-5:]", "train[:-5]"):
        for refuse in (stream_rows, check):
            with pytest.raises(
                UserError, match=r"split: found 'train.*with streaming the number of rows is not known"
            ):
                refuse(config(file), split, 0, ("text",))


def test_a_pass_can_be_repeated_and_continued(file):
    stream = stream_rows(config(file, max_rows=50), "train", 0, ("text",))
    first = texts(stream)
    assert first == texts(stream) == [str(i) for i in range(50)] and texts(stream.skip(48)) == ["48", "49"]
    mixed = shuffled(stream, 10, 3, 1)
    assert texts(mixed.skip(20)) == texts(mixed)[20:] and sorted(texts(mixed)) == sorted(first)
    half = iter(stream)
    assert texts(islice(half, 3)) == ["0", "1", "2"] and texts(stream)[:1] == ["0"] and texts(half)[0] == "3"


def test_what_a_stream_says_of_itself(file):
    stream = stream_rows(config(file, max_rows=50), "train", 0, ("text",))
    facts = stream.description()
    assert (facts["name"], facts["split"], facts["rows"], facts["skipped"]) == (str(file), "train", None, {})
    again = stream_rows(config(file, max_rows=50), "train", 0, ("text",)).description()
    assert again == facts and len(facts["sha256"]) == 64
    others = [
        stream_rows(config(file, max_rows=49), "train", 0, ("text",)),
        stream_rows(config(file), "train[:9]", 0, ()),
    ]
    file.write_text(file.read_text() + "\n")
    others.append(stream_rows(config(file, max_rows=50), "train", 0, ("text",)))
    assert len({facts["sha256"], *(other.description()["sha256"] for other in others)}) == 4
    tiny = DataConfig("tiny", "documents", max_rows=9, streaming=True)
    made = stream_rows(tiny, "train", 0, ("text",))
    assert list(made) == load_rows(DataConfig("tiny", "documents", max_rows=9), "train", 0, ("text",))[0]
    assert made.description()["sha256"] != stream_rows(tiny, "train", 1, ("text",)).description()["sha256"]


def test_what_a_stream_leaves_out(file, caplog):
    stream = stream_rows(config(file, on_bad_row="skip"), "train", 0, ("text",))
    assert len(list(stream)) == 100 and stream.description()["skipped"] == {"malformed_json": 1}
    assert list(stream) and stream.description()["skipped"] == {"malformed_json": 1}  # of one pass
    assert len(caplog.records) == 1 and "left out 1 of 101 rows" in caplog.text  # the same every time
    with pytest.raises(UserError, match="rows.jsonl:101: not valid JSON"):
        list(stream_rows(config(file), "train", 0, ("text",)))


def test_too_much_is_never_skipped(file):
    file.write_text("".join('{"text": "a"}\n' + "{\n" * 2 for _ in range(5000)))
    stream = iter(stream_rows(config(file, on_bad_row="skip"), "train", 0, ("text",)))
    with pytest.raises(UserError, match="left out 19.. of 29.. rows .* more than max_skipped 0.5"):
        print(len(list(stream)))  # it does not read to the end first
    few = stream_rows(config(file, on_bad_row="skip", max_rows=9), "train", 0, ("text",))
    with pytest.raises(UserError, match="left out 16 of 25 rows"):
        list(few)
    file.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        list(stream_rows(config(file), "train", 0, ("text",)))


def test_held_out_rows_are_left_out_of_a_stream(file):
    index = EvalIndex([{"text": "7"}, {"text": " 11 "}])
    stream = stream_rows(config(file, max_rows=20), "train", 0, ("text",))
    kept = stream.without(lambda row: index.is_seen(row, ["same_text"]))
    expected = [str(i) for i in range(20) if i not in (7, 11)]
    assert texts(kept) == texts(kept) == expected and kept.description()["leaked"] == 2
    assert texts(kept.skip(7)) == expected[7:]


def test_what_does_not_go_with_streaming(file):
    for dedup in ("id", "text", "both"):
        with pytest.raises(
            UserError, match=f"dedup: {dedup} has to remember every row.*dedup: none, or streaming: fals"
        ):
            stream_rows(config(file, dedup=dedup), "train", 0, ("text",))
    file.write_text('{"text": "a", "id": 1}\n' * 2)
    assert texts(stream_rows(config(file), "train", 0, ("text",))) == ["a", "a"]  # ids are not remembered


def test_an_adapter_sees_the_rows_one_by_one(file):
    keys = {"dataset_adapter": "test_data.reversed_lazily"}
    rows, _ = load_rows(config(file, max_rows=20, **keys), "train", 0, ("text",))
    assert texts(rows)[12] == "21"


MEMORY = """
import sys
from posttrain.data import DataConfig, load_rows, shuffled, stream_rows
from test_data_files import zstd

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

config = DataConfig(sys.argv[1], streaming=True)
list(stream_rows(DataConfig(sys.argv[2], streaming=True), "train", 0, ("text",)))
before = peak()
num = sum(len(row["text"]) for row in shuffled(stream_rows(config, "train", 0, ("text",)), 1000, 0))
print(num, peak() - before)
if sys.argv[3] == "all":
    load_rows(DataConfig(sys.argv[1]), "train", 0, ("text",))
    print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """60 MB of text through a buffer of 1000 rows of a thousand characters."""
    from recipe_runs import ENV
    from test_data_files import zstd

    def write(path, num):
        rows = [f"{i:06d}" + "x" * 994 for i in range(num)]
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=2000)
        else:
            lines = "".join(f'{{"text": "{row}"}}\n' for row in rows).encode()
            path.write_bytes(zstd(lines) if kind.endswith("zst") else lines)
        return str(path)

    large, small = write(tmp_path / f"large.{kind}", 60_000), write(tmp_path / f"small.{kind}", 10)
    arguments = [large, small, "all" if kind == "jsonl" else ""]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, grown, *all_at_once = done.stdout.split()
    assert int(total) == 60_000_000 and float(grown) < 25
    assert all(float(megabytes) > 60 for megabytes in all_at_once)  # the measure can tell the difference
