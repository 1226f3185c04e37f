"""Loading rows: files good and bad, splits, adapters.

Run: pytest tests/test_data.py
"""

import gzip
import json

import pytest

from posttrain.data import DataConfig, check, load_rows, parse_split
from posttrain.errors import UserError


def load(path, split="train", columns=("text",), **keys):
    return load_rows(DataConfig(dataset_name=str(path), **keys), split, 0, columns)


def texts(path, *args, **keys):
    return [row["text"] for row in load(path, *args, **keys)[0]]


def jsonl(path, *values):
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return path


def parquet(path, *values):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": list(values)}), path)
    return path


def reversed_rows(rows):
    """An adapter of the user's own, named by its dotted path."""
    return [{"text": row["text"][::-1]} for row in rows]


def failing_rows(rows):
    for row in rows:
        yield {"text": row["no such key"]}


def test_jsonl_gzip_and_parquet_give_the_same_rows_and_hash(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", "one", "zwei é", "\u2028\x00")
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = parquet(tmp_path / "c.parquet", "one", "zwei é", "\u2028\x00")
    loaded = [load(path) for path in (plain, zipped, table)]
    assert [rows for rows, _ in loaded] == [[{"text": t} for t in ("one", "zwei é", "\u2028\x00")]] * 3
    assert len({description["sha256"] for _, description in loaded}) == 1
    assert loaded[0][1] | {"sha256": ""} == {
        "name": str(plain),
        "config": None,
        "split": "train",
        "rows": 3,
        "sha256": "",
    }
    assert load(jsonl(plain, "one", "zwei e"))[1]["sha256"] != loaded[0][1]["sha256"]


def test_bom_crlf_and_blank_lines(tmp_path):
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}\r\n  \n{"text": "c"}')
    assert texts(file) == ["a", "b\r\n", "c"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "c"', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON in UTF-8"),
        (b'{"text": "\x00"}', "not valid JSON"),
        (b'["c"]', "found list, expected a JSON object"),
        (b'{"text": "c"} {"text": "d"}', "Extra data"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "e"}\n')
    with pytest.raises(UserError, match=words) as refused:
        load(file)
    assert str(refused.value).startswith(f"{file}:3: ")


def test_half_a_surrogate_pair_names_the_row(tmp_path):
    file = tmp_path / "half.jsonl"
    file.write_text('{"text": "\\ud83d\\ude42"}\n{"text": "a\\ud83d"}\n')
    with pytest.raises(UserError, match=r"row 1: '\\ud83d' is half a surrogate pair"):
        load(file)


def test_damaged_files(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 99)
    for name, content in (("cut.jsonl.gz", whole[:-9]), ("no.jsonl.gz", b"x"), ("cut.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    cases = {
        "empty.jsonl": "no rows",
        "folder": r"has no file that ends in .jsonl, .jsonl.gz, .parquet",
        "notes.txt": "expected a file that ends in",
        "missing.jsonl": "no file or folder",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as refused:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(UserError, match="no file or folder 'oasst'"):
        load("oasst")
    with pytest.raises(UserError, match="max_rows: found 0"):
        DataConfig(dataset_name="tiny", max_rows=0)


def test_a_missing_column_names_row_columns_and_mend(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [], "text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="row 1: column 'messages' is missing; found text; .* dataset_adapter"):
        load(file, columns=("text", "messages"))


def test_adapters(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "abc")
    assert texts(file, dataset_adapter="test_data.reversed_rows") == ["cba"]
    for name in ("no_such", "no.such.module", "test_data.nothing"):
        with pytest.raises(UserError, match=f"dataset_adapter: no function '{name}'.*gsm8k"):
            load(file, dataset_adapter=name)
    with pytest.raises(UserError, match="test_data.failing_rows cannot read .*a.jsonl: KeyError"):
        load(file, dataset_adapter="test_data.failing_rows")
    with pytest.raises(UserError, match="gsm8k cannot read .*a.jsonl"):
        load(file, columns=("prompt",), dataset_adapter="gsm8k")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "abcdefghij"),
        ("train[:3]", "abc"),
        ("train[7:]", "hij"),
        ("train[2:4]", "cd"),
        ("train[:90%]", "abcdefghi"),
        ("train[90%:]", "j"),
        ("train[-3:]", "hij"),
        ("train[:-20%]", "abcdefgh"),
        ("train[:]", "abcdefghij"),
    ],
)
def test_slices(tmp_path, split, expected):
    assert "".join(texts(jsonl(tmp_path / "rows.jsonl", *"abcdefghij"), split)) == expected


def test_slices_that_are_none(tmp_path):
    for split in ("train[", "train[a:]", "train[1]", "[1:2]", ""):
        with pytest.raises(UserError, match="expected a name or a slice"):
            parse_split(split)
    with pytest.raises(UserError, match="no rows"):
        load(jsonl(tmp_path / "rows.jsonl", "a"), "train[5:9]")


def test_max_rows_counts_after_the_slice(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", *"abcdefghij")
    assert texts(file, "train[4:]", max_rows=2) == ["e", "f"] and len(texts(file, max_rows=99)) == 10


def test_the_files_of_a_folder_belong_to_splits(tmp_path):
    for name in ("test", "train-00001-of-00002", "train-00000-of-00002", "train_2", "training"):
        jsonl(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "README.md").write_text("not data")
    assert texts(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002", "train_2"]
    assert texts(tmp_path, "test") == ["test"]
    with pytest.raises(UserError, match="no file named after split 'validation'; found test.jsonl"):
        texts(tmp_path, "validation")  # rather than to measure on the training rows


def test_a_folder_without_split_names_is_one_split(tmp_path):
    jsonl(tmp_path / "b.jsonl", "b")
    parquet(tmp_path / "a.parquet", "a")
    assert texts(tmp_path) == texts(tmp_path, "test") == ["a", "b"]


def test_tiny_by_name():
    rows, description = load("tiny", columns=("prompt", "answer"), dataset_config="problems", max_rows=7)
    assert len(rows) == description["rows"] == 7
    again = load("tiny", columns=("prompt",), dataset_config="problems", max_rows=7)[1]
    other = load("tiny", columns=("prompt",), dataset_config="problems", max_rows=7, dataset_seed=1)[1]
    assert again["sha256"] == description["sha256"] != other["sha256"]
    with pytest.raises(UserError, match="dataset_config: found None, expected one of documents"):
        load("tiny")
    with pytest.raises(UserError, match="split: found 'valid', expected train or test"):
        load("tiny", "valid", dataset_config="documents")


def test_a_dry_run_finds_what_it_can(tmp_path):
    check(DataConfig("tiny", "documents"), "train[50000:]", 0, ("text",))  # without making 60 000 documents
    check(DataConfig("user/name"), "train", 0, ("text",))
    broken = [
        DataConfig("tiny", "document"),
        DataConfig("no_such_file.jsonl"),
        DataConfig("user/name", dataset_adapter="no_such"),
        DataConfig(str(jsonl(tmp_path / "a.jsonl", "a")), dataset_adapter="no_such"),
    ]
    for config in broken:
        with pytest.raises(UserError):
            check(config, "train", 0, ("text",))
    with pytest.raises(UserError, match="column 'messages'"):
        check(DataConfig(str(tmp_path / "a.jsonl")), "train", 0, ("messages",))
