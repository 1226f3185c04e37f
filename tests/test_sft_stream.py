"""SFT on conversations that are read while training: what comes, in which order, what is refused, resume.

Run: pytest tests/test_sft_stream.py
"""

import json
from collections import Counter
from itertools import islice

import pytest
from recipe_runs import TERM, Running, argv, log, manifest, refused, result, run

from posttrain.data import tiny
from posttrain.data.stream import Stream
from posttrain.errors import UserError
from posttrain.sft import SFTConfig
from posttrain.sft_rows import encode_rows
from posttrain.sft_stream import RowStream

ROWS = list(tiny.rows("conversations", "train", 30, 0))
STREAMED = {"streaming": "true", "stream_buffer": 16, "loss_dataset_split": "test", "loss_max_rows": 20}


def row_stream(tokenizer, rows=ROWS, seed=0, **keys):
    config = SFTConfig(**{"max_length": 256, "stream_buffer": 8, **keys})
    return RowStream(Stream(lambda: iter(rows)), tokenizer, config, seed, [], {})


def test_every_conversation_comes_once_an_epoch_as_it_is_encoded_alone(tokenizer):
    encoded = {row["row"]: row for row in encode_rows(tokenizer, ROWS, 256)}
    rows = list(islice(row_stream(tokenizer, packing=False), 120))  # four epochs, and fifteen times the buffer
    places = [row["rows"][0] for row in rows]
    assert Counter(places) == dict.fromkeys(range(30), 4) and places[:30] != sorted(places[:30])
    for row in rows:
        alone = encoded[row["rows"][0]]
        assert row["input_ids"] == alone["input_ids"] and row["labels"] == alone["labels"]


def test_packed_rows_hold_every_conversation(tokenizer):
    rows = list(islice(row_stream(tokenizer), 40))
    assert all(len(row["input_ids"]) == 256 for row in rows)
    assert any(len(row["rows"]) > 1 for row in rows) and {place for row in rows for place in row["rows"]} == set(
        range(30)
    )


def test_the_same_seed_gives_the_same_rows_and_another_does_not(tokenizer):
    first, again, other = (list(islice(row_stream(tokenizer, seed=seed), 20)) for seed in (3, 3, 4))
    assert first == again != other


def test_a_conversation_that_is_found_in_the_middle_names_its_place(tokenizer):
    broken = {"messages": [{"role": "user", "content": "Hello?"}]}
    stream = iter(row_stream(tokenizer, [*ROWS[:20], broken, *ROWS[20:]], stream_buffer=4))
    with pytest.raises(UserError, match=r"of 4 streamed conversations, .* no_assistant_turn: row \d"):
        list(islice(stream, 60))


def test_streamed_training_goes_on_bit_equal(small_chain, tmp_path):
    settings = {**STREAMED, "max_steps": 40, "eval_steps": 20}
    straight = run(argv("sft", small_chain, tmp_path / "straight", **settings), tmp_path)
    assert straight.returncode == 0, straight.stderr
    arguments = argv("sft", small_chain, tmp_path / "stopped", **settings)
    stopped = Running(arguments, tmp_path).stop_at(12, TERM, tmp_path / "stopped")
    assert stopped.returncode == 143, stopped.stderr
    again = run(arguments, tmp_path)
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")


def test_what_a_stream_leaves_out_is_told(small_chain, tmp_path):
    """A file with a bad line and with a conversation that stands in the held-out rows, too."""
    held_out = list(tiny.rows("conversations", "test", 20, 0))[3]
    lines = [json.dumps(row) for row in (*ROWS, held_out)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]) + "\n")
    settings = {
        **STREAMED, "dataset_name": tmp_path / "train.jsonl", "dataset_config": "null", "on_bad_row": "skip",
        "max_rows": 40, "eval_dataset_name": "tiny", "loss_dataset_name": "tiny",
        "loss_dataset_config": "conversations",
    }  # fmt: skip
    done = run(argv("sft", small_chain, tmp_path / "sft", **settings), tmp_path)
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "sft")["data"][0]
    assert found["skipped"] == {"malformed_json": 1} and found["leaked"] == 1
    assert "malformed_json" in done.stdout + done.stderr
    assert len(log(tmp_path / "sft")) == 8


def test_a_stream_cannot_give_way_to_held_out_rows(small_chain, tmp_path):
    done = run(argv("sft", small_chain, tmp_path / "o", streaming="true", on_leak="stop"), tmp_path)
    refused(done, "on_leak", "drop_train or report")
