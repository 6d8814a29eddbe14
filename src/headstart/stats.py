"""Means of shares with honest intervals, and percentiles. Plain Python and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Z95 = 1.96
"""Standard normal quantile of a two-sided 95% interval."""


BIN_EDGES = (0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000)
"""Edges (completion tokens) of `divergence_by_position`."""

Array = npt.NDArray[Any]


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, 1927); (0, 1) when n is 0.

    Unlike mean +- z * standard error it stays inside [0, 1] and has a width at shares 0 and 1. `n` may be an effective
    (fractional) number of trials.
    """
    if n <= 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(values: Sequence[float], z: float = Z95) -> tuple[float, float]:
    """Interval (95% by default) of the mean of per-problem shares, such as avg@k, over problems.

    The Wilson interval for the number of yes/no problems that would be as noisy as these values: with mean m and
    sample variance s^2 of the n values, m (1 - m) n / s^2 (at least n: averaging samples only lowers the variance;
    n when all values agree). (0, 1) without values. Raises ValueError for values outside [0, 1].
    """
    n = len(values)
    if n == 0:
        return 0.0, 1.0
    if min(values) < 0 or max(values) > 1:
        raise ValueError(f"mean_interval takes shares in 0..1 (found {min(values)} to {max(values)})")
    mean, variance = moments(values)
    effective = max(n, n * mean * (1 - mean) / variance) if variance > 1e-12 else n
    return wilson(mean * effective, effective, z)


def paired_difference(a: Sequence[float], b: Sequence[float], z: float = Z95) -> tuple[float, tuple[float, float]]:
    """Mean of a - b over problems measured in both arms (shares in 0..1) and its interval, inside [-1, 1].

    Normal approximation over the per-problem differences. Where all differences agree (or n is 1) it has no width to
    show, and 3 / n, the 95% rule of three, stands in. Raises ValueError when the lists differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_difference needs the same problems in both arms (found {len(a)} and {len(b)})")
    n = len(a)
    if n == 0:
        return 0.0, (-1.0, 1.0)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, variance = moments(differences)
    half = z * math.sqrt(variance / n) if variance > 1e-12 else 3.0 / n
    return mean, (max(mean - half, -1.0), min(mean + half, 1.0))


def percentiles(values: Sequence[float], qs: Sequence[float]) -> list[float]:
    """The `qs`-th percentiles (0..100, linear interpolation) of `values`; NaN for each when there are no values."""
    if len(values) == 0:
        return [math.nan] * len(qs)
    return [float(q) for q in np.percentile(np.asarray(values, dtype=np.float64), list(qs))]


def by_position(position: Array, value: Array) -> dict[str, float]:
    """Mean of `value` in bins of completion position, keyed `first-last` (inclusive); empty bins are left out."""
    means: dict[str, float] = {}
    for low, high in zip(BIN_EDGES, BIN_EDGES[1:], strict=False):
        inside = (position >= low) & (position < high)
        if inside.any():
            means[f"{low}-{high - 1}"] = float(value[inside].mean())
    return means


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased variance (0 for a single value)."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
