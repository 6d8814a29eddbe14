"""Door to torch.distributed: who am I, where are my tensors, sums over all ranks.

One process per GPU under `torchrun` (SPMD); a plain `python` run is world size 1 and touches no process group.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from headstart.errors import ConfigError, HeadstartError, LostRankError, StopRequested, out_of_memory
from headstart.ranks.launch import Launch, disagreements, read_launch, versions
from headstart.ranks.watch import BEAT, JOINING, RESUME, Watch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among its peers. `device` is where this rank's tensors live."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Runtime:
        """Join the process group that torchrun announced, if any, and choose the device.

        Raises ConfigError when CUDA is asked for and absent, when ranks run different versions, and for a launch whose
        processes do not know of each other.
        """
        launch = read_launch(os.environ)
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise ConfigError("training.device is cuda, but torch sees no CUDA device; use training.device=cpu or auto")
        use_cuda = cuda and device != "cpu"
        if launch.world_size == 1:
            return cls(0, 1, torch.device("cuda" if use_cuda else "cpu"))
        device_of_rank = _own_gpu(launch) if use_cuda else torch.device("cpu")
        joined = dist.is_initialized()
        if not joined:
            _join("nccl" if use_cuda else "gloo", launch)
        if dist.get_world_size() != launch.world_size:
            raise ConfigError(
                f"torchrun announced {launch.world_size} ranks but the process group has {dist.get_world_size()}"
            )
        runtime = cls(dist.get_rank(), launch.world_size, device_of_rank)
        if not joined:
            runtime.agree(versions())
        return runtime

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of `items` (every world_size-th); may be empty."""
        return list(items[self.rank :: self.world_size])

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks (float64)."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with _reaching():
            dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def gather(self, item: T) -> list[T]:
        """`item` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        return _gathered(item, self.world_size)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError on all ranks, naming what differs and where, unless `facts` are the same on all of them.

        A rank with another configuration, prompt or model would train a mixture, or wait for ever.
        """
        text = json.dumps(facts, sort_keys=True, default=str)
        if len(set(self.gather(hashlib.sha256(text.encode(errors="replace")).hexdigest()))) == 1:
            return
        lines = "\n  ".join(disagreements(self.gather(json.loads(text))))
        error = ConfigError(
            f"the ranks were not started alike:\n  {lines}\nStart all of them with the same command, files and versions"
        )
        error.everywhere = True
        raise error

    def gather_unless_stopped(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in rank order, on every rank.

        The work of one may take as long as it likes. Raises StopRequested on all ranks when it was raised in the work
        of one, so that they leave together.
        """
        group = _endless() if self.world_size > 1 else None
        try:
            mine: tuple[T | None, tuple[Any, ...]] = work(), ()
        except StopRequested as error:
            mine = None, error.args
        found: list[Any] = [mine] if group is None else _gathered(mine, self.world_size, group)
        for stop in (args for _, args in found if args):
            raise StopRequested(*stop)
        return [item for item, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """What `work`, which needs no other rank, returns. A HeadstartError that it raises on one rank is raised on all
        of them, so that they leave together instead of waiting for one another."""
        result, error = _caught(work)
        self._raise_first(self.gather(error))
        return cast("T", result)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work`, which rank 0 alone does, returns, on every rank; a HeadstartError that it raises, too."""
        result, error = self.gather(_caught(work) if self.is_main else (None, None))[0]
        self._raise_first([error])
        return cast("T", result)

    def _raise_first(self, errors: Sequence[HeadstartError | None]) -> None:
        for error in (error for error in errors if error is not None):
            error.everywhere = self.world_size > 1
            raise error

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all ranks, in place, as one flat all-reduce; a missing gradient counts as zero.

        Those of divided weights are sums already (`headstart.ranks.sharding`).
        """
        if self.world_size == 1:
            return
        grads: list[Tensor] = []
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        if not grads:
            return
        flat = torch.cat([g.flatten().float() for g in grads])
        with _reaching():
            dist.all_reduce(flat)
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()

    def barrier(self) -> None:
        if self.world_size > 1:
            with _reaching():
                dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_gib(self) -> float:
        """Peak memory so far: allocated by torch on a GPU, resident set of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        status = Path("/proc/self/status")
        if status.exists():  # getrusage would count what the parent process held when it started this one
            lines = status.read_text(encoding="utf-8").splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


ALONE = Runtime(0, 1, torch.device("cpu"))
"""One process that works for itself."""


_PATIENCE = timedelta(hours=1)
"""How long a rank waits for one that is alive: the first may be writing a large model. `Watch` finds dead ones."""
_WATCHES: list[Watch] = []
"""One, after this process has joined others."""


def _caught(work: Callable[[], T]) -> tuple[T | None, HeadstartError | None]:
    """What `work` returns, or the error that it raises."""
    try:
        return work(), None
    except HeadstartError as error:
        return None, error


def tell_others(message: str) -> None:
    """Have the other ranks end, if there are any, because this one ends with the error `message`."""
    for watch in _WATCHES:
        watch.tell(message)


def _join(backend: str, launch: Launch) -> None:
    """Meet the other ranks, and watch over them from then on."""
    with _reaching():
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=JOINING)))
        own = store.clone()
        own.set_timeout(timedelta(seconds=BEAT))
        watch = Watch(own, launch, os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))
        watch.start()
        _WATCHES.append(watch)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_PATIENCE)
    # Its threads, still running when the interpreter ends, abort a finished rank (SIGABRT) now and then.
    atexit.register(_leave)


def _own_gpu(launch: Launch) -> torch.device:
    """The GPU of this rank, made torch's current one."""
    count = torch.cuda.device_count()
    if launch.local_rank is None or launch.local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK is {launch.local_rank}, but must say which of this machine's {count} GPUs is this rank's; "
            f"start at most {count} ranks here (torchrun --nproc-per-node={count})"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _leave() -> None:
    failure = getattr(sys, "last_value", None)  # of an error that nobody caught
    for watch in _WATCHES:
        watch.close() if failure is None else watch.tell(f"{type(failure).__name__}: {failure}")
    if dist.is_initialized():
        dist.destroy_process_group()


_ENDLESS: list[dist.ProcessGroup] = []
"""The group of all ranks that waits for weeks, once it is made: for a diagnosis by one rank, say."""


def _endless() -> dist.ProcessGroup:
    if not _ENDLESS:
        with _reaching():
            _ENDLESS.append(dist.new_group(backend="gloo", timeout=timedelta(days=30)))
    return _ENDLESS[0]


def _gathered(item: T, world_size: int, group: dist.ProcessGroup | None = None) -> list[T]:
    items: list[Any] = [None] * world_size
    with _reaching():
        dist.all_gather_object(items, item, group=group)
    return items


_SETTLING: list[Callable[[], None]] = []


@contextmanager
def settling(settle: Callable[[], None]) -> Iterator[None]:
    """While entered, `settle` is called before every call of a Runtime that needs the other ranks: it returns once
    they are all about to make that call."""
    _SETTLING.append(settle)
    try:
        yield
    finally:
        _SETTLING.remove(settle)


@contextmanager
def _reaching() -> Iterator[None]:
    """Around every call that needs the other ranks."""
    for settle in _SETTLING:
        settle()
    with reaching():
        yield


@contextmanager
def reaching() -> Iterator[None]:
    """While entered, an error of a collective says that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        raise lost from error


def lost_rank(error: BaseException) -> LostRankError | None:
    """What to say of an error by which torch.distributed tells that another rank is gone; None for any other."""
    if isinstance(error, LostRankError):
        return error
    ours = type(error) is RuntimeError and re.search(r"/gloo/|NCCL", str(error))  # gloo has no type of its own
    if out_of_memory(error) or not (ours or isinstance(error, dist.DistError)):
        return None
    said = next((text for watch in _WATCHES if (text := watch.said())), None)
    reason = str(error).splitlines()[0].split(". This is")[0]
    reason = f"another rank has ended: {reason}. Its own message says why, unless it was killed"
    return LostRankError(f"{said or reason}; {RESUME}")
