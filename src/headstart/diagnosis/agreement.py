"""Reference answers where there are none: what most of the teacher's own responses say.

An accuracy against these measures agreement with the teacher, not truth: a teacher that is wrong with conviction counts
as right, and a student that is right against it as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from headstart.diagnosis.probes import DecayProbe

FEWEST = 2
"""Votes that an answer needs: one alone could be any slip."""


@dataclass(frozen=True, slots=True)
class References:
    """The teacher's majority answer by problem index, None where there is none, and what the votes cost."""

    answers: dict[int, str | None]
    generated_tokens: int
    seconds: float

    def __add__(self, more: References) -> References:
        tokens, seconds = self.generated_tokens + more.generated_tokens, self.seconds + more.seconds
        return References(self.answers | more.answers, tokens, seconds)


def vote(probe: DecayProbe, votes: int, grader: str) -> References:
    """`votes` responses of the teacher to every prompt of `probe`, apart from those that are measured later."""
    responses = probe.respond("teacher", probe.prompts, votes, "votes")
    read = [_plain(r.answer, grader) for r in responses]
    return References(
        answers={p.index: majority(read[k * votes : (k + 1) * votes]) for k, p in enumerate(probe.prompts)},
        generated_tokens=sum(len(r.rollout.completion_ids) for r in responses),
        seconds=sum(r.seconds for r in responses),
    )


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer most often given, if at least two agree on it and no other is given as often."""
    counted = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not counted or counted[0][1] < FEWEST or (len(counted) == 2 and counted[1][1] == counted[0][1]):
        return None
    return counted[0][0]


def with_references(probe: DecayProbe, answers: dict[int, str | None]) -> DecayProbe:
    """The problems that have a reference answer, with it in the place of the missing one."""
    problems = [replace(p, answer=answers.get(index)) for index, p in enumerate(probe.problems)]
    return replace(probe, problems=problems, prompts=[p for p in probe.prompts if answers.get(p.index) is not None])


def _plain(answer: str | None, grader: str) -> str | None:
    # A grader of numbers reports 100 as 1E+2, which it would not read back as a reference.
    return format(Decimal(answer), "f") if answer is not None and grader == "number" else answer
