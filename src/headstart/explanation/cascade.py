"""Cascading alignment: does training the first N tokens move the tokens after them? (arXiv 2605.27028)

The divergence on untrained positions falls in the aggregate. It can fall in two ways: the student changes what it says
there (within), or rollouts of a kind that was far from the teacher have become rare (mixture). Both are computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headstart.diagnosis.positions import EDGES, TokenReadings
from headstart.explanation.cast import Cast, Voice
from headstart.explanation.modes import modes
from headstart.stats import Array, Estimate, by_problem, estimate, is_noise, ratio, resamples, share

SETS = ("before", "after", "fixed")
"""The student before on its own rollouts, the student after on its own, the student after on those of the student
before (nothing but the weights differs from the first)."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """D_after - D_before in two parts that always add up, nats per token; see `decompose`."""

    change: Estimate | None
    mixture: Estimate | None
    within: Estimate | None


@dataclass(frozen=True, slots=True)
class Levels:
    """Mean divergence (nats per token) of each of SETS over some positions, with differences to `before`."""

    tokens: int
    before: Estimate | None
    after: Estimate | None
    fixed: Estimate | None
    change: Estimate | None
    relative: Estimate | None
    """after / before - 1"""
    fixed_change: Estimate | None


@dataclass(frozen=True, slots=True)
class Mode:
    """One kind of rollout: its share of the rollouts before and after, and the divergence within it."""

    mode: str
    share_before: Estimate | None
    share_after: Estimate | None
    levels: Levels


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions `first` to `last` (inclusive): all rollouts together, and each mode."""

    first: int
    last: int
    levels: Levels
    modes: Mapping[str, Levels]


@dataclass(frozen=True, slots=True)
class Cascade:
    """`levels`, `parts` and `modes` are over positions from `first` on: the run's horizon, or 0 when no rollout is
    longer (`untrained` is false then). `trained` are the positions before. `details` averages the task's further
    readings of whole responses, before and after."""

    sentence: str
    untrained: bool
    first: int
    problems: int
    samples: int
    modes_by: str
    levels: Levels
    trained: Levels | None
    parts: Decomposition
    modes: tuple[Mode, ...]
    bins: tuple[Bin, ...]
    details: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Scored:
    """M tokens of one set: problem, position, divergence (nats) and mode (as a number) of each."""

    problem: Array
    position: Array
    divergence: Array
    mode: Array

    @classmethod
    def of(cls, read: TokenReadings, problem_of_row: Array, mode_of_row: Array) -> Scored:
        return cls(problem_of_row[read.row], read.position, read.divergence, mode_of_row[read.row])

    def where(self, kept: Array) -> Scored:
        return Scored(self.problem[kept], self.position[kept], self.divergence[kept], self.mode[kept])

    def between(self, first: int, end: int) -> Scored:
        return self.where((self.position >= first) & (self.position < end))


def explain_cascade(cast: Cast) -> Cascade:
    """Sample, score and compare. Sentences call a change noise when its 95% interval holds zero."""
    rollouts = {"before": cast.said("before"), "after": cast.said("after")}
    kinds = modes(cast, rollouts["before"], rollouts["after"])
    names = sorted({name for of in kinds.of for name in of})
    number = {name: i for i, name in enumerate(names)}
    mode_of = [np.array([number[name] for name in of]) for of in kinds.of]
    problem_of = [cast.problem_of(rollouts["before"]), cast.problem_of(rollouts["after"])]
    sets = {
        "before": Scored.of(cast.read("before", "before"), problem_of[0], mode_of[0]),
        "after": Scored.of(cast.read("after", "after"), problem_of[1], mode_of[1]),
        "fixed": Scored.of(cast.read("after", "before"), problem_of[0], mode_of[0]),
    }
    counts_RP = resamples(len(cast.problems), cast.seed)
    longest = 1 + max(int(scored.position.max()) for scored in sets.values())
    untrained = bool(cast.horizon < longest and all((s.position >= cast.horizon).any() for s in sets.values()))
    first = cast.horizon if untrained else 0
    tail = {name: scored.between(first, longest) for name, scored in sets.items()}
    found = levels(tail, counts_RP)
    parts = decompose(tail["before"], tail["after"], len(names), counts_RP)
    by_mode = tuple(
        Mode(
            name,
            _mode_share(problem_of[0], mode_of[0] == number[name], counts_RP),
            _mode_share(problem_of[1], mode_of[1] == number[name], counts_RP),
            _within(tail, number[name], counts_RP),
        )
        for name in names
    )
    return Cascade(
        sentence=sentence(found, parts, by_mode, first, untrained),
        untrained=untrained,
        first=first,
        problems=len(cast.problems),
        samples=cast.samples,
        modes_by=kinds.told_by,
        levels=found,
        trained=levels({n: s.between(0, first) for n, s in sets.items()}, counts_RP) if untrained else None,
        parts=parts,
        modes=by_mode,
        bins=_bins(sets, first, names, counts_RP),
        details={"before": _details(cast, "before"), "after": _details(cast, "after")} if cast.task else {},
    )


def levels(sets: Mapping[str, Scored], counts_RP: Array) -> Levels:
    """Means of the three sets over the tokens given, and their differences, with intervals over problems."""
    means = {}
    for name in SETS:
        sums_P, tokens_P = by_problem(sets[name].problem, sets[name].divergence, counts_RP.shape[1])
        means[name] = ratio(counts_RP, sums_P, tokens_P)
    before = means["before"]
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(before > 0, means["after"] / before - 1.0, np.nan)
    return Levels(
        tokens=sum(len(sets[name].problem) for name in SETS[:2]),
        before=estimate(before),
        after=estimate(means["after"]),
        fixed=estimate(means["fixed"]),
        change=estimate(means["after"] - before),
        relative=estimate(relative),
        fixed_change=estimate(means["fixed"] - before),
    )


def decompose(before: Scored, after: Scored, kinds: int, counts_RP: Array) -> Decomposition:
    """The change of the mean divergence D = sum_m w_m D_m, where w_m is the share of tokens in mode m:

        mixture = sum_m (w'_m - w_m) (D_m + D'_m) / 2        within = sum_m (w_m + w'_m) / 2 (D'_m - D_m)

    Exact and symmetric in before and after. A mode that only one side has cannot have changed within: its D is taken
    for both sides, so all of it is mixture.
    """
    parts = []
    for scored in (before, after):
        sums_PM, tokens_PM = np.zeros((2, counts_RP.shape[1], kinds))
        np.add.at(sums_PM, (scored.problem, scored.mode), scored.divergence.astype(np.float64))
        np.add.at(tokens_PM, (scored.problem, scored.mode), 1.0)
        parts.append((counts_RP @ sums_PM, counts_RP @ tokens_PM))
    (sums_b, tokens_b), (sums_a, tokens_a) = parts
    with np.errstate(invalid="ignore", divide="ignore"):
        share_b, share_a = (t / t.sum(axis=1, keepdims=True) for t in (tokens_b, tokens_a))
        own_b, own_a = sums_b / tokens_b, sums_a / tokens_a
        mean_b = np.where(tokens_b > 0, own_b, np.where(tokens_a > 0, own_a, 0.0))
        mean_a = np.where(tokens_a > 0, own_a, mean_b)
    mixture_R = ((share_a - share_b) * (mean_b + mean_a) / 2).sum(axis=1)
    within_R = ((share_b + share_a) / 2 * (mean_a - mean_b)).sum(axis=1)
    return Decomposition(estimate(mixture_R + within_R), estimate(mixture_R), estimate(within_R))


def sentence(found: Levels, parts: Decomposition, by_mode: Sequence[Mode], first: int, untrained: bool) -> str:
    """What the figures say, in plain words."""
    where = f"On positions from {first} on, which were never trained"
    if not untrained:
        where = "No rollout is longer than the horizon, so every position was trained; over all of them"
    if found.before is None or found.after is None or found.change is None:
        return f"{where}, there is nothing to compare."
    levels_ = f"{found.before.value:.4f} nats per token before and {found.after.value:.4f} after"
    moved = [f"{mode.mode!r} {_moved(mode.levels.change)}" for mode in by_mode if not is_noise(mode.levels.change)]
    within = f" Within a mode: {', '.join(moved)}." if moved else " Within no mode it moved beyond noise."
    if is_noise(found.change):
        return f"{where}, the divergence did not move beyond noise ({levels_}).{within}"
    relative = f" ({found.relative.value:+.0%})" if found.relative and found.relative.value is not None else ""
    way = "fell" if (found.change.value or 0.0) < 0 else "rose"
    return (
        f"{where}, the divergence {way}{relative}: {levels_}. {_part('A change of mixture', parts.mixture)}; "
        f"{_part('the change within modes', parts.within)}.{within} On the student's old rollouts, which hold the "
        f"mixture fixed, it {_moved(found.fixed_change)}."
    )


def _part(name: str, part: Estimate | None) -> str:
    if part is None or part.value is None:
        return f"{name} is undefined"
    noise = ", within noise" if is_noise(part) else ""
    return f"{name} makes {part.value:+.4f} of it [{part.low:+.4f}, {part.high:+.4f}]{noise}"


def _moved(change: Estimate | None) -> str:
    if change is None or change.value is None or is_noise(change):
        return "did not move beyond noise"
    return f"{'fell' if change.value < 0 else 'rose'} by {abs(change.value):.2g}"


def _within(sets: Mapping[str, Scored], mode: int, counts_RP: Array) -> Levels:
    return levels({name: scored.where(scored.mode == mode) for name, scored in sets.items()}, counts_RP)


def _mode_share(problem: Array, member: Array, counts_RP: Array) -> Estimate | None:
    return share(counts_RP, *by_problem(problem, member, counts_RP.shape[1]))


def _bins(sets: Mapping[str, Scored], split: int, names: Sequence[str], counts_RP: Array) -> tuple[Bin, ...]:
    """Levels in bins of position; an edge lies where training ended."""
    edges = sorted({*EDGES, split})
    found = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = {name: scored.between(low, high) for name, scored in sets.items()}
        if any(len(scored.problem) for scored in inside.values()):
            by_mode = {name: _within(inside, number, counts_RP) for number, name in enumerate(names)}
            found.append(Bin(low, high - 1, levels(inside, counts_RP), by_mode))
    return tuple(found)


def _details(cast: Cast, voice: Voice) -> dict[str, float]:
    verdicts = cast.verdicts(cast.said(voice))
    names = sorted({name for verdict in verdicts for name in verdict.details})
    return {name: float(np.mean([v.details.get(name, False) for v in verdicts])) for name in names}
