"""Pretraining under kills, damage and bad texts, beside what tests/test_resume.py does with every stage.

Run: pytest tests/test_pretrain_faults.py
"""

import json
import os
import time

import pytest
from recipe_runs import KILL, TERM, Running, argv, log, manifest, refused, result, run

pytestmark = pytest.mark.slow
LONG = {"max_steps": 30, "save_steps": 1, "eval_steps": 10, "optim": "muon", "skip_spikes": 8.0}


def go(chain, out, tmp_path, **changes):
    return run(argv("pretrain", chain, out, **changes), tmp_path)


def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(small_chain, tmp_path):
    """Checkpoints after every step: most kills fall into one of them."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert go(small_chain, whole, tmp_path, **LONG).returncode == 0
    kills = 0
    for step in (3, 4, 7, 12, 13, 21, 29):
        running = Running(argv("pretrain", small_chain, out, **LONG), tmp_path)
        while not (out / "log.jsonl").is_file() or len((out / "log.jsonl").read_bytes().splitlines()) < step:
            if (out / "stage.json").exists():
                break
            time.sleep(0.002)
        os.killpg(running.pid, KILL)
        kills += running.finish().returncode == -9
    assert kills >= 5
    done = go(small_chain, out, tmp_path, **LONG)
    assert done.returncode == 0, done.stderr
    assert result(out) == result(whole) and log(out, "samples.jsonl") == log(whole, "samples.jsonl")
    assert [line["step"] for line in log(out) if "loss" in line] == list(range(1, 31))


def test_a_second_sigterm_changes_nothing(small_chain, tmp_path):
    out, settings = tmp_path / "out", {"max_steps": 400}
    running = Running(argv("pretrain", small_chain, out, **settings), tmp_path)
    while not (out / "log.jsonl").is_file():
        time.sleep(0.002)
    for _ in range(20):
        os.killpg(running.pid, TERM)
        time.sleep(0.001)
    stopped = running.finish()
    assert stopped.returncode == 143 and "Traceback" not in stopped.stderr, stopped.stderr
    (saved,) = (out / "checkpoints").glob("*/checkpoint.json")
    assert json.loads(saved.read_text())["step"] == log(out)[-1]["step"]


def test_damaged_tokens_are_named_when_it_goes_on(small_chain, tmp_path):
    out, settings = tmp_path / "out", {"max_steps": 60, "save_steps": 10}
    Running(argv("pretrain", small_chain, out, **settings), tmp_path).stop_at(25, KILL, out)
    file = out / "tokens" / "shard-00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    refused(go(small_chain, out, tmp_path, **settings), str(file), "damaged", f"remove {file.parent}")


def test_the_seed_decides_everything(small_chain, tmp_path):
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert go(small_chain, tmp_path / name, tmp_path, seed=seed, dataset_seed=0).returncode == 0
        found[name] = result(tmp_path / name)
    assert found["a"] == found["b"]
    assert found["a"]["files"]["model.safetensors"] != found["c"]["files"]["model.safetensors"]


# ---- texts ----------------------------------------------------------------------------------------------------------

GOOD = [json.dumps({"text": f"Sum {n}: {n} + {n} is {2 * n}. Tom found a hat in the old town."}) for n in range(80)]


@pytest.fixture
def on_file(small_chain, tmp_path):
    """`on_file(lines, **changes)`: pretraining on these lines of JSONL, measured on tiny."""

    def go_on(lines: list, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
        held_out = {"eval_dataset_name": "tiny", "eval_dataset_config": "documents", "dataset_name": file}
        keys = {**held_out, "max_rows": 5000, "max_steps": 2, **changes}
        return go(small_chain, tmp_path / "out", tmp_path, **keys), tmp_path / "out", file

    return go_on


BAD = {
    "malformed_json": b'{"text": "half\n',
    "wrong_type": b'["text"]\n',
    "invalid_utf8": b'{"text": "\xff\xfe"}\n',
    "nul": b'{"text": "a\x00b"}\n',
    "surrogate": b'{"text": "\\ud800 alone"}\n',
    "missing": b'{"txt": "another name"}\n',
}


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_bad_row_stops_it_by_file_and_line(on_file, streaming):
    done, out, file = on_file([*GOOD[:40], BAD["malformed_json"], *GOOD[40:]], streaming=streaming)
    refused(done, f"{file}:41", "not valid JSON")
    assert not (out / "stage.json").exists()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_bad_rows_are_counted_where_that_is_asked_for(on_file, streaming):
    done, out, _ = on_file([*GOOD, *BAD.values()], streaming=streaming, on_bad_row="skip")
    assert done.returncode == 0, done.stderr
    facts = manifest(out)["data"][0]
    assert sum(facts["skipped"].values()) == len(BAD) and facts["rows"] == facts["documents"] == len(GOOD)
    assert {"malformed_json", "wrong_type", "invalid_utf8", "nul"} <= facts["skipped"].keys()


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(on_file):
    lines = [line.encode() + b"\r\n" for line in GOOD]
    done, out, _ = on_file([b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    assert done.returncode == 0, done.stderr
    facts = manifest(out)["data"][0]
    assert (facts["documents"], facts["skipped"]) == (80, {})
    assert facts["bytes"] == sum(len(json.loads(line)["text"]) for line in GOOD)


def test_a_row_of_a_hundred_megabytes_is_rejected_in_bounded_memory(on_file, tmp_path):
    huge = b'{"text": "' + b"x" * 100_000_000 + b'"}\n'
    done, out, file = on_file([*GOOD, huge])
    refused(done, f"{file}:81", "more than 16,000,000 bytes")
    done, out, _ = on_file([*GOOD, huge], on_bad_row="skip", streaming="true")
    assert done.returncode == 0, done.stderr
    assert manifest(out)["data"][0]["skipped"] == {"too_long": 1}
    alone, small, _ = on_file(GOOD, on_bad_row="skip", streaming="true", output_dir=tmp_path / "small")
    memory = [
        json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["memory_gb"]
        for folder in (out, tmp_path / "small")
    ]
    assert alone.returncode == 0 and memory[0] - memory[1] < 0.1, memory


def test_a_row_of_one_repeated_token_is_text_like_any_other(on_file):
    done, out, _ = on_file([*GOOD, json.dumps({"text": " a" * 400_000})])
    assert done.returncode == 0, done.stderr
    assert manifest(out)["data"][0]["documents"] == 81
    assert all(line["loss"] > 0 for line in log(out))
