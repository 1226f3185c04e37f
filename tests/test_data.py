"""Loading rows: what comes out, splits, adapters and their options, what is skipped, config keys.

Run: pytest tests/test_data.py
"""

import gzip
import json
import os
import subprocess
import sys

import pytest

from posttrain import args
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


def reversed_lazily(rows):
    for row in rows:
        yield {"text": row["text"][::-1]}


def failing_rows(rows):
    for row in rows:
        yield {"text": row["no such key"]}


def test_jsonl_gzip_and_parquet_give_the_same_rows_and_hash(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", "one", "zwei é", "\u2028.")
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = parquet(tmp_path / "c.parquet", "one", "zwei é", "\u2028.")
    loaded = [load(path) for path in (plain, zipped, table)]
    assert [rows for rows, _ in loaded] == [[{"text": t} for t in ("one", "zwei é", "\u2028.")]] * 3
    assert len({description["sha256"] for _, description in loaded}) == 1
    assert loaded[0][1] | {"sha256": ""} == {
        "name": str(plain),
        "config": None,
        "split": "train",
        "revision": None,
        "rows": 3,
        "skipped": {},
        "duplicates": {},
        "sha256": "",
    }
    assert load(jsonl(plain, "one", "zwei e"))[1]["sha256"] != loaded[0][1]["sha256"]


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.md").write_text("text")
    cases = {
        "empty.jsonl": "no rows",
        "folder": r"has no file that ends in .jsonl, .json, .txt",
        "notes.md": "expected a file that ends in",
        "*.parquet": "no file matches the pattern",
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
    turns = [{"role": "user", "content": "hi"}]
    file.write_text(json.dumps({"messages": turns, "text": "a"}) + '\n{"text": "b"}\n')
    with pytest.raises(
        UserError, match=r"rows.jsonl:2 \(row 1\): column 'messages' is missing; found text; .* dataset_adapter"
    ):
        load(file, columns=("text", "messages"))


def test_adapters(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "abc")
    assert texts(file, dataset_adapter="test_data.reversed_rows") == ["cba"]
    for name in ("no_such", "no.such.module", "test_data.nothing"):
        with pytest.raises(UserError, match=f"dataset_adapter: no function '{name}'.*gsm8k"):
            load(file, dataset_adapter=name)
    with pytest.raises(UserError, match="test_data.failing_rows cannot read .*a.jsonl:1: KeyError"):
        load(file, dataset_adapter="test_data.failing_rows")
    with pytest.raises(UserError, match="a.jsonl:1: row 0: 'question' is None.*missing_column"):
        load(file, columns=("prompt",), dataset_adapter="gsm8k")


def test_an_error_of_an_adapter_names_the_line_or_nothing_false(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "one", "two", "three")
    with pytest.raises(UserError, match=r"picky_rows cannot read .*a.jsonl:2: ValueError: I dislike two$"):
        load(file, dataset_adapter="test_data.picky_rows")
    with pytest.raises(UserError, match=r"picky_rows cannot .*a.jsonl:2: .*no keyword `bad`, so it cannot skip"):
        load(file, dataset_adapter="test_data.picky_rows", on_bad_row="skip")
    with pytest.raises(
        UserError, match=r"slow_rows cannot read .*a.jsonl: IndexError"
    ):  # the last line is not at fault
        load(file, dataset_adapter="test_data.slow_rows")
    with pytest.raises(UserError, match=r"a.jsonl, split train, row 1, id 'two': column 'text': found ''"):
        load(file, dataset_adapter="test_data.reading_all")
    with pytest.raises(UserError, match=r"a.jsonl:1 .row 0.: the adapter gave str, expected a dict"):
        load(file, dataset_adapter="test_data.only_texts")


def picky_rows(rows):
    for row in rows:
        if row["text"] == "two":
            raise ValueError("I dislike two")
        yield row


def slow_rows(rows):
    yield list(rows)[99]


def reading_all(rows):
    return [{"text": "", "id": row["text"]} if row["text"] == "two" else row for row in rows]


def only_texts(rows):
    return (row["text"] for row in rows)


def careful_rows(rows, *, bad=None, least: int = 3, word: str = ""):
    """An adapter of the user's own that can skip, with options."""
    for row in rows:
        if len(row["text"]) < least:
            bad("too_short", f"found {row['text']!r}, expected {least} characters")
        else:
            yield {"text": row["text"] + word}


def test_an_adapter_with_options_that_skips(tmp_path, caplog):
    file = jsonl(tmp_path / "a.jsonl", "a", "bcd", "efg", "", "hij")
    keys = {"dataset_adapter": "test_data.careful_rows", "dataset_adapter_options": {"word": "!"}}
    with pytest.raises(UserError, match="a.jsonl:1: found 'a', expected 3 characters .too_short; on_bad_row"):
        load(file, **keys)
    rows, description = load(file, on_bad_row="skip", **keys)
    assert [row["text"] for row in rows] == ["bcd!", "efg!", "hij!"] and description["skipped"] == {"too_short": 2}
    said = f"left out 2 of 5 rows of {file}, split train: too_short 2 (first: {file}:1: found 'a'"
    assert said in caplog.text
    keys["dataset_adapter_options"] = {"least": 1, "word": "?"}
    assert texts(file, on_bad_row="skip", **keys) == ["a?", "bcd?", "efg?", "hij?"]


def test_options_that_an_adapter_does_not_take(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "abc")
    cases = [
        ({"wrod": 1}, "careful_rows does not take 'wrod'; did you mean 'word'"),
        ({"colour": 1}, "does not take 'colour'; it takes least, word"),
        ({"bad": 1}, "does not take 'bad'; it takes"),
    ]
    for options, words in cases:
        keys = {"dataset_adapter": "test_data.careful_rows", "dataset_adapter_options": options}
        for look in (lambda keys=keys: load(file, **keys), lambda keys=keys: checked(file, **keys)):
            with pytest.raises(UserError, match=words):
                look()
    with pytest.raises(UserError, match="reversed_rows does not take 'x'; it takes none"):
        load(file, dataset_adapter="test_data.reversed_rows", dataset_adapter_options={"x": 1})
    with pytest.raises(UserError, match="dataset_adapter_options: given without dataset_adapter"):
        load(file, dataset_adapter_options={"lang": "de"})


def checked(path, columns=("text",), **keys):
    check(DataConfig(dataset_name=str(path), **keys), "train", 0, columns)


def test_what_is_skipped_is_counted_and_told(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    lines = [b'{"text": "a"}', b"{", b'{"text": ""}', b'{"text": "\xff"}', b'{"text": "b"}', b"[", b'{"txt": 1}', b""]
    file.write_bytes(b"\n".join(lines) + b'{"text": "c"}\n{"text": "d"}\n{"text": "e"}')
    rows, description = load(file, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["a", "b", "c", "d", "e"]
    expected = {"malformed_json": 2, "empty_content": 1, "invalid_utf8": 1, "missing_column": 1}
    assert description["skipped"] == expected and description["rows"] == 5
    assert f"data: left out 5 of 10 rows of {file}, split train: " in caplog.text and len(caplog.records) == 1
    assert f"malformed_json 2 (first: {file}:2: not valid JSON" in caplog.text
    assert f"missing_column 1 (first: {file}:7 (row 3): column 'text' is missing" in caplog.text
    assert description["sha256"] == load(jsonl(tmp_path / "good.jsonl", *"abcde"))[1]["sha256"]


def test_only_the_first_process_speaks(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(jsonl(tmp_path / "rows.jsonl", "a", "", "b"), on_bad_row="skip")
    assert not caplog.records


def test_too_much_is_never_skipped(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", "a", "", " ", "b", "")
    with pytest.raises(UserError, match="left out 3 of 5 rows .* that is more than max_skipped 0.5"):
        load(file, on_bad_row="skip")
    assert len(load(file, on_bad_row="skip", max_skipped=0.6)[0]) == 2
    with pytest.raises(UserError, match="max_skipped 0: mend"):
        load(jsonl(tmp_path / "one.jsonl", *"abcdefgh", ""), on_bad_row="skip", max_skipped=0)
    with pytest.raises(UserError, match="no rows .left out 2 of 2 rows"):
        load(jsonl(tmp_path / "none.jsonl", "", ""), on_bad_row="skip", max_skipped=1)


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


def test_a_dry_run_of_a_large_file_is_short(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "large.jsonl", *["a"] * 100, "")
    with pytest.raises(UserError, match=r"large.jsonl:101 .row 100"):
        checked(file)
    monkeypatch.setattr("posttrain.data.SMALL", 1000)
    checked(file)  # the beginning stands for all
    with pytest.raises(UserError, match="'messages' is missing"):
        checked(file, ("messages",))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "dataset_name: required and not given; add `--dataset_name tiny`, or a dataset_mixture"),
        ({"dataset_name": ""}, "dataset_name: required"),
        ({"dataset_name": "a", "on_bad_row": "skp"}, "on_bad_row: found 'skp', .* did you mean 'skip'"),
        ({"dataset_name": "a", "dedup": "ids"}, "dedup: found 'ids', expected one of check, id, text, both, none"),
        ({"dataset_name": "a", "on_leak": "drop"}, "on_leak: found 'drop', .*drop_eval"),
        ({"dataset_name": "a", "leak_kinds": ["ngram_12"]}, "leak_kinds: found 'ngram_12', .*did you mean 'ngram_13'"),
        ({"dataset_name": "a", "max_skipped": 1.5}, "max_skipped: found 1.5"),
        ({"dataset_name": "a", "max_row_chars": 0}, "max_row_chars: found 0"),
    ],
)
def test_keys_that_do_not_fit(keys, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**keys)


def test_every_key_stands_in_yaml_and_on_the_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset_mixture:\n- {dataset_name: tiny, dataset_config: documents, weight: 0.5}\n"
        "- dataset_name: tiny\n  dataset_config: texts\n  weight: 1\nstreaming: true\n"
    )
    (read,) = args.parse([DataConfig], ["--config", str(config)])
    flags = [
        "--dataset_mixture", "{dataset_name: tiny, dataset_config: documents, weight: 0.5}",
        "{dataset_name: tiny, dataset_config: texts, weight: 1}", "--streaming",
    ]  # fmt: skip
    (given,) = args.parse([DataConfig], flags)
    assert read == given and read.dataset_mixture[1]["weight"] == 1
    assert args.resolved(read)["dataset_mixture"][0] == {
        "dataset_name": "tiny", "dataset_config": "documents", "weight": 0.5,
    }  # fmt: skip
    config.write_text("dataset_mixture: [{dataset_name: tiny, wieght: 1}]\n")
    with pytest.raises(
        UserError, match=r"config.yaml:1: dataset_mixture: entry 1: unknown key 'wieght'; did you mean"
    ):
        args.parse([DataConfig], ["--config", str(config)])


def test_the_same_in_every_process(tmp_path):
    """Python's hashes differ from process to process."""
    jsonl(tmp_path / "a.jsonl", *(f"a{i}" for i in range(50)), *(f"a{i}" for i in range(20)))
    jsonl(tmp_path / "b.jsonl", *(f"b{i}" for i in range(30)), "a3", "a4")
    script = """
import json, sys
from posttrain.data import DataConfig, load_rows, separate, shuffled, stream_rows
a, b = sys.argv[1:]
entries = [{"dataset_name": a, "weight": 2}, {"dataset_name": b, "weight": 1.5}]
config = DataConfig(dataset_mixture=entries, dedup="both", on_leak="report")
rows, description = load_rows(config, "train", 7, ("text",))
stream = stream_rows(DataConfig(a, streaming=True), "train", 7, ("text",))
order = [row["text"] for row in shuffled(stream, 9, 3, 1)]
print(json.dumps([description, order, separate(config, rows, rows[:9], ("a", "b"))[2]]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    runs = [
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout, runs[0].stderr
    description, order, numbers = json.loads(runs[0].stdout)
    assert [entry["duplicates"] for entry in description["mixture"]] == [{"text": 20}, {"text": 2}]
    assert sorted(order) != order and len(order) == 70 and numbers["same_text"] == 9
