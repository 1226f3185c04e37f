"""Local files: every kind, packed or not, folders, patterns, damage, lines too long for memory.

Run: pytest tests/test_data_files.py
"""

import gzip
import io
import json
import subprocess
import sys

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import DataConfig, load_rows
from posttrain.data import files as data_files
from posttrain.data.bad_rows import BadRows
from posttrain.errors import UserError

LINES = b'{"text": "one"}\n{"text": "zwei \xc3\xa9"}\n'


def zstd(data: bytes) -> bytes:
    packed = io.BytesIO()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
        stream.flush()
        packed.close = lambda: None  # pyarrow closes what it writes to
    return packed.getvalue()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def load(path, split="train", columns=("text",), **keys):
    return load_rows(DataConfig(dataset_name=str(path), **keys), split, 0, columns)


def texts(path, *args, **keys):
    return [row["text"] for row in load(path, *args, **keys)[0]]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(path, **keys) -> str:
    with pytest.raises(UserError) as refused:
        load(path, **keys)
    return str(refused.value)


# ---- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", PACK)
def test_jsonl_json_and_txt_packed_in_every_way(tmp_path, end):
    pack = PACK[end]
    expected = ["one", "zwei é"]
    assert texts(write(tmp_path / f"a.jsonl{end}", pack(LINES))) == expected
    array = b'[ {"text": "one"},\n{"text":\n "zwei \xc3\xa9"}\n]\n'
    assert texts(write(tmp_path / f"a.json{end}", pack(array))) == expected
    assert texts(write(tmp_path / f"b.json{end}", pack(LINES))) == expected
    assert texts(write(tmp_path / f"a.txt{end}", pack(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\n"))) == ["One.\n\nTwo.\n"]


def test_packed_files_made_of_several_pieces(tmp_path):
    """`cat a.gz b.gz > c.gz` is a gzip file, and so it is with zstd."""
    for end in (".gz", ".zst"):
        pieces = PACK[end](LINES) + PACK[end](b'{"text": "three"}\n')
        assert texts(write(tmp_path / f"a.jsonl{end}", pieces)) == ["one", "zwei é", "three"]


def test_the_zstd_command_line_writes_what_we_read(tmp_path):
    if subprocess.run(["which", "zstd"], capture_output=True).returncode:
        pytest.skip("no zstd program here")
    plain = write(tmp_path / "a.jsonl", b"".join(b'{"text": "line %d"}\n' % i for i in range(20_000)))
    subprocess.run(["zstd", "-q", "-19", "--long=24", str(plain)], check=True)
    packed = tmp_path / "a.jsonl.zst"
    assert load(plain)[1]["sha256"] == load(packed)[1]["sha256"]
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 1  # the program adds a checksum
    assert "damaged or cut-off zstd file" in refusal(write(packed, bytes(data)))


def test_a_yaml_file_is_one_row(tmp_path):
    write(tmp_path / "identity.yaml", "name: Pip\ntext: I am Pip.\nlanguages: [en, de]\n")
    assert load(tmp_path / "identity.yaml")[0] == [{"name": "Pip", "text": "I am Pip.", "languages": ["en", "de"]}]
    broken = refusal(write(tmp_path / "identity.yaml", "name: Pip\ntext: [a\nmaker: me\n"))
    assert "identity.yaml:3: not valid YAML" in broken


def test_one_object_over_several_lines_is_one_row(tmp_path):
    assert texts(write(tmp_path / "a.json", json.dumps({"text": "a"}, indent=2))) == ["a"]
    assert texts(write(tmp_path / "b.json", '[{"text": "a"},]')) == ["a"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers(), max_size=3)), st.data())
def test_json_arrays_are_read_as_pythons_own_parser_reads_them(tmp_path_factory, rows, data):
    indent = data.draw(st.sampled_from([None, 1]))
    text = json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=indent)
    file = write(tmp_path_factory.mktemp("json") / "a.json", text.encode("utf-8", "surrogatepass"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    piece, data_files.PIECE = data_files.PIECE, data.draw(st.sampled_from([1, 2, 7, 100]))
    try:
        assert [row for _, row in data_files.read([file], BadRows(), 10_000)] == rows
    finally:
        data_files.PIECE = piece


# ---- lines that hold no row -----------------------------------------------------------------------------------------


def test_bom_crlf_and_blank_lines(tmp_path):
    windows = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}\r\n  \n\xef\xbb\xbf{"text": "c"}'
    file = write(tmp_path / "windows.jsonl", windows)
    assert texts(file) == ["a", "b\r\n", "c"]  # files put together have a BOM in the middle, too


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b'{"text": "c"', "malformed_json", "not valid JSON (Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "invalid_utf8", "not valid UTF-8 (invalid start byte at byte 10 of the line)"),
        (b'{"text": "c\x00"}', "nul", 'a NUL byte after b\'{"text": "c\''),
        (b'["c"]', "wrong_type", "found list, expected a JSON object"),
        (b'{"text": "c"} {"text": "d"}', "malformed_json", "Extra data"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "malformed_json", "nested too deeply"),
        (b'{"text": ' + b"1" * 10_000 + b"}", "malformed_json", "Exceeds the limit"),
        (
            b'{"text": "' + b"c" * 20_000 + b'"}',
            "too_long",
            "the line has more than 16,000 bytes; raise max_row_chars",
        ),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path, line, reason, words):
    keys = {} if reason != "too_long" else {"max_row_chars": 1000}
    file = write(tmp_path / "bad.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "e"}\n')
    error = refusal(file, **keys)
    assert error.startswith(f"{file}:3: ") and words in error and f"[{reason}; on_bad_row: skip" in error
    rows, description = load(file, on_bad_row="skip", **keys)
    assert [row["text"] for row in rows] == ["a", "e"] and description["skipped"] == {reason: 1}


def test_utf16_is_called_so(tmp_path):
    file = write(tmp_path / "powershell.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    assert "the file is UTF-16, expected UTF-8: save it as UTF-8" in refusal(file)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', 3, "expected , or ] after an object of the array"),
        ('[{"text": "a"},\n\n{"text": b}]', 3, "not valid JSON"),
        ('[{"text": "a"},\n"b"]', 2, "found '\"b\"]', expected an object {...}"),
        ('[{"text": "a"},\n{"text": "b"}', 2, "the file ends before the array's ]"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 1, "not valid UTF-8"),
        ('{"text": "a"}\n{"text": "b"', 2, "not valid JSON"),
        ("a", 1, "found 'a', expected an object"),
        ('[{"text": "a"}] [{"text": "b"}]', 1, "expected nothing after the array's ]"),
    ],
)
def test_a_broken_json_file_stops_under_every_policy(tmp_path, content, line, words):
    file = write(tmp_path / "a.json", content)
    for policy in ("stop", "skip"):
        error = refusal(file, on_bad_row=policy)
        assert error.startswith(f"{file}:{line}: ") and words in error and "make it .jsonl" in error


def test_texts_that_are_none(tmp_path):
    write(tmp_path / "d" / "a.txt", b"good")
    write(tmp_path / "d" / "b.txt", b"bad \xff")
    write(tmp_path / "d" / "c.txt", b" \n")
    write(tmp_path / "d" / "d.txt", b"x" * 2000)
    write(tmp_path / "d" / "e.txt", b"NUL \x00")
    write(tmp_path / "d" / "f.txt", b"x" * 20_000)
    for name, words in {
        "b": "b.txt: not valid UTF-8 (invalid start byte at byte 4)",
        "c": "c.txt:1 (row 0): column 'text': found ' \\n', expected some text",
        "d": "d.txt:1 (row 0): 2,000 characters, expected max_row_chars 1,000 or fewer",
        "e": "e.txt:1 (row 0): a NUL character after 'NUL '",
        "f": "f.txt: more than 16,000 bytes; raise max_row_chars",
    }.items():
        assert words in refusal(tmp_path / "d" / f"{name}.txt", max_row_chars=1000)
    rows, description = load(tmp_path / "d", on_bad_row="skip", max_row_chars=1000, max_skipped=0.9)
    assert [row["text"] for row in rows] == ["good"]
    assert description["skipped"] == {"invalid_utf8": 1, "empty_content": 1, "too_long": 2, "nul": 1}


def test_damaged_files(tmp_path):
    whole = b"".join(b'{"text": "line %d"}\n' % i for i in range(5000))
    contents = {
        "cut.jsonl.gz": gzip.compress(whole)[:-9],
        "no.jsonl.gz": b"x",
        "cut.jsonl.zst": zstd(whole)[:-100],
        "no.jsonl.zst": b"xyz",
        "cut.parquet": b"PAR1",
    }
    for name, content in contents.items():
        for policy in ("stop", "skip"):  # what is cut off cannot be counted
            assert name in refusal(write(tmp_path / name, content), on_bad_row=policy)
    assert "damaged or cut-off zstd file (Truncated" in refusal(tmp_path / "cut.jsonl.zst")
    assert "damaged or cut-off gzip file" in refusal(tmp_path / "cut.jsonl.gz")


# ---- which files ----------------------------------------------------------------------------------------------------


def named(path, names):
    for name in names:
        write(path / f"{name}.jsonl", json.dumps({"text": name}))


def test_the_files_of_a_folder_belong_to_splits(tmp_path):
    named(tmp_path, ("test", "train-00001-of-00002", "train-00000-of-00002", "train_2", "training", ".train"))
    (tmp_path / "README.md").write_text("not data")
    assert texts(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002", "train_2"]
    assert texts(tmp_path, "test") == ["test"]
    with pytest.raises(UserError, match="no file named after split 'validation'; found test.jsonl"):
        texts(tmp_path, "validation")  # rather than to measure on the training rows


def test_a_folder_without_split_names_is_one_split(tmp_path):
    named(tmp_path, ["b"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert texts(tmp_path) == texts(tmp_path, "test") == ["a", "b"]


def test_a_folder_gives_files_of_one_kind_and_says_so(tmp_path, caplog):
    named(tmp_path, ["a"])
    for name in ("LICENSE.txt", "dataset_info.json", "config.yaml"):
        write(tmp_path / name, "{}")
    assert texts(tmp_path) == ["a"]
    assert "took its 1 .jsonl and .parquet files and not the 3 others" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").unlink()
    assert texts(tmp_path) == ["{}"]  # LICENSE.txt


def test_folders_in_the_hubs_layout(tmp_path, caplog):
    named(tmp_path / "flat" / "data", ["train-0", "test-0"])
    named(tmp_path / "configs" / "main", ["train", "test"])
    named(tmp_path / "configs" / "other", ["train"])
    assert texts(tmp_path / "flat", "test") == ["test-0"] and texts(tmp_path / "flat") == ["train-0"]
    assert texts(tmp_path / "configs", "test", dataset_config="main") == ["test"] and not caplog.records
    assert texts(tmp_path / "flat", dataset_config="main") == ["train-0"]
    assert "dataset_config: " in caplog.text and "no subfolder main; not used" in caplog.text
    assert texts(tmp_path / "configs" / "main" / "train.jsonl", dataset_config="main") == ["train"]
    assert "main has no meaning for the file" in caplog.text
    assert "give a pattern such as" in refusal(tmp_path / "configs")


def test_patterns(tmp_path):
    named(tmp_path, ("b-2", "b-1", "c"))
    write(tmp_path / "deep" / "down" / "b-0.jsonl.zst", zstd(b'{"text": "b-0"}'))
    assert texts(tmp_path / "b-*.jsonl") == ["b-1", "b-2"]
    assert texts(tmp_path / "[bc]*.jsonl") == ["b-1", "b-2", "c"]
    assert texts(tmp_path / "**" / "b-*") == ["b-1", "b-2", "b-0"]
    assert f"no file matches the pattern '{tmp_path}/x-*.jsonl'" in refusal(tmp_path / "x-*.jsonl")
    write(tmp_path / "b-3.md", "text")
    assert "b-3.md: expected a file that ends in .jsonl" in refusal(tmp_path / "b-*")


def test_the_files_of_a_pattern_belong_to_splits(tmp_path):
    named(tmp_path, ("train-0", "train-1", "test"))
    assert texts(tmp_path / "*.jsonl") == ["train-0", "train-1"]
    assert texts(tmp_path / "*.jsonl", "test") == ["test"]
    with pytest.raises(UserError, match="pattern .* has no file named after split 'validation'"):
        texts(tmp_path / "*.jsonl", "validation")


# ---- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from posttrain.data import DataConfig, load_rows

def peak():  # of this program: getrusage would count what its parent used
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

load_rows(DataConfig(sys.argv[2]), "train", 0, ("text",))
before = peak()
rows, description = load_rows(DataConfig(sys.argv[1], on_bad_row="skip"), "train", 0, ("text",))
print(json.dumps([[row["text"] for row in rows], description["skipped"], peak() - before]))
"""


@pytest.mark.parametrize("end", PACK)
def test_a_line_of_a_hundred_million_bytes_is_not_read_into_memory(tmp_path, end):
    """Packed by gzip or zstd it is a file of a few kilobytes."""
    long = b'{"text": "' + b"a" * 100_000_000 + b'"}'
    file = write(tmp_path / f"rows.jsonl{end}", PACK[end](b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n'))
    small = write(tmp_path / f"small.jsonl{end}", PACK[end](LINES))
    done = subprocess.run([sys.executable, "-c", PEAK, str(file), str(small)], capture_output=True)
    assert done.returncode == 0, done.stderr
    rows, skipped, megabytes = json.loads(done.stdout)
    assert rows == ["a", "b"] and skipped == {"too_long": 1}
    assert megabytes < 60  # of a line 16 are read, put together from pieces
