"""What the launcher says of this process: its rank, and how many there are. Nothing here needs torch.

A launch whose processes do not know of each other is refused: each would train the whole run as if it were alone.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from headstart.errors import ConfigError
from headstart.version import __version__

_SIZES = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}
"""Where srun and mpirun say how many processes they started, and beside it the number of this one."""
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were started together, and on its machine. `local_rank` is None where the launcher
    does not say it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0


def read_launch(environ: Mapping[str, str]) -> Launch:
    """The launch that torchrun, or a user by hand, has put into the environment.

    Raises ConfigError where that is not whole, and where another launcher has started several processes.
    """
    if "WORLD_SIZE" not in environ:
        _refuse_strangers(environ)
        return Launch()
    world_size = _number(environ, "WORLD_SIZE")
    if world_size == 1:
        return Launch()
    if missing := [name for name in _NEEDED if not environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} are not set; start the ranks with torchrun, "
            f"which sets them: {_torchrun(world_size)}"
        )
    rank = _number(environ, "RANK")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank}, which is not from 0 to {world_size - 1} (WORLD_SIZE is {world_size})")
    return Launch(rank, world_size, _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else None)


def versions() -> dict[str, str | None]:
    """What all ranks must have the same version of."""
    found: dict[str, str | None] = {"headstart": __version__}
    for package in ("torch", "transformers", "peft", "tokenizers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def disagreements(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same on all ranks: `training.steps is 4 on rank 0 and 5 on ranks 1, 2`."""
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(str(facts[name])[:200] if name in facts else "missing", []).append(rank)
        if len(ranks) > 1:
            lines.append(f"{name} is " + " and ".join(f"{text} on {_few(those)}" for text, those in ranks.items()))
    return lines


def _few(ranks: Sequence[int]) -> str:
    some = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {some}{' and others' if len(ranks) > 8 else ''}"


def _refuse_strangers(environ: Mapping[str, str]) -> None:
    """Raises ConfigError when another launcher than torchrun started this process beside others."""
    if "SLURM_STEP_NUM_TASKS" in environ:  # of this srun; SLURM_NTASKS may be of the batch script around it
        environ = {name: value for name, value in environ.items() if name != "SLURM_NTASKS"}
    for name, place in _SIZES.items():
        if place in environ and environ.get(name, "").isdecimal() and int(environ[name]) > 1:
            count = int(environ[name])
            slurm = name.startswith("SLURM")
            line = _srun(environ, count) if slurm else _torchrun(count)
            raise ConfigError(
                f"{name} says that {count} processes were started together, but WORLD_SIZE is not set, so each of them "
                f"would train the whole run as if it were alone. Start them with torchrun:\n  {line}\n"
                "Or set WORLD_SIZE=1 where this process is alone, or each of them is a run of its own"
            )


def _torchrun(count: int) -> str:
    return f"torchrun --nproc-per-node={count} -m headstart {shlex.join(sys.argv[1:])}".rstrip()


def _srun(environ: Mapping[str, str], count: int) -> str:
    """One torchrun on every machine of the job, which starts as many ranks as srun did."""
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    each = max(1, count // (int(nodes) if nodes.isdecimal() and int(nodes) else 1))
    if nodes == "1":
        return f"srun --ntasks=1 {_torchrun(each)}"
    meeting = (
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" '
        '--rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500"'
    )
    ranks = _torchrun(each).replace("torchrun", f"torchrun --nnodes={nodes} {meeting}", 1)
    return f"srun --ntasks-per-node=1 --ntasks={nodes} {ranks}"


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name} is {environ[name]!r}, not a whole number; torchrun sets it") from None
