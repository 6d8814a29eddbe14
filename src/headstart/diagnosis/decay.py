"""Teacher decay: how well does each model finish what the other, or itself, began? (arXiv 2605.27028)

R(N) is the teacher's accuracy when it continues the student's first N tokens, G(N) the student's when it continues the
teacher's. The controls say what a fall of R means: each model continuing *its own* prefix of the same length, and the
split of R by the state of the prefix, because a fall can be a growing share of spoiled prefixes rather than a teacher
that loses the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

from headstart.diagnosis.damage import damage_share
from headstart.records import PrefixState
from headstart.stats import Estimate, wilson

FORMAT = 1
FIRST, LENGTHS = 4, 8
"""Shortest prefix of the default grid, and how many lengths it has at most."""


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
    """One problem, one prefix length: is each continuation right, and in which state was the student's prefix?

    `after_student` and `after_own`: the teacher continues the student's prefix, its own. `student_continues` and
    `gift`: the student continues its own prefix, the teacher's. The own rollout stands in where nothing is left.
    """

    prefix_tokens: int
    state: PrefixState
    after_student: bool
    after_own: bool
    student_continues: bool
    gift: bool


@dataclass(frozen=True, slots=True)
class ProblemOutcome:
    """All that was measured on one problem; `index` is its place in the source, lengths and costs are in tokens."""

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
    `longest_tokens` say how long the student's own responses are. Without reference answers (`labelled` false) every
    accuracy is agreement with the teacher's majority answer. `left_out` problems could not be judged at all.
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

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def default_grid(median_tokens: int) -> tuple[int, ...]:
    """0 and at most eight lengths from 4 up to the median response: doubling, or wider apart for long responses.

    Early lengths are the dense ones: where decisions come early, R falls within the first tokens.
    """
    last = max(median_tokens, FIRST)
    ratio = max(2.0, (last / FIRST) ** (1 / (LENGTHS - 1)))
    lengths = {round(FIRST * ratio**k) for k in range(LENGTHS)}
    return (0, *sorted(length for length in lengths if length <= last))


def decay_curve(
    outcomes: Sequence[ProblemOutcome],
    *,
    task: str,
    max_tokens: int,
    labelled: bool = True,
    left_out: int = 0,
    seed: int = 0,
) -> DecayCurve:
    """The curve of some problems, at least one, all measured on the same grid. `seed` keys the bootstrap."""
    grid = tuple(point.prefix_tokens for point in outcomes[0].points)
    lengths = [o.student_tokens for o in outcomes]
    return DecayCurve(
        task=task,
        labelled=labelled,
        prompts=len(outcomes),
        left_out=left_out,
        grid=grid,
        max_tokens=max_tokens,
        median_tokens=median_low(lengths),
        longest_tokens=max(lengths),
        generated_tokens=sum(o.generated_tokens for o in outcomes),
        seconds=sum(o.seconds for o in outcomes),
        student=Share.of([o.student for o in outcomes]),
        teacher=Share.of([o.teacher for o in outcomes]),
        points=tuple(_point(outcomes, place, seed) for place in range(len(grid))),
    )


def _point(outcomes: Sequence[ProblemOutcome], place: int, seed: int) -> DecayPoint:
    points = [o.points[place] for o in outcomes]
    teacher, student = [o.teacher for o in outcomes], [o.student for o in outcomes]

    def share(outcome: Callable[[PrefixOutcome], bool], state: PrefixState | None = None) -> Share:
        return Share.of([outcome(p) for p in points if state in (None, p.state)])

    return DecayPoint(
        prefix_tokens=points[0].prefix_tokens,
        after_student=share(lambda p: p.after_student),
        after_clean=share(lambda p: p.after_student, "clean"),
        after_wrong=share(lambda p: p.after_student, "wrong"),
        after_finished=share(lambda p: p.after_student, "finished"),
        after_own=share(lambda p: p.after_own),
        student_continues=share(lambda p: p.student_continues),
        gift=share(lambda p: p.gift),
        damage=damage_share(teacher, [p.after_student for p in points], student, seed),
    )
