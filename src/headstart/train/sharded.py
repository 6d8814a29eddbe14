"""Checkpoints of a sharded student: every rank writes its own shards of weights and optimizer, the first the rest.

Gathering 32B weights with AdamW's two moments on one rank would take 384 GB of its memory. What is written is as safe
as an unsharded checkpoint (manifest, flush, rename), and any number of ranks, one included, resumes from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from headstart.errors import CheckpointError
from headstart.files import sync
from headstart.ranks.runtime import Runtime
from headstart.ranks.shards import placed_like, read_shards, stored_tensors, write_shards
from headstart.train.checkpoint import (
    MANIFEST,
    SHARDED,
    SHARDS,
    STATE,
    Checkpoint,
    ShardedCheckpoint,
    bytes_of,
    damage,
    digests,
    manifest,
    reason_of,
    refusal,
    remove,
    remove_later,
    shards_in,
    write_state,
)

T = TypeVar("T")
_MODEL = "model"


def save_sharded(
    folder: Path | None,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    runtime: Runtime,
) -> None:
    """Write `folder/step_NNNNNN/`, whose place rank 0 names; all ranks call it together. A valid one is left alone.

    Raises CheckpointError on all ranks, with one message, when the disk of any is full or refuses; earlier checkpoints
    are kept.
    """
    place = runtime.gather(folder.absolute() if folder else None)[0]
    assert place is not None
    final = place / f"step_{step:06d}"
    if runtime.gather(final.is_dir())[0] and damage(final, runtime) is None:
        return
    incomplete, tensors = final.with_name(f"{final.name}.incomplete"), _named(weights, optimizer)
    try:
        _on_main(runtime, lambda: _make(incomplete))
        _on_all(runtime, lambda: write_shards(incomplete / SHARDS, tensors))
        files = _described(runtime, incomplete)
        _on_main(runtime, lambda: _finish(incomplete, final, step, state, files))
    except OSError as error:
        message = ""
        if runtime.is_main:
            shutil.rmtree(incomplete, ignore_errors=True)
            message = refusal(place, final, str(error), bytes_of(tensors))
        failure = CheckpointError(runtime.gather(message)[0])
        failure.everywhere = True
        raise failure from error
    if runtime.is_main:
        remove_later(place, step)


def restore_sharded(
    checkpoint: Checkpoint | ShardedCheckpoint, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Fill weights and optimizer from a checkpoint, either of which, or both, may be sharded. No collective."""
    match checkpoint:
        case ShardedCheckpoint():
            stored = stored_tensors(checkpoint.shards)
            for name, tensor in stored.items():
                field, _, owner = name.partition(".")
                if field != _MODEL:
                    optimizer.state[weights[owner]][field] = _like(tensor, weights[owner])
            read_shards(checkpoint.shards, _named(weights, optimizer))
        case Checkpoint():
            for name, parameter in weights.items():
                parameter.data.copy_(placed_like(checkpoint.model[name], parameter.data))
            optimizer.load_state_dict(_placed(checkpoint.optimizer, list(weights.values())))


def weights_in(checkpoint: Checkpoint | ShardedCheckpoint) -> dict[str, Tensor]:
    """Every weight of a checkpoint; of a sharded one without memory, by shape and type."""
    match checkpoint:
        case Checkpoint():
            return checkpoint.model
        case ShardedCheckpoint():
            parts = [(name.partition("."), tensor) for name, tensor in stored_tensors(checkpoint.shards).items()]
            return {owner: tensor for (field, _, owner), tensor in parts if field == _MODEL}


def _named(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`model.<weight>` and `exp_avg.<weight>`: by the weight's name, not its number among those of a rank."""
    named = {f"{_MODEL}.{name}": parameter.detach() for name, parameter in weights.items()}
    for name, parameter in weights.items():
        named |= {f"{field}.{name}": tensor for field, tensor in optimizer.state.get(parameter, {}).items()}
    return named


def _like(stored: Tensor, parameter: nn.Parameter) -> Tensor:
    """Memory for a part of the optimizer's state: sharded as its weight, but for the count of steps."""
    if stored.shape == parameter.shape:
        return torch.zeros_like(parameter.data, dtype=stored.dtype)
    return torch.zeros(stored.shape, dtype=stored.dtype, device=parameter.device)


def _placed(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An `optimizer.state_dict()` of whole tensors, its moments sharded as their weights are."""
    placed = {
        index: {
            field: placed_like(value, parameters[index].data) if value.shape == parameters[index].shape else value
            for field, value in fields.items()
        }
        for index, fields in state["state"].items()
    }
    return {**state, "state": placed}


def _make(incomplete: Path) -> None:
    if incomplete.exists():
        shutil.rmtree(incomplete)
    (incomplete / SHARDS).mkdir(parents=True)


def _described(runtime: Runtime, incomplete: Path) -> dict[str, Any]:
    """Flush all ranks' files; size and sha256 of each, by its name in the checkpoint's folder."""
    listed = _on_all(runtime, lambda: shards_in(incomplete))
    if listed.count(listed[0]) < len(listed):
        raise OSError("the ranks do not see each other's files there; a sharded student needs a shared file system")

    def flush() -> None:
        for name in runtime.share(listed[0]):
            sync(incomplete / name)

    _on_all(runtime, flush)
    return digests(incomplete, listed[0], runtime)


def _finish(incomplete: Path, final: Path, step: int, state: Mapping[str, Any], files: dict[str, Any]) -> None:
    write_state(incomplete, state)
    text = manifest(step, files | digests(incomplete, [STATE]), SHARDED)
    (incomplete / MANIFEST).write_text(text, encoding="utf-8")
    for written in (incomplete / STATE, incomplete / MANIFEST, incomplete / SHARDS, incomplete):
        sync(written)
    remove(final)  # a damaged one: with a valid one nothing would be written
    incomplete.rename(final)
    sync(final.parent)


def _on_main(runtime: Runtime, work: Callable[[], None]) -> None:
    _on_all(runtime, work if runtime.is_main else lambda: None)


def _on_all(runtime: Runtime, work: Callable[[], T]) -> list[T]:
    """What `work` returns on every rank. Raises one OSError on all of them when it fails on any."""
    result: T | None = None
    reason = None
    try:
        result = work()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
    found: list[Any] = runtime.gather((result, reason))
    for rank, (_, failed) in enumerate(found):
        if failed is not None:
            raise OSError(failed if failed.startswith("rank ") else f"rank {rank}: {failed}")
    return [item for item, _ in found]
