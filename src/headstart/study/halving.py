"""Successive halving (arXiv 1502.07943) within a budget of seconds: what is planned, who goes on, who is dropped.

Arms (a horizon N and a learning rate) train side by side; after each rung all living arms are graded on the same
problems and draws, and the better third goes on from where it stood. Here is the bookkeeping only; what trains an arm
is handed in as a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headstart.stats import paired_difference

Reason = Literal["behind", "budget", "not finite"]
"""Why an arm was dropped: clearly worse than those that went on, no budget for it, or a loss that is not finite."""
ETA = 3
"""One arm in so many goes on (more while they cannot be told apart), and trains this many times as long."""
LEAST_STEPS, GOOD_STEPS = 10, 40
"""Shortest first rung; the first rung worth having before more than one sample per problem is taken."""
RESERVE = 0.9
"""Share of the budget that is planned away; the rest is for a machine that is slower than it was when timed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and generated tokens."""

    seconds: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.tokens + other.tokens)

    def times(self, n: float) -> Cost:
        return Cost(self.seconds * n, self.tokens * n)


@dataclass(frozen=True, slots=True)
class Prices:
    """What was timed before the plan was made: a step at each horizon and at full length, one evaluation with one
    sample per problem, putting an arm's state away and taking it out again; and what the timing itself cost."""

    step: Mapping[int, Cost]
    full_step: Cost
    evaluation: Cost
    swap: Cost
    timing: Cost


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """One way to train: a horizon (completion tokens) and a learning rate. Sorts by cost, then by caution."""

    tokens: int
    lr: float

    def __str__(self) -> str:
        return f"N = {self.tokens} at lr {self.lr:.2g}"


@dataclass(frozen=True, slots=True)
class Rung:
    """`steps` optimizer steps in all, for the `keep` best arms of the rung before; `room` is how many were planned."""

    steps: int
    keep: int
    room: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Who trains how long, and what that costs at most (`cost`) if no more than `room` arms reach each rung."""

    arms: tuple[Arm, ...]
    rungs: tuple[Rung, ...]
    samples: int
    prices: Prices

    def unit(self, arm: Arm, rung: int) -> Cost:
        """Price of taking one arm through one rung: its steps, its evaluation, its state in and out."""
        before = self.rungs[rung - 1].steps if rung else 0
        training = self.prices.step[arm.tokens].times(self.rungs[rung].steps - before)
        return training + self.prices.evaluation.times(self.samples) + self.prices.swap

    def rung_cost(self, rung: int, arms: Sequence[Arm], most: int) -> Cost:
        """Price of rung `rung` for the `most` dearest of `arms`."""
        units = sorted((self.unit(arm, rung) for arm in arms), key=lambda cost: cost.seconds, reverse=True)
        return sum(units[:most], Cost())

    @property
    def cost(self) -> Cost:
        rungs = (self.rung_cost(number, self.arms, rung.room) for number, rung in enumerate(self.rungs))
        return sum(rungs, Cost())


def grids(horizons: Sequence[int], rates: Sequence[float]) -> tuple[tuple[Arm, ...], ...]:
    """Sets of arms from the fullest to the barest; the first horizon and the first rate are the likeliest.

    Every horizon at every rate; every horizon at the first rate and the first horizon at every rate; every horizon at
    the first rate (at one horizon: every rate). Likelier arms come first, for they are run first.
    """
    cross = [Arm(n, rates[0]) for n in horizons] + [Arm(horizons[0], lr) for lr in rates[1:]]
    rest = [Arm(n, lr) for n in horizons[1:] for lr in rates[1:]]
    barest = cross[: len(horizons)] if len(horizons) > 1 else cross
    return tuple(dict.fromkeys((tuple(cross + rest), tuple(cross), tuple(barest))))


def make_plan(choices: Sequence[Sequence[Arm]], prices: Prices, seconds: float, longest: int) -> Plan | None:
    """The fullest set of arms, and with it the longest rungs, that `seconds` pay for; None when nothing does.

    Nothing is planned beyond `longest` steps. Up to 4 samples per problem are taken where the first rung stays good.
    """
    for arms in choices:
        for samples, least in ((4, GOOD_STEPS), (2, GOOD_STEPS), (1, LEAST_STEPS)):
            low, high = 0, longest  # the cost grows with the first rung's steps: bisection
            while low < high:
                middle = (low + high + 1) // 2
                plan = Plan(tuple(arms), rungs_for(len(arms), middle), samples, prices)
                if plan.rungs[-1].steps <= longest and plan.cost.seconds <= seconds:
                    low = middle
                else:
                    high = middle - 1
            if low >= least:
                return Plan(tuple(arms), rungs_for(len(arms), low), samples, prices)
    return None


def cheapest(choices: Sequence[Sequence[Arm]], prices: Prices) -> Cost:
    """Price of the least pilot there is, for the message that even that is too dear."""
    return Plan(tuple(choices[-1]), rungs_for(len(choices[-1]), LEAST_STEPS), 1, prices).cost


def rungs_for(arms: int, first: int) -> tuple[Rung, ...]:
    """Rungs until a third of a third ... of the arms is no more than three, each three times as long as the last.

    Half as many arms again as must go on are planned for, because arms within noise of each other stay together.
    """
    rungs = [Rung(first, arms, arms)]
    while rungs[-1].keep > ETA:
        keep = math.ceil(rungs[-1].keep / ETA)
        rungs.append(Rung(rungs[-1].steps * ETA, keep, min(rungs[-1].room, math.ceil(1.5 * keep))))
    return tuple(rungs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """An arm after a rung: the share of right answers per problem, in a fixed order (empty when its loss was not
    finite), and what this rung took, training and evaluation together."""

    steps: int
    scores: tuple[float, ...]
    generated_tokens: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return math.fsum(self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True)
class Track:
    """One arm's way through the rungs; `reason` says why it was dropped: behind, budget, or not finite."""

    arm: Arm
    outcomes: tuple[Outcome, ...] = ()
    dropped_after: int | None = None
    reason: Reason | None = None

    @property
    def scores(self) -> tuple[float, ...]:
        return self.outcomes[-1].scores


@dataclass(slots=True)
class Meter:
    """What is left of the seconds. Prices are scaled up once the machine proves slower than they say."""

    seconds: float
    spent: float = 0.0
    priced: float = 0.0

    def affords(self, cost: Cost) -> bool:
        slower = max(1.0, self.spent / self.priced) if self.priced else 1.0
        return self.spent + cost.seconds * slower <= self.seconds

    def pay(self, price: Cost, seconds: float) -> None:
        self.priced += price.seconds
        self.spent += seconds


def halving(plan: Plan, seconds: float, run: Callable[[Arm, int], Outcome]) -> tuple[Track, ...]:
    """Take the arms through the rungs; `run(arm, rung)` trains one on to that rung and grades it.

    After each rung the best third goes on, and with it every arm within noise (paired 95% interval) of the last of
    that third, as far as `seconds` reach. Nothing is begun that its price says will not fit.
    """
    tracks = {arm: Track(arm) for arm in plan.arms}
    meter = Meter(seconds)
    alive = list(plan.arms)

    def drop(arm: Arm, reason: Reason) -> None:
        done = tracks[arm].outcomes
        tracks[arm] = replace(tracks[arm], dropped_after=done[-1].steps if done else 0, reason=reason)

    for number in range(len(plan.rungs)):
        for arm in alive:
            price = plan.unit(arm, number)
            if not meter.affords(price):
                drop(arm, "budget")
                continue
            outcome = run(arm, number)
            meter.pay(price, outcome.seconds)
            tracks[arm] = replace(tracks[arm], outcomes=(*tracks[arm].outcomes, outcome))
            if not outcome.scores:
                drop(arm, "not finite")
        ranked = rank([track for track in tracks.values() if track.arm in alive and track.reason is None])
        if number + 1 == len(plan.rungs):
            break
        alive = _go_on(plan, number + 1, ranked, meter, drop)
    return tuple(tracks.values())


def rank(tracks: Sequence[Track]) -> list[Track]:
    """The most accurate first; of equals the cheaper, then the gentler."""
    return sorted(tracks, key=lambda track: (-track.outcomes[-1].accuracy, track.arm))


def _go_on(
    plan: Plan, rung: int, ranked: Sequence[Track], meter: Meter, drop: Callable[[Arm, Reason], None]
) -> list[Arm]:
    """The arms that enter `rung`, best first; the others are dropped."""
    keep = plan.rungs[rung].keep
    kept = [track.arm for track in ranked[:keep]]
    for track in ranked[keep:]:
        if not within_noise(ranked[keep - 1].scores, track.scores):
            drop(track.arm, "behind")
            continue
        arms = [*kept, track.arm]
        later = (plan.rung_cost(n, arms, plan.rungs[n].keep) for n in range(rung + 1, len(plan.rungs)))
        if meter.affords(sum(later, plan.rung_cost(rung, arms, len(arms)))):
            kept = arms
        else:
            drop(track.arm, "budget")
    return kept


def within_noise(better: Sequence[float], other: Sequence[float], z: float = 1.96) -> bool:
    """Whether `other` may be as good: the paired interval of the difference reaches zero."""
    return paired_difference(better, other, z)[1][0] <= 0.0
