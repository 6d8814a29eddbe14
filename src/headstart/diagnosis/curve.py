"""Teacher decay: the accuracy of each model when it continues a prefix of the other, or of itself (arXiv 2605.27028).

R(N) is the teacher's accuracy after the student's first N tokens, G(N) (the prefix gift) the student's after the
teacher's. Two controls say what a fall of R means: each model continuing *its own* prefix, and R split by the state of
the prefix, because R can fall because more prefixes are spoiled rather than because the teacher is lost after them.
Everything is resampled or averaged over problems, never over single continuations: the outcomes of one problem depend
on each other, and pairing them is what makes 64 problems enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

import numpy as np

from headstart.records import PrefixState
from headstart.stats import UNDEFINED, Estimate, estimate, mean_interval, paired_difference, ratio, resamples, wilson

FORMAT = 1
FIRST, LENGTHS = 4, 8
"""Shortest prefix of the default grid, and how many lengths it has at most."""
MATERIAL = 0.02
"""Accuracy below which a shortfall is not worth a warning: training seeds differ by more."""


@dataclass(frozen=True, slots=True)
class Share:
    """`successes` of `n` with the 95% Wilson interval."""

    successes: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Share:
        low, high = wilson(sum(outcomes), len(outcomes))
        return cls(sum(outcomes), len(outcomes), low, high)

    @property
    def mean(self) -> float:
        return self.successes / self.n if self.n else float("nan")


@dataclass(frozen=True, slots=True)
class PrefixOutcome:
    """One problem at one prefix length: is each continuation right, and in which state is the student's prefix?

    `after_student`, `after_own`: the teacher continues the student's prefix, its own. `student_continues`, `gift`: the
    student continues its own prefix, the teacher's. A response that ends within the prefix counts as it is.
    """

    prefix_tokens: int
    state: PrefixState
    after_student: bool
    after_own: bool
    student_continues: bool
    gift: bool


@dataclass(frozen=True, slots=True)
class ProblemOutcome:
    """All readings of one problem; `index` is its index in the source, lengths and costs are in tokens."""

    index: int
    problem_id: str
    student: bool
    teacher: bool
    student_tokens: int
    generated_tokens: int
    seconds: float
    points: tuple[PrefixOutcome, ...]


@dataclass(frozen=True, slots=True)
class DecayPoint:
    """All readings at one prefix length (tokens); shares are over problems.

    `after_student` is R, split by the state of the student's prefix (`unknown` states are in none of the three);
    `gift` is G and `damage` D.
    """

    prefix_tokens: int
    after_student: Share
    after_clean: Share
    after_wrong: Share
    after_finished: Share
    after_own: Share
    student_continues: Share
    gift: Share
    damage: Estimate


@dataclass(frozen=True, slots=True)
class DecayCurve:
    """R, G, D and their controls over a grid of prefix lengths.

    `student` and `teacher` are the models' own accuracies, the levels R falls from and to; `median_tokens` and
    `longest_tokens` say how long the student's own responses are, `teacher_median_tokens` how long the teacher's.
    Without reference answers (`labelled` false) every accuracy is agreement with the teacher's majority answer.
    `left_out` problems could not be judged at all. `student_cut` and `teacher_cut` are the shares of the models' own
    responses that reached `max_tokens` without an end.
    """

    task: str
    labelled: bool
    prompts: int
    left_out: int
    grid: tuple[int, ...]
    max_tokens: int
    median_tokens: int
    longest_tokens: int
    generated_tokens: int
    seconds: float
    student: Share
    teacher: Share
    points: tuple[DecayPoint, ...]
    student_cut: float = 0.0
    teacher_cut: float = 0.0
    teacher_median_tokens: int = 0

    @property
    def typical_tokens(self) -> int:
        """A full rollout of the training, about: the student comes to answer as long as the teacher does."""
        return max(self.median_tokens, self.teacher_median_tokens)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Plateau:
    """What the student reaches when only its first `tokens` tokens become the teacher's: G(N), sampled several times a
    problem. `shortfall` is the teacher's own accuracy less that, paired over problems."""

    tokens: int
    gift: Estimate
    shortfall: Estimate

    @property
    def falls_short(self) -> bool:
        """Beyond noise, and by more than runs with different seeds differ anyway."""
        return self.shortfall.low > 0 and (self.shortfall.value or 0.0) >= MATERIAL


def default_grid(median_tokens: int) -> tuple[int, ...]:
    """0 and at most eight lengths from 4 up to the median response: doubling, or wider apart for long responses.

    Dense among early lengths: where decisions come early, R falls within the first tokens.
    """
    last = max(median_tokens, FIRST)
    ratio = max(2.0, (last / FIRST) ** (1 / (LENGTHS - 1)))
    lengths = {round(FIRST * ratio**k) for k in range(LENGTHS)}
    return (0, *sorted(length for length in lengths if length <= last))


def decay_curve(outcomes: Sequence[ProblemOutcome], *, task: str, max_tokens: int, seed: int = 0) -> DecayCurve:
    """The curve of some problems, at least one, all measured on the same grid. `seed` keys the bootstrap."""
    grid = tuple(point.prefix_tokens for point in outcomes[0].points)
    lengths = [o.student_tokens for o in outcomes]
    return DecayCurve(
        task=task,
        labelled=True,
        prompts=len(outcomes),
        left_out=0,
        grid=grid,
        max_tokens=max_tokens,
        median_tokens=median_low(lengths),
        longest_tokens=max(lengths),
        generated_tokens=sum(o.generated_tokens for o in outcomes),
        seconds=sum(o.seconds for o in outcomes),
        student=Share.of([o.student for o in outcomes]),
        teacher=Share.of([o.teacher for o in outcomes]),
        points=tuple(_point(outcomes, i, seed) for i in range(len(grid))),
    )


def _point(outcomes: Sequence[ProblemOutcome], index: int, seed: int) -> DecayPoint:
    points = [o.points[index] for o in outcomes]
    teacher, student = [o.teacher for o in outcomes], [o.student for o in outcomes]
    after = [p.after_student for p in points]
    by_state = {
        f"after_{state}": Share.of([p.after_student for p in points if p.state == state])
        for state in ("clean", "wrong", "finished")
    }
    return DecayPoint(
        prefix_tokens=points[0].prefix_tokens,
        after_student=Share.of(after),
        **by_state,
        after_own=Share.of([p.after_own for p in points]),
        student_continues=Share.of([p.student_continues for p in points]),
        gift=Share.of([p.gift for p in points]),
        damage=damage_share(teacher, after, student, seed),
    )


def damage_share(teacher: Sequence[float], after: Sequence[float], student: Sequence[float], seed: int = 0) -> Estimate:
    """D(N) = (R(0) - R(N)) / (R(0) - A_S): the share of the teacher's lead that the student's first N tokens cost.

    `teacher`, `after` and `student` hold one outcome a problem (right 1, wrong 0): the teacher alone, the teacher after
    the student's first N tokens, the student alone. The interval is a bootstrap over problems (the same problems in
    all three), keyed by `seed`; where every resample agrees it has no width to show, and the rule of three (3 / n
    problems) stands in. Undefined unless the teacher's lead is positive beyond noise. By noise the value can lie
    outside 0..1. Raises ValueError when the lists differ in length.
    """
    lead, (lowest, _) = paired_difference(teacher, student)
    if lowest <= 0:
        return UNDEFINED
    teacher_P, after_P, student_P = (np.array(outcomes, dtype=np.float64) for outcomes in (teacher, after, student))
    result = estimate(ratio(resamples(len(teacher_P), seed), teacher_P - after_P, teacher_P - student_P))
    assert result is not None, "the lead is positive"
    assert result.value is not None
    if result.high - result.low < 1e-9:
        room = 3 / len(teacher_P) / lead
        return Estimate(result.value, result.value - room, result.value + room)
    return result


def plateau(tokens: int, teacher: Sequence[float], gift: Sequence[float]) -> Plateau:
    """From the shares of right answers of each problem: the teacher alone, the student after `tokens` of the
    teacher's."""
    value, interval = paired_difference(teacher, gift)
    return Plateau(tokens, Estimate(sum(gift) / len(gift), *mean_interval(gift)), Estimate(value, *interval))
