"""Door to sharded tensors on disk: torch.distributed.checkpoint (DCP) over safetensors, one set of files per rank.

Nothing is pickled, and any number of ranks, one included, reads what any other number wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from headstart.sharding import local_tensor

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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
