"""The kernel's side of a sandbox: namespaces, mounts, capabilities and a filter of system calls, through ctypes.

In: the process that calls. Out: that process with fewer rights; `OSError` names the call that the kernel refused.
Python has `os.unshare` from 3.12 on, and mount, pivot_root, capset and seccomp in no version.
"""

import ctypes
import os
import platform
import struct

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
BOUND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18  # flags of mount(2)
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8  # the same bits in mount(2) and in mount_setattr(2)
DETACH = 2

SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUNDING, NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38  # of prctl(2)

MOUNT_SETATTR = 442  # Linux 5.12; this number and pivot_root's are of the two machines below
# Numbers of system calls on x86-64 and on arm64. What untrusted code has no use for and what would widen its reach:
# namespaces and mounts, other processes' memory, sockets, memory that RLIMIT_AS does not count, young kernel code.
REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "socket": (41, 198), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "personality": (135, 92), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of linux/audit.h

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, function, *arguments) -> int:
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _call("unshare", _libc.unshare, flags)


def prctl(option: int, value: int) -> None:
    _call(f"prctl({option})", _libc.prctl, option, value, 0, 0, 0)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str = "") -> None:
    encoded = [value.encode() if value else None for value in (source, target, kind, data)]
    _call(f"mount of {source} on {target}", _libc.mount, *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def restrict_mount(target: str, flags: int) -> None:
    """Add flags (READ_ONLY, ...) to the mount at `target` and to those below it."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    recursive, here = 0x8000, -100
    number = ctypes.c_long(MOUNT_SETATTR)
    _call(f"mount_setattr of {target}", _libc.syscall, number, here, target.encode(), recursive, attributes, 32)


def enter_root(folder: str) -> None:
    """Make `folder`, a mount of its own, the root; nothing of the old one can be reached any more."""
    os.chdir(folder)
    number = ctypes.c_long(_number((155, 41)))
    _call("pivot_root", _libc.syscall, number, b".", b".")
    _call("umount2", _libc.umount2, b".", DETACH)
    os.chdir("/")


def drop_rights() -> None:
    """No capability now or later, no gain from setuid programs, no core dump, and the filter of system calls."""
    for capability in range(64):
        if _libc.prctl(DROP_BOUNDING, capability, 0, 0, 0) < 0:
            break  # past the last one that this kernel knows
    version = 0x20080522
    _call("capset", _libc.capset, struct.pack("Ii", version, 0), bytes(24))
    prctl(NO_NEW_PRIVILEGES, 1)
    prctl(SET_DUMPABLE, 0)
    _filter_calls()


def _number(pair: tuple[int, int]) -> int:
    return pair[MACHINES[platform.machine()][0]]


def _filter_calls() -> None:
    """Refused calls fail with EPERM; clone3 with ENOSYS, so that libc falls back to clone, whose flags can be read."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF, linux/filter.h
    number, machine, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000
    new_namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    program = [(load, 0, 0, machine), (equal, 1, 0, MACHINES[platform.machine()][1]), (give, 0, 0, kill)]
    program += [(load, 0, 0, number)]
    if platform.machine() == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbers of the same calls
    for pair in REFUSED.values():
        program += [(equal, 0, 1, _number(pair)), (give, 0, 0, fail | 1)]
    program += [(equal, 0, 1, _number(CLONE3)), (give, 0, 0, fail | 38)]
    program += [(equal, 0, 3, _number(CLONE)), (load, 0, 0, first_argument), (any_bit, 0, 1, new_namespaces)]
    program += [(give, 0, 0, fail | 1), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("seccomp", _libc.prctl, SET_SECCOMP, 2, header, 0, 0)
