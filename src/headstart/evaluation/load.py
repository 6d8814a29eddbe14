"""What an evaluation will generate at most, how long that takes, and the smaller one that fits some minutes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from headstart.assemble import cost
from headstart.assemble.pair import Pair
from headstart.assemble.speed import FEWEST, NOTABLE, PLANNED, Speed, duration, fitting, timed
from headstart.assemble.tasks import Questions
from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config
from headstart.interfaces import RolloutEngine
from headstart.models.memory import rows
from headstart.ranks.sharding import division_of
from headstart.records import Prompt

TIMED = 16
"""Rows of a timing that is nobody's work yet."""
UNNOTICED = 600.0
"""Seconds of evaluations that need no warning."""
SHORTEST = 128
"""Responses (tokens) that no advice cuts further."""


@dataclass(frozen=True, slots=True)
class Load:
    """`samples` responses of at most `max_tokens` to each of `problems`, whose prompts have `prompt` tokens on average;
    `batch` are decoded at once."""

    problems: int
    samples: int
    max_tokens: int
    prompt: float
    batch: int

    @classmethod
    def of(cls, questions: Questions, engine: RolloutEngine) -> Load:
        s, prompts = questions.settings, questions.prompts
        batch = s.batch_size or engine.fitting(prompts, s.max_tokens) or len(prompts) * s.samples
        mean = fmean(len(prompt.token_ids) for prompt in prompts)
        return cls(len(prompts), s.samples, s.max_tokens, mean, min(batch, len(prompts) * s.samples))

    def __str__(self) -> str:
        return f"{self.problems} problems x {self.samples} of at most {self.max_tokens:,} tokens"

    def seconds(self, speed: Speed) -> float:
        count = self.problems * self.samples
        return speed.seconds(count, self.max_tokens, self.problems * self.prompt, self.batch)

    def announcement(self, speed: Speed) -> str:
        """What it takes, and beyond half an hour what would take less."""
        seconds, tokens = self.seconds(speed), self.problems * self.samples * self.max_tokens
        text = f"{self}: at most {tokens:,} tokens, at most about {duration(seconds)}"
        text += f" at {speed.per_second(self.batch):,.0f} tokens a second"
        if seconds > NOTABLE:
            fits = self.smaller(lambda load: load.seconds(speed), PLANNED * 600)
            text += f". --minutes 10 would take {fits.problems} problems x {fits.samples} or more"
        return text

    def smaller(self, price: Callable[[Load], float], seconds: float, samples: int = 1) -> Load:
        """The one that fits: fewer problems, down to FEWEST, then fewer samples, down to `samples`."""

        def most(load: Load) -> int:
            return fitting(self.problems, seconds, lambda n: price(replace(load, problems=n)))

        fewest = min(FEWEST, self.problems)
        kept = next((n for n in range(self.samples, samples, -1) if most(replace(self, samples=n)) >= fewest), samples)
        return replace(self, samples=kept, problems=max(1, most(replace(self, samples=kept))))


def cut(questions: Questions, problems: int, samples: int) -> Questions:
    """The first of them, with fewer samples."""
    settings = replace(questions.settings, samples=samples)
    return replace(
        questions, problems=questions.problems[:problems], prompts=questions.prompts[:problems], settings=settings
    )


def warn_of_cost(config: Config, pair: Pair, prompts: Sequence[Prompt], questions: Questions) -> None:
    """Say, before the first step, that the evaluations of a run may take longer than the training they judge.

    Tokens say whether that can be; only then a moment is timed. Nothing is where a step takes all ranks.
    """
    if config.evaluation is None or not pair.runtime.is_main or division_of(pair.student.model) is not None:
        return
    steps, every = config.training.steps, config.evaluation.every
    times = 2 + ((steps - 1) // every if every else 0)
    share = times / pair.runtime.world_size
    horizon = config.horizon.longest or FullHorizon().max_tokens
    prompt, rollouts = fmean(len(p.token_ids) for p in prompts), rows(config, pair.runtime.world_size)[0]
    s, count = questions.settings, len(questions.prompts)
    if share * count * s.samples * s.max_tokens < steps * rollouts * (prompt + horizon):
        return
    speed = timed(pair.engine("student"), questions.prompts, TIMED, s.sampling)
    load = Load.of(questions, pair.engine("student"))
    training = steps * cost.expected(config, pair.runtime.world_size, prompt, horizon, speed, speed)

    def price(some: Load) -> float:
        return share * some.seconds(speed)

    if price(load) < max(training, UNNOTICED):
        return
    smaller = load.smaller(price, max(training, UNNOTICED))
    while smaller.problems < min(FEWEST, count) and smaller.max_tokens > SHORTEST:
        smaller = replace(load, samples=1, max_tokens=smaller.max_tokens // 2).smaller(price, max(training, UNNOTICED))
    warnings.warn(
        f"{times} evaluations of {load} may take {duration(price(load))}, the training they judge about "
        f"{duration(training)}; evaluation.limit={smaller.problems} evaluation.samples={smaller.samples} "
        f"evaluation.max_tokens={smaller.max_tokens} would take at most {duration(price(smaller))}",
        stacklevel=2,
    )
