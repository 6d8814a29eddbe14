"""Which evaluations are compared, and what the numbers say in plain sentences. Every clause is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.reports.run import Point, Record, Run, labels
from headstart.stats import Z95, paired_difference

NOTHING = "-"


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


def percent(share: float) -> str:
    """`96.4%`."""
    return f"{share:.1%}"


def accuracy(record: Record) -> str:
    """The `accuracy` of a record with its `interval`: `96.4% [91.5, 99.0]`."""
    low, high = record["interval"]
    return f"{percent(record['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"


def seconds(value: float) -> str:
    """`8.7 s`; two digits after the point under a second."""
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def share(value: Record | None) -> str:
    """A count of yes/no outcomes: `47 of 96 (49%)`."""
    if not value or not value["n"]:
        return NOTHING
    return f"{value['successes']} of {value['n']} ({value['successes'] / value['n']:.0%})"


def estimate(value: Record | None, form: str = ".1%") -> str:
    """A value with its interval: `0.51 [0.40, 0.62]`, or `51.0% [40.1, 61.7]`."""
    if not value or value.get("value") is None:
        return NOTHING
    low, high = (f"{value[key]:{form}}".removesuffix("%") for key in ("low", "high"))
    return f"{value['value']:{form}} [{low}, {high}]"


def outcome(runs: Sequence[Run]) -> list[str]:
    """The result in a sentence for each run beside the first; one about itself when there is no other.

    What the first run reached, when the other came level, how both ended. Differences are called noise when their 95%
    interval holds zero; level means at most one standard error below. Empty without an evaluation.
    """
    named = [(name, run.points) for name, run in zip(labels(runs), runs, strict=True) if run.points]
    if not named:
        return []
    (name, points), *others = named
    change, moved = _change(name, points)
    if not others:
        return [f"{change}."]
    return [f"{change}; {other} {_race(points[-1], theirs, moved)}." for other, theirs in others]


def _change(name: str, points: Sequence[Point]) -> tuple[str, bool]:
    """What training did to the first run's student, and whether it rose beyond noise."""
    start, end = points[0], points[-1]
    name = name[0].upper() + name[1:]
    if start.step == end.step:
        return f"{name} was evaluated only once, at step {end.step}: {percent(end.accuracy)}", False
    change = f"from {percent(start.accuracy)} to {percent(end.accuracy)} in {seconds(end.seconds)} of training"
    gained = gap(end, start)
    if gained is None or gained.is_noise:
        return f"{name} did not move the student beyond noise ({change})", False
    if gained.is_lower:
        return f"{name} made the student worse, {change}", False
    return f"{name} took the student {change}", True


def _race(end: Point, theirs: Sequence[Point], moved: bool) -> str:
    """When another run came level with the first run's end, and how it ended."""
    last = theirs[-1]
    difference = gap(last, end)
    where = f"ended at {percent(last.accuracy)} after {seconds(last.seconds)}"
    if difference is None:
        return f"{where}, on other problems, so the two are not compared"
    side = "higher" if difference.points > 0 else "lower"
    ending = f"{where}, " + ("within noise of it" if difference.is_noise else f"{difference} {side}")
    if not moved:
        return ending
    level = first_level_with(theirs, end)
    if level is None:
        return f"did not get there and {ending}"
    when = f"after {seconds(level.seconds)} ({percent(level.accuracy)}"
    if end.seconds > 0 and level.seconds > 0:
        when += f", {level.seconds / end.seconds:.1f} times as long"
    if level is last and difference.is_noise:
        return f"came level at the last evaluation, {when})"
    return f"came level {when}) and {ending}"


def decay_reading(decay: Record) -> str:
    """Whether the state of the student's prefixes explains the teacher's fall; empty where the task cannot say."""
    points = decay["points"]
    late = next((p for p in reversed(points) if p["after_clean"]["n"] and p["after_wrong"]["n"]), None)
    if late is None:
        return ""
    wrong, clean = late["after_wrong"], late["after_clean"]
    spoiled = share({"successes": wrong["n"], "n": wrong["n"] + clean["n"]})
    return (
        f"Of the student's prefixes of {late['prefix_tokens']} tokens {spoiled} hold a mistake; the teacher is right "
        f"after {share(clean)} of the clean ones and after {share(wrong)} of the wrong ones. "
        f"{_conclusion(points[0], late)}"
    )


def _conclusion(start: Record, late: Record) -> str:
    alone = share_eval(start["after_student"])
    mixed, clean, wrong, own = (
        share_eval(late[key]) for key in ("after_student", "after_clean", "after_wrong", "after_own")
    )
    if alone is None or mixed is None or clean is None or wrong is None:
        return ""
    if not unpaired(mixed, alone).is_lower:
        return "There is no measurable decay here."
    if unpaired(clean, alone).is_lower or (own is not None and unpaired(own, alone).is_lower):
        return (
            "Spoiled prefixes do not explain the whole fall: after clean prefixes, or after its own, the teacher does "
            "measurably worse than alone."
        )
    if not unpaired(wrong, clean).is_lower:
        return (
            "The split does not explain the fall: the teacher does about as well after wrong prefixes as after clean."
        )
    return (
        "So the curve is the share of spoiled prefixes: length alone does the teacher no measurable harm, and a "
        "mistake once written is rarely made good."
    )
