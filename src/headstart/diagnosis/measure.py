"""The whole measurement, block by block into its store: cost announced first, readable while it runs, resumable."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TypeVar

from headstart.assemble.pair import Speaker
from headstart.assemble.speed import NOTABLE, PLANNED, duration
from headstart.diagnosis.budget import Clock, Prices, Setting
from headstart.diagnosis.curve import DecayCurve, Plateau, decay_curve, default_grid, plateau
from headstart.diagnosis.ledger import Store
from headstart.diagnosis.probes import GIFTS, SPEAKERS, DecayProbe, Response, vote, with_references
from headstart.errors import DataError
from headstart.interfaces import OnProgress, silent
from headstart.records import Prompt

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


@dataclass(slots=True)
class Measured:
    """The curve, and both models' own responses to its problems, in one order."""

    probe: DecayProbe
    store: Store
    students: list[Response]
    teachers: list[Response]
    curve: DecayCurve = field(init=False)

    def plateau(self, tokens: int, listener: Listener, samples: int = GIFTS) -> Plateau | None:
        """What the student reaches with the teacher's first `tokens` tokens; measured once, then read. None without
        `samples`."""
        gifts = self.store.gifts(tokens)
        if gifts is None:
            if not samples:
                return None
            counting = _counting(self.probe, listener, len(self.teachers) * samples, f"gifts of {tokens} tokens")
            gifts = counting.gifts(self.teachers, tokens, samples)
            self.store.set_gifts(tokens, gifts)
        # Continuing its own prefix is the teacher's own accuracy again: every control point is a further sample of it.
        outcomes = [self.store.outcomes[t.rollout.prompt.index] for t in self.teachers]
        return plateau(tokens, [sum(p.after_own for p in o.points) / len(o.points) for o in outcomes], gifts)


def measure(probe: DecayProbe, plan: Plan, store: Store, listener: Listener, clock: Clock | None = None) -> Measured:
    """The curve of every prompt of `probe`; with a `clock` of the first ones, as many as there is time for.

    What the store holds is not measured again, and no number depends on where an earlier run stopped. Raises DataError
    when no problem can be judged.
    """
    left = store.missing(probe.prompts)
    known = {p.index for p in left}
    tried = [p for p in probe.prompts if p.index not in known]
    if left and clock is None:
        listener.say(announcement(probe, plan, Prices.timed(probe, plan.votes)))
    size = clock.first(len(left)) if clock else len(left)
    while True:
        start, before = time.monotonic(), len(tried)
        tried, left = tried + left[:size], left[size:]
        measured = _answered(probe, tried, plan, store, listener)
        if clock and (back := _unaffordable(measured, clock, time.monotonic() - start)):
            first = tried.index(back[0])
            tried, left = tried[:first], tried[first:] + left
            measured = _answered(probe, tried, plan, store, listener)
        _continuations(measured, plan, listener, len(tried))
        done = len(tried) - before
        size = clock.more(len(measured.students), done, time.monotonic() - start) if clock and left and done else 0
        if not size:
            return measured


def _answered(probe: DecayProbe, tried: Sequence[Prompt], plan: Plan, store: Store, listener: Listener) -> Measured:
    """Both models' own responses to those of the prompts that can be judged."""
    probe = replace(probe, prompts=tried)
    if plan.votes and tried:
        probe = _with_votes(probe, plan, store, listener)
    students, teachers = (_responses(probe, store, who, listener) for who in SPEAKERS)
    return Measured(probe, store, students, teachers)


def _unaffordable(measured: Measured, clock: Clock, seconds: float) -> Sequence[Prompt]:
    """The last problems, which there is no time to finish."""
    new = measured.store.missing(measured.probe.prompts)
    done = len(measured.students) - len(new)
    lengths = [len(r.rollout.completion_ids) for r in (*measured.students[done:], *measured.teachers[done:])]
    return new[clock.affordable(done, lengths, seconds) :] if new else ()


def _with_votes(probe: DecayProbe, plan: Plan, store: Store, listener: Listener) -> DecayProbe:
    """The problems on which the teacher agrees with itself."""
    references = store.references
    missing = [p for p in probe.prompts if p.index not in references.answers]
    asked = len(probe.prompts) * plan.votes
    counting = _counting(probe, listener, asked, "the teacher's votes", asked - len(missing) * plan.votes)
    for block in _blocks(missing, BLOCK * (probe.batch_size or asked) // plan.votes):
        references += vote(replace(counting, prompts=block), plan.votes, plan.grader)
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
    asked = len(probe.prompts)
    counting = _counting(probe, listener, asked, f"responses of the {who}", asked - len(missing))
    for block in _blocks(missing, BLOCK * (probe.batch_size or len(missing))):
        store.add_responses(who, counting.respond(who, block))
    return [response for p in probe.prompts if (response := store.response(who, p))]


def _continuations(measured: Measured, plan: Plan, listener: Listener, tried: int) -> None:
    """Every prefix finished by both, with what is known of the curve after each block."""
    probe, store = measured.probe, measured.store
    pairs = list(zip(measured.students, measured.teachers, strict=True))
    lengths = sorted(len(s.rollout.completion_ids) for s in measured.students)
    grid = plan.grid or default_grid(lengths[(len(lengths) - 1) // 2])
    missing = [pair for pair in pairs if pair[0].rollout.prompt.index not in store.outcomes]
    rows = BLOCK * (probe.batch_size or 2 * len(grid) * len(pairs))

    def generations(some: Sequence[tuple[Response, Response]]) -> int:
        lengths = [len(response.rollout.completion_ids) for pair in some for response in pair]
        return 2 * sum(0 < n < length for length in lengths for n in grid)

    total = generations(pairs)
    text = "continuations"
    done = total - generations(missing)
    for block in _blocks(missing, rows // (2 * len(grid))):  # each engine continues the prefixes of both models
        counting = _counting(probe, listener, total, text, done)
        store.add_outcomes(counting.outcomes([s for s, _ in block], [t for _, t in block], grid))
        done += generations(block)
        known = measured.curve = _curve(measured, plan, tried)
        listener.curve(known)
        shown = known.points[:: max(1, (len(known.points) - 1) // 2)]
        readings = ", ".join(f"{p.after_student.mean:.0%} after {p.prefix_tokens}" for p in shown)
        text = f"teacher right: {readings} of the student's tokens"
    measured.curve = _curve(measured, plan, tried)


def _curve(measured: Measured, plan: Plan, tried: int) -> DecayCurve:
    probe, votes, outcomes = measured.probe, measured.store.references, measured.store.outcomes
    done = [outcomes[p.index] for p in probe.prompts if p.index in outcomes]
    known = decay_curve(done, task=probe.task.name, max_tokens=probe.max_tokens, seed=probe.seed)
    cut = [
        fmean(not r.rollout.stopped for r in responses if r.rollout.prompt.index in outcomes)
        for responses in (measured.students, measured.teachers)
    ]
    return replace(
        known,
        labelled=not plan.votes,
        left_out=plan.left_out + tried - len(probe.prompts),
        generated_tokens=known.generated_tokens + votes.generated_tokens,
        seconds=known.seconds + votes.seconds,
        student_cut=cut[0],
        teacher_cut=cut[1],
    )


def _blocks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    size = max(1, size)
    return (items[start : start + size] for start in range(0, len(items), size))


def _counting(probe: DecayProbe, listener: Listener, total: int, text: str, done: int = 0) -> DecayProbe:
    """`probe`, whose generations are counted for the listener as they end."""
    count = itertools.count(done + 1)
    return replace(probe, finished=lambda rollout: listener.progress(next(count), total, text))


def announcement(probe: DecayProbe, plan: Plan, prices: Prices) -> str:
    """What is going to be generated at most, and how long that takes at the speed of a short sample."""
    full = plan.setting(probe)
    problems, lengths, longest = full.problems, full.lengths, full.max_tokens
    # Gifts are at the length that is recommended, if one is.
    own = longest * (2 + plan.votes) + 4 * sum(longest - n for n in lengths)
    tokens = problems * (own + (GIFTS * (longest - min(lengths)) if lengths else 0))
    generations = problems * (2 + plan.votes + 4 * len(lengths) + (GIFTS if lengths else 0))
    seconds = prices.whole(full, GIFTS)
    speeds = [speed.per_second(prices.batch) for speed in (prices.student, prices.teacher)]
    text = (
        f"{problems} problems: at most {generations:,} generations and {tokens:,} tokens (fewer where "
        f"responses end before {longest:,}), at most about {duration(seconds)} at {speeds[0]:,.0f} tokens a "
        f"second for the student and {speeds[1]:,.0f} for the teacher"
    )
    if seconds > NOTABLE:
        text += f". --minutes 10 would take {prices.smaller(full, PLANNED * 600)}"
    return text
