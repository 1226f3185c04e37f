"""Write folders so that they are whole or absent, and find the last whole one.

In: a function that writes files into a folder. Out: that folder under its final name, every file flushed to disk
and listed with its SHA-256 in `checkpoint.json`. A torn write leaves only a `.tmp-*` folder, which is never read
and is swept up by the next write.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import UserError

MANIFEST = "checkpoint.json"


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, dict]:
    """Relative name -> {"sha256", "bytes"} of every file below `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files}


def fsync(path: Path) -> None:
    """Flush a file's or a folder's entry to disk; a rename is only durable once its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, mode: str = "wb", **options):
    """A file to write that takes the place of `path` once it is whole and flushed; else nothing is left of it."""
    beside = path.with_name(f".tmp-{path.name}")
    try:
        with open(beside, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value) -> None:
    """Write JSON beside `path` and rename it into place, flushed."""
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def staging(parent: Path, write: Callable[[Path], None]) -> tuple[Path, dict[str, dict]]:
    """Let `write` fill a fresh hidden folder under `parent`; returns it, flushed, with the list of its files.

    Whatever stops the write (full disk, signal) removes the folder again.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(".tmp-*"):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    folder = parent / f".tmp-{os.getpid()}"
    try:
        folder.mkdir()
        write(folder)
        for path in folder.rglob("*"):
            fsync(path)
        fsync(folder)
        return folder, list_files(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def save(folder: Path, write: Callable[[Path], None], *, keep: int, **facts) -> None:
    """Write checkpoint `folder` atomically with a manifest of `facts` (JSON values) and its files' hashes.

    Afterwards only the `keep` newest complete checkpoints beside it (by the manifest's `step`) stay.
    """
    temporary, files = staging(folder.parent, write)
    unwanted = []
    try:
        write_json(temporary / MANIFEST, {**facts, "files": files})
        if folder.exists():
            unwanted.append(_set_aside(folder))
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(folder.parent)
    unwanted += map(_set_aside, complete(folder.parent)[:-keep])
    for old in unwanted:
        shutil.rmtree(old)


def _set_aside(folder: Path) -> Path:
    """Rename what is to be deleted, so that a kill while deleting leaves a folder that the next write sweeps up."""
    return folder.rename(folder.with_name(f".tmp-old-{folder.name}"))


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. UserError naming it where it is damaged."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): remove {folder} to go back to an older one") from error
    if not (isinstance(manifest, dict) and isinstance(manifest.get("step"), int) and "files" in manifest):
        raise UserError(f"{file} is damaged (no step or no files): remove {folder} to go back to an older one")
    return manifest


def complete(parent: Path) -> list[Path]:
    """Checkpoints under `parent` that have a manifest, by the step it states: the folder's name decides nothing."""
    found = [path.parent for path in parent.glob(f"[!.]*/{MANIFEST}")]
    return sorted(found, key=lambda folder: read_manifest(folder)["step"])


def last_complete(parent: Path) -> Path | None:
    """The newest complete checkpoint, its files verified against their hashes; None where there is none.

    Raises UserError naming the file that is missing or differs: falling back to an older one is the user's choice.
    """
    found = complete(parent)
    if not found:
        return None
    verify(found[-1], read_manifest(found[-1])["files"])
    return found[-1]


def verify(folder: Path, files: dict[str, dict], mend: str | None = None) -> None:
    """Check that every file of the list is there with its hash. Raises UserError naming the first that is not, and
    `mend`, what to do about it."""
    mend = mend or f"remove {folder} to go back to an older one"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {folder} lists it: {mend}")
        if path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the one written with it; {mend}")
