"""The setting of a diagnosis that fits the minutes it is given: arithmetic over timed speeds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from headstart.assemble.speed import FEWEST, READING, Speed, fitting
from headstart.diagnosis.curve import default_grid
from headstart.diagnosis.probes import SPEAKERS, DecayProbe

SHORTEST = 32
"""Responses (tokens) that are not shortened further."""
SPARSE = (4, 2)
"""Prefix lengths of a thinned grid."""
FEW_GIFTS = 2
"""Continuations of a gift that time is kept for; GIFTS where it is left."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides the cost: `lengths` are those of the prefixes, in tokens like `max_tokens`."""

    problems: int
    lengths: tuple[int, ...]
    max_tokens: int

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.lengths)) or "none"
        return f"{self.problems} problems, prefixes of {lengths} tokens, responses of at most {self.max_tokens:,}"


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of the parts of a diagnosis, at most. `prompt` is the mean prompt in tokens, `votes` a problem's."""

    student: Speed
    teacher: Speed
    batch: int
    prompt: float
    votes: int

    @classmethod
    def timed(cls, probe: DecayProbe, votes: int) -> Prices:
        batch = probe.batch_size or max(1, len(probe.prompts))
        student, teacher = (probe.speed(who, batch) for who in SPEAKERS)
        return cls(student, teacher, batch, fmean(len(p.token_ids) for p in probe.prompts), votes)

    def measuring(self, s: Setting) -> float:
        """Own responses and votes, and both models' continuations of both models' prefixes."""
        lengths = [n for n in s.lengths if n < s.max_tokens]
        own = [(self.student, s.problems), (self.teacher, s.problems), (self.teacher, s.problems * self.votes)]
        seconds = sum(x.seconds(n, s.max_tokens, s.problems * self.prompt, self.batch) for x, n in own)
        if not lengths:
            return seconds
        rows, read = 2 * s.problems * len(lengths), 2 * s.problems * sum(self.prompt + n for n in lengths)
        tokens, longest = s.max_tokens - fmean(lengths), s.max_tokens - min(lengths)
        return seconds + sum(x.seconds(rows, tokens, read, self.batch, longest) for x in (self.student, self.teacher))

    def ending(self, s: Setting, gifts: int = FEW_GIFTS) -> float:
        """The position readings, and `gifts` continuations a problem at one length."""
        reading = READING * s.problems * (self.prompt + s.max_tokens) * (self.student.encoded + self.teacher.encoded)
        first = min(s.lengths, default=0)
        read = s.problems * (self.prompt + first)
        return reading + self.student.seconds(s.problems * gifts, max(0, s.max_tokens - first), read, self.batch)

    def whole(self, s: Setting, gifts: int = FEW_GIFTS) -> float:
        return self.measuring(s) + self.ending(s, gifts)

    def smaller(self, full: Setting, seconds: float) -> Setting:
        """The setting that fits: fewer problems, then a sparser grid, then shorter responses, each only as far as it
        must. Where nothing does, the smallest."""
        fewest = min(FEWEST, full.problems)

        def most(s: Setting) -> int:
            return fitting(full.problems, seconds, lambda n: self.whole(replace(s, problems=n)))

        def short(tokens: int) -> Setting:
            kept = tuple(n for n in full.lengths if n < tokens)
            lengths = kept if len(kept) >= min(SPARSE) else default_grid(tokens)[1:-1]
            return Setting(fewest, thinned(lengths, min(SPARSE)), tokens)

        for count in (len(full.lengths), *SPARSE):
            sparser = replace(full, lengths=thinned(full.lengths, count))
            if (problems := most(sparser)) >= fewest:
                return replace(sparser, problems=problems)
        lengths = range(min(SHORTEST, full.max_tokens), full.max_tokens + 1)
        fit = bisect_right(lengths, seconds, key=lambda n: self.whole(short(n)))
        chosen = short(lengths[max(0, fit - 1)])
        return replace(chosen, problems=max(1, min(fewest, most(chosen))))


def thinned(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the lengths, spread over them."""
    if len(lengths) <= count:
        return tuple(lengths)
    return tuple(lengths[int((i + 0.5) * len(lengths) / count)] for i in range(count))
