"""The whole measurement, block by block into its store: cost announced first, readable while it runs, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median_low
from typing import TypeVar

from headstart.assemble.pair import Speaker
from headstart.assemble.speed import NOTABLE, PLANNED, duration
from headstart.diagnosis.budget import Prices, Setting
from headstart.diagnosis.curve import DecayCurve, Plateau, decay_curve, default_grid, plateau
from headstart.diagnosis.ledger import Store
from headstart.diagnosis.probes import GIFTS, DecayProbe, Response, vote, with_references
from headstart.errors import DataError
from headstart.interfaces import OnProgress, silent
from headstart.records import Rollout

BLOCK = 4
"""Batches between two writes: work lost to a kill, against idle slots at the end of each block."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks: `progress` (done, total, live reading), `say` a line for the reader, `curve` what is known after each
    block."""

    progress: OnProgress = silent
    say: Callable[[str], None] = lambda text: None
    curve: Callable[[DecayCurve], None] = lambda curve: None

    def at(self, text: str) -> OnProgress:
        """The progress of a part that has no words of its own."""
        return lambda done, total, _="": self.progress(done, total, text)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked beside the probe: `grid` None is the default one; `votes` 0 where there are reference answers, and
    `grader` reads those that are voted on."""

    grid: tuple[int, ...] | None
    votes: int
    grader: str
    left_out: int

    def setting(self, probe: DecayProbe) -> Setting:
        """All of it, as far as it costs anything."""
        longest = probe.max_tokens
        lengths = tuple(n for n in self.grid or default_grid(longest) if 0 < n < longest)
        return Setting(len(probe.prompts), lengths, longest)


@dataclass(frozen=True, slots=True)
class Measured:
    """The curve, and both models' own responses to its problems, in one order."""

    probe: DecayProbe
    store: Store
    curve: DecayCurve
    students: list[Response]
    teachers: list[Response]

    @property
    def setting(self) -> Setting:
        return Setting(self.curve.prompts, self.curve.grid[1:], self.curve.max_tokens)

    def plateau(self, tokens: int, listener: Listener, samples: int = GIFTS) -> Plateau:
        """What the student reaches with the teacher's first `tokens` tokens; measured once, then read."""
        gifts = self.store.gifts(tokens)
        if gifts is None:
            counter = _Counter(listener, samples * len(self.teachers), f"the student after {tokens} of the teacher's")
            gifts = replace(self.probe, finished=counter.finished).gifts(self.teachers, tokens, samples)
            self.store.set_gifts(tokens, gifts)
        # Continuing its own prefix is the teacher's own accuracy again: every control point is a further sample of it.
        outcomes = [self.store.outcomes[t.rollout.prompt.index] for t in self.teachers]
        return plateau(tokens, [sum(p.after_own for p in o.points) / len(o.points) for o in outcomes], gifts)


def measure(probe: DecayProbe, plan: Plan, store: Store, listener: Listener, announced: bool = True) -> Measured:
    """The curve of every prompt of `probe`; what that takes is said first.

    What the store holds is not measured again, and no number depends on where an earlier run stopped. Raises DataError
    when no problem can be judged.
    """
    if announced and not store.is_whole(probe.prompts):
        listener.say(_announcement(probe, plan))
    asked = len(probe.prompts)
    if plan.votes:
        probe = _with_votes(probe, plan, store, listener)
    votes = store.references
    students = _responses(probe, store, "student", listener)
    teachers = _responses(probe, store, "teacher", listener)
    lengths = sorted(len(r.rollout.completion_ids) for r in students)
    grid = plan.grid or default_grid(lengths[(len(lengths) - 1) // 2])

    def curve() -> DecayCurve:
        outcomes = [store.outcomes[p.index] for p in probe.prompts if p.index in store.outcomes]
        known = decay_curve(outcomes, task=probe.task.name, max_tokens=probe.max_tokens, seed=probe.seed)
        return replace(
            known,
            labelled=not plan.votes,
            left_out=plan.left_out + asked - len(probe.prompts),
            generated_tokens=known.generated_tokens + votes.generated_tokens,
            seconds=known.seconds + votes.seconds,
            student_cut=fmean(not r.rollout.stopped for r in students),
            teacher_cut=fmean(not r.rollout.stopped for r in teachers),
            teacher_median_tokens=median_low(len(r.rollout.completion_ids) for r in teachers),
        )

    _continuations(probe, store, list(zip(students, teachers, strict=True)), grid, listener, curve)
    return Measured(probe, store, curve(), students, teachers)


def _with_votes(probe: DecayProbe, plan: Plan, store: Store, listener: Listener) -> DecayProbe:
    """The problems on which the teacher agrees with itself."""
    references = store.references
    missing = [p for p in probe.prompts if p.index not in references.answers]
    asked = len(probe.prompts) * plan.votes
    counter = _Counter(listener, asked, "the teacher's votes", asked - len(missing) * plan.votes)
    for block in _blocks(missing, BLOCK * (probe.batch_size or asked) // plan.votes):
        references += vote(replace(probe, prompts=block, finished=counter.finished), plan.votes, plan.grader)
        store.set_references(references)
    voted = with_references(probe, references.answers)
    if not voted.prompts:
        raise DataError(
            f"no problem can be judged: without prompts.answer_column the teacher's majority answer stands in, and on "
            f"none of {len(probe.prompts)} problems did two of its {plan.votes} responses give the same answer to the "
            f"grader {plan.grader!r}. Set diagnosis.grader to how answers are written, or name prompts.answer_column"
        )
    return voted


def _responses(probe: DecayProbe, store: Store, who: Speaker, listener: Listener) -> list[Response]:
    missing = [p for p in probe.prompts if store.response(who, p) is None]
    counter = _Counter(listener, len(probe.prompts), f"responses of the {who}", len(probe.prompts) - len(missing))
    counting = replace(probe, finished=counter.finished)
    for block in _blocks(missing, BLOCK * (probe.batch_size or len(missing))):
        store.add_responses(who, counting.respond(who, block))
    return [response for p in probe.prompts if (response := store.response(who, p))]


def _continuations(
    probe: DecayProbe,
    store: Store,
    pairs: Sequence[tuple[Response, Response]],
    grid: Sequence[int],
    listener: Listener,
    curve: Callable[[], DecayCurve],
) -> None:
    missing = [pair for pair in pairs if pair[0].rollout.prompt.index not in store.outcomes]
    rows = BLOCK * (probe.batch_size or 2 * len(grid) * len(pairs))

    def generations(some: Sequence[tuple[Response, Response]]) -> int:
        lengths = [len(response.rollout.completion_ids) for pair in some for response in pair]
        return 2 * sum(0 < n < length for length in lengths for n in grid)

    counter = _Counter(listener, generations(pairs), "continuations", generations(pairs) - generations(missing))
    counting = replace(probe, finished=counter.finished)
    for block in _blocks(missing, rows // (2 * len(grid))):  # each engine continues the prefixes of both models
        store.add_outcomes(counting.outcomes([s for s, _ in block], [t for _, t in block], grid))
        known = curve()
        listener.curve(known)
        shown = known.points[:: max(1, (len(known.points) - 1) // 2)]
        readings = ", ".join(f"{p.after_student.mean:.0%} after {p.prefix_tokens}" for p in shown)
        counter.text = f"teacher right: {readings} of the student's tokens"


def _blocks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    size = max(1, size)
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(slots=True)
class _Counter:
    """Counts generations as they end, for a listener."""

    listener: Listener
    total: int
    text: str
    done: int = 0

    def finished(self, rollout: Rollout) -> None:
        self.done += 1
        self.listener.progress(self.done, self.total, self.text)


def _announcement(probe: DecayProbe, plan: Plan) -> str:
    """What is going to be generated at most, and how long that takes at the speed of a short sample."""
    full, prices = plan.setting(probe), Prices.timed(probe, plan.votes)
    longest, problems, lengths = full.max_tokens, full.problems, full.lengths
    gifts = GIFTS * (longest - min(lengths)) if lengths else 0  # at the length that is recommended, if one is
    tokens = problems * (longest * (2 + plan.votes) + 4 * sum(longest - n for n in lengths) + gifts)
    seconds, speeds = prices.whole(full, GIFTS), [x.per_second(prices.batch) for x in (prices.student, prices.teacher)]
    generations = problems * (2 + plan.votes + 4 * len(lengths) + (GIFTS if lengths else 0))
    less = f". --minutes 10 would take {prices.smaller(full, PLANNED * 600)}" if seconds > NOTABLE else ""
    return (
        f"{problems} problems: at most {generations:,} generations and {tokens:,} tokens (fewer where "
        f"responses end before {longest:,}), at most about {duration(seconds)} at {speeds[0]:,.0f} tokens a "
        f"second for the student and {speeds[1]:,.0f} for the teacher{less}"
    )
