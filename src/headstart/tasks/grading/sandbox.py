"""Where untrusted programs may run: bubblewrap, else Linux namespaces of our own, else nowhere (`unsafe` on demand).

| mode | network | files it can read | files it can write | other processes |
|---|---|---|---|---|
| `bwrap`, `unshare` | none | the interpreter and system libraries | 32 MiB, 1,024 files in a private /tmp | invisible |
| `unsafe` | no sockets | all that the user can | all that the user can, 8 MiB a file | those of the user, by /proc |

In every mode the program has no capabilities, cannot start a process or a program, send signals or change priorities,
and is held by limits on CPU time, memory, file size, open files and threads; `inside` does that part. That needs Linux
on x86-64 or aarch64; elsewhere only `unsafe` runs, with nothing but the limits.

`unsafe` does not keep a program from deleting or changing the user's files (also those that the user's next login
runs), filling the disk with many of them, using devices, or reading the environment of the user's other processes and,
where Yama does not forbid it, writing their memory: a hostile program gets everything that the user has that way.
"""

from __future__ import annotations

import json
import marshal
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from headstart.tasks.grading import inside
from headstart.tasks.grading.inside.values import frame

Mode = Literal["bwrap", "unshare", "unsafe"]
MEMORY = 2**30  # bytes of address space for the program; the largest reference solution of MBPP+ needs a third of it
JUDGE_MEMORY = 2 * 2**30  # bytes; it holds the reference solution of EvalPlus problems
FILE = 8 * 2**20  # bytes: the largest file, and also all that a program may print
DISK = 32 * 2**20  # bytes of the private /tmp (it is memory)
FILES = 1024  # files in the private /tmp: each takes memory of the kernel, also when it is empty
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All that the interpreter sees, so that set order changes no verdict between runs; the program's own is empty."""
MACHINES = ("x86_64", "aarch64")  # those whose system calls `inside.confine` knows
MODULES = ("values", "confine", "program", "judge", "compare", "main")
BOOTSTRAP = """
import marshal, os, sys
size, data = int.from_bytes(os.read(0, 8), "big"), b""
while len(data) < size:
    data += os.read(0, size - len(data))
for name, code in marshal.loads(data):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main()
"""


def missing(mode: Mode) -> str | None:
    """What this machine lacks for `mode` at first sight, or None. Whether it works shows only when it is tried."""
    if mode == "unsafe":
        return None
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES:
        return f"needs Linux on {' or '.join(MACHINES)}, this is {sys.platform} on {platform.machine()}"
    return None if shutil.which(mode) else f"the program {mode} is not installed"


def deadline(seconds: float) -> int:
    """Wall-clock seconds after which a judge must have given its verdict on a program that may use `seconds`."""
    return int(5 * seconds) + 10


def command(mode: Mode, seconds: float, folder: str) -> list[str]:
    """The command line that starts the judge under `mode`. `folder` is the working folder of `unsafe`."""
    settings: dict[str, Any] = {
        "seconds": seconds,
        "deadline": deadline(seconds),
        "memory": MEMORY,
        "judge_memory": JUDGE_MEMORY,
        "file": FILE,
        "disk": 0 if mode == "unsafe" else DISK,
        "files": FILES,
        "folder": folder if mode == "unsafe" else "/tmp",
        "binds": _folders() if mode == "unshare" else [],
        "links": _links() if mode == "unshare" else {},
    }
    # -I without -E: the one variable set is ours. No site-packages, no user site, no working folder on the path.
    python = [_interpreter(), "-s", "-P", "-S", "-B", "-c", BOOTSTRAP, json.dumps(settings)]
    match mode:
        case "bwrap":
            return [*_bwrap(), *python]
        case "unshare":
            spaces = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
            return [_tool("unshare"), *spaces, "--kill-child", *python]
        case "unsafe":
            return python


def _bwrap() -> list[str]:
    # The one capability is for mounting /tmp; `inside.main` gives it up. bwrap's own --tmpfs does not limit the files.
    arguments = [
        _tool("bwrap"),
        "--unshare-all",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--die-with-parent",
    ]
    for path in _folders():
        arguments += ["--ro-bind", path, path]
    for path, target in _links().items():
        arguments += ["--symlink", target, path]
    arguments += ["--dev-bind", os.devnull, os.devnull, "--dir", "/tmp", "--remount-ro", "/"]
    return arguments


@cache
def _folders() -> list[str]:
    """What the interpreter needs to run: its own files and the system's libraries. No home, no /etc, no /proc."""
    binary = Path(_interpreter())
    wanted = [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")]
    wanted += [binary.parents[1] / "lib", Path(sys.base_prefix) / "lib", Path(sysconfig.get_paths()["stdlib"]), binary]
    folders: list[Path] = []
    for path in sorted(path for path in set(wanted) if path.exists() and not path.is_symlink()):
        if not any(path.is_relative_to(folder) for folder in folders):
            folders.append(path)
    return [str(path) for path in folders]


@cache
def _links() -> Mapping[str, str]:
    """/lib and its like are links into /usr on most systems."""
    return {path: str(Path(path).readlink()) for path in ("/lib", "/lib64", "/usr/lib64") if Path(path).is_symlink()}


@cache
def _interpreter() -> str:
    """The real interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def modules() -> bytes:
    """The first frame of input: the modules of `inside`, compiled here because compiling costs 10 ms."""
    folder = Path(inside.__file__).parent
    codes = []
    for name in MODULES:
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        codes.append((f"{inside.__name__}.{name}", compile(text, f"{name}.py", "exec", dont_inherit=True)))
    return frame(marshal.dumps(codes))


def _tool(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} disappeared"
    return path
