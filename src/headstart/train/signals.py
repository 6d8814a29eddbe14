"""SIGINT and SIGTERM end a run in good order: a checkpoint is written, then the process exits with 128 + the signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import ClassVar

from headstart.errors import StopRequested
from headstart.progress import first_rank

ECHO = 10.0
"""Seconds within which a rank takes a second signal for the first: a batch system sends one to every process, and
torchrun, which gets it as well, sends it to the ranks again."""


class StopSignals:
    """While entered, the first signal only sets `requested`, so that a training step is never cut in half.

    Long work that may be cut (evaluation) runs inside `interruptible`, where the signal raises StopRequested. A second
    signal ends the process at once. Outside the main thread Python delivers no signals, and this does nothing.
    """

    current: ClassVar[StopSignals | None] = None
    """The innermost that is entered; it takes up what the one around it was asked."""

    def __init__(self, *, interruptible: bool = False) -> None:
        self.requested: int | None = None
        self._interruptible = interruptible
        self._previous: dict[int, signal._HANDLER] = {}
        self._outer: StopSignals | None = None
        self._since = 0.0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._outer, StopSignals.current = StopSignals.current, self
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
            if self._outer is not None:
                self.requested, self._since = self._outer.requested, self._outer._since
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if StopSignals.current is self:
            StopSignals.current = self._outer

    def defer(self) -> None:
        """From now on the first signal only sets `requested`, until the ranks agree on it."""
        self._interruptible = False

    def ignore(self) -> None:
        """Ignore both from now on, also after leaving: the process ends, and once the first rank has, torchrun sends
        SIGTERM to the others."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous.clear()
        if self._outer is not None:
            self._outer.ignore()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        before, self._interruptible = self._interruptible, True
        try:
            if self.requested is not None:
                raise StopRequested(self.requested)
            yield
        finally:
            self._interruptible = before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, time.monotonic()
            if self._interruptible:
                raise StopRequested(number)
        elif int(os.environ.get("WORLD_SIZE", "1")) == 1 or time.monotonic() > self._since + ECHO:
            if first_rank():
                os.write(2, b"error: ended at once by a second signal\n")
            raise SystemExit(128 + number)


def interruptible() -> AbstractContextManager[None]:
    """Around work that may be cut where no `StopSignals` is at hand; outside of any, Python's own handlers act."""
    return StopSignals.current.interruptible() if StopSignals.current is not None else nullcontext()
