"""The setting of a diagnosis that fits the minutes it is given: arithmetic over timed speeds, and a clock."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from headstart.assemble.speed import PLANNED, READING, Speed, width
from headstart.diagnosis.curve import default_grid
from headstart.diagnosis.probes import GIFTS, SPEAKERS, DecayProbe

FEWEST = 8
"""Problems below which the grid is thinned, and then responses are shortened, instead."""
SHORTEST = 32
"""Responses (tokens) that are not shortened further."""
SPARSE = (4, 2)
"""Prefix lengths of a thinned grid."""
FEW_GIFTS = 2
"""Continuations of a gift that time is kept for; more (at most GIFTS) where some is left."""
EXPECTED = 1.25
"""Tokens that a continued response is expected to have at most, over the mean of the models' own."""
STORED = 0.5
"""Less than this share of the time they should have taken: responses that were stored before, and say nothing."""


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
    """Seconds of the parts of a diagnosis, at most. `prompt` is the mean prompt in tokens, `votes` a problem's;
    `drag` is what the work took so far over what it should have."""

    student: Speed
    teacher: Speed
    batch: int
    prompt: float
    votes: int
    drag: float = 1.0

    @classmethod
    def timed(cls, probe: DecayProbe, votes: int) -> Prices:
        batch = probe.batch_size or max(1, len(probe.prompts))
        student, teacher = (probe.speed(who, batch) for who in SPEAKERS)
        return cls(student, teacher, batch, fmean(len(p.token_ids) for p in probe.prompts), votes)

    def own(self, s: Setting) -> float:
        """Both models' own responses, and the votes."""
        read = s.problems * self.prompt
        rows = ((self.student, s.problems), (self.teacher, s.problems), (self.teacher, s.problems * self.votes))
        return self.drag * sum(speed.seconds(n, s.max_tokens, read, self.batch) for speed, n in rows)

    def continuations(self, s: Setting) -> float:
        """Both models' continuations of both models' prefixes."""
        lengths = [n for n in s.lengths if n < s.max_tokens]
        if not lengths:
            return 0.0
        rows, read = 2 * s.problems * len(lengths), 2 * s.problems * sum(self.prompt + n for n in lengths)
        tokens, longest = s.max_tokens - fmean(lengths), s.max_tokens - min(lengths)
        speeds = (self.student, self.teacher)
        return self.drag * sum(speed.seconds(rows, tokens, read, self.batch, longest) for speed in speeds)

    def ending(self, s: Setting, gifts: int = FEW_GIFTS) -> float:
        """The position readings, and `gifts` continuations a problem at one length."""
        reading = READING * s.problems * (self.prompt + s.max_tokens) * (self.student.encoded + self.teacher.encoded)
        first = min((n for n in s.lengths if n < s.max_tokens), default=s.max_tokens)
        tails = self.student.seconds(
            s.problems * gifts, s.max_tokens - first, s.problems * (self.prompt + first), self.batch
        )
        return self.drag * (reading + tails)

    def whole(self, s: Setting, gifts: int = FEW_GIFTS) -> float:
        return self.own(s) + self.continuations(s) + self.ending(s, gifts)

    def smaller(self, full: Setting, seconds: float) -> Setting:
        """The setting that fits: fewer problems, then a sparser grid, then shorter responses, each only as far as it
        must. Where nothing does, the smallest."""
        fewest = min(FEWEST, full.problems)

        def most(s: Setting) -> int:
            counts = range(1, full.problems + 1)
            return bisect_right(counts, seconds, key=lambda n: self.whole(replace(s, problems=n)))

        def short(tokens: int) -> Setting:
            kept = tuple(n for n in full.lengths if n < tokens)
            lengths = kept if len(kept) >= min(SPARSE) else default_grid(tokens)[1:-1]
            return Setting(fewest, thinned(lengths, min(SPARSE)), tokens)

        for count in (len(full.lengths), *SPARSE):
            sparser = replace(full, lengths=thinned(full.lengths, count))
            if (problems := most(sparser)) >= fewest:
                return replace(sparser, problems=problems)
        lengths = range(min(SHORTEST, full.max_tokens), full.max_tokens + 1)
        fitting = bisect_right(lengths, seconds, key=lambda n: self.whole(short(n)))
        chosen = short(lengths[max(0, fitting - 1)])
        return replace(chosen, problems=max(1, min(fewest, most(chosen))))


def thinned(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the lengths, spread over them."""
    if len(lengths) <= count:
        return tuple(lengths)
    return tuple(lengths[int((i + 0.5) * len(lengths) / count)] for i in range(count))


@dataclass(slots=True)
class Clock:
    """The minutes of a diagnosis, and what its parts take: how many problems more, before it has to end.

    Whole problems are left out, from the end of their order, never those that take long.
    """

    end: float
    prices: Prices
    setting: Setting

    @classmethod
    def start(cls, end: float, prices: Prices, full: Setting) -> Clock:
        clock = cls(end, prices, full)
        clock.setting = prices.smaller(full, clock.left)
        return clock

    @property
    def left(self) -> float:
        """Seconds that may be planned."""
        return PLANNED * (self.end - time.monotonic())

    def __str__(self) -> str:
        known = f"{self.setting.problems} tell an accuracy to ±{width(self.setting.problems)} points"
        return f"{self.setting}, then more problems while there is time ({known})"

    def first(self, asked: int) -> int:
        """Problems of the first block: half of those that fit, so that what they take corrects the plan."""
        planned = self.prices.smaller(replace(self.setting, problems=asked), self.left).problems if asked else 0
        return min(planned, max(FEWEST, planned // 2))

    def affordable(self, done: int, lengths: Sequence[int], seconds: float) -> int:
        """How many problems, whose own responses have these `lengths` and took `seconds`, can be finished too."""
        s = replace(self.setting, problems=len(lengths) // 2, max_tokens=round(fmean(lengths)))
        took = seconds / self.prices.own(s) * self.prices.drag
        if took > STORED:
            self.prices = replace(self.prices, drag=max(1.0, took))
        s = replace(s, max_tokens=min(self.setting.max_tokens, round(EXPECTED * fmean(lengths))))

        def ended(n: int) -> float:
            continued = self.prices.continuations(replace(s, problems=n))
            return continued + self.prices.ending(replace(s, problems=done + n))

        return max(1, bisect_right(range(1, s.problems + 1), self.left, key=ended))

    def more(self, done: int, size: int, seconds: float) -> int:
        """Problems of the next block, after one of `size` that took `seconds`: fewer need more time each."""

        def ended(n: int) -> float:
            block = seconds * (0.5 + 0.5 * n / size)
            return block + self.prices.ending(replace(self.setting, problems=done + n))

        n = bisect_right(range(1, size + 1), self.left, key=ended)
        return n if n >= max(1, size // 4) else 0

    def gifts(self, problems: int, max_tokens: int) -> int:
        """Continuations a problem at the recommended length: as many as there is time for, 0 for none."""
        s = replace(self.setting, problems=problems, max_tokens=max_tokens)
        reading = self.prices.ending(s, 0)
        fitting = (n for n in (GIFTS, GIFTS // 2, FEW_GIFTS) if self.prices.ending(s, n) - reading <= self.left)
        return next(fitting, 0)
