"""SIGINT and SIGTERM end a run in good order: a checkpoint is written, then the process exits with 128 + the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """Raised inside `StopSignals.interruptible` when a signal arrives; nothing else may catch it."""


class StopSignals:
    """While entered, the first signal only sets `requested`, so that a training step is never cut in half.

    Long work that may be cut (evaluation) runs inside `interruptible`. A second signal ends the process at once.
    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._interruptible = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        if self.requested is not None:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise SystemExit(128 + number)
        self.requested = number
        if self._interruptible:
            raise StopRequested
