"""Differences between arms that were measured on the same problems: the damage share, and the plateau a gift predicts.

Both are resampled or averaged over problems, never over single continuations: the outcomes of one problem depend on
each other, and pairing them is what makes 64 problems enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headstart.stats import mean_interval, paired_difference
from headstart.streams import uniforms

RESAMPLES = 2000
MATERIAL = 0.02
"""Accuracy below which a shortfall is not worth a warning: training seeds differ by more."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval; `value` is None where it is not defined (the interval then says nothing)."""

    value: float | None
    low: float
    high: float


UNDEFINED = Estimate(None, 0.0, 1.0)


def damage_share(teacher: Sequence[float], after: Sequence[float], student: Sequence[float], seed: int = 0) -> Estimate:
    """D(N) = (R(0) - R(N)) / (R(0) - A_S): the share of the teacher's lead that the student's first N tokens cost.

    `teacher`, `after` and `student` hold one outcome a problem (right 1, wrong 0): the teacher alone, the teacher after
    the student's first N tokens, the student alone. The interval is a bootstrap over problems (the same problems in
    all three), keyed by `seed`; where every resample agrees it has no width to show, and the rule of three (3 / n
    problems) stands in. Undefined unless the teacher's lead is positive beyond noise. By noise the value can lie
    outside 0..1. Raises ValueError when the lists differ in length.
    """
    lead, (lowest, _) = paired_difference(teacher, student)
    if lowest <= 0:
        return UNDEFINED
    outcomes_3n = np.array([teacher, after, student], dtype=np.float64)
    n = outcomes_3n.shape[1]
    draws_bn = (uniforms((seed, "damage", 0), [(b, 0) for b in range(RESAMPLES)], 0, n) * n).astype(np.int64)
    means_3b = outcomes_3n[:, draws_bn].mean(axis=2)
    leads_b = means_3b[0] - means_3b[2]
    shares_b = (means_3b[0] - means_3b[1])[leads_b > 0] / leads_b[leads_b > 0]
    value = float((outcomes_3n[0] - outcomes_3n[1]).mean() / lead)
    low, high = (float(q) for q in np.percentile(shares_b, [2.5, 97.5]))
    if high - low < 1e-9:
        low, high = value - 3 / n / lead, value + 3 / n / lead
    return Estimate(value, min(low, value), max(high, value))


@dataclass(frozen=True, slots=True)
class Plateau:
    """What the student reaches when only its first `tokens` tokens become the teacher's: G(N), sampled several times a
    problem. `shortfall` is the teacher's own accuracy less that, paired over problems."""

    tokens: int
    gift: Estimate
    shortfall: Estimate

    @property
    def falls_short(self) -> bool:
        """Beyond noise, and by more than runs with different seeds differ anyway."""
        return self.shortfall.low > 0 and (self.shortfall.value or 0.0) >= MATERIAL


def plateau(tokens: int, teacher: Sequence[float], gift: Sequence[float]) -> Plateau:
    """From the shares of right answers of each problem: the teacher alone, the student after `tokens` of the
    teacher's."""
    value, (low, high) = paired_difference(teacher, gift)
    return Plateau(
        tokens=tokens,
        gift=Estimate(sum(gift) / len(gift), *mean_interval(gift)),
        shortfall=Estimate(value, low, high),
    )
