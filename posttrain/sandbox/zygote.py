"""The process that sandboxes are forked from: one Python, started once, already behind a read-only root.

In: on `commands`, a socket, one JSON message a sandbox: {"role", "limits"} with its file descriptors. Out: on the
sandbox's `control` socket {"status"}, as os.waitstatus_to_exitcode gives it, or {"error"} where the kernel refused.
The trainer starts it with an empty environment and its own session (host.py).

    zygote: own user, mount, net, ipc and uts namespaces; a tmpfs as root with Python's libraries, read-only
      supervisor, one a sandbox: a further set of namespaces, pid included; kills at the deadline
        process 1 of the sandbox: limits set, capabilities gone, system calls filtered; runs one role
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import sysconfig
import time
import traceback

from posttrain.sandbox import checker, kernel, program

# Modules that programs use, imported once: each fork has them at once.
COMMON = "bisect collections copy datetime decimal fractions functools heapq itertools math operator random re"
COMMON += " statistics string typing"
NOBODY = 65534
HOST = kernel.NEWUSER | kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
# The zygote's net, ipc and uts namespaces, empty as they are, do for all: no socket and no shared memory can be made
# in them (kernel.REFUSED), and taking one net namespace down for each run costs more than the run.
BOX = kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID
ROLES = {"check": checker.check, "serve": program.serve, "script": program.script}
FIRST_FD = 3  # of a role's own descriptors; 0 is /dev/null, 1 and 2 are output
MAX_FDS, ABOVE = 64, 40  # ABOVE: more than the few that a supervisor has open


def main(commands_fd: int) -> None:
    """Serve until the trainer's side of `commands` is closed, by whatever end."""
    commands, root = socket.socket(fileno=commands_fd), os.geteuid() == 0
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no reaping
    try:
        _first_to_die(proc)
        _leave_the_host(proc, root)
    except OSError as error:
        commands.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        return
    for name in COMMON.split():
        importlib.import_module(name)
    commands.send(b'{"ready": true}')
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(commands, 2**16, 8)
        if not message:
            return
        if os.fork() == 0:
            try:
                _supervise(json.loads(message), fds, proc, root)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def _first_to_die(proc: int) -> None:
    """Where memory runs out, the kernel takes sandboxes before the trainer."""
    with open("self/oom_score_adj", "w", opener=_in(proc)) as file:
        file.write("1000")


def _in(folder: int):
    return lambda path, flags: os.open(path, flags, dir_fd=folder)


# ---- the first set of namespaces: what all sandboxes share ----------------------------------------------------------


def _leave_the_host(proc: int, root: bool) -> None:
    ids = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
    if root:
        _unshare_mapped(proc, HOST, ids, ids)
    else:
        _unshare_mapped(proc, HOST, f"0 {os.geteuid()} 1\n", f"0 {os.getegid()} 1\n")
    socket.sethostname("sandbox")
    kernel.mount("none", "/", flags=kernel.PRIVATE | kernel.RECURSIVE)
    new = "/proc"  # any folder that is sure to exist and holds nothing of Python's: the new root is mounted over it
    kernel.mount("tmpfs", new, "tmpfs", kernel.NO_SETUID | kernel.NO_DEVICES, "mode=755,size=1m")
    for path in _libraries():
        _bind(path, new, kernel.READ_ONLY | kernel.NO_SETUID | kernel.NO_DEVICES)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}", new, kernel.NO_SETUID | kernel.NO_EXEC)
    os.mkdir(f"{new}/tmp")
    kernel.enter_root(new)
    kernel.restrict_mount("/", kernel.READ_ONLY | kernel.NO_SETUID)


def _unshare_mapped(proc: int, flags: int, users: str, groups: str) -> None:
    """unshare, with the id maps written by a process that stays behind: it has the rights to."""
    ready, done = os.pipe(), os.pipe()
    me = os.getpid()
    if os.fork() == 0:
        code = 1
        os.close(ready[1])
        try:
            if not os.read(ready[0], 1):
                os._exit(0)  # the other one was refused, and is gone
            if os.geteuid():
                _write(proc, f"{me}/setgroups", "deny")
            _write(proc, f"{me}/gid_map", groups)
            _write(proc, f"{me}/uid_map", users)
            code = 0
        except OSError as error:
            code = error.errno
        finally:
            os.write(done[1], bytes([code]))
            os._exit(0)
    kernel.unshare(flags)
    os.write(ready[1], b".")
    code = os.read(done[0], 1)[0]
    for fd in (*ready, *done):
        os.close(fd)
    if code:
        raise OSError(code, f"writing the id maps of a user namespace: {os.strerror(code)}")


def _write(proc: int, path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY, dir_fd=proc)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _libraries() -> list[str]:
    """Folders that Python and the modules of its standard library load from."""
    stdlib = [os.path.dirname(os.__file__), sysconfig.get_path("platstdlib")]
    stdlib += [f"{sys.base_prefix}/lib"] if sys.base_prefix != "/usr" else []
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/nix/store"]
    return [path for path in dict.fromkeys(shared + stdlib) if os.path.exists(path)]


def _bind(path: str, new: str, flags: int) -> None:
    """Show `path` of the old root at the same place of the new one; a link stays a link."""
    target = new + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    kernel.mount(path, target, flags=kernel.BOUND | kernel.RECURSIVE)
    kernel.restrict_mount(target, flags)


# ---- one sandbox ----------------------------------------------------------------------------------------------------


def _supervise(order: dict, fds: list[int], proc: int, root: bool) -> None:
    """Make the sandbox, wait for its process 1, kill it at the deadline or when the trainer hangs up or dies."""
    control, limits = socket.socket(fileno=fds[0]), order["limits"]
    deadline = time.monotonic() + limits["seconds"] + 5  # the trainer's own comes first; this one is in case it died
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        _enter_box(limits, proc, root)
        child = os.fork()
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    if child == 0:
        status = 1
        try:
            status = _process_one(order, control, fds[1:])
        finally:
            os._exit(status)
    for fd in fds[1:]:
        os.close(fd)
    exited = os.pidfd_open(child)
    poll = select.poll()
    poll.register(exited, select.POLLIN)
    poll.register(control, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(1000 * max(0.0, deadline - time.monotonic()))]
    if exited not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {"status": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
    control.send(json.dumps(report).encode())


def _enter_box(limits: dict, proc: int, root: bool) -> None:
    mapped = NOBODY if root else 0
    if root:  # the limit on processes does not hold for the machine's user 0
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.prctl(kernel.SET_DUMPABLE, 1)  # or /proc/self would be the old user's
    kernel.prctl(kernel.SET_DEATH_SIGNAL, signal.SIGKILL)
    kernel.unshare(BOX)
    _write(proc, "self/setgroups", "deny")
    _write(proc, "self/gid_map", f"{NOBODY} {mapped} 1\n")
    _write(proc, "self/uid_map", f"{NOBODY} {mapped} 1\n")
    size = f"mode=700,size={limits['disk_mb']}m,nr_inodes=4096"
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.NO_SETUID | kernel.NO_DEVICES, f"{size},uid={NOBODY},gid={NOBODY}")


def _process_one(order: dict, control: socket.socket, fds: list[int]) -> int:
    """Give up every right and run the role; its exit status."""
    try:
        kernel.prctl(kernel.SET_DEATH_SIGNAL, signal.SIGKILL)
        os.setsid()  # kill(0) reaches a process group across namespaces: not the supervisors'
        os.chdir("/tmp")
        os.umask(0o077)
        _set_limits(order["limits"])
        kernel.drop_rights()
        os.environ.clear()
        os.environ.update({"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"})
        program.give_exit()
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return 1
    arguments = _only_these_open(fds)
    try:
        return ROLES[order["role"]](*arguments) & 0xFF
    except SystemExit as error:
        return error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    except EOFError:  # the tests are done
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def _only_these_open(fds: list[int]) -> list[int]:
    """Standard output, error, then the role's own from FIRST_FD on; all else is closed."""
    null = os.open("/dev/null", os.O_RDWR)
    high = [os.dup2(fd, ABOVE + place) for place, fd in enumerate([null, *fds])]  # out of each other's way
    for place, fd in enumerate(high):
        os.dup2(fd, place)
    os.closerange(len(high), 2**20)
    return list(range(FIRST_FD, len(high)))


def _set_limits(limits: dict) -> None:
    seconds, megabyte = int(limits["seconds"]) + 1, 2**20
    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: limits["memory_mb"] * megabyte,
        resource.RLIMIT_NPROC: limits["processes"] + 1,  # the supervisor counts
        resource.RLIMIT_FSIZE: limits["disk_mb"] * megabyte,
        resource.RLIMIT_NOFILE: MAX_FDS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, bound in bounds.items():
        resource.setrlimit(name, (bound, bound))
