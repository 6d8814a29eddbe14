"""Giving up privileges, and a file system of our own: what bubblewrap and the kernel are asked for."""

# pathlib would cost every program 4 ms.
# ruff: noqa: PTH103, PTH108, PTH112, PTH120, PTH211
from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_NUMBERS = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, kill 62 129, tkill 200 130, tgkill 234 131,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434,
    pidfd_getfd 438 438, setpgid 109 154, setsid 112 157, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, socket 41 198, connect 42 203, shmget 29 194, msgget 68 186, semget 64 190,
    memfd_create 319 279, memfd_secret 447 447, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39,
    pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, fsopen 430 430, fsmount 432 432,
    mount_setattr 442 442, bpf 321 280, userfaultfd 323 282, io_uring_setup 425 425, perf_event_open 298 241,
    add_key 248 217, request_key 249 218, keyctl 250 219, setpriority 141 140, ioprio_set 251 30,
    sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274,
    kcmp 312 272, migrate_pages 256 238, move_pages 279 239, process_madvise 440 440, process_mrelease 448 448,
    mq_open 240 180, syslog 103 116
"""
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    name: (int(first), None if second == "-" else int(second))
    for name, first, second in (row.split() for row in _NUMBERS.split(","))
}
"""System calls refused to the program: their numbers on x86-64 and on aarch64 (None: does not exist there)."""
OWNERS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "fcntl": ((72, 25), (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
}
"""Calls (numbers as above) whose second argument must not be one of these: they make a pipe send signals to others."""
MACHINES: dict[str, tuple[int, int, int, int, int]] = {
    "x86_64": (0, 0xC000003E, 56, 302, 155),
    "aarch64": (1, 0xC00000B7, 220, 261, 41),
}
"""Column of FORBIDDEN, audit architecture, and the numbers of clone, prlimit64 and pivot_root."""


def system_call_filter(machine: str) -> bytes:
    """A seccomp program: no new processes (threads may start), no programs, no sockets, no reaching other processes."""
    column, architecture, clone, limits, _ = MACHINES[machine]
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, deny, unknown, allow = 0x80000000, 0x00050000 | 1, 0x00050000 | 38, 0x7FFF0000  # 1 EPERM, 38 ENOSYS
    numbers = [row[column] for row in FORBIDDEN.values()]
    steps: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 calls of x86-64
        (give, 0, 0, deny),
        (equal, 0, 1, 435),  # clone3 hides its flags in memory; the C library falls back to clone
        (give, 0, 0, unknown),
    ]
    for number in numbers:
        if number is not None:
            steps += [(equal, 0, 1, number), (give, 0, 0, deny)]
    # Where the first argument (its low half is at 16) or the second (24) decides: only threads, only limits of one's
    # own, and no owner for signals.
    steps += [
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (has_bits, 1, 0, 0x10000),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    steps += [(equal, 0, 4, limits), (load, 0, 0, 16), (equal, 1, 0, 0), (give, 0, 0, deny), (give, 0, 0, allow)]
    for columns, values in OWNERS.values():
        steps += [(equal, 0, 2 * len(values) + 2, columns[column]), (load, 0, 0, 24)]
        steps += [step for value in values for step in ((equal, 0, 1, value), (give, 0, 0, deny))]
        steps.append((give, 0, 0, allow))
    steps.append((give, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def call(name: str, *arguments: Any) -> None:
    """A function of the C library that must succeed."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def drop_privileges() -> None:
    """No capabilities, no way to get any, and no other process may look into this one (also not its children)."""
    if sys.platform != "linux":
        return
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def confine(settings: Mapping[str, Any], keep: tuple[int, int]) -> None:
    """Make this process the program's: its own descriptors, limits and system-call filter."""
    os.environ.clear()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open("output", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("output")
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    last = 3
    for fd in sorted(keep):
        os.closerange(last, fd)
        last = fd + 1
    os.closerange(last, 4096)
    seconds = int(settings["seconds"]) + 2
    for name, limit in (("CPU", seconds), ("CORE", 0), ("NOFILE", 64), ("NPROC", 64), ("MEMLOCK", 0)):
        lower(name, limit)
    lower("AS", settings["memory"])
    lower("FSIZE", settings["file"])
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; a program that prints without end should end
    if sys.platform == "linux":
        steps = ctypes.create_string_buffer(system_call_filter(os.uname().machine))
        program = struct.pack("HxxxxxxP", (len(steps) - 1) // 8, ctypes.addressof(steps))
        call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def lower(name: str, limit: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}", None)
    if kind is None:
        return
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    try:
        resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError):
        if sys.platform == "linux":
            raise


def mount_folder(path: str, size: int, files: int) -> None:
    """An empty folder in memory for at most `size` bytes and `files` files, on top of `path`."""
    options = f"size={size},nr_inodes={files},mode=700"
    call("mount", b"tmpfs", path.encode(), b"tmpfs", 6, options.encode())  # MS_NOSUID | MS_NODEV


def build_root(binds: list[str], links: Mapping[str, str]) -> None:
    """A file system of our own, in the mount namespace made by `unshare`: `binds` read-only, and a place for /tmp."""
    root = "/proc"  # any folder that exists everywhere and holds none of the binds
    call("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    for path in [*binds, os.devnull]:
        place = root + path
        os.makedirs(place if os.path.isdir(path) else os.path.dirname(place), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(place, os.O_CREAT))
        call("mount", path.encode(), place.encode(), None, 0x5000, None)  # MS_BIND | MS_REC
    for path, target in links.items():
        os.symlink(target, root + path)
    os.makedirs(root + "/tmp", exist_ok=True)
    read_only = struct.pack("QQQQ", 1, 0, 0, 0)
    call("syscall", 442, -100, root.encode(), 0x8000, read_only, len(read_only))  # mount_setattr, AT_RECURSIVE
    os.chdir(root)
    call("syscall", MACHINES[os.uname().machine][-1], b".", b".")  # pivot_root
    call("umount2", b".", 2)  # MNT_DETACH: the old root is gone
