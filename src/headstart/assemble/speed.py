"""What generating will take, before it is done: how fast an engine is, timed in a moment at the batch of the work.

A decoding step takes a while whatever it decodes (weights are read once), and a little more for each row; encoding a
prompt is a third kind of work. A speed measured in rows of one batch says little of another: on two cores a model of
135 M decodes 17 tokens a second alone and 150 in a batch of 64.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headstart.interfaces import OnProgress, RolloutEngine
from headstart.records import Prompt, Sampling
from headstart.stats import Z95

T = TypeVar("T")

STEPS = 8
"""Decoding steps of a timing; one where a short call takes SLOW seconds."""
SLOW = 2.0
ENCODED = 400
"""Prompt tokens of the timing that encodes, about."""
PLANNED = 0.85
"""Share of the time left that is planned: machines are slower at times, and grading takes some."""
READING = 3.0
"""Seconds of reading both models' distributions at a token, over those of encoding it."""
FEWEST = 8
"""Problems below which something else is left out instead."""
NOTABLE = 1800.0
"""Seconds from which an announcement names the setting that takes less."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of a decoding step, of each row in it, and of each token of a prompt."""

    step: float
    row: float
    encoded: float

    def seconds(self, rows: int, tokens: float, encoded: float, batch: int, longest: float | None = None) -> float:
        """`rows` responses of `tokens` tokens on average, at most `batch` at once, after `encoded` prompt tokens in
        all; `longest` where one is longer than they are on average."""
        steps = max(longest or tokens, rows * tokens / batch) if rows else 0.0
        return self.step * steps + self.row * rows * tokens + self.encoded * encoded

    def per_second(self, batch: int) -> float:
        return batch / (self.step + self.row * batch)


def timed(engine: RolloutEngine, prompts: Sequence[Prompt], batch: int, sampling: Sampling) -> Speed:
    """The speed of `engine`: from one prompt with one row and with `batch` rows, and from encoding some prompts.

    A step is the difference of two timings, so that encoding and what every call costs once are no part of it.
    """

    def clock(some: Sequence[Prompt], samples: int, tokens: int) -> tuple[float, int]:
        start = time.perf_counter()
        rollouts = engine.generate(
            some, samples=samples, max_tokens=tokens, sampling=sampling, key=(0, "timing", 0), batch_size=batch
        )
        return time.perf_counter() - start, max(len(r.completion_ids) for r in rollouts)

    def again(some: Sequence[Prompt], samples: int, tokens: int) -> tuple[float, int]:
        first = clock(some, samples, tokens)  # may compile, capture or allocate
        return min(first, clock(some, samples, tokens)) if first[0] < SLOW else first

    def step(rows: int) -> float:
        short, few = again(some[:1], rows, 2)
        long, many = clock(some[:1], rows, 2 + (STEPS if short < SLOW else 1))
        return max(long - short, 0.0) / max(1, many - few)

    some = sorted(prompts, key=lambda prompt: len(prompt.token_ids))[len(prompts) // 2 :]
    some = some[: 1 + ENCODED // len(some[0].token_ids)]
    alone = step(1)
    together = step(batch) if batch > 1 else alone
    seconds = again(some, 1, 1)[0] - (again(some[:1], 1, 1)[0] if some[1:] else 0.0)
    encoded = max(seconds, 0.0) / sum(len(prompt.token_ids) for prompt in some[1:] or some)
    row = max(0.0, together - alone) / max(1, batch - 1)
    return Speed(max(alone - row, 1e-6), row, encoded)


def fitting(problems: int, seconds: float, price: Callable[[int], float]) -> int:
    """How many of the problems fit into `seconds`, by the price of the first n of them."""
    return bisect_right(range(1, problems + 1), seconds, key=price)


def growing(first: int, asked: int, end: float, work: Callable[[int], T], tail: float = 0.0) -> T:
    """`work` on the first of the `asked` problems, then on more of them while there is time until `end` (seconds of the
    monotonic clock): whole problems from the front, whatever they take. `tail` seconds a problem come after it."""
    done = size = first
    while True:
        start = time.monotonic()
        result = work(done)
        now = time.monotonic()
        share = (PLANNED * (end - now) - tail * done) / (now - start + tail * size)
        size = min(int(share * size), asked - done)
        if share < 0.5 or not size:
            return result
        done += size


def elapsed(progress: OnProgress, end: float, minutes: float) -> OnProgress:
    """Progress in the seconds that are given, which is what there is an end of."""
    whole = round(60 * minutes)

    def passed(done: int, total: int, text: str = "", /) -> None:
        progress(min(whole, max(0, round(whole - end + time.monotonic()))), whole, text)

    return passed


def width(problems: int) -> int:
    """Half of a 95% interval of a share near one half, in points."""
    return round(50 * Z95 / math.sqrt(problems))


def duration(seconds: float) -> str:
    """In words, for a plan."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:,.1f} days"
