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
from typing import Any, NoReturn

from headstart.launch import Launch

BEAT = 5.0
"""Seconds between two beats, and between two looks."""
SILENCE = 40.0
"""Seconds after its last beat when a rank counts as dead."""
JOINING = 300.0
"""Seconds until a rank must have joined: ranks import torch at different speeds."""
UNREACHABLE = 20.0
"""Seconds of a store that does not answer after which its process is dead. At the end of a run it has merely ended
first, and this process ends meanwhile."""
_LEFT = 1 << 40
"""Counted up by a rank that ends in good order."""


class Watch:
    """This rank's watch over the others, in a thread of its own that ends the whole process.

    `store` is a torch.distributed.Store that no one else uses: its calls wait for each other.
    """

    def __init__(self, store: Any, launch: Launch, run: str = "", end: Callable[[int], NoReturn] = os._exit) -> None:
        self._store, self._launch, self._end = store, launch, end
        self._run = run
        """Set apart from earlier attempts of the same launch."""
        self._others = range(1, launch.world_size) if launch.rank == 0 else range(1)
        self._seen = dict.fromkeys(self._others, (0, time.monotonic()))
        """Each other's number, and when it last changed."""
        self._answered = time.monotonic()
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        self._store.add(self._key(self._launch.rank), 1)
        threading.Thread(target=self._watch, name="watch over the other ranks", daemon=True).start()

    def tell(self, message: str) -> None:
        """Have all others end, because this rank ends with the error `message`."""
        where = f"rank {self._launch.rank} on {socket.gethostname()}"
        self._closed.set()
        self._announce(f"{where} has ended: {' '.join(message.split())[:500]}")

    def said(self) -> str | None:
        """Why a rank has ended, where one has said it."""
        with suppress(RuntimeError), self._lock:
            if self._store.check([self._key("ended")]):
                return str(self._store.get(self._key("ended")).decode())
        return None

    def close(self) -> None:
        """Stop watching, and being watched: this rank ends in good order."""
        if not self._closed.is_set():
            self._closed.set()
            with suppress(RuntimeError), self._lock:
                self._store.add(self._key(self._launch.rank), _LEFT)

    def look(self, now: float) -> str | None:
        """Beat, and look at the others; why this process must end, if it must."""
        try:
            with self._lock:
                self._store.add(self._key(self._launch.rank), 1)
                numbers = {rank: self._store.add(self._key(rank), 0) for rank in self._others}
            self._answered = now
        except RuntimeError:
            return self._unreachable(now)
        for rank, number in numbers.items():
            before, since = self._seen[rank]
            if number != before:
                self._seen[rank] = (number, now)
            elif number < _LEFT and now - since > (SILENCE if number else JOINING):
                did = "has not been heard of" if number else "has not joined the others"
                return f"rank {rank} {did} for {now - since:.0f} s: it was killed, or its machine or network is down"
        return None

    def _watch(self) -> None:
        while not self._closed.wait(BEAT):
            problem = self.look(time.monotonic())
            if problem is not None:
                self._announce(problem)
            if (problem := self.said() or problem) and not self._closed.is_set():
                self._stop(problem)

    def _unreachable(self, now: float) -> str | None:
        if now - self._answered <= UNREACHABLE:
            return None
        return "the process where the ranks meet (rank 0, or the first torchrun) cannot be reached any more"

    def _announce(self, problem: str) -> None:
        """The first problem stays."""
        with suppress(RuntimeError), self._lock:
            self._store.compare_set(self._key("ended"), "", problem)

    def _stop(self, problem: str) -> None:
        """End the process from this thread: the main one may wait in a collective, where no exception reaches it."""
        if self._launch.local_rank in (None, 0, 1):  # either may be the one that is gone
            line = f"error: {problem}; continue from the last checkpoint with --resume\n"
            with suppress(OSError):
                os.write(2, line.encode(errors="backslashreplace"))
        self._end(1)

    def _key(self, what: int | str) -> str:
        return f"headstart/{self._run}/{what}"
