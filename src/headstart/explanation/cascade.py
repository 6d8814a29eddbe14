"""Cascading alignment: does training the first N tokens move the tokens after them? (arXiv 2605.27028)

The divergence on untrained positions can fall in two ways: the student writes other tokens there (within a mode), or
rollouts of a mode that is far from the teacher have become rare (mixture). A mode is a kind of response, known by the
first decisions. Both parts are computed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from headstart.diagnosis.positions import EDGES
from headstart.explanation.models import OPENING, Models, Reading, Source, opening, token_share
from headstart.losses.readings import TokenTable
from headstart.records import Rollout
from headstart.stats import Array, Estimate, by_problem, estimate, is_noise, ratio, resamples

SETS = ("before", "after", "fixed")
"""The student before on its own rollouts, the student after on its own, the student after on those of the student
before (nothing but the weights differs from the first)."""
CLUSTERS = 6
"""Openings that are separate modes; the others are one mode, `OTHER`."""
OTHER = "other"


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
    """One kind of response: its share of the rollouts before and after, and the divergence within it."""

    mode: str
    share_before: Estimate | None
    share_after: Estimate | None
    levels: Levels


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions `first` to `last` (inclusive)."""

    first: int
    last: int
    levels: Levels


@dataclass(frozen=True, slots=True)
class Cascade(Reading):
    """`levels`, `parts` and `modes` are over positions from `first` on: the run's horizon, or 0 when no rollout is
    longer (`untrained` is false then). `trained` are the positions before. `details` averages the task's further
    readings of whole responses, before and after."""

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


@dataclass(frozen=True, slots=True)
class Scored(TokenTable):
    """M tokens of one set: problem, position, divergence (nats) and mode (as a number) of each."""

    problem: Array
    position: Array
    divergence: Array
    mode: Array

    def between(self, first: int, end: int) -> Scored:
        return self.where((self.position >= first) & (self.position < end))


def explain_cascade(models: Models) -> Cascade:
    """Sample, score and compare. Sentences call a change noise when its 95% interval holds zero."""
    modes_by, kinds = _modes(models, models.responses("before"), models.responses("after"))
    names = sorted({name for of in kinds for name in of})
    mode_of = dict(
        zip(("before", "after"), (np.array([names.index(name) for name in of]) for of in kinds), strict=True)
    )

    def scored(student: Source, source: Source) -> Scored:
        read, problem_of = models.read(student, source), models.problem_of(models.responses(source))
        return Scored(problem_of[read.row], read.position, read.divergence, mode_of[source][read.row])

    sets = {
        "before": scored("before", "before"),
        "after": scored("after", "after"),
        "fixed": scored("after", "before"),
    }
    counts_RP = resamples(len(models.problems), models.seed)
    longest = 1 + max(int(s.position.max()) for s in sets.values())
    untrained = all((s.position >= models.horizon).any() for s in sets.values())
    first = models.horizon if untrained else 0
    tail = _between(sets, first, longest)
    change, parts = levels(tail, counts_RP), decompose(tail["before"], tail["after"], len(names), counts_RP)

    def frequency(source: Source, mode: int) -> Estimate | None:
        problem_of = models.problem_of(models.responses(source))
        return token_share(counts_RP, problem_of, mode_of[source] == mode)

    by_mode = tuple(
        Mode(name, frequency("before", i), frequency("after", i), _within(tail, i, counts_RP))
        for i, name in enumerate(names)
    )
    return Cascade(
        sentence=sentence(change, parts, by_mode, first, untrained),
        untrained=untrained,
        first=first,
        problems=len(models.problems),
        samples=models.samples,
        modes_by=modes_by,
        levels=change,
        trained=levels(_between(sets, 0, first), counts_RP) if untrained else None,
        parts=parts,
        modes=by_mode,
        bins=_bins(sets, first, counts_RP),
        details={"before": _details(models, "before"), "after": _details(models, "after")} if models.task else {},
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


def sentence(change: Levels, parts: Decomposition, by_mode: Sequence[Mode], first: int, untrained: bool) -> str:
    """What the figures say, in plain words."""
    where = f"On positions from {first} on, which were never trained"
    if not untrained:
        where = "No rollout is longer than the horizon, so every position was trained; over all of them"
    if change.before is None or change.after is None or change.change is None:
        return f"{where}, there is nothing to compare."
    means = f"{change.before.value:.4f} nats per token before and {change.after.value:.4f} after"
    moved = [f"{mode.mode!r} {_moved(mode.levels.change)}" for mode in by_mode if not is_noise(mode.levels.change)]
    within = f" Within a mode: {', '.join(moved)}." if moved else " Within no mode it moved beyond noise."
    if is_noise(change.change):
        return f"{where}, the divergence did not move beyond noise ({means}).{within}"
    relative = f" ({change.relative.value:+.0%})" if change.relative and change.relative.value is not None else ""
    way = "fell" if (change.change.value or 0.0) < 0 else "rose"
    return (
        f"{where}, the divergence {way}{relative}: {means}. {_part('A change of mixture', parts.mixture)}; "
        f"{_part('the change within modes', parts.within)}.{within} On the student's old rollouts, which hold the "
        f"mixture fixed, it {_moved(change.fixed_change)}."
    )


def _part(name: str, part: Estimate | None) -> str:
    if part is None or part.value is None:
        return f"{name} is undefined"
    noise = ", within noise" if is_noise(part) else ""
    return f"{name} makes {part:+.4f} of it{noise}"


def _moved(change: Estimate | None) -> str:
    if change is None or change.value is None or is_noise(change):
        return "did not move beyond noise"
    return f"{'fell' if change.value < 0 else 'rose'} by {abs(change.value):.2g}"


def _between(sets: Mapping[str, Scored], first: int, end: int) -> dict[str, Scored]:
    return {name: scored.between(first, end) for name, scored in sets.items()}


def _within(sets: Mapping[str, Scored], mode: int, counts_RP: Array) -> Levels:
    return levels({name: scored.where(scored.mode == mode) for name, scored in sets.items()}, counts_RP)


def _bins(sets: Mapping[str, Scored], split: int, counts_RP: Array) -> tuple[Bin, ...]:
    """Levels in bins of position; an edge lies where training ended."""
    edges = sorted({*EDGES, split})
    bins = []
    for low, high in pairwise(edges):
        inside = _between(sets, low, high)
        if any(len(scored.problem) for scored in inside.values()):
            bins.append(Bin(low, high - 1, levels(inside, counts_RP)))
    return tuple(bins)


def _details(models: Models, source: Source) -> dict[str, float]:
    verdicts = models.verdicts(models.responses(source))
    names = sorted({name for verdict in verdicts for name in verdict.details})
    return {name: float(np.mean([v.details.get(name, False) for v in verdicts])) for name in names}


def _modes(models: Models, *sets: Sequence[Rollout]) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """What distinguishes modes, in words, and the mode of each rollout of each set: the state of its first
    `horizon` tokens (clean, wrong, finished) where the task can tell, else its opening if that is a frequent one."""
    task, N, tokenizer = models.task, models.horizon, models.pair.tokenizer
    if task is not None and any(len(r.completion_ids) > N for rollouts in sets for r in rollouts):
        states = tuple(
            tuple(
                task.prefix_state(models.problems[r.prompt.index], opening(tokenizer, r, N))
                if len(r.completion_ids) > N
                else "finished"
                for r in rollouts
            )
            for rollouts in sets
        )
        if any(state not in ("unknown", "finished") for of in states for state in of):
            return f"state of the first {N} tokens, judged by the task", states
    openings = [[opening(tokenizer, r) for r in rollouts] for rollouts in sets]
    return f"the {CLUSTERS} most frequent openings of {OPENING} tokens", by_frequency(openings)


def by_frequency(openings: Sequence[Sequence[str]], clusters: int = CLUSTERS) -> tuple[tuple[str, ...], ...]:
    """Each opening in one line if it is among the `clusters` most frequent of all sets together, else OTHER.

    Equal counts are kept in alphabetical order, so the result does not depend on the order of the rollouts.
    """
    openings = [[" ".join(text.split()) for text in texts] for texts in openings]
    counted = Counter(text for texts in openings for text in texts)
    kept = set(sorted(counted, key=lambda text: (-counted[text], text))[:clusters])
    return tuple(tuple(text if text in kept else OTHER for text in texts) for texts in openings)
