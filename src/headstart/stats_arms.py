"""Arms compared over seeds and problems at once: resampling both, and many tests without luck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headstart.streams import uniforms

Array = npt.NDArray[Any]
RESAMPLES = 4000


def crossed_means(values_SP: Array, seed: int = 0) -> Array:
    """Mean of `values_SP` (seeds x problems; every seed met the same problems) in RESAMPLES resamples, float64 `[R]`.

    Seeds and problems are drawn with replacement, each for itself (the pigeonhole bootstrap: A. B. Owen, Annals of
    Applied Statistics 1, 2007), so that neither many problems nor many seeds pass for the other. Of S seeds S - 1 are
    drawn, which makes the spread between them right on average (P. J. McCarthy and C. B. Snowden, 1985: with S draws
    three seeds would show two thirds of it). A single seed is kept as it is: the spread is then over problems alone.
    The draws depend on the shape alone, so that equal shapes are resampled alike.
    """
    S, P = values_SP.shape
    seeds_RS = _counts(S, max(S - 1, 1), seed, "seeds")
    problems_RP = _counts(P, P, seed, "problems")
    found: Array = np.einsum("rs,sp,rp->r", seeds_RS, values_SP.astype(np.float64), problems_RP, optimize=True)
    return found


def interval(means_R: Array) -> tuple[float, float]:
    """The 95% interval of a resampled mean."""
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def p_value(means_R: Array) -> float:
    """Two-sided p-value that the mean is zero: twice the share of resamples on its far side, never 0, at most 1.

    Resamples of exactly zero count for both sides, so equal arms have p = 1. What is zero but for the last bits is
    zero: they depend on the order in which a processor adds.
    """
    means_R = np.round(means_R, 12)
    far = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2.0 * (far + 1) / (len(means_R) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting those below 0.05 keeps the chance of any false rejection among all of them below 5%.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _counts(n: int, draws: int, seed: int, purpose: str) -> Array:
    """How often each of `n` is drawn in `draws` draws, as a share of them: float64 `[R, n]`."""
    uniform_RD = uniforms((seed, f"resample {purpose}", 0), [(r, 0) for r in range(RESAMPLES)], 0, draws)
    places = (uniform_RD * n).astype(np.int64) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / draws
