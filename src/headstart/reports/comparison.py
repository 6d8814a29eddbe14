"""Which evaluations are compared, and whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.reports.run import Point, Record
from headstart.stats import Z95, paired_difference


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of two accuracies, with its 95% interval, in percentage points. `problems` says over how many
    problems it is paired; None when it is not."""

    points: float
    low: float
    high: float
    problems: int | None = None

    @property
    def is_noise(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def is_lower(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        """Size without sign, interval turned the same way: `8.2 points (95% interval 2.9 to 13.4)`."""
        low, high = (self.low, self.high) if self.points >= 0 else (-self.high, -self.low)
        return f"{abs(self.points):.1f} points (95% interval {low:.1f} to {high:.1f})"

    @property
    def signed(self) -> str:
        """`+8.2 [+2.9, +13.4]`."""
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gap(a: Point, b: Point) -> Gap | None:
    """Accuracy of `a` minus that of `b`, paired over the problems both graded; None when they cannot be compared.

    Where the graded responses of one are missing, the two count as independent, which is rather too wide.
    """
    if a.evaluation.get("task") != b.evaluation.get("task"):
        return None
    ours, theirs = (point.graded().get("correct", {}) for point in (a, b))
    return paired(ours, theirs) if ours and theirs else unpaired(a.evaluation, b.evaluation)


def paired(a: dict[str, float], b: dict[str, float]) -> Gap | None:
    """Mean difference over the problems that both hold; None when there are none."""
    shared = [problem for problem in a if problem in b]
    if not shared:
        return None
    mean, (low, high) = paired_difference([a[p] for p in shared], [b[p] for p in shared])
    return Gap(100 * mean, 100 * low, 100 * high, len(shared))


def unpaired(a: Record, b: Record) -> Gap:
    """Difference of two `accuracy`s with their `interval`s, as if measured on independent problems.

    Square-and-add of the two score intervals (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10).
    """
    (a_low, a_high), (b_low, b_high) = a["interval"], b["interval"]
    difference = a["accuracy"] - b["accuracy"]
    down = math.hypot(a["accuracy"] - a_low, b_high - b["accuracy"])
    up = math.hypot(a_high - a["accuracy"], b["accuracy"] - b_low)
    return Gap(100 * difference, 100 * (difference - down), 100 * (difference + up))


def share_eval(share: Record) -> Record | None:
    """A share of yes/no outcomes as an evaluation for `unpaired`; None when nothing was counted."""
    if not share["n"]:
        return None
    return {"accuracy": share["successes"] / share["n"], "interval": [share["low"], share["high"]]}


def at_equal_steps(points: Sequence[Point], step: int) -> Point | None:
    """The point at `step`, else the last one before it; None when all come later."""
    return max((p for p in points if p.step <= step), key=lambda p: p.step, default=None)


def last_within(points: Sequence[Point], seconds: float) -> Point | None:
    """The last trained point that took at most `seconds` of training; None when all took longer."""
    return max((p for p in points if p.step > 0 and p.seconds <= seconds), key=lambda p: p.step, default=None)


def first_past(points: Sequence[Point], seconds: float) -> Point | None:
    """The first point that took more than `seconds` of training; None when there is none."""
    return min((p for p in points if p.seconds > seconds), key=lambda p: p.step, default=None)


def first_level_with(points: Sequence[Point], target: Point) -> Point | None:
    """The first point at most one standard error below `target`; None when there is none.

    Not the first that is "not measurably lower": with 96 problems that lets 70% pass for 79%. Not the first that is
    as high: a tie would then be decided by a single answer.
    """
    low, high = target.evaluation["interval"]
    bar = target.accuracy - (high - low) / 2 / Z95
    return next((p for p in points if p.accuracy >= bar), None)
