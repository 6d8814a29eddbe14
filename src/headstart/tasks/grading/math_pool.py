"""Workers that compare answers, and the deadline they work under: the owner's side of `math_worker`."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from os import environ
from pathlib import Path
from typing import NamedTuple

from headstart.errors import HeadstartError

_PROGRAM = Path(__file__).with_name("math_worker.py")
_WORD = 4  # bytes of a control message
_START_SECONDS = 120.0  # importing sympy takes a second, and many when the machine is loaded or its disk is cold


class Request(NamedTuple):
    """An answer to compare with a reference, both LaTeX without dollars."""

    gold: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Worker:
    nursery: _Nursery
    channel: Connection
    pid: int

    def ask(self, request: Request, until: float) -> str:
        try:
            self.channel.send_bytes(json.dumps(request._asdict()).encode())
            if not self.channel.poll(max(0.0, until - time.monotonic())):
                return "timeout"
            return self.channel.recv_bytes().decode()
        except (EOFError, OSError):
            return "error"


class WorkerPool:
    """At most `size` workers, each within `memory` bytes of address space; any number of threads may ask.

    Nothing is started before the first question. All processes end with `close`, when the pool is collected, when
    Python exits, and when this process is killed.
    """

    def __init__(self, size: int, memory: int) -> None:
        self._memory = memory
        self._nursery: _Nursery | None = None
        self._lock = threading.Lock()
        self._closed = False
        # One slot per worker, the last used one first; an empty slot is a worker still to be made.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._slots.put(None)

    def ask(self, requests: Sequence[Request], seconds: float) -> list[str]:
        """One status per request: a worker's word, `timeout` once `seconds` are over for all of them, or `error`.

        After `timeout` or `error` the remaining requests are not tried and the worker is replaced. Waiting for a free
        worker does not count. Raises HeadstartError when the pool is closed or no worker can be started.
        """
        worker, healthy = self._slots.get(), False
        replies: list[str] = []
        try:
            worker = self._ready(worker)
            until = time.monotonic() + seconds
            for request in requests:
                replies.append(worker.ask(request, until))
                if replies[-1] in ("timeout", "error"):
                    break
            else:
                healthy = True
        finally:  # also after Ctrl-C: a worker that still owes a reply must never be asked again
            if worker is not None and not healthy:
                self._discard(worker)
                worker = None
            self._slots.put(worker)
        return replies

    def close(self) -> None:
        """End all processes; whoever is still waiting for a reply gets `error`."""
        with self._lock:
            self._closed = True
            if self._nursery is not None:
                self._nursery.close()

    def _ready(self, worker: _Worker | None) -> _Worker:
        if worker is not None:
            if not self._closed and not worker.channel.poll(0):
                return worker
            self._discard(worker)  # an idle worker that has something to say has died
        with self._lock:
            if self._closed:
                raise HeadstartError("this math grader is closed; make a new one")
            if self._nursery is not None:
                try:
                    return self._nursery.fork()
                except (EOFError, OSError):  # somebody killed the nursery
                    self._nursery.close()
            self._nursery = _Nursery(self._memory)
            return self._nursery.fork()

    def _discard(self, worker: _Worker) -> None:
        worker.channel.close()
        with self._lock:
            worker.nursery.kill(worker.pid)


class _Nursery:
    """The process that forks the workers. Not thread-safe."""

    def __init__(self, memory: int) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                # -P: beside the program lies a math.py, which must not stand in for Python's own.
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # Its own session, so that Ctrl-C reaches the owner only; a fixed hash seed, so that sympy orders terms
                # in the same way in every run.
                start_new_session=True,
                env={**environ, "PYTHONHASHSEED": "0"},
            )
        self.close = weakref.finalize(self, _end, self._control, process)
        self._control.settimeout(_START_SECONDS)
        try:
            self._number()
        except (EOFError, OSError) as error:
            raise HeadstartError(f"the math grader's process does not start: {_last_words(process)}") from error
        if process.stderr is not None:
            process.stderr.close()  # nobody would read it; from here on the processes write to nowhere

    def fork(self) -> _Worker:
        """A new worker. Raises EOFError or OSError when the nursery is gone."""
        ours, theirs = Pipe()
        with theirs:
            socket.send_fds(self._control, [bytes(_WORD)], [theirs.fileno()])
            return _Worker(self, ours, self._number())

    def kill(self, pid: int) -> None:
        """End a worker; nothing happens when the nursery is gone, because its workers went with it."""
        try:
            self._control.sendall(pid.to_bytes(_WORD, sys.byteorder))
        except OSError:
            return

    def _number(self) -> int:
        data = self._control.recv(_WORD)
        if not data:
            raise EOFError
        return int.from_bytes(data, sys.byteorder)


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # the nursery sees the end of file, kills its workers and ends
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    process.kill()
    _, stderr = process.communicate()
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
