"""Push finished stages to the Hugging Face Hub, private unless asked otherwise, and go on where a push was cut off.

    posttrain push runs/tiny/grpo --repo user/name [--public] [--license apache-2.0] [--dry_run]
    posttrain push runs/tiny --repo user/tiny              # each stage: user/tiny-tokenizer, ..., user/tiny-grpo
    accelerate launch recipes/sft.py --config ... --push_to_hub [--hub_model_id user/name] [--hub_private_repo false]

In: the folder of a finished stage, or of a run; a token in HF_TOKEN or from `hf auth login`, nowhere else. Out: one
commit with what `hub_files.collect` takes and the card, and `hub.json` in the folder, which says where it went.

One commit, so that nobody ever pulls half of a model. What a cut-off push has sent is not sent again: the Hub keeps
uploaded files by their hash (with Xet storage their chunks), and the client asks before it sends. What an earlier push
left there and this one has not (shards of larger weights) is removed by the same commit; files of other names stay.
"""

import argparse
import logging
import re
import shlex
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from posttrain import card, checkpoint, hub_files, lineage
from posttrain.errors import UserError
from posttrain.licenses import known_license
from posttrain.manifests import RUN, STAGE, read_manifest

ATTEMPTS = 5  # at the commit itself; each request before it is retried by huggingface_hub
LOST_RACE = 412  # somebody else has committed since the repository was looked at
WORTH_A_WAIT = (LOST_RACE, 429, 500, 502, 503, 504)
LONGEST_WAIT = 300  # seconds, whatever the Hub asks for
LOGIN = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://hf.co/settings/tokens)"
NOT_OURS = {".gitattributes", hub_files.CARD}  # what a repository may hold before the first push


@dataclass(frozen=True)
class Target:
    """A repository for a model on the Hub; `private`: nobody but its owner may ever see it."""

    repo: str
    private: bool = True

    def __str__(self) -> str:
        return f"{_api().endpoint}/{self.repo} ({'private' if self.private else 'public'})"

    def command(self, folder: Path) -> str:
        """The line that pushes `folder` here."""
        return f"posttrain push {shlex.quote(str(folder))} --repo {self.repo}" + ("" if self.private else " --public")


def add_verb(verbs, debug: argparse.ArgumentParser) -> None:
    """The verb `push` of the command line."""
    push = verbs.add_parser("push", parents=[debug], help="put a finished stage on the Hugging Face Hub, private")
    push.set_defaults(call=call_push)
    push.add_argument("folder", metavar="STAGE", help="folder of a finished stage, or of a run: every stage of it")
    push.add_argument("--repo", metavar="USER/NAME", help="default: your name / the last two parts of the folder")
    push.add_argument("--public", action="store_true", help="let everybody see a repository that this makes")
    push.add_argument(
        "--license", metavar="NAME", help="as the Hub names it; default: what config or base model state"
    )
    push.add_argument("--dry_run", "--dry-run", action="store_true", help="list what would go up and show the card")


def call_push(options: argparse.Namespace) -> int:
    known_license("--license", options.license)
    for folder, repo in _stages(Path(options.folder), options.repo):
        if options.dry_run:
            print(plan(folder, repo, options.license))
        else:
            print(push(folder, named(repo, folder, not options.public), options.license))
    return 0


def _stages(folder: Path, repo: str | None) -> list[tuple[Path, str | None]]:
    """(stage, its repository): the folder itself, or each stage of a run, parents first."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a finished stage, e.g. runs/tiny/grpo, or a run")
    if (folder / STAGE).is_file() or (folder / RUN).is_file():
        return [(folder, repo)]
    found = {path.parent: read_manifest(path.parent) for path in folder.glob(f"*/{STAGE}")}
    found = {path: told for path, told in found.items() if told["stage"] != "clean"}
    if not found:
        raise UserError(
            f"{folder} is no stage of posttrain (it has no {STAGE}), nor a run of any; `hf upload` sends other folders"
        )
    for path in sorted({file.parent for file in folder.glob(f"*/{RUN}")} - set(found)):
        print(f"{path} is not finished and is left out")
    in_order = sorted(found, key=lambda path: (found[path]["created"], path.name))
    return [(path, repo and f"{repo}-{path.name}") for path in in_order]


# --- before anything is sent, or trained


def prepare(config: dict) -> Target:
    """The repository that a recipe's config asks for: made or found, with a token that may write to it.

    Raises UserError, within seconds, where one of these is missing: the training that follows takes hours.
    """
    return make_or_check(named(config["hub_model_id"], Path(config["output_dir"]), config["hub_private_repo"]))


def named(repo: str | None, folder: Path, private: bool) -> Target:
    """The target's full name. `repo` without a user is one of yours; None takes the name of run and stage.

    UserError where there is no token that may write, or the Hub takes no such name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    user = _user()
    name = repo or re.sub(r"[^\w.-]+", "-", "-".join(folder.absolute().parts[-2:])).strip("-.")
    target = Target(name if "/" in name else f"{user}/{name}", private)
    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        raise UserError(f"repository: found {target.repo!r}, expected user/name of the Hub: {error}") from error
    return target


def _user() -> str:
    """Who the token belongs to. UserError where there is none, it is not valid or may only read."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: nothing can be pushed; unset it, or leave push_to_hub out")
    try:
        with explained("the Hub"):
            told = _api().whoami()
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, LocalTokenNotFoundError):
            raise UserError(f"no token of the Hub was found: {LOGIN}") from error
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401:
            raise UserError(f"the Hub does not take this token (expired, revoked or mistyped): {LOGIN}") from error
        raise
    if told.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token of {told['name']} may only read: {LOGIN}")
    return told["name"]


def make_or_check(target: Target) -> Target:
    """The repository, made where there is none. UserError where the token may not write to it, everybody can see it
    though it was to be private, or it holds what posttrain did not write."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api, repo = _api(), target.repo
    with explained(repo):
        try:
            there = api.model_info(repo)
            api.auth_check(repo, write=True)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=target.private)
            return target
    if target.private and not there.private:
        raise UserError(
            f"{repo} is there already and everybody can see it, while a push is private unless asked otherwise: name "
            "another repository, make this one private, or say --public (in a recipe --hub_private_repo false)"
        )
    names = {sibling.rfilename for sibling in there.siblings or ()}
    if names - NOT_OURS and STAGE not in names:
        raise UserError(
            f"{repo} holds files that are not of posttrain ({', '.join(sorted(names - NOT_OURS)[:3])}; no {STAGE}): "
            "name another repository, or empty this one first"
        )
    return Target(repo, bool(there.private))


# --- sending


def plan(folder: Path, repo: str | None, licence: str | None = None) -> str:
    """What a push would send, file by file, what stays here, and the card; nothing is asked of the Hub."""
    repo = repo or "-".join(folder.absolute().parts[-2:])
    files = content(folder, repo, licence, ask=False)
    total = sum(map(hub_files.size_of, files.values()))
    lines = [f"{hub_files.size_of(data):>14,} B  {name}{_changed(folder, name, data)}" for name, data in files.items()]
    return "\n".join(
        [
            f"{folder} -> {repo}: {len(files)} files, {total:,} B",
            *lines,
            f"stays here: {', '.join(hub_files.stays(folder)) or 'nothing'}",
            "",
            files[hub_files.CARD].decode(),
        ]
    )


def _changed(folder: Path, name: str, data: Path | bytes) -> str:
    if isinstance(data, Path):
        return ""
    file = folder / name
    same = file.is_file() and file.read_bytes() == data
    return "" if same else "  (written for the Hub, without this machine's paths)"


def content(folder: Path, repo: str, licence: str | None, ask: bool = True) -> dict[str, Path | bytes]:
    """What goes up, the card among it. `ask`: whether the Hub is asked for licences of base model and data sets."""
    manifest = hub_files.finished(folder)
    stages = lineage.ancestors(folder)
    base = lineage.base_model(stages)
    known = {"license": licence, "from": "--license"} if licence else _licence_of(base, ask)
    text = card.make(folder, repo, known, _data_licences(manifest) if ask else None)
    facts = {
        "hub": {"repo": repo, "manifest_sha256": checkpoint.sha256_file(folder / STAGE)},
        "lineage": [stage.as_dict() for stage in stages],
    }
    return hub_files.collect(folder, text, lineage.adapter_base(stages), **facts)


def push(folder: Path, target: Target, licence: str | None = None) -> str:
    """Send the stage in `folder`; returns a line for the user. What the Hub has already is not sent again.

    Raises UserError that says what stopped it and how to go on.
    """
    files = content(folder, target.repo, licence)
    target = make_or_check(target)
    with explained(target.repo, target.command(folder)):
        commit, changed = _commit(target.repo, files, f"{read_manifest(folder)['stage']} by posttrain")
    told = {
        "repo": target.repo,
        "commit": commit,
        "manifest_sha256": checkpoint.sha256_file(folder / STAGE),
        "pushed": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    checkpoint.write_json(folder / lineage.PUSHED, told)
    total = sum(map(hub_files.size_of, files.values()))
    state = f"commit {commit[:12]}" if changed else "nothing had changed"
    return f"{folder}: {len(files)} files, {total:,} B, at {target}, {state}"


def push_finished(folder: Path, target: Target) -> None:
    """After a training: push, print where to. A UserError says that the stage is whole, and how to go on."""
    try:
        print(push(folder, target), flush=True)
    except UserError as error:
        said = str(error).partition("\n")[0]
        raise UserError(
            f"the stage is finished and whole in {folder}, but it was not pushed: {said}\n"
            f"push it with: {target.command(folder)}"
        ) from error


def _commit(repo: str, files: dict[str, Path | bytes], message: str) -> tuple[str, bool]:
    """One commit on top of what the repository holds now; its hash, and whether it is a new one.

    huggingface_hub sends the large files first; it retries these and every question, but not the commit: if the answer
    was lost it may have been made. Here that is no harm: asked again, the client finds each file unchanged and leaves
    it out."""
    import httpx
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(ATTEMPTS):
        try:
            there = _api().model_info(repo)
            left_over = [s.rfilename for s in there.siblings or () if hub_files.needed(s.rfilename)]
            operations = [
                CommitOperationAdd(name, str(data) if isinstance(data, Path) else data) for name, data in files.items()
            ]
            operations += [CommitOperationDelete(name) for name in left_over if name not in files]
            made = _api().create_commit(repo, operations, commit_message=message, parent_commit=there.sha)
            return made.oid, made.oid != there.sha
        except (HfHubHTTPError, httpx.TransportError) as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise
            print(f"{repo}: {_said(error)}; trying again in {wait} s", flush=True)
            time.sleep(wait)


def _wait(error: Exception, attempt: int) -> int | None:
    """Seconds until it is worth another try; None where it is not."""
    answer = getattr(error, "response", None)
    if answer is None:
        return 2**attempt
    if answer.status_code not in WORTH_A_WAIT:
        return None
    asked = answer.headers.get("Retry-After", "")
    return min(int(asked), LONGEST_WAIT) if asked.isdigit() else 0 if answer.status_code == LOST_RACE else 2**attempt


def _said(error: Exception) -> str:
    """What an error says, in one line, without signatures."""
    lines = without_query(str(error)).strip().splitlines() or [type(error).__name__]
    return re.sub(r" *\(Request ID: [^)]*\)", "", lines[0])[:300].rstrip(". ")


def _licence_of(base: str | None, ask: bool) -> dict:
    """The licence in the card of a model on the Hub, {} where it states none or cannot be read."""
    from huggingface_hub import ModelCard, hf_hub_download

    if base is None:
        return {}
    try:
        file = hf_hub_download(base, hub_files.CARD, local_files_only=not ask)
        told = ModelCard.load(file).data.to_dict()
    except (OSError, ValueError):  # no card, no network, or metadata that are no YAML
        return {}
    return {key: told[key] for key in card.LICENSE_KEYS if isinstance(told.get(key), str)}


def _data_licences(manifest: dict) -> dict[str, str]:
    """Data set -> licence, for those on the Hub whose card states one."""
    found = {}
    for name in sorted(card.data_ids(manifest)):
        try:
            told = _api().dataset_info(name).card_data
        except OSError:  # renamed since, gated, or no network: the card says that it is not known
            continue
        licence = told and told.get("license")
        if licence:
            found[name] = ", ".join(licence) if isinstance(licence, list) else str(licence)
    return found


# --- the client


def _api():
    from importlib.metadata import version

    from huggingface_hub import HfApi

    return HfApi(library_name="posttrain", library_version=version("posttrain"))


class _WithoutQuery(logging.Filter):
    """The client logs addresses of uploads that it retries; what stands behind their `?` may be a signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_query(record.getMessage()), ()
        return True


def without_query(text: str) -> str:
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)


@contextmanager
def explained(repo: str, command: str | None = None):
    """What the Hub or the network refuses inside becomes a UserError that says how to mend it; `command` goes on where
    this was cut off."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(kept, _WithoutQuery) for kept in handler.filters):
            handler.addFilter(_WithoutQuery())
    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        # An upload's own error is wrapped into a RuntimeError that names the file.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, ValueError, httpx.HTTPError)):
            raise  # a bug of ours
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        again = f"\nWhat was sent is kept there; go on with: {command}" if command else ""
        raise UserError(f"{repo}: {_said(cause)}. {_mend(status, repo)}{again}") from cause


def _mend(status: int | None, repo: str) -> str:
    if status == 401:
        return f"The token is not valid, or the repository is another's: {LOGIN}"
    if status == 403:
        return f"The token may not write to {repo.partition('/')[0]}: {LOGIN}, or name a repository of your own"
    if status == 402:
        return "The account's private storage is used up, or the plan does not allow this"
    if status is not None and 400 <= status < 500:
        return "The Hub refuses it; huggingface_hub's message above says why"
    return "The Hub could not be reached or did not answer: try again later"
