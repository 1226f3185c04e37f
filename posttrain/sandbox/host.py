"""The trainer's side of the zygote: start it once, send it sandboxes to fork, say what is in the way where it fails.

In: a role, limits and file descriptors. Out: a sandbox's control socket. From any thread. When the trainer dies, the
zygote reads the end of its socket and everything under it dies with it.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.errors import UserError

START = (
    "import sys; sys.path.append(sys.argv[1]); from posttrain.sandbox import zygote; sys.path.pop(); zygote.main({})"
)


@dataclass(frozen=True)
class Limits:
    """Of one sandbox. A process that wants more fails; a sandbox that takes longer or says more is killed."""

    seconds: float = 5.0  # of the wall clock; a process has as many of CPU time, rounded up, and one more
    memory_mb: int = 512  # address space of each process
    processes: int = 4  # and threads
    disk_mb: int = 16  # of /tmp, in memory, which is all that can be written
    output_kb: int = 256


class Broken(Exception):
    """The zygote is gone, or the kernel refused it a sandbox."""


class Zygote:
    """The process of zygote.py and the socket to it."""

    def __init__(self):
        self.commands, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner = os.getpid()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-B", "-X", "utf8", "-c", START.format(theirs.fileno()),
                 str(Path(__file__).parents[2])],
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}, pass_fds=[theirs.fileno()], cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.commands.settimeout(60)
        said = json.loads(self.commands.recv(2**16) or b'{"error": "it ended at once"}')
        self.error = said.get("error")

    def spawn(self, role: str, limits: Limits, fds: list[int]) -> socket.socket:
        """Fork a sandbox with these descriptors as 1, 2, 3, ...; its control socket, which ends it when closed."""
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = json.dumps({"role": role, "limits": asdict(limits)}).encode()
        with theirs:
            try:
                socket.send_fds(self.commands, [order], [theirs.fileno(), *fds])
            except OSError as error:
                control.close()
                raise Broken(f"the sandbox's server is gone: {error}") from error
        return control

    def close(self) -> None:
        self.commands.close()
        self.process.wait()


_lock = threading.Lock()
_server: Zygote | None = None


def server() -> Zygote:
    """The one of this process, started at its first use and again where it died. UserError where it cannot be."""
    global _server
    with _lock:
        if _server is not None and (_server.owner != os.getpid() or _server.process.poll() is not None):
            _server.commands.close()
            _server = None
        if _server is None:
            started = Zygote()
            if started.error:
                started.close()
                raise UserError(f"untrusted code cannot be isolated here: {started.error}. {advice()}")
            _server = started
            atexit.register(_end, started)
        return _server


def _end(started: Zygote) -> None:
    if started.owner == os.getpid():
        started.close()


def advice() -> str:
    """What stands in the way on this machine, as far as the kernel's settings tell, and how to mend it."""
    settings = {
        "/proc/sys/user/max_user_namespaces": ("0", "sudo sysctl -w user.max_user_namespaces=15000"),
        "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
            "1", "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    }  # fmt: skip
    for path, (bad, mend) in settings.items():
        if Path(path).exists() and Path(path).read_text().strip() == bad:
            return f"{path} is {bad}: {mend}"
    return (
        "It takes Linux 5.14 on x86-64 or arm64 with user namespaces; in a container, start it with "
        "`docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined`"
    )
