"""What of a stage's folder goes to the Hub, and in what words.

In: the folder of a finished stage. Out: path in the repository -> a file to send as it is, or bytes to send in its
place. Only files that a user of the model needs go up: weights, tokenizer, template, generation config, `stage.json`,
evaluations, the card. Checkpoints, logs, rollouts and configs with paths of this machine stay here: rollouts and logs
quote the training data, which may not be yours to publish.

Paths of this machine are cut down to their last part, in the manifest, the evaluations and the adapter's config;
hashes in the uploaded stage.json are those of the uploaded files. A text with what looks like a token is refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from posttrain import checkpoint
from posttrain.errors import UserError
from posttrain.manifests import RUN, STAGE, read_manifest
from posttrain.trackers import SECRET

CARD = "README.md"
ADAPTER_DIR = "adapter"  # posttrain.lora writes it; importing that would import torch
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER = tuple(f"{ADAPTER_DIR}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json"))
NEEDED = (
    *WEIGHTS, *ADAPTER, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "evals/*.json", STAGE, CARD,
)  # fmt: skip
NOTICES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # put there by who must pass them on, with Llama's weights for one
HERE_ONLY = ("vllm_server_base_url", "vllm_server_host")
SPECIAL = re.compile("(bos|eos|pad|unk|sep|cls|mask)_token")  # a tokenizer's, no secret
QUOTES = ("samples",)  # what was said by models and people: only the home folder is taken out of it
# An absolute path with a folder in it, not a part of a URL or of a fraction such as 1/2.
PATH = re.compile(r"(?<![\w.:/~}\-])~?/(?:[^\s'\"/\\:,;(){}]+/)+([^\s'\"/\\:,;(){}]*)")
# A digit must be among the rest: `sk-learn-based-methods` is a word.
TOKENS = {
    "a Hugging Face token": r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-(?=[\w-]*\d)[\w-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret": r"(?i)aws_?secret_?access_?key\W{1,5}[\w/+=]{30,}",
    "a Google key": r"\bAIza[\w-]{35}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\w://[^\s/:@'\"]+:[^\s/@'\"]+@",
}


def collect(folder: Path, card: str, origin: str | None = None, **facts) -> dict[str, Path | bytes]:
    """Everything that goes up, checked. `card`: the text of the model card. `origin`: the Hub's name of the model that
    an adapter belongs to. `facts`: further keys of the uploaded stage.json.

    Raises:
        UserError: the folder is no finished stage with a model or a tokenizer; a file differs from its hash; a text
            holds what looks like a token, or the path of your home folder.
    """
    manifest = finished(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (needed(name) or _notice(name)):
            found[name] = path
    for name in [name for name in found if name.startswith("evals/")]:
        found[name] = _as_json(public(json.loads(found[name].read_bytes())))
    if (config := f"{ADAPTER_DIR}/adapter_config.json") in found:
        found[config] = _adapter_config(found[config], origin)
    found[CARD] = card.encode()
    kept = {"files": {name: _facts(found[name], facts) for name, facts in manifest["files"].items() if name in found}}
    found[STAGE] = _as_json({**public(manifest), **facts, **kept})
    for name, content in found.items():
        _refuse_secrets(name, content)
    return dict(sorted(found.items()))


def finished(folder: Path) -> dict:
    """The manifest of a stage that can be pushed; UserError where it is unfinished, damaged or no model's."""
    manifest = read_manifest(folder)
    if manifest is None and (folder / RUN).is_file():
        raise UserError(f"{folder} is an unfinished stage (it has no {STAGE}): run it to its end first")
    if manifest is None:
        raise UserError(f"{folder} is no stage of posttrain (it has no {STAGE}); `hf upload` sends any other folder")
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: a {manifest['stage']} stage leaves neither a model nor a tokenizer; "
            "`hf upload --repo-type dataset` sends data"
        )
    checkpoint.verify(folder, manifest["files"], "run the stage again with --overwrite true, or copy it anew")
    return manifest


def needed(name: str) -> bool:
    """Whether a path goes up; `*` of a pattern does not reach into folders."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in NEEDED)


def _notice(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in NOTICES)


def stays(folder: Path) -> list[str]:
    """Names directly in `folder` of which nothing goes up."""
    folders = {pattern.partition("/")[0] for pattern in NEEDED if "/" in pattern}
    names = {path.name: path.is_dir() for path in folder.iterdir()}
    kept = [name for name in sorted(names) if not (needed(name) or _notice(name) or name in folders)]
    return [name + "/" * names[name] for name in kept]


def public(value, key: str | None = None):
    """A JSON value as others may see it: without this machine's paths and addresses, and values of keys that are named
    like secrets."""
    secret = isinstance(value, str) and SECRET.search(key or "") and not SPECIAL.fullmatch(key)
    if secret or (key in HERE_ONLY and value is not None):
        return "(not shown)"
    if isinstance(value, dict):
        return {inner: public(item, inner if key not in QUOTES else key) for inner, item in value.items()}
    if isinstance(value, list):
        return [public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return without_home(value) if key in QUOTES else without_paths(value)


def without_paths(text: str) -> str:
    """Absolute paths in a text cut down to their last part: /home/ann/runs/sft is sft."""
    if Path(text).is_absolute() and "\n" not in text:  # a name of a file may hold spaces
        return Path(text).name
    return PATH.sub(r"\1", text)


def without_home(text: str) -> str:
    home = _home()
    return text.replace(home, "~") if home else text


def _home() -> str | None:
    """The home folder where it names a person: /home/ann, not /root."""
    home = Path.home()
    return str(home) if len(home.parts) > 2 else None


def _adapter_config(file: Path, origin: str | None) -> bytes:
    """peft's config, whose base model is a path of this machine until it is replaced by a name of the Hub."""
    config = json.loads(file.read_bytes())
    base = config.get("base_model_name_or_path") or ""
    config["base_model_name_or_path"] = origin or without_paths(base)
    return _as_json(config)


def _as_json(value) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _facts(content: Path | bytes, facts: dict) -> dict:
    if isinstance(content, Path):
        return facts
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def size_of(content: Path | bytes) -> int:
    """Bytes."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


# --- the scan


def _refuse_secrets(name: str, content: Path | bytes) -> None:
    if name.endswith(".safetensors"):
        return
    text = (content.read_bytes() if isinstance(content, Path) else content).decode(errors="replace")
    for line, what in secrets_in(text):
        raise UserError(
            f"{name}:{line}: holds what looks like {what}; nothing was sent. Take it out of the stage's config, data "
            "or evaluations, and revoke a key that was real"
        )


def secrets_in(text: str) -> Iterator[tuple[int, str]]:
    """(line, what it looks like) of each token in a text, values of this environment's secrets and the home folder
    among them. What was found is not repeated."""
    patterns = dict(TOKENS)
    for name, value in own_secrets().items():
        patterns[f"the value of {name}"] = re.escape(value)
    if home := _home():
        patterns["a path of your home folder"] = re.escape(home) + r"\b"
    for what, pattern in patterns.items():
        for match in re.finditer(pattern, text):
            yield text.count("\n", 0, match.start()) + 1, what


def own_secrets() -> dict[str, str]:
    """Name -> value of the environment's variables that are named like secrets, and of the Hub's stored token."""
    from huggingface_hub import get_token

    found = {name: value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 12}
    token = get_token()
    return {**found, **({"your Hub token": token} if token else {})}
