"""The manifests of finished stages: read one, and describe a stage's parents by theirs.

In: a stage's folder, or parents by role: folders and names on the Hub. Out: stage.json as a dict; for the next stage's
own manifest what each parent was, by its hashes. A folder without stage.json is no finished stage.
"""

import json
import os
import re
from pathlib import Path

from posttrain.errors import UserError
from posttrain.provenance import file_sha256s

RUN, STAGE = "run.json", "stage.json"


def read_manifest(path: str | Path) -> dict | None:
    """The manifest of a finished stage, or None where `path` is no stage folder. UserError where it is unreadable."""
    file = Path(path) / STAGE
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): run that stage again with --overwrite true") from error
    if manifest.get("status") != "finished":
        raise UserError(
            f"{file}: status is {manifest.get('status')!r}, expected 'finished': run that stage to its end"
        )
    return manifest


def describe_parents(parents: dict[str, str], planned=()) -> dict[str, dict]:
    """role -> {"path", "stage", "sha256", "tokenizer_sha256"}; UserError for a stage that is missing or unfinished.

    `planned` holds output folders that earlier stages of a chain will have written (used by dry runs). A path with
    no local folder is taken as a name on the Hub ("hub": true) and left to the loader.
    """
    described = {}
    for role, path in parents.items():
        folder = Path(path)
        if str(path) in set(map(str, planned)):
            described[role] = {"path": str(path), "stage": "planned", "sha256": None, "tokenizer_sha256": None}
            continue
        if folder.is_dir() and ((folder / RUN).is_file() and not (folder / STAGE).is_file()):
            raise UserError(f"{role}: {path} is an unfinished stage (it has no {STAGE}): run it to its end first")
        if not folder.is_dir() and (len(folder.parts) != 2 or folder.parent.is_dir() or path.startswith((".", "/"))):
            raise UserError(
                f"{role}: no folder {path!r}, and it is no Hub name (user/name): run the stage that writes it"
                f"{_written_by(path)}"
            )
        manifest = read_manifest(folder) or {}
        hashes = file_sha256s(folder, (STAGE, "tokenizer.json"))
        described[role] = {
            "path": str(path),
            "stage": manifest.get("stage"),
            "sha256": hashes.get(STAGE),
            "tokenizer_sha256": hashes.get("tokenizer.json"),
            **({} if folder.is_dir() else {"hub": True}),
        }
    _refuse_tokenizer_mismatch(described)
    return described


def _written_by(path: str) -> str:
    """The command that writes `path`, where a chain of recipes/ in the working folder does, else ""."""
    wanted = re.compile(rf"^output_dir:\s*{re.escape(os.path.normpath(path))}\s*$", re.MULTILINE)
    for file in sorted(Path("recipes").glob("*/*.yaml")):
        if (file.parent / "chain.yaml").is_file() and wanted.search(file.read_text(encoding="utf-8")):
            return f": posttrain run {file.parent}"
    return ""


def ask_hub(parents: dict[str, dict], revisions: dict[str, str | None]) -> dict[str, dict]:
    """The same description, with what the Hub has of those parents that are names on it and were pushed by posttrain.

    `revisions`: path -> branch, tag or commit. Adds "commit", the one that was read. What the Hub (or its cache, where
    it cannot be reached) has no stage.json of is left as it is: the loader says whether there is a model.
    """
    found = {role: parent | _of_hub(parent, revisions.get(parent["path"])) for role, parent in parents.items()}
    _refuse_tokenizer_mismatch(found)
    return found


def _of_hub(parent: dict, revision: str | None) -> dict:
    if not parent.get("hub"):
        return {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        file = Path(hf_hub_download(parent["path"], STAGE, revision=revision))
        manifest = json.loads(file.read_bytes())
    except (OSError, HFValidationError, ValueError):
        return {}
    if not isinstance(manifest, dict) or manifest.get("status") != "finished":
        return {}  # another program's stage.json
    return {
        "stage": manifest.get("stage"),
        "sha256": file_sha256s(file.parent, (STAGE,))[STAGE],
        "tokenizer_sha256": manifest.get("tokenizer_sha256"),
        "commit": file.parent.name,
    }


def _refuse_tokenizer_mismatch(parents: dict[str, dict]) -> None:
    """Policy and reward model must read the same token ids: rollouts are passed on as tokens, never as text."""
    known = {role: p for role, p in parents.items() if p["tokenizer_sha256"]}
    if len({p["tokenizer_sha256"] for p in known.values()}) > 1:
        roles = "; ".join(
            f"{role} {p['path']} has tokenizer {p['tokenizer_sha256'][:12]}" for role, p in known.items()
        )
        raise UserError(
            f"parents have different tokenizers: {roles}. Train the reward model from the policy's own stage"
        )
