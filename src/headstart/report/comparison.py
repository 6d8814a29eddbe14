"""Which measured points are compared, and whether a difference is more than noise. Reads plain JSON records, no torch.

An *evaluation* is a mapping with `accuracy` and `interval` (shares in 0..1); a *point* is a mapping with `step`,
`seconds`, `generated_tokens` (training cost so far) and `eval`; an *arm* is a mapping with `key`, `name`, `settings`
and `points` in step order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of two accuracies, with its 95% interval, in percentage points."""

    points: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def is_higher(self) -> bool:
        return self.low > 0

    @property
    def is_lower(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        """Size without sign, interval turned the same way: `8.2 points (95% interval 2.9 to 13.4)`."""
        low, high = (self.low, self.high) if self.points >= 0 else (-self.high, -self.low)
        return f"{abs(self.points):.1f} points (95% interval {low:.1f} to {high:.1f})"


def gap(a: Record, b: Record) -> Gap:
    """Accuracy of evaluation `a` minus that of `b`, as if measured on independent problems.

    Square-and-add of the two score intervals (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10). Arms of one
    run share problems and draws, so this interval is rather too wide than too narrow.
    """
    (a_low, a_high), (b_low, b_high) = a["interval"], b["interval"]
    difference = a["accuracy"] - b["accuracy"]
    down = math.hypot(a["accuracy"] - a_low, b_high - b["accuracy"])
    up = math.hypot(a_high - a["accuracy"], b["accuracy"] - b_low)
    return Gap(100 * difference, 100 * (difference - down), 100 * (difference + up))


def share_eval(share: Record) -> dict[str, Any] | None:
    """A share of yes/no outcomes as an evaluation, so that `gap` can compare it; None when nothing was counted."""
    if not share["n"]:
        return None
    return {"accuracy": share["successes"] / share["n"], "interval": [share["low"], share["high"]]}


def find_arm(results: Record, key: str) -> Record | None:
    """The arm called `key`; None when it is absent or holds no point."""
    return next((arm for arm in results["arms"] if arm["key"] == key and arm["points"]), None)


def at_equal_steps(points: Sequence[Record], step: int) -> Record | None:
    """The point at `step`, else the last one before it; None when all come later."""
    return max((p for p in points if p["step"] <= step), key=lambda p: p["step"], default=None)


def last_within(points: Sequence[Record], seconds: float) -> Record | None:
    """The last trained point that took at most `seconds` of training; None when all took longer."""
    return max((p for p in points if p["step"] > 0 and p["seconds"] <= seconds), key=lambda p: p["step"], default=None)


def first_past(points: Sequence[Record], seconds: float) -> Record | None:
    """The first point that took more than `seconds` of training; None when there is none."""
    return min((p for p in points if p["seconds"] > seconds), key=lambda p: p["step"], default=None)


def standard_error(evaluation: Record) -> float:
    """Standard error of the accuracy, as a share: the half width of the 95% interval over 1.96."""
    low, high = evaluation["interval"]
    return float(high - low) / 2 / 1.96


def first_level_with(points: Sequence[Record], target: Record) -> Record | None:
    """The first point at most one standard error below evaluation `target`; None when there is none.

    Not the first that is "not measurably lower": with 96 problems that lets 70% pass for 79%. Not the first that is
    as high: a tie would then be decided by a single answer.
    """
    bar = target["accuracy"] - standard_error(target)
    return next((p for p in points if p["eval"]["accuracy"] >= bar), None)
