"""Statistics of every table: intervals of shares, paired differences, one bootstrap over problems, corrected tests.

What two rollouts of one problem share never counts as two pieces of evidence: everything is averaged within a problem
first and resampled over problems (and seeds), and arms that met the same problems are compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headstart.streams import uniforms

Z95 = 1.96
"""Standard normal quantile of a two-sided 95% interval."""
RESAMPLES = 4000
"""Bootstrap resamples of every interval that is resampled: its ends move by about 3% of its width between seeds."""
BIN_EDGES = (0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000)
"""Edges (completion tokens) of `divergence_by_position`."""

CUT, MOSTLY = 0.1, 0.5
"""Shares of responses that were cut: beyond the first they can move an accuracy by more than its interval is wide, from
the second on it is rather that of cut responses than that of the model."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval; `value` is None where it is not defined (the interval then says nothing)."""

    value: float | None
    low: float
    high: float

    def __format__(self, form: str) -> str:
        """`0.51 [0.40, 0.62]`, with a percentage `51.0% [40.1, 61.7]`; a dash where it is not defined."""
        if self.value is None:
            return "-"
        low, high = (f"{bound:{form}}".removesuffix("%") for bound in (self.low, self.high))
        return f"{self.value:{form}} [{low}, {high}]"


UNDEFINED = Estimate(None, 0.0, 1.0)


def cut_note(
    share: float | None, tokens: int | None, setting: str = "evaluation.max_tokens", whose: str = "the responses"
) -> str:
    """What an accuracy is worth when `share` of the responses were cut at `tokens`, and the length to give; empty where
    the share is small or unknown."""
    if share is None or share <= CUT:
        return ""
    cut = f"{share:.0%} of {whose} were cut" + (f" at {tokens:,} tokens" if tokens else "")
    remedy = f"set {setting}={longer(share, tokens)}" if tokens else f"at least double {setting}"
    if share < MOSTLY:
        return f"{cut} and hardly count as right, so the accuracy is a lower bound; {remedy}"
    return f"{cut}: the accuracy is that of mostly cut responses, not that of the model; {remedy}"


def longer(share: float, tokens: int) -> int:
    """The length, 2, 4 or 8 times `tokens`, at which few responses (`CUT`) would still be cut if they ended at the rate
    at which they did so far."""
    times = math.log(CUT) / math.log(share) if 0 < share < 1 else math.inf
    return next((k * tokens for k in (2, 4) if times <= k), 8 * tokens)


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


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that only_a and only_b are draws of a fair coin (McNemar 1947, binomial form)."""
    n, few = only_a + only_b, min(only_a, only_b)
    tail: float = sum(math.comb(n, i) for i in range(few + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting those below 0.05 keeps the chance of any false rejection among all of them below 5%.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def resamples(problems: int, seed: int) -> Array:
    """How often each problem counts, float64 `[1 + RESAMPLES, problems]`: once in row 0 (the data as they are), as
    often as it is drawn with replacement in the others. Readings that share these counts are paired."""
    return np.vstack([np.ones(problems), _counts(problems, problems, (seed, "resample", 0)).astype(np.float64)])


def estimate(values_R: Array) -> Estimate | None:
    """The value of row 0 with the 95% interval of the other rows; None when it is not defined for the data."""
    if not np.isfinite(values_R[0]):
        return None
    drawn = values_R[1:][np.isfinite(values_R[1:])]
    low, high = interval(drawn) if len(drawn) else (values_R[0], values_R[0])
    return Estimate(float(values_R[0]), float(min(low, values_R[0])), float(max(high, values_R[0])))


def ratio(counts_RP: Array, numerator_P: Array, denominator_P: Array) -> Array:
    """Sum over problems of the numerator per sum of the denominator, `[1 + RESAMPLES]`; NaN where there is nothing."""
    top, bottom = counts_RP @ numerator_P, counts_RP @ denominator_P
    quotient: Array = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
    return quotient


def share(counts_RP: Array, numerator_P: Array, denominator_P: Array) -> Estimate | None:
    """`ratio` for shares in 0..1. Where every resample agrees there is no width to show, and the 95% rule of three
    (3 / problems that count) stands in: a single problem with 5 of 6 says little of the next one."""
    result = estimate(ratio(counts_RP, numerator_P, denominator_P))
    if result is None or result.value is None or result.high - result.low > 1e-9:
        return result
    room = 3.0 / int((denominator_P > 0).sum())
    return Estimate(result.value, max(result.value - room, 0.0), min(result.value + room, 1.0))


def by_problem(problem_M: Array, value_M: Array, problems: int) -> tuple[Array, Array]:
    """Sum of the values and their number for each problem, float64 `[problems]` each."""
    sums = np.bincount(problem_M, weights=value_M.astype(np.float64), minlength=problems)
    return sums, np.bincount(problem_M, minlength=problems).astype(np.float64)


def is_noise(difference: Estimate | None) -> bool:
    """A difference that is unknown, or whose interval holds zero."""
    return difference is None or difference.low <= 0.0 <= difference.high


def crossed_means(values_SP: Array, seed: int = 0) -> Array:
    """Mean of `values_SP` (seeds x problems; every seed met the same problems) in RESAMPLES resamples, float64 `[R]`.

    Seeds and problems are drawn with replacement, each for itself (the pigeonhole bootstrap: A. B. Owen, Annals of
    Applied Statistics 1, 2007), so that neither many problems nor many seeds pass for the other. Of S seeds S - 1 are
    drawn, which makes the spread between them right on average (P. J. McCarthy and C. B. Snowden, 1985: with S draws
    three seeds would show two thirds of it). A single seed is kept as it is: the spread is then over problems alone.
    The draws depend on the shape alone, so that equal shapes are resampled alike.
    """
    S, P = values_SP.shape
    draws = max(S - 1, 1)
    seeds_RS = _counts(S, draws, (seed, "resample seeds", 0)) / draws
    problems_RP = _counts(P, P, (seed, "resample problems", 0)) / P
    means: Array = np.einsum("rs,sp,rp->r", seeds_RS, values_SP.astype(np.float64), problems_RP, optimize=True)
    return means


def interval(values_R: Array) -> tuple[float, float]:
    """The 95% interval of resampled values."""
    low, high = np.percentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def p_value(means_R: Array) -> float:
    """Two-sided p-value that the mean is zero: twice the share of resamples on its far side, never 0, at most 1.

    Resamples of exactly zero count for both sides, so equal arms have p = 1. What is zero but for the last bits is
    zero: they depend on the order in which a processor adds.
    """
    means_R = np.round(means_R, 12)
    far = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2.0 * (far + 1) / (len(means_R) + 1))


def _counts(n: int, draws: int, key: tuple[int, str, int]) -> Array:
    """How often each of `n` is drawn in `draws` draws with replacement: int64 `[RESAMPLES, n]`."""
    uniform_RD = uniforms(key, [(r, 0) for r in range(RESAMPLES)], 0, draws)
    drawn = (uniform_RD * n).astype(np.int64) + n * np.arange(RESAMPLES)[:, None]
    counted: Array = np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)
    return counted


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
