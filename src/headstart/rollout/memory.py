"""How many rows fit: the batch size of an evaluation, from the memory that is free."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from headstart.models.causal import CausalModel
from headstart.models.memory import Passes
from headstart.records import Prompt
from headstart.rollout.cache import ReservingLayer, states
from headstart.rollout.decoding import Decoding

LARGEST = 256
"""Rows decoded at once at most: beyond it a token costs about as much per row on the devices we know."""
SHARE = 0.7
"""Of the free memory; the rest is for activations of the prompts and for what the allocator cannot reuse."""
SAMPLER = 48
"""Bytes per vocabulary entry and row while a token is drawn: float32 logits, float64 masses and sums, masks."""


def fitting_batch(model: CausalModel, prompts: Sequence[Prompt], max_tokens: int, free: int | None = None) -> int:
    """Rows (1 to LARGEST) that decode at once in `free` bytes, by default what is free on the model's device now.

    The cache is measured, by encoding the longest prompt once: whatever the architecture keeps per token and per row
    counts. Without a cache whole texts pass through the model.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    places = len(longest.token_ids)
    with model.sampling_mode():
        layers = Decoding.of(model, [longest]).cache.layers
    attention = [layer for layer in layers if isinstance(layer, ReservingLayer)]
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in attention) / places
    whole = 0.0 if model.caches else Passes.of(model, "student").passing
    # Storage is up to half wider than needed, and one layer is there twice while it grows; states while rows move.
    cache = ((1.5 + 1 / len(layers)) * per_token + whole) * (places + max_tokens)
    cache += 2 * sum(state.nbytes for layer in layers for state in states(layer))
    available = free_bytes(model.device) if free is None else free
    return max(1, min(LARGEST, int(SHARE * available / (cache + SAMPLER * model.vocabulary))))


def free_bytes(device: torch.device, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be had on `device`, what torch holds in reserve included; on a CPU no more than a
    container's limit leaves (control groups of both versions)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_by_limits(groups)])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_limits(groups: Path) -> Iterator[int]:
    """Bytes below each limit of this process's control groups; file pages that can be dropped do not count as used."""
    for limit, used in (
        (groups / "memory.max", "memory.current"),
        (groups / "memory/memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if limit.exists() and limit.read_text().strip() != "max":
            stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            taken = int(limit.with_name(used).read_text()) - int(stat.get("inactive_file", 0))
            yield max(0, int(limit.read_text()) - taken)
