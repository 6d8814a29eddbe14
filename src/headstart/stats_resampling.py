"""Intervals by resampling problems: what two rollouts of one problem share never counts as two pieces of evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from headstart.diagnosis.damage import Estimate
from headstart.streams import uniforms

Array = npt.NDArray[Any]
RESAMPLES = 1000


def resamples(problems: int, seed: int) -> Array:
    """How often each problem counts, float64 `[1 + RESAMPLES, problems]`: once in row 0 (the data as they are), as
    often as it is drawn with replacement in the others. Readings that share these counts are paired."""
    draws = uniforms((seed, "resample", 0), [(r, 0) for r in range(RESAMPLES)], 0, problems)
    places = (draws * problems).astype(np.int64) + problems * np.arange(RESAMPLES)[:, None]
    counted = np.bincount(places.ravel(), minlength=RESAMPLES * problems).reshape(RESAMPLES, problems)
    return np.vstack([np.ones(problems), counted.astype(np.float64)])


def estimate(values_R: Array) -> Estimate | None:
    """The value of row 0 with the 95% interval of the other rows; None when it is not defined for the data."""
    if not np.isfinite(values_R[0]):
        return None
    drawn = values_R[1:][np.isfinite(values_R[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (values_R[0], values_R[0])
    return Estimate(float(values_R[0]), float(min(low, values_R[0])), float(max(high, values_R[0])))


def ratio(counts_RP: Array, numerator_P: Array, denominator_P: Array) -> Array:
    """Sum over problems of the numerator per sum of the denominator, `[1 + RESAMPLES]`; NaN where there is nothing."""
    top, bottom = counts_RP @ numerator_P, counts_RP @ denominator_P
    found: Array = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
    return found


def share(counts_RP: Array, numerator_P: Array, denominator_P: Array) -> Estimate | None:
    """`ratio` for shares in 0..1. Where every resample agrees there is no width to show, and the 95% rule of three
    (3 / problems that count) stands in: a single problem with 5 of 6 says little of the next one."""
    found = estimate(ratio(counts_RP, numerator_P, denominator_P))
    if found is None or found.value is None or found.high - found.low > 1e-9:
        return found
    room = 3.0 / int((denominator_P > 0).sum())
    return Estimate(found.value, max(found.value - room, 0.0), min(found.value + room, 1.0))


def by_problem(problem_M: Array, value_M: Array, problems: int) -> tuple[Array, Array]:
    """Sum of the values and their number for each problem, float64 `[problems]` each."""
    sums = np.bincount(problem_M, weights=value_M.astype(np.float64), minlength=problems)
    return sums, np.bincount(problem_M, minlength=problems).astype(np.float64)


def is_noise(difference: Estimate | None) -> bool:
    """A difference that is unknown, or whose interval holds zero."""
    return difference is None or difference.low <= 0.0 <= difference.high
