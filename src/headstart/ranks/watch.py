"""Ranks that watch each other: when one dies, the others end within a minute instead of waiting for it.

A collective waits for a rank that was killed: with NCCL for as long as the process group's timeout, which must be long,
since ranks rightly wait while the first one writes a model. So a thread of every rank counts up a number in the store
that the ranks met in. The first rank reads the numbers of all, all read that of the first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from headstart.ranks.launch import Launch

T = TypeVar("T")

BEAT = 5.0
"""Seconds between two beats, and between two looks."""
SILENCE = 35.0
"""Seconds after its last beat when a rank counts as dead."""
JOINING = 300.0
"""Seconds until a rank must have joined: ranks import torch at different speeds."""
UNREACHABLE = 30.0
"""Seconds without an answer after which the store's process counts as dead. At the end of a run that process has merely
ended first, and this one ends meanwhile."""
_LEFT = 1 << 40
"""Counted up by a rank that ends in good order."""
RESUME = "--resume continues from the last checkpoint"
_GONE = "the process where the ranks meet (rank 0, or the first torchrun) has not answered for {:.0f} s"


class Watch:
    """This rank's watch over the others, in threads of its own that end the whole process.

    `store` is a torch.distributed.Store that no one else uses: its calls wait for each other.
    """

    def __init__(self, store: Any, launch: Launch, run: str = "", end: Callable[[int], Any] = os._exit) -> None:
        """`run` sets this attempt apart from earlier ones of the same launch."""
        self._store, self._launch, self._run, self._end = store, launch, run, end
        others = range(1, launch.world_size) if launch.rank == 0 else range(1)
        self._seen = dict.fromkeys(others, (0, time.monotonic()))
        """Each other's number, and when it last changed."""
        self._answered = time.monotonic()
        self._problem: str | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        self._store.add(self._key(self._launch.rank), 1)
        for work in (self._beat, self._guard):
            threading.Thread(target=work, name="watch over the other ranks", daemon=True).start()

    def tell(self, message: str) -> None:
        """Have all others end, because this rank ends with the error `message`."""
        self._closed.set()
        where = f"rank {self._launch.rank} on {socket.gethostname()}"
        self._asking(lambda: self._announce(f"{where} has ended: {' '.join(message.split())[:500]}"))

    def said(self) -> str | None:
        """Why a rank has ended, where one has said it."""
        return self._asking(self._announced)

    def close(self) -> None:
        """Stop watching, and being watched: this rank ends in good order."""
        if not self._closed.is_set():
            self._closed.set()
            self._asking(lambda: self._store.add(self._key(self._launch.rank), _LEFT))

    def look(self, now: float) -> str | None:
        """Beat, and look at the others; why this process must end, if it must. Blocks while the store is silent."""
        self._store.add(self._key(self._launch.rank), 1)
        for rank, (before, since) in self._seen.items():
            number = self._store.add(self._key(rank), 0)
            if number != before:
                self._seen[rank] = (number, now)
            elif number < _LEFT and now - since > (SILENCE if number else JOINING):
                did = "has not answered" if number else "has not joined the others"
                how = "it was killed, or its machine or network is down"
                self._announce(f"rank {rank} {did} for {now - since:.0f} s: {how}")
        self._answered = now
        return self._announced()

    def unreachable(self, now: float) -> str | None:
        """Why this process must end when nothing answers."""
        silence = now - self._answered
        return _GONE.format(silence) if silence > UNREACHABLE else None

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with suppress(RuntimeError), self._lock:
                self._problem = self.look(time.monotonic())

    def _guard(self) -> None:
        """The beating thread may wait for a store whose machine is down."""
        while not self._closed.wait(1.0):
            problem = self._problem or self.unreachable(time.monotonic())
            if problem is not None and not self._closed.is_set():
                self._stop(problem)

    def _stop(self, problem: str) -> None:
        """End the process from this thread: the main one may wait in a collective, where no exception reaches it."""
        if self._launch.local_rank in (None, 0, 1):  # either may be the one that is gone
            line = f"error: {problem}; {RESUME}\n"
            with suppress(OSError):
                os.write(2, line.encode(errors="backslashreplace"))
        self._end(1)

    def _asking(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where the store does not answer, or is waited for by another thread."""
        if self._lock.acquire(timeout=1.0):
            try:
                with suppress(RuntimeError):
                    return work()
            finally:
                self._lock.release()
        return None

    def _announce(self, problem: str) -> None:
        """Of several problems the first stays."""
        self._store.compare_set(self._key("ended"), "", problem)

    def _announced(self) -> str | None:
        key = self._key("ended")
        return str(self._store.get(key).decode()) if self._store.check([key]) else None

    def _key(self, what: int | str) -> str:
        return f"headstart/{self._run}/{what}"
