"""Checkpoints: killed at every file operation, flipped, cut short and with no room left.

Run: pytest tests/test_checkpoint.py
"""

import json
import os

import pytest
from conftest import run_script

from posttrain import checkpoint
from posttrain.errors import UserError


def write(text="new"):
    def into(folder):
        (folder / "policy").mkdir()
        (folder / "policy" / "model.safetensors").write_text(text * 100)
        (folder / "training_state.pt").write_text(text)

    return into


def text_of(folder):
    return (folder / "training_state.pt").read_text()


def hidden(parent):
    return sorted(path.name for path in parent.rglob(".tmp-*"))


def test_saved_files_are_listed_with_their_hashes(tmp_path):
    checkpoint.save(tmp_path / "step-1", write(), keep=1, step=1, elapsed=2.5)
    manifest = checkpoint.read_manifest(tmp_path / "step-1")
    assert (manifest["step"], manifest["elapsed"]) == (1, 2.5)
    assert set(manifest["files"]) == {"policy/model.safetensors", "training_state.pt"}
    # sha256("new"), from coreutils
    expected = "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
    assert manifest["files"]["training_state.pt"] == {"sha256": expected, "bytes": 3}
    assert checkpoint.last_complete(tmp_path) == tmp_path / "step-1" and not hidden(tmp_path)


def test_a_write_that_fails_half_way_leaves_nothing_but_the_old_one(tmp_path):
    checkpoint.save(tmp_path / "step-1", write("old"), keep=1, step=1)

    def fails(folder):
        write()(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "step-2", fails, keep=1, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert text_of(checkpoint.last_complete(tmp_path)) == "old"


def test_sigkill_at_any_point_of_a_save(kill_everywhere):
    folders = kill_everywhere("""
        from posttrain import checkpoint

        def fill(text):
            def write(folder):
                (folder / "policy").mkdir()
                for name in ("policy/model.safetensors", "training_state.pt"):
                    with open(folder / name, "w") as file:
                        file.write(text * 50)
                        file.flush()
                        sys.audit("test.halfway")
                        file.write(text * 50)
            return write

        def before(folder):
            checkpoint.save(folder / "step-1", fill("old"), keep=1, step=1)

        def action(folder):
            checkpoint.save(folder / "step-2", fill("new"), keep=1, step=2)
    """)
    assert len(folders) > 15
    found = [checkpoint.last_complete(folder) for folder in folders]  # verifies every file's hash
    texts = [text_of(path) for path in found]
    assert all(text in ("old" * 100, "new" * 100) for text in texts) and texts[0][0] == "o" and texts[-1][0] == "n"
    assert any(hidden(folder) for folder in folders[:-1]) and not hidden(folders[-1])
    for folder in folders:  # the next save works and sweeps up
        checkpoint.save(folder / "step-3", write(), keep=1, step=3)
        assert [path.name for path in folder.iterdir()] == ["step-3"]


def test_sigkill_while_the_same_step_is_replaced_loses_nothing_older(kill_everywhere):
    folders = kill_everywhere("""
        from posttrain import checkpoint

        def fill(text):
            return lambda folder: (folder / "training_state.pt").write_text(text)

        def before(folder):
            for step in (1, 2):
                checkpoint.save(folder / f"step-{step}", fill("old"), keep=2, step=step)

        def action(folder):
            checkpoint.save(folder / "step-2", fill("new"), keep=2, step=2)
    """)
    assert {text_of(checkpoint.last_complete(folder)) for folder in folders} == {"old", "new"}


def test_the_manifest_decides_which_is_the_last(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path / f"step-{step}", write(str(step)), keep=9, step=step)
    (tmp_path / "step-100").rename(tmp_path / "a")  # neither the highest number
    (tmp_path / "step-999").mkdir()  # nor a folder without a manifest
    (tmp_path / "step-999" / "model.safetensors").write_text("torn")
    (tmp_path / ".tmp-1").mkdir()
    (tmp_path / ".tmp-1" / checkpoint.MANIFEST).write_text(json.dumps({"step": 5000, "files": {}}))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-9", "step-10", "a"]
    assert checkpoint.last_complete(tmp_path) == tmp_path / "a"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / f"step-{step}", write(), keep=2, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]


def test_a_save_of_the_same_step_replaces_it(tmp_path):
    for text in ("old", "new"):
        checkpoint.save(tmp_path / "step-1", write(text), keep=1, step=1)
    assert text_of(checkpoint.last_complete(tmp_path)) == "new"


@pytest.mark.parametrize("name", ["policy/model.safetensors", "training_state.pt"])
def test_one_flipped_byte_names_the_file(tmp_path, name):
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-{step}", write(), keep=2, step=step)
    damaged = tmp_path / "step-2" / name
    content = bytearray(damaged.read_bytes())
    content[1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{damaged} is damaged"):
        checkpoint.last_complete(tmp_path)  # no silent fall-back to step 1
    damaged.unlink()
    with pytest.raises(UserError, match=f"{damaged} is missing"):
        checkpoint.last_complete(tmp_path)


@pytest.mark.parametrize("content", [b'{"step": 1, "files"', b"\xff\xfe", b"[]", b'{"stfp": 1, "files": {}}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    checkpoint.save(tmp_path / "step-1", write(), keep=1, step=1)
    file = tmp_path / "step-1" / checkpoint.MANIFEST
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        checkpoint.last_complete(tmp_path)


def test_nothing_there(tmp_path):
    assert checkpoint.last_complete(tmp_path) is None
    assert checkpoint.last_complete(tmp_path / "no") is None


def test_no_room_left(tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails in its middle."""
    checkpoint.save(tmp_path / "step-1", write("old"), keep=1, step=1)
    done = run_script(
        """
        import errno, resource, sys
        from pathlib import Path
        from posttrain import checkpoint

        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

        def write(folder):
            (folder / "small").write_text("x")
            (folder / "large").write_bytes(bytes(50_000))

        try:
            checkpoint.save(Path(sys.argv[1]), write, keep=1, step=2)
        except OSError as error:
            assert error.errno == errno.EFBIG
            sys.exit(9)
        """,
        str(tmp_path / "step-2"),
    )
    assert done.returncode == 9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert text_of(checkpoint.last_complete(tmp_path)) == "old"


def test_write_json_replaces_whole_or_not_at_all(tmp_path):
    file = tmp_path / "stage.json"
    checkpoint.write_json(file, {"a": "é"})
    with pytest.raises(TypeError):
        checkpoint.write_json(file, {"a": [1, object()]})  # fails with half of it written
    assert json.loads(file.read_bytes()) == {"a": "é"} and os.listdir(tmp_path) == ["stage.json"]
