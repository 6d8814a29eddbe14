"""Named random streams: every draw is a pure function of what it is for, never of global state.

A uniform number is keyed by (seed, purpose, step, prompt index, sample index, position). So a resumed run draws what
the straight run drew, and neither batching nor the number of ranks changes a sample. The generator is counter-based:
the finaliser of splitmix64 (Steele, Lea and Flood, 2014) over per-rollout keys, the same bits on every platform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from headstart.errors import DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PROMPT = np.uint64(0xD1342543DE82EF95)
_SAMPLE = np.uint64(0xDA942042E4DD58B5)


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for `purpose` (and further numbers), fit for `torch.Generator.manual_seed`.

    JSON keeps the parts apart: ("a", 1, 23) and ("a", 12, 3) are different texts.
    """
    text = json.dumps([int(seed), purpose, *(int(number) for number in numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(
    key: tuple[int, str, int], rollouts: Sequence[tuple[int, int]], start: int, count: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, `[len(rollouts), count]`, for positions `start ..`.

    `key` is (seed, purpose, step) and a rollout is (prompt index, sample index). An entry depends on these and its
    position alone: asking for other rollouts or other positions beside it never changes it.
    """
    pairs = np.array(rollouts, dtype=np.int64).reshape(-1, 2).astype(np.uint64)
    base = np.uint64(derive_seed(*key))
    prompt_B = _mix(base + _PROMPT * pairs[:, 0])
    rollout_B = _mix(prompt_B ^ (_SAMPLE * (pairs[:, 1] + np.uint64(1))))
    position_N = np.arange(start + 1, start + count + 1, dtype=np.int64).astype(np.uint64)
    bits_BN = _mix(rollout_B[:, None] + _GOLDEN * position_N[None, :])
    return (bits_BN >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `range(n)` that epoch `epoch` (counts from 0) walks."""
    return [int(place) for place in _permutation(n, seed, epoch)]


def prompt_order(n: int, seed: int, step: int, per_step: int) -> list[int]:
    """The `per_step` indices (of `n` prompts) that step `step` uses; steps count from 0.

    Steps walk one shuffled epoch after another without gaps: every prompt is used once before any is used twice, and a
    step may straddle epochs. A function of its arguments, so a resumed run meets the same prompts.
    Raises DataError when there are no prompts.
    """
    if n < 1:
        raise DataError(f"no prompts to train on (found {n}): give a prompt file with at least one usable prompt")
    places = range(step * per_step, (step + 1) * per_step)
    return [int(_permutation(n, seed, place // n)[place % n]) for place in places]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorting our own uniforms, not numpy's Generator: its methods may change between numpy versions.
    draws_N = uniforms((seed, "order", epoch), [(0, 0)], 0, n)[0]
    return np.argsort(draws_N, kind="stable")


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser, a bijection of 64-bit words in which every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
