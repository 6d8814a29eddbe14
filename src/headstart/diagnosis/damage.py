"""Differences between arms that were measured on the same problems: the damage share, and the plateau a gift predicts.

Both are resampled or averaged over problems, never over single continuations: the outcomes of one problem depend on
each other, and pairing them is what makes 64 problems enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headstart.stats import UNDEFINED, Estimate, estimate, mean_interval, paired_difference, ratio, resamples

MATERIAL = 0.02
"""Accuracy below which a shortfall is not worth a warning: training seeds differ by more."""


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
    teacher_P, after_P, student_P = (np.array(outcomes, dtype=np.float64) for outcomes in (teacher, after, student))
    result = estimate(ratio(resamples(len(teacher_P), seed), teacher_P - after_P, teacher_P - student_P))
    assert result is not None, "the lead is positive"
    assert result.value is not None
    if result.high - result.low < 1e-9:
        room = 3 / len(teacher_P) / lead
        return Estimate(result.value, result.value - room, result.value + room)
    return result


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
