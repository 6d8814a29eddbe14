"""Which evaluations are compared, and what the numbers say in plain sentences. Every clause is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headstart.reports.run import Point, Record, Run, labels
from headstart.stats import CUT, MOSTLY, UNDEFINED, Z95, Estimate, cut_note, is_noise, paired_difference

NOTHING = "-"


def gap(a: Point, b: Point) -> Estimate | None:
    """Accuracy of `a` minus that of `b` in points, paired over the problems both graded; None for other tasks.

    Where the graded responses of one are missing, the two count as independent, which is rather too wide.
    """
    if a.evaluation.get("task") != b.evaluation.get("task"):
        return None
    ours, theirs = (point.graded().get("correct", {}) for point in (a, b))
    return paired(ours, theirs) if ours and theirs else unpaired(measured(a.evaluation), measured(b.evaluation))


def paired(a: dict[str, float], b: dict[str, float]) -> Estimate | None:
    """Mean difference in points over the problems that both hold; None when there are none."""
    shared = [problem for problem in a if problem in b]
    if not shared:
        return None
    mean, (low, high) = paired_difference([a[p] for p in shared], [b[p] for p in shared])
    return Estimate(100 * mean, 100 * low, 100 * high)


def unpaired(a: Estimate, b: Estimate) -> Estimate:
    """Difference of two shares in points, as if measured on independent problems.

    Square-and-add of the two score intervals (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10).
    """
    x, y = a.value or 0.0, b.value or 0.0
    down, up = math.hypot(x - a.low, b.high - y), math.hypot(a.high - x, y - b.low)
    return Estimate(100 * (x - y), 100 * (x - y - down), 100 * (x - y + up))


def measured(record: Record | None) -> Estimate:
    """The value and interval of any record that holds them: an evaluation, a count of yes/no outcomes, an estimate."""
    match record:
        case {"accuracy": value, "interval": [low, high]} | {"accuracy": value, "low": low, "high": high}:
            return Estimate(value, low, high)
        case {"successes": right, "n": n, "low": low, "high": high}:
            return Estimate(right / n if n else None, low, high)
        case {"value": value, "low": low, "high": high}:
            return Estimate(value, low, high)
    return UNDEFINED


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


def estimate(record: Record | None, form: str = ".1%") -> str:
    """The value of a record with its interval (see `measured`): `0.51 [0.40, 0.62]`, or `51.0% [40.1, 61.7]`."""
    return format(measured(record), form)


def cut_mark(share: float | None) -> str:
    """What stands behind an accuracy of which many responses were cut: ` (23% cut)`, ` (mostly cut: 61%)`."""
    if share is None or share <= CUT:
        return ""
    return f" ({share:.0%} cut)" if share < MOSTLY else f" (mostly cut: {share:.0%})"


def seconds(value: float) -> str:
    """`8.7 s`; two digits after the point under a second."""
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def share(value: Record | None) -> str:
    """A count of yes/no outcomes: `47 of 96 (49%)`."""
    if not value or not value["n"]:
        return NOTHING
    return f"{value['successes']} of {value['n']} ({value['successes'] / value['n']:.0%})"


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
    ends = {f"{of}, step {p.step}": p.evaluation for of, run in named for p in (run[0], run[-1])}
    notes = {where: cut_note(e.get("truncated"), e.get("settings", {}).get("max_tokens")) for where, e in ends.items()}
    cut = [f"{where}: {note}." for where, note in notes.items() if note]
    if not others:
        return [f"{change}.", *cut]
    return [f"{change}; {other} {_race(points[-1], theirs, moved)}." for other, theirs in others] + cut


def _change(name: str, points: Sequence[Point]) -> tuple[str, bool]:
    """What training did to the first run's student, and whether it rose beyond noise."""
    start, end = points[0], points[-1]
    name = name[0].upper() + name[1:]
    if start.step == end.step:
        return f"{name} was evaluated only once, at step {end.step}: {percent(end.accuracy)}", False
    change = f"from {percent(start.accuracy)} to {percent(end.accuracy)} in {seconds(end.seconds)} of training"
    gained = gap(end, start)
    if gained is None or is_noise(gained):
        return f"{name} did not move the student beyond noise ({change})", False
    if gained.high < 0:
        return f"{name} made the student worse, {change}", False
    return f"{name} took the student {change}", True


def _race(end: Point, theirs: Sequence[Point], moved: bool) -> str:
    """When another run came level with the first run's end, and how it ended."""
    last = theirs[-1]
    difference = gap(last, end)
    where = f"ended at {percent(last.accuracy)} after {seconds(last.seconds)}"
    if difference is None:
        return f"{where}, on other problems, so the two are not compared"
    ending = f"{where}, " + ("within noise of it" if is_noise(difference) else _beside(difference))
    if not moved:
        return ending
    level = first_level_with(theirs, end)
    if level is None:
        return f"did not get there and {ending}"
    when = f"after {seconds(level.seconds)} ({percent(level.accuracy)}"
    if end.seconds > 0 and level.seconds > 0:
        when += f", {level.seconds / end.seconds:.1f} times as long"
    if level is last and is_noise(difference):
        return f"came level at the last evaluation, {when})"
    return f"came level {when}) and {ending}"


def _beside(difference: Estimate) -> str:
    """`8.2 points (95% interval 2.9 to 13.4) lower`."""
    points, low, high = difference.value or 0.0, difference.low, difference.high
    if points < 0:
        return f"{-points:.1f} points (95% interval {-high:.1f} to {-low:.1f}) lower"
    return f"{points:.1f} points (95% interval {low:.1f} to {high:.1f}) higher"


def decay_cuts(decay: Record) -> list[str]:
    """What the accuracies are worth, for each model of whose own responses many were cut."""
    shares = ((who, decay.get(f"{who}_cut")) for who in ("student", "teacher"))
    tokens, setting = decay.get("max_tokens"), "diagnosis.max_tokens"
    return [f"{note}." for who, x in shares if (note := cut_note(x, tokens, setting, f"the {who}'s responses"))]


def decay_reading(decay: Record) -> str:
    """Whether the state of the student's prefixes explains the teacher's fall; where the task cannot tell that state,
    the first fall and its control."""
    points = decay["points"]
    late = next((p for p in reversed(points) if p["after_clean"]["n"] and p["after_wrong"]["n"]), None)
    if late is None:
        return _first_fall(points)
    wrong, clean = late["after_wrong"], late["after_clean"]
    spoiled = share({"successes": wrong["n"], "n": wrong["n"] + clean["n"]})
    return (
        f"Of the student's prefixes of {late['prefix_tokens']} tokens {spoiled} hold a mistake; the teacher is right "
        f"after {share(clean)} of the clean ones and after {share(wrong)} of the wrong ones. "
        f"{_conclusion(points[0], late)}"
    )


def _first_fall(points: Sequence[Record]) -> str:
    if not points or (alone := measured(points[0]["after_student"])).value is None:
        return ""
    first = next((p for p in points[1:] if unpaired(measured(p["after_student"]), alone).high < 0), None)
    if first is None:
        return "There is no measurable decay here."
    n, ended = first["prefix_tokens"], first["after_finished"]["n"] / first["after_student"]["n"]
    control = (
        "It does measurably worse after its own, too, so the prefix is not all that harms it."
        if unpaired(measured(first["after_own"]), alone).high < 0
        else "It continues such text more than it corrects it."
    )
    return (
        f"After {n} of the student's tokens the teacher is right on {share(first['after_student'])}, alone on "
        f"{share(points[0]['after_student'])}, after {n} of its own on {share(first['after_own'])}; {ended:.0%} of the "
        f"student's responses had ended by then. {control}"
    )


def _conclusion(start: Record, late: Record) -> str:
    alone = measured(start["after_student"])
    mixed, clean, wrong, own = (
        measured(late[key]) for key in ("after_student", "after_clean", "after_wrong", "after_own")
    )
    if None in (alone.value, mixed.value, clean.value, wrong.value):
        return ""
    if unpaired(mixed, alone).high >= 0:
        return "There is no measurable decay here."
    if unpaired(clean, alone).high < 0 or (own.value is not None and unpaired(own, alone).high < 0):
        return (
            "Spoiled prefixes do not explain the whole fall: after clean prefixes, or after its own, the teacher does "
            "measurably worse than alone."
        )
    if unpaired(wrong, clean).high >= 0:
        return (
            "The split does not explain the fall: the teacher does about as well after wrong prefixes as after clean."
        )
    return (
        "So the curve is the share of spoiled prefixes: length alone does the teacher no measurable harm, and a "
        "mistake once written is rarely made good."
    )
