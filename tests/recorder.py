"""A stand-in for CUDA graphs on any device: what was recorded is done again on the same tensors, without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "repeat_interleave", "bincount", "lift_fresh")
"""Operations for which the host waits for the device, or copies to it: no CUDA graph holds them."""


class Recorder(TorchDispatchMode):
    """A `Capture`. Like a capture, it leaves every tensor as it was; like a graph, its replay reads and writes the
    tensors of the recording (what the work made included) and knows no Python value but those of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = 0
        self.replays = 0
        self.forgotten = 0

    def warm(self, work: Callable[[], None]) -> None:
        work()

    def forget(self) -> None:
        self.forgotten += 1

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        self._tape: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        try:
            with self:
                work()
        finally:
            for storage, copy in self._before.values():
                storage.copy_(copy)
        tape = self._tape

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, made in tape:
                again = tensors(func(*args, **kwargs))
                for old, new in zip(made, again, strict=True):
                    if key(old) != key(new):
                        old.copy_(new)

        return replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        with self:  # in inference mode operations arrive whole that consist of others
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        chosen = tensors(args[1]) if name in ("index", "index_put", "index_put_") else []
        if name in LOOKS or any(x.dtype == torch.bool for x in chosen):  # which counts what is true
            raise RuntimeError(f"{name} may not be captured")
        given = tensors((args, kwargs))
        if func._schema.is_mutable:
            for x in given:
                if key(x) not in self._own:
                    self._before.setdefault(key(x), (x.untyped_storage(), x.untyped_storage().clone()))
        result = func(*args, **kwargs)
        seen = {key(x) for x in given}
        self._own |= {key(x) for x in tensors(result)} - seen
        self._tape.append((func, args, kwargs, tensors(result)))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def key(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
