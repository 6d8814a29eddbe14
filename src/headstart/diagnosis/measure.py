"""The whole measurement, block by block into a ledger: its cost announced, readable while it goes on, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headstart.assemble.pair import Speaker
from headstart.diagnosis.agreement import References, vote, with_references
from headstart.diagnosis.damage import Plateau, plateau
from headstart.diagnosis.decay import DecayCurve, decay_curve, default_grid
from headstart.diagnosis.ledger import Ledger
from headstart.diagnosis.probes import GIFTS, SPEAKERS, DecayProbe, Response
from headstart.errors import DataError
from headstart.interfaces import OnProgress, silent
from headstart.records import Rollout

BLOCK = 4
"""Batches between two writes: work lost to a kill, against idle places at the end of each block."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of the progress: `progress` (done, total, live reading), `say` a line for the reader, `curve` what is
    known after each block."""

    progress: OnProgress = silent
    say: Callable[[str], None] = lambda text: None
    curve: Callable[[DecayCurve], None] = lambda curve: None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked beside the probe: `grid` None is the default one; `votes` 0 where there are reference answers, and
    `grader` reads those that are voted on."""

    grid: tuple[int, ...] | None
    votes: int
    grader: str
    left_out: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The curve, and both models' own responses to its problems, in one order."""

    probe: DecayProbe
    ledger: Ledger
    curve: DecayCurve
    students: list[Response]
    teachers: list[Response]

    def plateau(self, tokens: int) -> Plateau:
        """What the student reaches with the teacher's first `tokens` tokens; measured once, then read."""
        gifts = self.ledger.gifts(tokens)
        if gifts is None:
            gifts = self.probe.gifts(self.teachers, tokens)
            self.ledger.add_gifts(tokens, gifts)
        # Continuing its own prefix is the teacher's own accuracy again: every control point is a further sample of it.
        outcomes = [self.ledger.outcomes[t.rollout.prompt.index] for t in self.teachers]
        return plateau(tokens, [sum(p.after_own for p in o.points) / len(o.points) for o in outcomes], gifts)


def measure(probe: DecayProbe, plan: Plan, ledger: Ledger, listener: Listener) -> Measured:
    """The curve of every prompt of `probe`.

    What the ledger holds is not measured again, and no number depends on where an earlier run stopped. Raises DataError
    when no problem can be judged.
    """
    if not ledger.is_whole(probe.prompts):
        listener.say(_announcement(probe, plan))
    asked = len(probe.prompts)
    spent_tokens, spent_seconds = 0, 0.0
    if plan.votes:
        probe, spent_tokens, spent_seconds = _with_votes(probe, plan, ledger, listener)
    left_out = plan.left_out + asked - len(probe.prompts)
    students = _responses(probe, ledger, "student", listener)
    teachers = _responses(probe, ledger, "teacher", listener)
    lengths = sorted(len(r.rollout.completion_ids) for r in students)
    grid = plan.grid or default_grid(lengths[(len(lengths) - 1) // 2])

    def curve() -> DecayCurve:
        found = decay_curve(
            [ledger.outcomes[p.index] for p in probe.prompts if p.index in ledger.outcomes],
            task=probe.task.name,
            max_tokens=probe.max_tokens,
            labelled=not plan.votes,
            left_out=left_out,
            seed=probe.seed,
        )
        tokens, seconds = found.generated_tokens + spent_tokens, found.seconds + spent_seconds
        return replace(found, generated_tokens=tokens, seconds=seconds)

    _continuations(probe, ledger, (students, teachers), grid, listener, curve)
    return Measured(probe, ledger, curve(), students, teachers)


def _with_votes(probe: DecayProbe, plan: Plan, ledger: Ledger, listener: Listener) -> tuple[DecayProbe, int, float]:
    """The problems on which the teacher agrees with itself, and what its votes cost (tokens, seconds)."""
    references = ledger.references() or References({}, 0, 0.0)
    missing = [p for p in probe.prompts if p.index not in references.answers]
    asked = len(probe.prompts) * plan.votes
    counter = _Counter(listener, asked, "the teacher's votes", asked - len(missing) * plan.votes)
    size = max(1, BLOCK * (probe.batch_size or asked) // plan.votes)
    for start in range(0, len(missing), size):
        block = replace(probe, prompts=missing[start : start + size], finished=counter.finished)
        references += vote(block, plan.votes, plan.grader)
        ledger.add_references(references)
    voted = with_references(probe, references.answers)
    if not voted.prompts:
        raise DataError(
            f"no problem can be judged: without prompts.answer_column the teacher's majority answer stands in, and on "
            f"none of {len(probe.prompts)} problems did two of its {plan.votes} responses give the same answer to the "
            f"grader {plan.grader!r}. Set diagnosis.grader to how answers are written, or name prompts.answer_column"
        )
    return voted, references.generated_tokens, references.seconds


def _responses(probe: DecayProbe, ledger: Ledger, who: Speaker, listener: Listener) -> list[Response]:
    missing = [p for p in probe.prompts if ledger.response(who, p) is None]
    size = BLOCK * (probe.batch_size or len(missing) or 1)
    counter = _Counter(listener, len(probe.prompts), f"responses of the {who}", len(probe.prompts) - len(missing))
    counting = replace(probe, finished=counter.finished)
    for start in range(0, len(missing), size):
        ledger.add_responses(who, counting.respond(who, missing[start : start + size]))
    found = [ledger.response(who, p) for p in probe.prompts]
    return [response for response in found if response is not None]


def _continuations(
    probe: DecayProbe,
    ledger: Ledger,
    own: tuple[Sequence[Response], Sequence[Response]],
    grid: Sequence[int],
    listener: Listener,
    curve: Callable[[], DecayCurve],
) -> None:
    pairs = list(zip(*own, strict=True))
    missing = [pair for pair in pairs if pair[0].rollout.prompt.index not in ledger.outcomes]
    rows = BLOCK * (probe.batch_size or 2 * len(grid) * len(pairs))
    size = max(1, rows // (2 * len(grid)))  # each engine continues the prefixes of both models

    def generations(some: Sequence[tuple[Response, Response]]) -> int:
        lengths = [len(response.rollout.completion_ids) for pair in some for response in pair]
        return 2 * sum(0 < n < length for length in lengths for n in grid)

    counter = _Counter(listener, generations(pairs), "continuations", generations(pairs) - generations(missing))
    counting = replace(probe, finished=counter.finished)
    for start in range(0, len(missing), size):
        block = missing[start : start + size]
        ledger.add_outcomes(counting.outcomes([s for s, _ in block], [t for _, t in block], grid))
        known = curve()
        listener.curve(known)
        counter.text = _live(known)


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


def _live(curve: DecayCurve) -> str:
    shown = curve.points[:: max(1, (len(curve.points) - 1) // 2)]
    readings = ", ".join(f"{p.after_student.mean:.0%} after {p.prefix_tokens}" for p in shown)
    return f"teacher right: {readings} of the student's tokens"


def _announcement(probe: DecayProbe, plan: Plan) -> str:
    """What is going to be generated at most, and how long that takes at the speed of a short sample."""
    longest, problems = probe.max_tokens, len(probe.prompts)
    lengths = [n for n in plan.grid or default_grid(longest) if 0 < n < longest]
    continued = sum(longest - n for n in lengths)
    own = problems * (longest + 2 * continued)
    gifts = GIFTS * (longest - min(lengths)) if lengths else 0  # at the length that is recommended, if one is
    tokens = {"student": own + problems * gifts, "teacher": own + problems * plan.votes * longest}
    speed = {who: probe.tokens_per_second(who) for who in SPEAKERS}
    seconds = sum(tokens[who] / speed[who] for who in SPEAKERS)
    generations = problems * (2 + plan.votes + 4 * len(lengths) + (GIFTS if lengths else 0))
    return (
        f"{problems} problems: at most {generations:,} generations and {sum(tokens.values()):,} tokens (fewer where "
        f"responses end before {longest:,}), at most about {_duration(seconds)} at {speed['student']:,.0f} tokens a "
        f"second for the student and {speed['teacher']:,.0f} for the teacher"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
