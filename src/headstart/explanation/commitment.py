"""Sub-mode commitment: has the student settled on some of the teacher's ways to answer? (arXiv 2605.27028)

Lengths, ranks of the student's tokens under the teacher, its own confidence, and how many different openings it still
has, with the share of them that are the teacher's. Positions are *divergent* where the favourite tokens of student and
teacher differ: no threshold, and rank 1 there means that the student sampled the teacher's favourite over its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.cast import Cast, Voice
from headstart.explanation.modes import OPENING, opening
from headstart.models.collate import completion_text
from headstart.stats import Array, Estimate, by_problem, estimate, is_noise, resamples, share

CHARACTERS = 50
"""The paper's own measure of an opening."""
RANKS = ("1", "2-5", "over 5")


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
    """What the speaker's tokens are to the teacher, shares of tokens; the teacher itself is the reference.

    `divergent` is the share of divergent positions, `ranks` and `top_there` are over those; `own_top` is the speaker's
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
class Speaker:
    lengths: Lengths
    choices: Choices
    openings: Openings


@dataclass(frozen=True, slots=True)
class Commitment:
    sentence: str
    problems: int
    samples: int
    opening_tokens: int
    speakers: Mapping[Voice, Speaker]
    differences: Mapping[str, Estimate | None]
    """After minus before, paired over problems: median length, distinct openings, share on the teacher's openings, own
    top-1 probability."""

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def explain_commitment(cast: Cast) -> Commitment:
    """Sample and read everybody; intervals resample problems, the same ones for all."""
    counts_RP = resamples(len(cast.problems), cast.seed)
    said = {voice: cast.said(voice) for voice in cast.voices}
    tokenizer, problems = cast.pair.tokenizer, len(cast.problems)
    openings = {v: _per_problem([opening(tokenizer, r) for r in of], problems) for v, of in said.items()}
    texts = {
        v: _per_problem([completion_text(tokenizer, r)[:CHARACTERS] for r in of], problems) for v, of in said.items()
    }
    length_P = {v: np.array(_per_problem([len(r.completion_ids) for r in of], problems)) for v, of in said.items()}
    edges = histogram_edges(np.concatenate([lengths.ravel() for lengths in length_P.values()]))
    speakers = {
        voice: Speaker(
            lengths=lengths(length_P[voice], [r.stopped for r in of], edges, counts_RP),
            choices=choices(cast.read(voice, voice), cast.problem_of(of), counts_RP, is_teacher=voice == "teacher"),
            openings=_openings(openings[voice], texts[voice], openings["teacher"], voice == "teacher", counts_RP),
        )
        for voice, of in said.items()
    }
    per_problem = {
        "distinct": {v: distinct(openings[v]) for v in ("before", "after")},
        "on_teacher": {v: on_modes(openings[v], openings["teacher"]).sum(axis=1) for v in ("before", "after")},
    }
    differences = {
        name: estimate(counts_RP @ (of["after"] - of["before"]) / counts_RP.sum(axis=1))
        for name, of in per_problem.items()
    }
    differences["median_length"] = estimate(
        _quantile(length_P["after"], 50, counts_RP) - _quantile(length_P["before"], 50, counts_RP)
    )
    return Commitment(_sentence(speakers, differences, cast), problems, cast.samples, OPENING, speakers, differences)


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
    member = {"1": rank == 1, "2-5": (rank >= 2) & (rank <= 5), "over 5": rank > 5}

    def mean(value_M: Array, where_M: Array) -> Estimate | None:
        return share(counts_RP, *by_problem(problem_M[where_M], value_M[where_M], counts_RP.shape[1]))

    every = np.ones(len(read.row), dtype=bool)
    return Choices(
        divergent=None if is_teacher else mean(there, every),
        ranks={name: mean(member[name], there) for name in RANKS},
        own_top=mean(top, every),
        top_there=None if is_teacher else mean(top, there),
    )


def distinct(openings: Sequence[Sequence[str]]) -> Array:
    """Different openings per sample, for each problem: 1 when all differ, 1 / k when all k are the same."""
    return np.array([len(set(of)) / len(of) for of in openings])


def on_modes(openings: Sequence[Sequence[str]], teacher: Sequence[Sequence[str]]) -> Array:
    """Share of each problem's samples on the teacher's most frequent opening there, the second, ...: `[P, modes]`.

    A row sums to the share of samples on any opening the teacher was heard with; equal counts in alphabetical order.
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
    ones_P = np.ones(len(mine))
    by_mode = on_modes(mine, teacher)
    on_any = on_other_samples(mine) if is_teacher else by_mode.sum(axis=1)
    return Openings(
        distinct=share(counts_RP, distinct(mine), ones_P),
        distinct_characters=share(counts_RP, distinct(texts), ones_P),
        on_teacher=share(counts_RP, on_any, ones_P),
        on_mode=tuple(share(counts_RP, column, ones_P) for column in by_mode.T),
    )


def _per_problem(values: Sequence[Any], problems: int) -> list[list[Any]]:
    """Prompt-major values as one list a problem."""
    samples = len(values) // problems
    return [list(values[p * samples : (p + 1) * samples]) for p in range(problems)]


def _quantile(value_PK: Array, q: float, counts_RP: Array) -> Array:
    """The q-th percentile of all samples when problem p counts `counts_RP[r, p]` times (no interpolation): `[R]`."""
    order = np.argsort(value_PK, axis=None, kind="stable")
    problem = order // value_PK.shape[1]
    reached_R = np.zeros(len(counts_RP))
    for r, counts_P in enumerate(counts_RP):
        mass = np.cumsum(counts_P[problem])
        place = np.searchsorted(mass, q / 100 * mass[-1] - 1e-9)
        reached_R[r] = value_PK.ravel()[order[place]]
    return reached_R


def _sentence(speakers: Mapping[Voice, Speaker], differences: Mapping[str, Estimate | None], cast: Cast) -> str:
    before, after, teacher = speakers["before"], speakers["after"], speakers["teacher"]

    def number(found: Estimate | None, form: str = ".2f") -> str:
        return "-" if found is None or found.value is None else format(found.value, form)

    def change(name: str) -> str:
        return " (within noise)" if is_noise(differences[name]) else ""

    twin = f", {number(speakers['twin'].lengths.p50, '.0f')} after full rollouts" if "twin" in speakers else ""
    said = (
        f"The median response went from {number(before.lengths.p50, '.0f')} to "
        f"{number(after.lengths.p50, '.0f')} tokens{change('median_length')}{twin}; the teacher's has "
        f"{number(teacher.lengths.p50, '.0f')}. "
    )
    if cast.samples < 2:
        return said + "One sample per problem says nothing about openings; use evaluation.samples=4."
    return (
        f"{said}Different openings per sample: {number(before.openings.distinct)} before, "
        f"{number(after.openings.distinct)} after{change('distinct')}, teacher {number(teacher.openings.distinct)}. "
        f"Samples on an opening the teacher was heard with: {number(before.openings.on_teacher)} before, "
        f"{number(after.openings.on_teacher)} after{change('on_teacher')}; the teacher's own samples agree with each "
        f"other in {number(teacher.openings.on_teacher)}."
    )
