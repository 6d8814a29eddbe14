"""Door to FSDP2: a model's weights divided over the ranks, and put together again where a rank needs them whole.

A model of 32B in bfloat16 is 64 GB, and so are its gradients: one rank cannot hold them. Divided, every weight is a
DTensor of which a rank has one part along the first dimension, and a layer is gathered while it is computed. Adapters
stay whole on every rank. Gradients are sums over ranks, as `Runtime.sum_gradients` makes them, never means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from headstart.ranks.runtime import Runtime
from headstart.ranks.turns import count_collectives


@dataclass(frozen=True, slots=True)
class Division:
    """How one model is divided. `compute` is the type its layers compute in; its weights may have a wider one."""

    runtime: Runtime
    mesh: DeviceMesh
    compute: torch.dtype


@dataclass(frozen=True, slots=True)
class _Own:
    """A parameter as one module has it; a tied one is had by several."""

    module: nn.Module
    name: str
    parameter: nn.Parameter

    def becomes(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


@dataclass(frozen=True, slots=True)
class _Hooks:
    """The keys of FSDP's hooks in a module's own tables."""

    before: tuple[int, ...]
    after: tuple[int, ...]


Mesh = DeviceMesh
"""Ranks in an arrangement."""
_DIVISIONS: WeakKeyDictionary[nn.Module, Division] = WeakKeyDictionary()
_HOOKS: WeakKeyDictionary[nn.Module, _Hooks] = WeakKeyDictionary()


def make_mesh(runtime: Runtime, size: int, replicate: int = 1) -> DeviceMesh:
    """The ranks as `replicate` copies of a model, each divided over `size` neighbours. Collective."""
    shape, names = ((size,), ("shard",)) if replicate == 1 else ((replicate, size), ("replicate", "shard"))
    return init_device_mesh(runtime.device.type, shape, mesh_dim_names=names)


def shard(
    model: nn.Module,
    backbone: nn.Module,
    projection: nn.Module,
    layers: Sequence[nn.Module],
    division: Division,
    *,
    masters: torch.dtype | None = None,
) -> None:
    """Divide the weights of `model` as `division` says, in place, layer after layer.

    `backbone` makes hidden states, `layers` are its layers, `projection` makes logits. Weights of a mapped file are
    read as they are divided, so that a rank never holds more than one layer whole. Adapters stay whole. `masters` is
    the type that weights are kept in; None keeps theirs.
    """
    mesh, device = division.mesh, division.runtime.device
    whole = {p for name, p in model.named_parameters() if ".lora_" in name}
    shared = {id(own.parameter): own for own in _owned(backbone)}
    tied = {
        (own.module, own.name): shared[id(own.parameter)] for own in _owned(projection) if id(own.parameter) in shared
    }
    del shared
    policy = MixedPrecisionPolicy()
    if masters is not None and masters != division.compute:
        policy = MixedPrecisionPolicy(param_dtype=division.compute, reduce_dtype=masters)
    for module in (*layers, backbone):
        _fully_shard(module, mesh, policy, whole)
        if masters is not None:
            module.to(masters)  # now that it is a part of each
    for own in _owned(projection):
        if (place := tied.get((own.module, own.name))) is not None:
            own.becomes(cast(nn.Parameter, place.module._parameters[place.name]))
        elif own.parameter not in whole:
            part = _part(own.parameter.detach(), mesh, device, masters or own.parameter.dtype)
            own.becomes(nn.Parameter(part, own.parameter.requires_grad))
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device, copy=True)  # a copy: no longer the mapped file
    _DIVISIONS[model] = division


def division_of(model: nn.Module) -> Division | None:
    """How `model` is divided; None where it is whole on every rank."""
    return _DIVISIONS.get(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of `model` are divided over ranks now; False while it is `gathered`."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A divided tensor whole, on every rank (collective); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a divided tensor, the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While entered, every rank has all of `model` in its own memory, in the type it computes in, and its passes need
    no other rank. Entering is collective. Weights must not be trained meanwhile: changes are lost on leaving."""
    division = division_of(model)
    if division is None or not is_sharded(model):
        yield
        return
    divided = _gather(model, division.compute)
    hooks = [(module, _taken(module, keys)) for module in model.modules() if (keys := _HOOKS.get(module)) is not None]
    try:
        yield
    finally:
        for own in divided:
            own.becomes(own.parameter)
        for module, taken in hooks:
            _put_back(module, *taken)


@contextmanager
def gathered_weights(model: nn.Module, part: nn.Module, *, trained: bool) -> Iterator[None]:
    """While entered, the weights that `part` of `model` has are whole on every rank. With `trained`, the gradients
    that have reached them are summed over ranks on leaving, and added to those of the divided weights. Entering and
    leaving are collective."""
    division = division_of(model)
    divided = [] if division is None else _gather(part, division.compute)
    try:
        yield
        if trained:
            for own in divided:
                _take_gradient(own)
    finally:
        for own in divided:
            own.becomes(own.parameter)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> float:
    """The norm of all gradients over all ranks, divided ones counted once; larger ones are scaled down to `most`."""
    meshes = [p.grad.device_mesh for p in parameters if isinstance(p.grad, DTensor)]
    if not meshes:
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=local_tensor(gradients[0]).device)
    for gradient in gradients:
        local = local_tensor(gradient)
        squares[int(isinstance(gradient, DTensor))] += local.double().square().sum() if local.numel() else 0.0
    dist.all_reduce(squares[1:], group=meshes[0].get_group(meshes[0].ndim - 1))
    norm = float(squares.sum().sqrt())
    for gradient in gradients:
        local_tensor(gradient).mul_(min(1.0, most / (norm + 1e-6)))
    return norm


def _owned(module: nn.Module) -> Iterator[_Own]:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield _Own(part, name, parameter)


def _fully_shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, whole: set[nn.Parameter]) -> None:
    before, after = set(module._forward_pre_hooks), set(module._forward_hooks)
    made: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)
    # Sums, divided by nothing. Other backends than NCCL have no other reduction with a factor of one's own.
    made.set_gradient_divide_factor(1.0)
    made.set_force_sum_reduction_for_comms(True)
    if mesh.ndim == 1:
        count_collectives(made)
    _HOOKS[module] = _Hooks(
        tuple(key for key in module._forward_pre_hooks if key not in before),
        tuple(key for key in module._forward_hooks if key not in after),
    )


def _part(tensor: Tensor, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> DTensor:
    """This rank's part of a tensor that all ranks can read, placed as FSDP places it."""
    chunks = tensor.chunk(mesh.size(mesh.ndim - 1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    own = chunks[rank] if rank < len(chunks) else tensor[:0]
    placements = (*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0))
    return DTensor.from_local(
        own.to(device, dtype, copy=True), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _gather(module: nn.Module, compute: torch.dtype) -> list[_Own]:
    """Put whole weights in the place of divided ones; what stood there before."""
    divided = [own for own in _owned(module) if isinstance(own.parameter, DTensor)]
    whole: dict[int, nn.Parameter] = {}
    for own in divided:
        if id(own.parameter) not in whole:  # tied ones once
            full = full_tensor(own.parameter.detach().to(compute))
            whole[id(own.parameter)] = nn.Parameter(full, own.parameter.requires_grad)
        own.becomes(whole[id(own.parameter)])
    return divided


def _take_gradient(own: _Own) -> None:
    """Add the gradient of the whole weight that stands there now to the divided weight `own.parameter`."""
    whole, divided = own.module._parameters[own.name], cast(DTensor, own.parameter)
    if whole is None or not whole.requires_grad:
        return
    gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
    mesh = divided.device_mesh
    summed = DTensor.from_local(gradient.to(divided.dtype), mesh, [Partial()] * mesh.ndim, run_check=False)
    part = summed.redistribute(placements=divided.placements)
    divided.grad = part if divided.grad is None else divided.grad + part


def _taken(module: nn.Module, keys: _Hooks) -> tuple[dict[int, Any], dict[int, Any]]:
    before = {key: module._forward_pre_hooks.pop(key) for key in keys.before}
    return before, {key: module._forward_hooks.pop(key) for key in keys.after}


def _put_back(module: nn.Module, before: dict[int, Any], after: dict[int, Any]) -> None:
    """FSDP gathers before any other hook sees the module, so its hook comes first."""
    others = dict(module._forward_pre_hooks)
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks.update({**before, **others})
    module._forward_hooks.update(after)
