"""Sharded weights outside their ranks: on disk, as torch.distributed.checkpoint (DCP) writes them, or in a whole copy.

Every rank writes safetensors files of its own. Nothing is pickled, and any number of ranks, one included, reads what
any other number wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from headstart.ranks.sharding import Division, division_of, full_tensor, local_tensor

FILE = 2**30
"""Bytes of a shard file: DCP holds two copies of one file in CPU memory while it writes it."""


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is divided among ranks; the others are whole on each."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def placed_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole `value`, which every rank has, sharded as `target` is. No collective."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's shards of `tensors` into `folder` (collective); of what ranks have in common, one writes it.

    What fails on any rank is raised on all of them: an OSError that names the rank.
    """
    local = sum(_bytes(local_tensor(tensor)) for tensor in tensors.values())
    total = sum(_bytes(tensor) for tensor in tensors.values())
    per_file, place, files = FILE * max(1.0, total / max(1, local)), 0.0, {}
    for name, tensor in tensors.items():  # by global sizes, so that all ranks number their files alike
        files[name] = 1 + int(place / per_file)
        place += _bytes(tensor)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # a BaseException, the same on all ranks
        rank, (cause, _) = min(error.failures.items())
        failure = OSError(f"rank {rank}: {getattr(cause, 'strerror', None) or cause}")
        raise failure from error


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, sharded in whatever way or not at all, from what `write_shards` wrote. No collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(folder))
        load(dict(targets), storage_reader=reader, no_dist=True)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> whole shape and dtype of what `write_shards` wrote, as tensors without memory."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, stored in found.items()
    }


def whole_copy(model: nn.Module, *, trained_only: bool) -> Any:
    """A sharded model as a plain one in rank 0's CPU memory (collective); an unsharded one itself.

    Weights are gathered one at a time, in the type the model computes in: rank 0 needs CPU memory for all of them, and
    each rank's device for the largest. Those that are left out with `trained_only`, and all of them on other ranks,
    have no memory.
    """
    division = division_of(model)
    return model if division is None else _Copying(division, trained_only).of(model)


class _Copying:
    """One pass over a model, in the same order on all ranks; what is shared in it is shared in the copy."""

    def __init__(self, division: Division, trained_only: bool) -> None:
        self.division, self.trained_only = division, trained_only
        self.modules: dict[int, nn.Module] = {}
        self.parameters: dict[int, nn.Parameter] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.modules:
            # FSDP gives a module a class of its own, and hooks, which the copy does not have.
            kind: Any = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
            made = kind.__new__(kind)
            self.modules[id(module)] = made
            nn.Module.__init__(made)
            made.__dict__ |= {k: v for k, v in module.__dict__.items() if k not in made.__dict__}
            made.training, made._non_persistent_buffers_set = module.training, set(module._non_persistent_buffers_set)
            made._parameters = {k: None if p is None else self.parameter(p) for k, p in module._parameters.items()}
            made._buffers = {k: None if b is None else b.to("cpu", copy=True) for k, b in module._buffers.items()}
            made._modules = {k: None if m is None else self.of(m) for k, m in module._modules.items()}
        return self.modules[id(module)]

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self.parameters:
            value = parameter.detach()
            sharded = isinstance(parameter, DTensor)
            left_out = self.trained_only and not parameter.requires_grad
            if sharded and not left_out:
                value = full_tensor(value.to(self.division.compute))
            place = "meta" if left_out or not self.division.runtime.is_main else "cpu"
            whole = torch.empty(value.shape, dtype=value.dtype, device=place)
            if place == "cpu":
                whole.copy_(value)
            self.parameters[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
        return self.parameters[id(parameter)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
