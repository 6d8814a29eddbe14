"""Workers that compare answers, and the deadline they work under: the owner's side of `math_worker`."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from os import environ
from pathlib import Path
from typing import NamedTuple

from headstart.errors import HeadstartError

_PROGRAM = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0  # importing sympy takes a second, and many when the machine is loaded or its disk is cold


class Request(NamedTuple):
    """An answer to compare with a reference, both LaTeX without dollars."""

    gold: str
    answer: str


class WorkerPool:
    """At most `size` workers, each within `memory` bytes of address space; any number of threads may ask.

    Nothing is started before the first question. All processes end with `close`, when the pool is collected, when
    Python exits, and when this process is killed.
    """

    def __init__(self, size: int, memory: int) -> None:
        # The last used one is asked first, so that no more are started than are needed at once.
        self._workers = [_Worker(memory) for _ in range(size)]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._free.put(worker)

    def ask(self, requests: Sequence[Request], seconds: float) -> list[str]:
        """One status per request: a worker's answer, `timeout` once `seconds` are over for all of them, or `error`.

        After `timeout` or `error` the remaining requests are not tried. Waiting for a free worker and its start do not
        count. Raises HeadstartError when the pool is closed or no worker can be started.
        """
        worker = self._free.get()
        replies: list[str] = []
        try:
            worker.start()
            until = time.monotonic() + seconds
            while len(replies) < len(requests) and replies[-1:] not in (["timeout"], ["error"]):
                replies.append(worker.ask(requests[len(replies)], until))
        finally:
            self._free.put(worker)
        return replies

    def close(self) -> None:
        """End all processes; whoever is still waiting for a reply gets `error`."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process of `math_worker` and the connection to it; one thread at a time, except for `close`."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._number = 0
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process unless it runs."""
        with self._lock:
            if self._closed:
                raise HeadstartError("this math grader is closed; make a new one")
            if self._process is not None and self._process.poll() is None:
                return
            self._connection, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    # -P: beside the program lies a math.py, which must not stand in for Python's own.
                    [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno()), str(self._memory)],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    # Its own session, so that Ctrl-C reaches the owner only; a fixed hash seed, so that sympy orders
                    # terms in the same way in every run.
                    start_new_session=True,
                    env={**environ, "PYTHONHASHSEED": "0"},
                )
            self._end = weakref.finalize(self, _end, self._connection, self._process)
        if self._receive(time.monotonic() + _START_SECONDS) is None:
            raise HeadstartError(f"the math grader's process does not start: {_last_words(self._process)}")
        if self._process.stderr is not None:
            self._process.stderr.close()  # nobody would read it; from here on the process writes to nowhere

    def ask(self, request: Request, until: float) -> str:
        """`correct`, `wrong` or `bad_gold`; `timeout`, or `error` when the process that compared died."""
        assert self._process is not None
        self._number += 1
        try:
            while self._connection.poll(0):  # answers that came too late, and the death of an idle process
                self._connection.recv_bytes()
            self._connection.send_bytes(json.dumps([self._number, *request]).encode())
            while reply := self._receive(until):
                number, status = json.loads(reply)
                if number in (self._number, None):
                    return str(status)
        except OSError:  # closed by another thread
            return "error"
        except BaseException:  # such as Ctrl-C
            self._process.terminate()
            raise
        self._process.terminate()  # ends only the fork that compares, see math_worker; then it says so
        while (reply := self._receive(until + 5)) and json.loads(reply)[0] is not None:
            pass
        return "timeout" if time.monotonic() >= until else "error"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._end()

    def _receive(self, until: float) -> bytes | None:
        """The next message; None after the deadline, or when the process is gone."""
        try:
            return self._connection.recv_bytes() if self._connection.poll(max(0.0, until - time.monotonic())) else None
        except EOFError:
            return None


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()  # the process sees the end of file and ends, once it does not compare any more
    process.terminate()
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
