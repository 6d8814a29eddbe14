"""What the figures say, in plain sentences. Every clause is computed; none presumes who wins."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.reports.comparison import first_level_with, gap, share_eval, unpaired
from headstart.reports.run import Point, Record, Run, labels

NOTHING = "-"


def percent(share: float) -> str:
    """`96.4%`."""
    return f"{share:.1%}"


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
    """Does the state of the student's prefixes explain how far the teacher falls? Empty where the task cannot tell."""
    points = decay["points"]
    split = [p for p in points if p["after_clean"]["n"] and p["after_wrong"]["n"]]
    if not split:
        return ""
    late = split[-1]
    wrong, clean = late["after_wrong"], late["after_clean"]
    spoiled = share({"successes": wrong["n"], "n": wrong["n"] + clean["n"]})
    return (
        f"Of the student's prefixes of {late['prefix_tokens']} tokens {spoiled} hold a mistake; the teacher is right "
        f"after {share(clean)} of the clean ones and after {share(wrong)} of the wrong ones. "
        f"{_conclusion(points[0], late)}"
    )


def _conclusion(start: Record, late: Record) -> str:
    keys = ("after_student", "after_clean", "after_wrong", "after_own")
    alone = share_eval(start["after_student"])
    mixed, clean, wrong, own = (share_eval(late[key]) for key in keys)
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
