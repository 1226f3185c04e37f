"""What sandboxes leave behind on this machine, and the tests that attacks are run against.

In: nothing. Out: the processes, mounts and descriptors there are now.
"""

import os
import time
from pathlib import Path

from posttrain.sandbox import Limits

QUICK = Limits(seconds=2.0)
TESTS = "assert double(2) == 4\nassert double(0) == 0\n"


def inside() -> set[int]:
    """Processes of this machine that are in a user namespace other than ours and are no zygote."""
    ours, found = os.readlink("/proc/self/ns/user"), set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                space, command = os.readlink(folder / "ns" / "user"), (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if space != ours and b"zygote" in command and parent != os.getpid() and mine(parent):
                found.add(int(folder.name))
    return found


def mine(pid: int) -> bool:
    """Whether a process descends from this one: others run sandboxes on this machine, too."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return False
    return False


def traces() -> tuple:
    deadline = time.monotonic() + 1  # an ended process is seen in /proc a moment longer
    while inside() and time.monotonic() < deadline:
        time.sleep(0.01)
    return inside(), Path("/proc/self/mounts").read_text(), len(os.listdir("/proc/self/fd"))
