"""Token shards: the texts as a tokenizer of another kind gives them, the same files from any number of workers, kills
at every file operation, damage named.

Run: pytest tests/test_shards.py
"""

import hashlib
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import UserError
from posttrain.shards import INDEX, TokenShards, blocks, write_shards

TEXTS = [
    "Sum: 1+2.",
    "One day Tom found a hat.",
    "",
    "Ünïcode 漢字 🎩",
    "a<|endoftext|>b <|im_end|>",
    "x" * 500,
    "Tom.",
]


def files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of everything that a later run reads."""
    found = (*folder.glob("*.bin"), *folder.glob("*.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def write(folder, texts, tokenizer, **keys) -> dict:
    return write_shards(folder, texts, tokenizer, "some data", **{"workers": 1, "shard_chars": 40, **keys})


def test_all_texts_stand_in_order_each_behind_an_end_of_text(tmp_path, base_tokenizer):
    index = write(tmp_path, TEXTS, base_tokenizer)
    shards = TokenShards(tmp_path)
    ids = shards.read(0, shards.tokens).tolist()
    end = base_tokenizer.eos_token_id
    begins = [place for place, token in enumerate(ids) if token == end]
    documents = np.split(ids, begins[1:])
    assert begins[0] == 0 and len(index["shards"]) > 2 and index["documents"] == len(documents) == 6
    kept = [text for text in TEXTS if text]
    assert [base_tokenizer.decode(document[1:]) for document in documents] == kept
    # What looks like a control token in a text is text: each id is a piece of it, none is special.
    special = set(base_tokenizer.all_special_ids)
    assert not any(special & set(document[1:].tolist()) for document in documents)
    plain = [base_tokenizer(text, add_special_tokens=False)["input_ids"] for text in kept if "<|" not in text]
    found = [document[1:].tolist() for document, text in zip(documents, kept, strict=True) if "<|" not in text]
    assert found == plain
    assert index["bytes"] == sum(len(text.encode()) for text in kept) and index["tokens"] == len(ids)


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_files(tmp_path, base_tokenizer):
    texts = [f"{number}. {text}" for number in range(20) for text in TEXTS[:2]]
    found = []
    for workers in (1, 2, 3):
        write(tmp_path / str(workers), iter(texts), base_tokenizer, workers=workers)
        found.append(files(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2] and len(found[0]) > 20


def test_where_shards_are_cut_depends_on_the_texts_alone():
    assert list(blocks(["aaa", "", "bb", "cccc", "d"], 4)) == [["aaa", "bb"], ["cccc"], ["d"]]
    assert list(blocks(["", ""], 4)) == [] == list(blocks([], 4))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_shards_read_as_one_row(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("row")
    row, start, listed = np.arange(sum(sizes), dtype="<u2"), 0, []
    for number, size in enumerate(sizes):
        row[start : start + size].tofile(folder / f"shard-{number:05d}.bin")
        listed.append({"name": f"shard-{number:05d}.bin", "tokens": size})
        start += size
    (folder / INDEX).write_text(json.dumps({"dtype": "<u2", "tokens": start, "eos_token_id": 0, "shards": listed}))
    shards = TokenShards(folder)
    begin = data.draw(st.integers(0, start))
    count = data.draw(st.integers(0, start - begin))
    if count:
        assert shards.read(begin, count).tolist() == list(range(begin, begin + count))
    length = data.draw(st.integers(1, start))
    chunks = [shards.chunk(number, length).tolist() for number in range(shards.num_chunks(length))]
    assert sum(chunks, []) == list(range(start // length * length))
    with pytest.raises(IndexError):
        shards.read(begin, start - begin + 1)
    with pytest.raises(UserError, match=rf"fewer than one chunk: lower sequence_length \({start + 1}\)"):
        shards.num_chunks(start + 1)


def test_large_vocabularies_take_four_bytes(tmp_path, base_tokenizer):
    large = deepcopy(base_tokenizer)
    large.add_tokens([f"word{number}word" for number in range(1 << 16)])
    last = len(large) - 1
    index = write(tmp_path, ["word65535word"], large)
    assert index["dtype"] == "<u4" and TokenShards(tmp_path).read(1, 1).tolist() == [last] and last > 65535


def test_what_is_there_is_not_made_again(tmp_path, base_tokenizer, monkeypatch):
    first = write(tmp_path, TEXTS, base_tokenizer)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    unread = (text for text in [pytest.fail] if text())  # texts are not even looked at
    assert write(tmp_path, unread, base_tokenizer) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_texts_and_other_tokenizers_are_refused(tmp_path, base_tokenizer):
    write(tmp_path, TEXTS, base_tokenizer)
    other = deepcopy(base_tokenizer)
    other.add_tokens(["Tom"])
    with pytest.raises(UserError, match="holds tokens of another tokenizer .*: name another folder, or remove it"):
        write(tmp_path, TEXTS, other)
    with pytest.raises(UserError, match="holds tokens of another data"):
        write_shards(tmp_path, TEXTS, base_tokenizer, "other data", workers=1)


def test_damage_is_named(tmp_path, base_tokenizer):
    write(tmp_path, TEXTS, base_tokenizer)
    file = tmp_path / "shard-00001.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is damaged.*remove {tmp_path} to have it made again"):
        write(tmp_path, TEXTS, base_tokenizer)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} is missing"):
        write(tmp_path, TEXTS, base_tokenizer)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TokenShards(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="no such file: the shards were not finished"):
        TokenShards(tmp_path)


def test_finished_shards_of_a_run_that_was_killed_are_kept(tmp_path, base_tokenizer):
    write(tmp_path / "whole", TEXTS, base_tokenizer)
    folder = tmp_path / "half"

    def dies_after(count):
        yield from TEXTS[:count]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, dies_after(6), base_tokenizer)
    kept = sorted(folder.glob("shard-*.bin"))
    assert kept and not (folder / INDEX).exists()
    times = {path: path.stat().st_mtime_ns for path in kept}
    os.truncate(kept[-1], 2)  # torn: not taken
    write(folder, TEXTS, base_tokenizer)
    assert files(folder) == files(tmp_path / "whole")
    assert [path for path in kept if path.stat().st_mtime_ns == times[path]] == kept[:-1]


def test_shards_of_other_texts_or_another_tokenizer_are_made_again(tmp_path, base_tokenizer):
    def dies():
        yield from ["another text of enough characters to fill a shard", *TEXTS[:2], *TEXTS]
        raise KeyboardInterrupt

    other = deepcopy(base_tokenizer)
    other.add_tokens(["Tom"])
    write(tmp_path / "whole", TEXTS, base_tokenizer)
    for tokenizer in (base_tokenizer, other):
        folder = tmp_path / str(len(tokenizer))
        with pytest.raises(KeyboardInterrupt):
            write(folder, dies(), tokenizer)
        write(folder, TEXTS, base_tokenizer)
        assert files(folder).items() >= files(tmp_path / "whole").items()
        assert len(list(folder.glob("*.bin"))) == len(list((tmp_path / "whole").glob("*.bin")))


@pytest.mark.slow
def test_killed_at_any_file_operation_it_goes_on(kill_everywhere, tmp_path, base_tokenizer):
    base_tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = kill_everywhere(f"""
        from transformers import AutoTokenizer
        from posttrain.shards import write_shards
        tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
        tokenizer(["warm"])
        def before(folder): folder.mkdir()
        def action(folder): write_shards(folder, {TEXTS!r}, tokenizer, "some data", workers=1, shard_chars=300)
    """)
    expected = files(folders[-1])
    assert len(folders) > 8 and expected.keys() >= {INDEX, "shard-00000.bin", "shard-00001.bin"}
    for folder in folders:
        write(folder, TEXTS, base_tokenizer, shard_chars=300)
        assert files(folder) == expected and not list(folder.glob(".tmp-*.bin"))


def test_nothing_to_tokenize(tmp_path, base_tokenizer):
    with pytest.raises(UserError, match="no text to train on"):
        write(tmp_path, ["", ""], base_tokenizer)
    endless = deepcopy(base_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        write(tmp_path, TEXTS, endless)


MEMORY = """
import resource, sys
from transformers import AutoTokenizer
from pathlib import Path
from posttrain.shards import write_shards
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def texts(megabytes):
    for number in range(megabytes * 100): yield f"{number} " + "Tom found a hat. " * 600
peaks = []
for megabytes in (2, 10):
    write_shards(Path(sys.argv[2]) / str(megabytes), texts(megabytes), tokenizer, "d", workers=1, shard_chars=1 << 18)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path, base_tokenizer):
    base_tokenizer.save_pretrained(tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "tokenizer"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4, "MiB more for 8 MB of texts more"
