"""Checkpoints that survive a kill at any moment, a full disk and a flipped bit.

`checkpoints/step_000050/` holds `model.safetensors`, `optimizer.pt`, `state.json` and `manifest.json` (size and sha256
of the other three). It is written as `step_000050.incomplete/`, flushed to disk, then renamed: a folder with the final
name was once complete, and the manifest says whether it still is. That of a sharded student holds the files of all
ranks in `shards/` instead of the first two (`headstart.train.sharded`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.errors import CheckpointError
from headstart.files import sync
from headstart.ranks.runtime import ALONE, Runtime
from headstart.ranks.sharding import full_tensor

_MODEL, _OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"
_FILES = (_MODEL, _OPTIMIZER, STATE)
SHARDS = "shards"
_NAME = re.compile(r"step_(\d{6,})")
_WHOLE, SHARDED = 1, 2
"""Formats, as the manifest numbers them."""

Digest = dict[str, int | str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a run needs to continue after `step` steps as if it had never stopped.

    `model` holds the weights that training moves, `optimizer` is a torch `optimizer.state_dict()`, `state` is JSON: the
    horizon policy, the best evaluation, the tokens generated so far. Random draws need no more than the step.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShardedCheckpoint:
    """The checkpoint of a sharded student, whose tensors stay on disk until each rank reads its own part of them."""

    step: int
    path: Path
    state: dict[str, Any]

    @property
    def shards(self) -> Path:
        return self.path / SHARDS


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step_NNNNNN/` and return it; a valid one that is already there is left alone.

    Checkpoints of later steps are removed once this one is safe: `load_newest` has refused them, and left in place they
    would count as the newest. Raises CheckpointError when the disk is full or refuses; earlier checkpoints are kept.
    """
    final = folder / f"step_{checkpoint.step:06d}"
    if final.is_dir() and damage(final) is None:
        return final
    incomplete = final.with_name(f"{final.name}.incomplete")
    weights = {name: _own_copy(tensor) for name, tensor in checkpoint.model.items()}
    try:
        if incomplete.exists():
            shutil.rmtree(incomplete)
        incomplete.mkdir(parents=True)
        _write_files(incomplete, checkpoint, weights)
        remove(final)  # a damaged one: with a valid one we would have returned above
        incomplete.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap ENOSPC in their own types
        shutil.rmtree(incomplete, ignore_errors=True)
        needed = bytes_of(checkpoint.model) + bytes_of(checkpoint.optimizer)
        raise CheckpointError(refusal(folder, final, reason_of(error), needed)) from error
    remove_later(folder, checkpoint.step)
    return final


def remove_later(folder: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`."""
    for later, path in _saved(folder):
        if later > step:
            remove(path)


def load_newest(
    folder: Path, warn: Callable[[str], None], runtime: Runtime = ALONE
) -> Checkpoint | ShardedCheckpoint | None:
    """The newest undamaged checkpoint (tensors on the CPU, or on disk), or None when none was ever completed.

    All ranks of `runtime` call it together and share the reading of sharded ones. Each damaged one that is passed over
    is named, with what is wrong, through `warn`. Raises CheckpointError when all are damaged.
    """
    saved = _saved(folder)
    for step, path in reversed(saved):
        problem = damage(path, runtime)
        if problem is None:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if (path / SHARDS).is_dir():
                return ShardedCheckpoint(step, path, state)
            return Checkpoint(
                step=step,
                model=load_file(path / _MODEL),
                optimizer=torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True),
                state=state,
            )
        warn(f"checkpoint {path} is damaged: {problem}. Trying the one before it.")
    if saved:
        raise CheckpointError(
            f"all {len(saved)} checkpoints in {folder} are damaged (the last tried, {path.name}: {problem}). "
            "Restore one from a backup, or start again with another --out."
        )
    return None


def rotate(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and that of `best_step`."""
    for step, path in _saved(folder)[:-keep_last]:
        if step != best_step:
            remove(path)


def damage(path: Path, runtime: Runtime = ALONE) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written.

    All ranks of `runtime` call it together; each reads its share of the files of a sharded one.
    """
    try:
        stored = (path / MANIFEST).read_bytes()
        if (path / SHARDS).is_dir() or b'"format": 2' in stored:
            names = runtime.gather(shards_in(path))[0]  # two ranks may see a network file system differently
            fresh = manifest(_step_of(path), digests(path, [*names, STATE], runtime), SHARDED)
        else:
            fresh = manifest(_step_of(path), digests(path, _FILES))
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    # A manifest is made in one way only, so a change anywhere in it, or in the folder's name, shows here too.
    if stored == fresh.encode():
        return None
    try:
        promised, there = json.loads(stored)["files"], json.loads(fresh)["files"]
        for name in sorted(promised.keys() ^ there.keys()):
            return f"{name} is {'missing' if name in promised else 'more than there was'} by {MANIFEST}"
        for name, found in there.items():
            if found["bytes"] != promised[name]["bytes"]:
                return f"{name} has {found['bytes']} bytes, {MANIFEST} says {promised[name]['bytes']}"
            if found["sha256"] != promised[name]["sha256"]:
                return f"{name} does not match its sha256 in {MANIFEST}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    return f"{MANIFEST} does not describe this checkpoint"


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A digest of every weight, bit by bit, the same however weights are divided among ranks (then all ranks call it
    together)."""
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode())
        found.update(_own_copy(full_tensor(tensor.detach())).reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _own_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses tied and strided tensors."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_files(folder: Path, checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / _MODEL)
    with (folder / _OPTIMIZER).open("wb") as file:  # a file, not a path: then torch keeps the OSError as context
        torch.save(checkpoint.optimizer, file)
    write_state(folder, checkpoint.state)
    (folder / MANIFEST).write_text(manifest(checkpoint.step, digests(folder, _FILES)), encoding="utf-8")
    for name in (*_FILES, MANIFEST):
        sync(folder / name)
    sync(folder)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def manifest(step: int, files: Mapping[str, Digest], form: int = _WHOLE) -> str:
    """The text of `manifest.json`."""
    return json.dumps({"format": form, "step": step, "files": files}, indent=2) + "\n"


def digests(path: Path, names: Sequence[str], runtime: Runtime = ALONE) -> dict[str, Digest]:
    """Size and sha256 of files in `path`, of which every rank reads its share. Raises OSError, on all ranks."""
    mine: dict[str, Digest | OSError] = {}
    for name in runtime.share(names):
        try:
            mine[name] = {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)}
        except OSError as error:
            mine[name] = error
    found = {name: digest for part in runtime.gather(mine) for name, digest in part.items()}
    for digest in found.values():
        if isinstance(digest, OSError):
            raise digest
    return {name: cast(Digest, found[name]) for name in names}


def shards_in(path: Path) -> list[str]:
    return sorted(f"{SHARDS}/{file.name}" for file in (path / SHARDS).iterdir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    return int(match[1]) if match else -1


def _saved(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints under their final name, oldest first. They may be damaged."""
    if not folder.is_dir():
        return []
    return sorted((_step_of(path), path) for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def remove(path: Path) -> None:
    """Delete a checkpoint folder. A kill half-way leaves an `.incomplete` one, never a half under the final name."""
    if path.exists():
        doomed = path.with_name(f"{path.name}.removed.incomplete")
        if doomed.exists():
            shutil.rmtree(doomed)
        shutil.rmtree(path.rename(doomed))


def bytes_of(value: Any) -> int:
    match value:
        case Tensor():
            return value.numel() * value.element_size()
        case Mapping():
            return sum(bytes_of(item) for item in value.values())
        case list() | tuple():
            return sum(bytes_of(item) for item in value)
        case _:
            return 0


def reason_of(error: BaseException) -> str:
    """The operating system's own words where there are any."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return str(error)


def refusal(folder: Path, final: Path, reason: str, needed: int) -> str:
    saved = _saved(folder)
    kept = f"The last one, {saved[-1][1].name}, is kept." if saved else "There is no earlier one."
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    return (
        f"checkpoint {final} cannot be written: {reason}. It needs about {_size(needed)} and {_size(free)} are free "
        f"(a quota may allow less). {kept} Free space, then continue with --resume."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
