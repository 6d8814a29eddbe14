"""What the figures of a quickstart say, in plain sentences. Every clause is computed; none presumes who wins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headstart.report.comparison import (
    Gap,
    Record,
    at_equal_steps,
    find_arm,
    first_level_with,
    gap,
    share_eval,
)


def percent(share: float) -> str:
    """`96.4%`."""
    return f"{share:.1%}"


def accuracy(evaluation: Record) -> str:
    """`96.4%`, the accuracy without its interval."""
    return percent(evaluation["accuracy"])


def seconds(value: float) -> str:
    """`8.7 s`; two digits after the point under a second."""
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def outcome(results: Record) -> str:
    """The result in one sentence: what early stopping reached, when full rollouts came level, how both ended.

    Differences are called noise when their 95% interval holds zero; level means at most one standard error below.
    """
    early, full = find_arm(results, "esr"), find_arm(results, "full")
    if early is None or full is None:
        missing = "early stopping" if early is None else "full rollouts"
        return f"There is nothing to compare: {missing} has no measured point."
    end, full_end, start = early["points"][-1], full["points"][-1], results["student"]
    change = f"from {accuracy(start)} to {accuracy(end['eval'])} in {seconds(end['seconds'])} of training"
    gained = gap(end["eval"], start)
    if gained.is_noise:
        return (
            f"Early stopping did not move the student beyond noise ({change}); full rollouts {_ending(end, full_end)}."
        )
    if gained.is_lower:
        return f"Early stopping made the student worse, {change}; full rollouts {_ending(end, full_end)}."
    level = first_level_with(full["points"], end["eval"])
    if level is None:
        race = f"did not get there and {_ending(end, full_end)}"
    elif level is full_end and gap(full_end["eval"], end["eval"]).is_noise:
        race = f"came level at their last evaluation, {_race(end, level)}"
    else:
        race = f"came level {_race(end, level)} and {_ending(end, full_end)}"
    return f"Early stopping took the student {change}; full rollouts {race}."


def _race(end: Record, level: Record) -> str:
    """When full rollouts came level with early stopping's end, and how many times as long that took."""
    when = f"after {seconds(level['seconds'])} ({accuracy(level['eval'])}"
    if end["seconds"] <= 0 or level["seconds"] <= 0:
        return f"{when})"
    return f"{when}, {level['seconds'] / end['seconds']:.1f} times as long)"


def _ending(end: Record, full_end: Record) -> str:
    difference = gap(full_end["eval"], end["eval"])
    where = f"ended at {accuracy(full_end['eval'])} after {seconds(full_end['seconds'])}"
    if difference.is_noise:
        return f"{where}, within noise of early stopping"
    return f"{where}, {difference} {_side(difference)}"


def _side(difference: Gap) -> str:
    return "higher" if difference.points > 0 else "lower"


def weaknesses(results: Record) -> list[str]:
    """What the figures say about where early stopping falls short of the teacher and of full rollouts."""
    early, full = find_arm(results, "esr"), find_arm(results, "full")
    if early is None or full is None:
        return []
    end, full_end = early["points"][-1], full["points"][-1]
    parts = (
        _against_end(end, full_end),
        _against_steps(end, full["points"]),
        _progress(results["teacher"], early["points"]),
        _peak(early["points"]),
        _details(early, end, full_end),
    )
    return [part for part in parts if part]


def _against_end(end: Record, full_end: Record) -> str:
    difference = gap(full_end["eval"], end["eval"])
    both = f"early stopping {accuracy(end['eval'])}, full rollouts {accuracy(full_end['eval'])}"
    if difference.is_higher:
        return f"Final accuracy: it loses. Full rollouts end {difference} higher ({both})."
    if difference.is_lower:
        return f"Final accuracy: it does not lose. Full rollouts end {difference} lower ({both})."
    return f"Final accuracy: no visible loss; the difference is within noise ({both})."


def _against_steps(end: Record, full_points: list[Record]) -> str:
    same = at_equal_steps(full_points, end["step"])
    if same is None:
        return ""
    difference = gap(same["eval"], end["eval"])
    verdict = (
        "the two are within noise of each other"
        if difference.is_noise
        else f"full rollouts are {difference} {_side(difference)}"
    )
    which = f"At equal steps ({end['step']})"
    if same["step"] != end["step"]:
        which = f"At {end['step']} steps against {same['step']}, the nearest that was measured"
    ratio = ""
    if end["generated_tokens"] > 0:
        ratio = f", for {same['generated_tokens'] / end['generated_tokens']:.1f} times the generated tokens"
    return f"{which}, {verdict} ({accuracy(same['eval'])} for full rollouts{ratio})."


def _progress(teacher: Record, points: list[Record]) -> str:
    """Is it still rising, and how far from the teacher does it stop?"""
    end = points[-1]
    short = gap(teacher, end["eval"])
    if not short.is_higher:
        return f"Against the teacher ({accuracy(teacher)}): its end is not measurably lower."
    sentence = f"Against the teacher ({accuracy(teacher)}): it ends {short} lower"
    half = at_equal_steps(points, end["step"] // 2)
    if half is None or half is end:
        return f"{sentence}."
    late = gap(end["eval"], half["eval"])
    values = f"{accuracy(half['eval'])} to {accuracy(end['eval'])}"
    steps = f"from step {half['step']} to {end['step']} it went from {values}"
    if late.is_higher:
        return f"{sentence}, and was still rising: {steps}."
    if late.is_lower:
        return f"{sentence}, and was falling: {steps}."
    return f"{sentence}, on a plateau: {steps}, a change within noise, so more steps of the same kind promise little."


def _peak(points: list[Record]) -> str:
    best, end = max(points, key=lambda p: p["eval"]["accuracy"]), points[-1]
    if not gap(best["eval"], end["eval"]).is_higher:
        return ""
    peak = f"{accuracy(best['eval'])} at step {best['step']}"
    return f"It did not hold its best: {peak}, {accuracy(end['eval'])} at the end."


def _details(early: Record, end: Record, full_end: Record) -> str:
    """The task's two readings side by side: is the plan right, and is the plan that was written carried out?"""
    ours, theirs = end["eval"]["details"], full_end["eval"]["details"]
    names = {"plan_right": "the plan is right in", "faithful": "the written plan is carried out without a slip in"}
    read = [
        f"{words} {percent(ours[key])} of the answers (full rollouts: {percent(theirs[key])})"
        for key, words in names.items()
        if key in ours and key in theirs
    ]
    if not read:
        return ""
    horizon = early["settings"].get("horizon")
    window = (
        f"It only ever trains the first {horizon} tokens. At its end " if isinstance(horizon, int) else "At its end "
    )
    return f"{window}{', and '.join(read)}."


def decay_reading(results: Record) -> list[str]:
    """The decay curve in words: how far it falls, what its control does, and whether the split explains the fall."""
    points = results["decay"]["points"]
    starts = [p for p in points if p["prefix_tokens"] == 0 and p["after_student"]["n"]]
    split = [p for p in points if p["after_clean"]["n"] and p["after_wrong"]["n"]]
    if not starts or not split:
        return ["Too little was measured to say how the teacher's accuracy falls with the student's prefix."]
    start, late = starts[0], split[-1]
    length, wrong_n = late["prefix_tokens"], late["after_wrong"]["n"]
    total = wrong_n + late["after_clean"]["n"]
    means = {key: _mean(late[key]) for key in ("after_student", "after_own", "after_clean", "after_wrong")}
    first = (
        f"Alone, the teacher is right on {percent(_mean(start['after_student']))} of {start['after_student']['n']} "
        f"problems. When it continues the student's first {length} tokens, it is right on "
        f"{percent(means['after_student'])}; the student alone is on {percent(_mean(results['decay']['student']))}. "
        f"The control, continuing {length} tokens of its own, gives {percent(means['after_own'])}."
    )
    second = (
        f"Of these student prefixes {wrong_n} of {total} ({percent(wrong_n / total)}) hold a mistake already. "
        f"The teacher is right after {percent(means['after_clean'])} of the clean ones and after "
        f"{percent(means['after_wrong'])} of the wrong ones."
    )
    return [first, second, _decay_conclusion(start, late)]


def _decay_conclusion(start: Record, late: Record) -> str:
    alone, clean, wrong, own, mixed = (
        share_eval(share)
        for share in (
            start["after_student"],
            late["after_clean"],
            late["after_wrong"],
            late["after_own"],
            late["after_student"],
        )
    )
    if alone is None or clean is None or wrong is None or mixed is None:
        return ""
    if not gap(mixed, alone).is_lower:
        return "So there is no measurable decay here."
    if gap(clean, alone).is_lower or (own is not None and gap(own, alone).is_lower):
        return (
            "So spoiled prefixes do not explain the whole fall: after clean prefixes, or after its own, the teacher "
            "does measurably worse than alone."
        )
    if not gap(wrong, clean).is_lower:
        return (
            "So the split does not explain the fall: the teacher does about as well after wrong prefixes as after "
            "clean ones."
        )
    return (
        "So the curve is the share of spoiled prefixes (it follows the grey area): length alone does the teacher no "
        "measurable harm, and a mistake once written is rarely made good. Where the curve drops, the student decides."
    )


def _mean(share: Mapping[str, Any]) -> float:
    return share["successes"] / share["n"] if share["n"] else math.nan
