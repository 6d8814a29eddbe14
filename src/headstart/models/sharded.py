"""Models whose weights are divided over ranks: how they are divided, and what a rank may do with them alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

from headstart.config.schema import FsdpSharding, ModelConfig, Sharding
from headstart.errors import ConfigError
from headstart.models.causal import CausalModel, layers_of, parts_of
from headstart.models.load import dtype_of, load_model
from headstart.models.lora import unwrap
from headstart.models.memory import SHARE, free_bytes
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import (
    Division,
    Mesh,
    division_of,
    gathered,
    gathered_weights,
    is_sharded,
    make_mesh,
    shard,
)
from headstart.ranks.turns import accompany, can_finish, finish_pass, in_turns, turns

T = TypeVar("T")


def shape(sharding: Sharding, world_size: int) -> tuple[int, int] | None:
    """Ranks that a copy of a model is divided over, and copies; None where every rank has a whole one.

    Raises ConfigError where they are not what torchrun started.
    """
    if not isinstance(sharding, FsdpSharding):
        return None
    size, replicate = sharding.size, sharding.replicate
    size = size or max(1, world_size // (replicate or 1))
    replicate = replicate or max(1, world_size // size)
    if size * replicate != world_size:
        asked = f"size={sharding.size or 'null'}, replicate={sharding.replicate or 'null'}"
        raise ConfigError(
            f"sharding {{{asked}}} needs {size * replicate} ranks ({replicate} copies, each over {size}), but there "
            f"are {world_size}; start as many with torchrun, or leave size and replicate at null"
        )
    return (size, replicate) if size > 1 else None


def mesh_of(sharding: Sharding, runtime: Runtime) -> Mesh | None:
    """The ranks as `sharding` arranges them; None where every rank has whole models. Collective."""
    found = shape(sharding, runtime.world_size)
    if runtime.world_size == 1 and isinstance(sharding, FsdpSharding):
        warnings.warn("sharding.type=fsdp divides nothing over one process; start several with torchrun", stacklevel=2)
    return None if found is None else make_mesh(runtime, *found)


def load_over(
    mesh: Mesh | None, source: ModelConfig, runtime: Runtime, prepare: Callable[[Any], Any], *, sees: bool = False
) -> Any:
    """The model at `source`, divided over `mesh` where there is one; `prepare` sees it first and says what is trained.
    One that `sees` images is whole.

    Divided weights that are trained are kept in float32, whatever they are computed in: their steps are smaller than
    what half precision can add.
    """
    if mesh is None:
        return prepare(load_model(source, runtime.device, sees=sees))
    compute = dtype_of(source, runtime.device)
    model = prepare(load_model(source, runtime.device, mapped=True))
    base = unwrap(model)
    backbone, projection = parts_of(base)
    trained = any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name)
    division = Division(runtime, mesh, compute)
    masters = torch.float32 if trained else None
    shard(model, backbone, projection, layers_of(base, backbone), division, masters=masters)
    return model


@contextmanager
def alone(*models: CausalModel) -> Iterator[None]:
    """While entered, the passes of `models` on this rank, which have no gradients, need not be those of other ranks.

    A divided model is gathered where all of it fits into memory; otherwise its layers are gathered for every pass, and
    ranks run passes beside each other's. Entering and leaving are collective.
    """
    with ExitStack() as stack:
        for model in models:
            if is_sharded(model.model) and _fits(model):
                stack.enter_context(_whole(model))
        rest = [m for m in models if is_sharded(m.model) and not in_turns(m.backbone)]
        for model in rest:
            stack.enter_context(gathered_weights(model.model, model.projection, trained=False))
        if rest:
            division = division_of(rest[0].model)
            assert division is not None
            stack.enter_context(turns([m.backbone for m in rest], division.runtime))
        yield


def led(runtime: Runtime, models: Sequence[CausalModel], work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank: the others lend it their parts of `models`. Collective.

    Raises StopRequested on all ranks when it was raised there.
    """
    with alone(*models):
        return cast(T, runtime.gather_unless_stopped(lambda: work() if runtime.is_main else None)[0])


def check_ranks(sharding: Sharding, runtime: Runtime, what: str) -> None:
    """Raise ConfigError where several ranks would do the work of one: they are of use where models are divided."""
    if shape(sharding, runtime.world_size) is None and runtime.world_size > 1:
        raise ConfigError(
            f"{what} runs in one process (found {runtime.world_size} ranks); leave out torchrun, or divide models that "
            "are too large for one device with sharding.type=fsdp"
        )


@contextmanager
def heads(student: CausalModel, teacher: CausalModel | None) -> Iterator[None]:
    """While entered, the heads of divided models are whole on every rank, gathered once for all micro-batches; the
    gradient of the student's is summed on leaving."""
    with ExitStack() as stack:
        stack.enter_context(gathered_weights(student.model, student.projection, trained=True))
        if teacher is not None:
            stack.enter_context(gathered_weights(teacher.model, teacher.projection, trained=False))
        yield


def finish_micro_batch(student: CausalModel, teacher: CausalModel | None) -> bool:
    """After an error in a micro-batch: whether this rank could do what other ranks still need of it for theirs."""
    backbones = [m.backbone for m in (student, teacher) if m is not None and is_sharded(m.model)]
    if not can_finish(backbones):
        return False
    finish_pass(backbones, lambda: idle_pass(student, teacher))
    return True


def idle_pass(student: CausalModel, teacher: CausalModel | None) -> None:
    """The passes of a micro-batch without rollouts: other ranks need this one's parts for theirs. Adds no gradient."""
    if teacher is not None and is_sharded(teacher.model):
        accompany(teacher.backbone, teacher.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=student.device)
    hidden = student.backbone(input_ids=ids, use_cache=False).last_hidden_state
    if hidden.requires_grad:
        torch.autograd.backward(hidden, torch.zeros_like(hidden))


@contextmanager
def _whole(model: CausalModel) -> Iterator[None]:
    with gathered(model.model):
        try:
            yield
        finally:
            if model.decoder is not None:
                model.decoder.forget()


def _fits(model: CausalModel) -> bool:
    """Whether every rank has room for all of `model`; the same answer on all ranks."""
    division = division_of(model.model)
    assert division is not None
    if in_turns(model.backbone):
        return False
    runtime = division.runtime
    needed = sum(p.numel() for p in model.model.parameters()) * division.compute.itemsize
    sharing = runtime.world_size if runtime.device.type == "cpu" else 1
    return all(runtime.gather(needed <= SHARE * free_bytes(runtime.device) / sharing))
