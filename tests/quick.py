"""The command line without its imports: `python -S tests/quick.py VERB ...` is `headstart VERB ...`, run in a fork of a
process that has torch and transformers loaded already (5 CPU seconds each time, a sixth of this suite).

The command has its own process, working directory, environment, standard streams and exit code; SIGINT and SIGTERM go
on to it, and it is killed with this one. Tests of the imports themselves and of limits take `-m headstart`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM)
PRELOADED = (
    "headstart.cli.main",
    "headstart.diagnosis.run",
    "headstart.distillation.run",
    "headstart.explanation.run",
    "headstart.checks.run",
    "headstart.study.run",
    "headstart.reports.contents",
    "headstart.quickstart",
    "transformers.models.llama.modeling_llama",
    "peft",
)


def address() -> Path:
    """The server's socket: one for each test process (`HEADSTART_QUICK` is its id) and for what is read
    on import."""
    owner = os.environ.get("HEADSTART_QUICK") or str(os.getppid())
    read_once = sorted(item for item in os.environ.items() if item[0].startswith(("HF_", "PYTHON")))
    key = zlib.crc32(repr(read_once).encode())
    return Path(tempfile.gettempdir()) / f"headstart-quick-{os.getuid()}-{key:08x}-{owner}"


def shell() -> str:
    """A line that makes `headstart` in a shell's commands this."""
    return f'headstart() {{ {shlex.join(command())} "$@"; }}\n'


def command(*arguments: object) -> list[str]:
    """The words of `headstart ARGUMENTS`, for subprocess."""
    return [sys.executable, "-S", __file__, *map(str, arguments)]


def run(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """`headstart ARGUMENTS` with its output as text."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False, **options)


def ranks(count: int, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The same on `count` gloo ranks of this machine, without torchrun: the first exit code that is not 0, and what all
    of them wrote."""
    port = free_port()
    started = [
        subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | launched_by_hand(rank, count, port),
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=timeout) for process in started]
    code = next((process.returncode for process in started if process.returncode), 0)
    return subprocess.CompletedProcess(
        arguments, code, "".join(out for out, _ in said), "".join(err for _, err in said)
    )


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill the command itself, at once; its process ends with -SIGKILL."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        os.kill(int.from_bytes(_mark(process.pid).read_bytes(), "big"), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def launched_by_hand(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables of a rank, as torchrun or a user sets them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _mark(client: int) -> Path:
    """Where a client writes the number of its command's process."""
    return Path(tempfile.gettempdir()) / f"headstart-quick-{os.getuid()}-command-{client}"


def _client() -> None:
    place = address()
    with socket.socket(socket.AF_UNIX) as server:
        _connect(server, place)
        request = json.dumps({"words": sys.argv[1:], "cwd": str(Path.cwd()), "environment": dict(os.environ)}).encode()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(request)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        mark = _mark(os.getpid())
        mark.write_bytes(server.recv(4))
        status = int.from_bytes(server.recv(4), "big", signed=True)
        mark.unlink()
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _connect(client: socket.socket, place: Path) -> None:
    """Connect to the server; the first to come starts it."""
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            client.connect(str(place))
            return
        except OSError:
            place.unlink(missing_ok=True)
        owner = place.name.rpartition("-")[2]
        subprocess.Popen(
            [sys.executable, __file__, "--serve", str(place), owner],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
        )
        while not place.exists():
            time.sleep(0.02)
        client.connect(str(place))


def _serve(place: Path, owner: int) -> None:
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    running: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with socket.socket(socket.AF_UNIX) as listener:
        hidden = place.with_suffix(".new")
        hidden.unlink(missing_ok=True)
        listener.bind(str(hidden))
        listener.listen(64)
        hidden.rename(place)
        while Path(f"/proc/{owner}").exists() or running:
            ready, _, _ = select.select([listener, woken, *running.values()], [], [], 1.0)
            if woken in ready:
                os.read(woken, 4096)
            _report_ended(running)
            for pid, client in list(running.items()):
                if client in ready:
                    _forward(pid, client)
            if listener in ready:
                client, _ = listener.accept()
                running[_start(client, listener)] = client
    for path in (place, place.with_suffix(".lock")):
        path.unlink(missing_ok=True)


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as client, contextlib.suppress(OSError):  # killed meanwhile
            client.sendall(status.to_bytes(4, "big", signed=True))


def _forward(pid: int, client: socket.socket) -> None:
    """A signal of the client's to its command; the end of the client is the command's end."""
    try:
        numbers = client.recv(16)
    except OSError:
        numbers = b""
    for number in numbers or bytes([signal.SIGKILL]):
        os.kill(pid, number)


def _start(client: socket.socket, listener: socket.socket) -> int:
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    request, wanted = b"", int.from_bytes(size, "big")
    while len(request) < wanted:
        request += client.recv(wanted - len(request))
    pid = os.fork()
    if pid == 0:
        listener.close()
        client.close()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *FORWARDED):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        _command(json.loads(request))
    client.sendall(pid.to_bytes(4, "big"))
    for stream in streams:
        os.close(stream)
    return pid


def _command(request: dict[str, Any]) -> None:
    """Become the command, and end."""
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["headstart", *request["words"]]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
    from headstart.cli.main import main

    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _client()
else:
    os.environ.setdefault("HEADSTART_QUICK", str(os.getpid()))
