"""Passes of divided models on ranks that have different work: in turns, beside each other, and after one has failed.

A pass gathers one layer after another, on all ranks: a rank that runs another number of passes than the rest would wait
for ever, or make them wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headstart.ranks.runtime import Runtime, reaching, settling

_IN_TURNS: WeakSet[nn.Module] = WeakSet()
_COUNTED: WeakKeyDictionary[nn.Module, _AllGather] = WeakKeyDictionary()


@contextmanager
def turns(backbones: Sequence[nn.Module], runtime: Runtime) -> Iterator[None]:
    """While entered, a rank may run as many passes of `backbones` as it likes, of each: whenever one runs a pass, all
    others run a short one of the same backbone beside it. No pass has gradients. Entering and leaving are collective.
    """
    taking = _Turns(tuple(backbones), runtime)
    handles = [b.register_forward_pre_hook(taking.before, prepend=True) for b in backbones]
    _IN_TURNS.update(backbones)
    try:
        with _signals_held(), settling(taking.settle):
            yield
            taking.settle()
    finally:
        _IN_TURNS.difference_update(backbones)
        for handle in handles:
            handle.remove()


def in_turns(backbone: nn.Module) -> bool:
    """Whether passes of `backbone` are run in `turns` now."""
    return backbone in _IN_TURNS


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM act on leaving: their handlers may raise, and in the midst of a pass that would leave all
    other ranks waiting for the rest of it. The second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, frame: Any) -> None:
        if came:
            restore()
            signal.raise_signal(number)
        came.append(number)

    for held in before:
        signal.signal(held, hold)
    try:
        yield
    finally:
        restore()
    for number in came[:1]:
        signal.raise_signal(number)


@dataclass(slots=True)
class _Turns:
    backbones: tuple[nn.Module, ...]
    runtime: Runtime
    beside: bool = False
    """Whether this rank runs a pass beside another one's."""

    def before(self, backbone: nn.Module, arguments: Any) -> None:
        """Wait until it is this backbone's turn."""
        if not self.beside:
            self._wait(next(i for i, own in enumerate(self.backbones) if own is backbone))

    def settle(self) -> None:
        """Wait until no rank has a pass to run."""
        self._wait(len(self.backbones))

    def _wait(self, wanted: int) -> None:
        while (chosen := self._least(wanted)) != wanted:
            self.beside = True
            try:
                accompany(self.backbones[chosen], self.runtime.device)
            finally:
                self.beside = False

    def _least(self, wanted: int) -> int:
        """What is run next, on all ranks: the first backbone that any of them wants."""
        number = torch.tensor(wanted, device=self.runtime.device)
        with reaching():
            dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number)


@torch.no_grad()
def accompany(backbone: nn.Module, device: torch.device) -> None:
    """The shortest pass: it gathers every layer, as the other ranks need it just now."""
    backbone(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


@dataclass(slots=True)
class _Collectives:
    """Those of the pass that runs now: how many have begun, and how many of its first ones are left out."""

    begun: int = 0
    left_out: int = 0

    def runs(self) -> bool:
        if self.left_out:
            self.left_out -= 1
            return False
        self.begun += 1
        return True


_COLLECTIVES = _Collectives()


def count_collectives(module: Any) -> None:
    """From now on the collectives of this FSDP module are counted."""
    _COUNTED[module] = _AllGather()
    module.set_custom_all_gather(_COUNTED[module])
    module.set_custom_reduce_scatter(_ReduceScatter())


def begin_pass() -> None:
    """Passes that begin now may have to be finished by `finish_pass`."""
    _COLLECTIVES.begun = 0


def can_finish(backbones: Sequence[nn.Module]) -> bool:
    """Whether passes of these backbones can be finished: torch >= 2.13 can, where there is one copy."""
    return all(b in _COUNTED and hasattr(b, "reset_iter_state") for b in backbones)


def finish_pass(backbones: Sequence[nn.Module], again: Callable[[], None]) -> None:
    """Run what is left of the collectives since `begin_pass`, after an error: other ranks need them for their passes.

    `again` runs the same passes on as little as possible. The collectives that have been run before are left out of
    them, so what they compute is worth nothing, and neither are the gradients.
    """
    for backbone in backbones:
        reset: Any = backbone
        if _COUNTED[backbone].used:  # else there is nothing to reset yet
            reset.reset_iter_state()
    _COLLECTIVES.left_out = _COLLECTIVES.begun
    try:
        again()
    finally:
        _COLLECTIVES.left_out = 0


class _Allocating:
    """What FSDP asks of a way to communicate, beside the call."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        make = torch.zeros if _COLLECTIVES.left_out else torch.empty  # nothing may come to fill it
        return make(*size, dtype=dtype, device=device)


class _AllGather(_Allocating):
    used = False

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.used = True
        if not _COLLECTIVES.runs():
            return None
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work: dist.Work | None = gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class _ReduceScatter(_Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        if not _COLLECTIVES.runs():
            return None
        scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work: dist.Work | None = scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        return work
