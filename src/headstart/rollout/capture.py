"""Recording one piece of device work and doing it again without Python: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

Work = Callable[[], None]


class Capture(Protocol):
    """How a decoding step is recorded. Its work must touch the same tensors every time and never ask for a value."""

    def warm(self, work: Work) -> None:
        """Do the work where it will be captured: libraries set up what they may not set up during a capture."""

    def capture(self, work: Work) -> Work:
        """What does the same work again. Nothing of it is done yet. RuntimeError where it cannot be captured."""

    def forget(self) -> None:
        """All that was captured has been dropped."""


class CudaCapture:
    """Raw CUDA graphs on one stream of their own. They share their memory, for they run one after another and leave
    what they made in tensors that were there before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device)
        self.forget()

    def warm(self, work: Work) -> None:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")  # other threads may go on
        # torch.cuda.graph stays on its stream when a capture fails; the context around it does not.
        with torch.cuda.stream(torch.cuda.current_stream(self._stream.device)), recording:
            work()
        return graph.replay

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines: libraries keep a workspace for every stream that they ever saw."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
