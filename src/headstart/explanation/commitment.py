"""Sub-mode commitment: has the student settled on some of the teacher's ways to answer? (arXiv 2605.27028)

Lengths, ranks of the student's tokens under the teacher, its own confidence, and how many different openings it still
samples, with the share of them that are the teacher's. Positions are *divergent* where the favourite tokens of student
and teacher differ: no threshold, and rank 1 there means that the student sampled the teacher's favourite over its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.models import OPENING, Models, Reading, Source, opening, token_share
from headstart.models.collate import completion_text
from headstart.records import Rollout
from headstart.stats import Array, Estimate, estimate, is_noise, resamples, share

CHARACTERS = 50
"""The paper's own measure of an opening."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Length of responses in tokens, stop token included; one that did not stop counts with the bound it reached."""

    p10: Estimate | None
    p50: Estimate | None
    p90: Estimate | None
    stopped: Estimate | None
    edges: tuple[int, ...]
    """Histogram: `rollouts[i]` are at least `edges[i]` and less than `edges[i + 1]` long."""
    rollouts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a model's tokens are to the teacher, shares of tokens; the teacher itself is the reference.

    `divergent` is the share of divergent positions, `ranks` and `top_there` are over those; `own_top` is the model's
    mean probability of its own favourite over all positions. For the teacher's own rollouts there are no divergent
    positions: its ranks are over all.
    """

    divergent: Estimate | None
    ranks: Mapping[str, Estimate | None]
    own_top: Estimate | None
    top_there: Estimate | None


@dataclass(frozen=True, slots=True)
class Openings:
    """Different openings among the samples of a problem, per sample (1: all differ), by tokens and by characters.

    `on_teacher` is the share of samples whose opening is one of the teacher's on that problem (for the teacher: one of
    its *other* samples, the reference for its limited number), `on_mode[i]` the share on its (i+1)-th most frequent.
    """

    distinct: Estimate | None
    distinct_characters: Estimate | None
    on_teacher: Estimate | None
    on_mode: tuple[Estimate | None, ...]


@dataclass(frozen=True, slots=True)
class ModelReadings:
    lengths: Lengths
    choices: Choices
    openings: Openings


@dataclass(frozen=True, slots=True)
class Commitment(Reading):
    problems: int
    samples: int
    opening_tokens: int
    speakers: Mapping[Source, ModelReadings]
    differences: Mapping[str, Estimate | None]
    """After minus before, paired over problems: distinct openings, share on the teacher's openings, median length."""


def explain_commitment(models: Models) -> Commitment:
    """Sample and read every model; intervals resample problems, the same ones for all."""
    counts_RP, P = resamples(len(models.problems), models.seed), len(models.problems)
    responses = {source: models.responses(source) for source in models.sources}
    tokenizer, K = models.pair.tokenizer, models.samples

    def per_problem(value: Callable[[Rollout], Any]) -> dict[Source, list[list[Any]]]:
        return {s: [[value(r) for r in of[p * K : (p + 1) * K]] for p in range(P)] for s, of in responses.items()}

    openings = per_problem(lambda r: opening(tokenizer, r))
    texts = per_problem(lambda r: completion_text(tokenizer, r)[:CHARACTERS])
    length_P = {s: np.array(of) for s, of in per_problem(lambda r: len(r.completion_ids)).items()}
    edges = histogram_edges(np.concatenate([of.ravel() for of in length_P.values()]))
    readings = {
        source: ModelReadings(
            lengths=lengths(length_P[source], [r.stopped for r in of], edges, counts_RP),
            choices=choices(
                models.read(source, source), models.problem_of(of), counts_RP, is_teacher=source == "teacher"
            ),
            openings=_openings(openings[source], texts[source], openings["teacher"], source == "teacher", counts_RP),
        )
        for source, of in responses.items()
    }

    def difference(of: Callable[[Source], Array]) -> Estimate | None:
        return estimate(counts_RP @ (of("after") - of("before")) / counts_RP.sum(axis=1))

    before_R, after_R = (_quantile(length_P[source], 50, counts_RP) for source in ("before", "after"))
    differences = {
        "distinct": difference(lambda source: distinct(openings[source])),
        "on_teacher": difference(lambda source: on_modes(openings[source], openings["teacher"]).sum(axis=1)),
        "median_length": estimate(after_R - before_R),
    }
    return Commitment(_sentence(readings, differences, K), P, K, OPENING, readings, differences)


def lengths(length_PK: Array, stopped: Sequence[bool], edges: tuple[int, ...], counts_RP: Array) -> Lengths:
    """Percentiles over all samples of all problems, and a histogram."""
    stops_PK = np.array(stopped, dtype=np.float64).reshape(length_PK.shape)
    p10, p50, p90 = (estimate(_quantile(length_PK, q, counts_RP)) for q in (10, 50, 90))
    samples_P = np.full(len(length_PK), length_PK.shape[1], dtype=np.float64)
    counted, _ = np.histogram(length_PK, bins=np.array(edges))
    return Lengths(p10, p50, p90, share(counts_RP, stops_PK.sum(axis=1), samples_P), edges, tuple(map(int, counted)))


def histogram_edges(length: Array, bins: int = 20) -> tuple[int, ...]:
    """At most `bins` bins of one whole width that hold all lengths, from 0."""
    width = -(-(int(length.max()) + 1) // bins)
    return tuple(range(0, int(length.max()) + width + 1, width))


def choices(read: TokenReadings, problem_of_row: Array, counts_RP: Array, *, is_teacher: bool) -> Choices:
    """See `Choices`."""
    problem_M = problem_of_row[read.row]
    there = np.ones(len(read.row), dtype=bool) if is_teacher else ~read.agree.astype(bool)
    top = read.teacher_top if is_teacher else read.student_top
    rank = read.teacher_rank
    ranks = {"1": rank == 1, "2-5": (rank >= 2) & (rank <= 5), "over 5": rank > 5}

    def mean(value_M: Array, where_M: Array) -> Estimate | None:
        return token_share(counts_RP, problem_M[where_M], value_M[where_M])

    every = np.ones(len(read.row), dtype=bool)
    return Choices(
        divergent=None if is_teacher else mean(there, every),
        ranks={name: mean(member, there) for name, member in ranks.items()},
        own_top=mean(top, every),
        top_there=None if is_teacher else mean(top, there),
    )


def distinct(openings: Sequence[Sequence[str]]) -> Array:
    """Different openings per sample, for each problem: 1 when all differ, 1 / k when all k are the same."""
    return np.array([len(set(of)) / len(of) for of in openings])


def on_modes(openings: Sequence[Sequence[str]], teacher: Sequence[Sequence[str]]) -> Array:
    """Share of each problem's samples on the teacher's most frequent opening there, the second, ...: `[P, modes]`.

    A row sums to the share of samples on any opening that the teacher sampled; equal counts in alphabetical order.
    """
    width = max(len(set(of)) for of in teacher)
    shares_PK = np.zeros((len(teacher), width))
    for p, (mine, theirs) in enumerate(zip(openings, teacher, strict=True)):
        counted = Counter(theirs)
        for k, text in enumerate(sorted(counted, key=lambda t: (-counted[t], t))):
            shares_PK[p, k] = mine.count(text) / len(mine)
    return shares_PK


def on_other_samples(openings: Sequence[Sequence[str]]) -> Array:
    """Share of each problem's samples whose opening another sample of the problem has, too."""
    return np.array([sum(of.count(text) > 1 for text in of) / len(of) for of in openings])


def _openings(
    mine: Sequence[Sequence[str]],
    texts: Sequence[Sequence[str]],
    teacher: Sequence[Sequence[str]],
    is_teacher: bool,
    counts_RP: Array,
) -> Openings:
    by_mode = on_modes(mine, teacher)

    def mean(value_P: Array) -> Estimate | None:
        return share(counts_RP, value_P, np.ones(len(mine)))

    return Openings(
        distinct=mean(distinct(mine)),
        distinct_characters=mean(distinct(texts)),
        on_teacher=mean(on_other_samples(mine) if is_teacher else by_mode.sum(axis=1)),
        on_mode=tuple(mean(column) for column in by_mode.T),
    )


def _quantile(value_PK: Array, q: float, counts_RP: Array) -> Array:
    """The q-th percentile of all samples when problem p counts `counts_RP[r, p]` times (no interpolation): `[R]`."""
    order = np.argsort(value_PK, axis=None, kind="stable")
    problem = order // value_PK.shape[1]
    reached_R = np.zeros(len(counts_RP))
    for r, counts_P in enumerate(counts_RP):
        mass = np.cumsum(counts_P[problem])
        reached_R[r] = value_PK.ravel()[order[np.searchsorted(mass, q / 100 * mass[-1] - 1e-9)]]
    return reached_R


def _sentence(
    readings: Mapping[Source, ModelReadings], differences: Mapping[str, Estimate | None], samples: int
) -> str:
    before, after, teacher = readings["before"], readings["after"], readings["teacher"]

    def number(value: Estimate | None, form: str = ".2f") -> str:
        return "-" if value is None or value.value is None else format(value.value, form)

    def noise(name: str) -> str:
        return " (within noise)" if is_noise(differences[name]) else ""

    full = f", {number(readings['twin'].lengths.p50, '.0f')} after full rollouts" if "twin" in readings else ""
    text = (
        f"The median response went from {number(before.lengths.p50, '.0f')} to "
        f"{number(after.lengths.p50, '.0f')} tokens{noise('median_length')}{full}; the teacher's has "
        f"{number(teacher.lengths.p50, '.0f')}. "
    )
    if samples < 2:
        return text + "One sample per problem says nothing about openings; use evaluation.samples=4."
    return (
        f"{text}Different openings per sample: {number(before.openings.distinct)} before, "
        f"{number(after.openings.distinct)} after{noise('distinct')}, teacher {number(teacher.openings.distinct)}. "
        f"Samples on an opening that the teacher sampled: {number(before.openings.on_teacher)} before, "
        f"{number(after.openings.on_teacher)} after{noise('on_teacher')}; the teacher's own samples agree with each "
        f"other in {number(teacher.openings.on_teacher)}."
    )
