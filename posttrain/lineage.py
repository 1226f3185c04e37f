"""Where a model comes from: the stages before it, as far as their folders are here, and the Hub's model at the root.

In: a stage's folder. Out: `Ancestor`s, the nearest first, each branch to its end; a text that shows them as a tree;
the name of the model on the Hub that its weights go back to. A stage that was pushed has `hub.json` in its folder
(`posttrain.hub` writes it), so that those trained from it can name it as others find it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.checkpoint import sha256_file
from posttrain.manifests import STAGE, read_manifest

PUSHED = "hub.json"  # in a pushed stage's folder: {"repo", "commit", "manifest_sha256", ...}
WEIGHTS_FROM = ("policy", "model")  # roles of the parent whose weights a stage goes on from
DEEPEST = 20  # stages; a chain that is longer has a parent that names its child


@dataclass(frozen=True)
class Ancestor:
    """A parent, or a parent's parent: `depth` 1 is a parent. `hub`: its name there; `sha256`: of its stage.json.

    `trunk`: whether this model's weights go back to it; a reward model or a tokenizer is beside the trunk.
    """

    role: str
    name: str
    stage: str | None
    depth: int
    trunk: bool
    hub: str | None = None
    sha256: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def ancestors(folder: Path) -> list[Ancestor]:
    """All stages before the one in `folder`. A folder that has changed since, or is not here, is named and ends its
    branch, and so does a stage that stands further up already. A manifest from the Hub tells what it was told."""
    return list(_before(folder, 1, True, set()))


def _before(folder: Path, depth: int, trunk: bool, seen: set[str]):
    manifest = read_manifest(folder) or {}
    for entry in manifest.get("lineage", ()):
        yield Ancestor(**{**entry, "depth": entry["depth"] + depth - 1, "trunk": entry["trunk"] and trunk})
    if "lineage" in manifest:
        return
    for role, parent in manifest.get("parents", {}).items():
        path, in_trunk = parent_folder(folder, parent), trunk and role in WEIGHTS_FROM
        hub = pushed_as(path) if path else parent["path"] if parent.get("hub") else None
        name = hub or Path(parent["path"]).name
        yield Ancestor(role, name, parent.get("stage"), depth, in_trunk, hub, parent.get("sha256"))
        if path and depth < DEEPEST and parent["sha256"] not in seen:
            seen.add(parent["sha256"])
            yield from _before(path, depth + 1, in_trunk, seen)


def parent_folder(folder: Path, parent: dict) -> Path | None:
    """Where the very stage is that the one in `folder` was trained from: beside it, for a run may have been moved, or
    where it was then. None where neither place holds it, as it was."""
    path = Path(parent["path"])
    for place in (folder.absolute().parent / path.name, path):
        if (place / STAGE).is_file() and sha256_file(place / STAGE) == parent.get("sha256"):
            return place
    return None


def pushed_as(folder: Path) -> str | None:
    """The repository that the stage in `folder` was pushed to last; None where it was not, or has been run again."""
    file = folder / PUSHED
    if not file.is_file():
        return None
    told = json.loads(file.read_bytes())
    return told["repo"] if told["manifest_sha256"] == sha256_file(folder / STAGE) else None


def adapter_base(found: list[Ancestor]) -> str | None:
    """The Hub's name of the very model that an adapter was trained on, the parent; None where it is not there."""
    return next((ancestor.hub for ancestor in found if ancestor.trunk and ancestor.depth == 1), None)


def base_model(found: list[Ancestor]) -> str | None:
    """The nearest ancestor on the Hub whose weights this model's go back to."""
    return next((ancestor.hub for ancestor in found if ancestor.trunk and ancestor.hub), None)


def as_text(name: str, found: list[Ancestor]) -> str:
    """A tree, this model at its root."""
    lines = [f"{name}  ◀ this model"]
    for index, ancestor in enumerate(found):
        bars = [_goes_on(found, index, depth) for depth in range(1, ancestor.depth + 1)]
        branch = "".join("│  " if bar else "   " for bar in bars[:-1]) + ("├─ " if bars[-1] else "└─ ")
        stage = f" ({ancestor.stage})" if ancestor.stage and ancestor.stage != ancestor.name else ""
        above = ancestor.sha256 and ancestor.sha256 in {other.sha256 for other in found[:index]}
        lines.append(f"{branch}{ancestor.role}: {ancestor.name}{stage}{', as above' if above else ''}")
    return "\n".join(lines)


def _goes_on(found: list[Ancestor], index: int, depth: int) -> bool:
    """Whether a later line has a branch at `depth` before one ends above it."""
    for later in found[index + 1 :]:
        if later.depth < depth:
            return False
        if later.depth == depth:
            return True
    return False
