"""Successive halving (arXiv 1502.07943) within a budget of seconds: what is planned, which arms stay, which one wins.

An arm is a horizon N with a learning rate. After each rung all arms still in are graded on the same problems and draws,
and the best third trains on from where it stood. How an arm is trained is passed in as a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from headstart.stats import Estimate, mean_interval, paired_difference

Reason = Literal["behind", "budget", "not finite"]
"""Why an arm was dropped: clearly worse than those that were kept, no budget for it, or a loss that is not finite."""
ETA = 3
"""The best 1/ETA of the arms is kept (more where they are within noise) and trains ETA times as long."""
LEAST_STEPS, GOOD_STEPS = 10, 40
"""Shortest first rung; the first rung worth having before more than one sample per problem is taken."""
RESERVE = 0.9
"""Share of the budget that is planned; the rest is for a machine that is slower than it was when timed."""


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
    """What was timed before planning: a step at each horizon and at full length, one evaluation with one sample per
    problem, starting an arm and keeping its checkpoint (`overhead`); and what the timing itself cost."""

    step: dict[int, Cost]
    full_step: Cost
    evaluation: Cost
    overhead: Cost
    timing: Cost


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """A horizon (completion tokens) and a learning rate. Sorts by cost, then by caution."""

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
    """Which arms train how long, and what that costs at most (`cost`) if no more than `room` arms reach each rung. Each
    arm is graded with `samples` per problem after each rung, and the untrained student once."""

    arms: tuple[Arm, ...]
    rungs: tuple[Rung, ...]
    samples: int
    prices: Prices

    @property
    def grading(self) -> Cost:
        return self.prices.evaluation.times(self.samples)

    @property
    def start(self) -> Cost:
        """Price of grading the untrained student; with one sample that is part of the timing."""
        return self.grading if self.samples > 1 else Cost()

    def before(self, rung: int) -> int:
        """Steps that an arm has behind it when it enters a rung."""
        return self.rungs[rung - 1].steps if rung else 0

    def unit(self, arm: Arm, rung: int) -> Cost:
        """Price of taking one arm through one rung: its steps, its evaluation, its overhead."""
        training = self.prices.step[arm.tokens].times(self.rungs[rung].steps - self.before(rung))
        return training + self.grading + self.prices.overhead

    def rung_cost(self, rung: int, arms: Iterable[Arm], most: int) -> Cost:
        """Price of rung `rung` for the `most` expensive of `arms`."""
        units = sorted((self.unit(arm, rung) for arm in arms), key=lambda cost: cost.seconds, reverse=True)
        return sum(units[:most], Cost())

    @property
    def cost(self) -> Cost:
        rungs = (self.rung_cost(n, self.arms, rung.room) for n, rung in enumerate(self.rungs))
        return sum(rungs, self.start)


def grids(horizons: Sequence[int], rates: Sequence[float]) -> tuple[tuple[Arm, ...], ...]:
    """Sets of arms from the fullest to the barest; the first horizon and the first rate are the likeliest.

    Every horizon at every rate; every horizon at the first rate and the first horizon at every rate; every horizon at
    the first rate (at one horizon: every rate). Likelier arms come first and are run first.
    """
    cross = [Arm(n, rates[0]) for n in horizons] + [Arm(horizons[0], lr) for lr in rates[1:]]
    rest = [Arm(n, lr) for n in horizons[1:] for lr in rates[1:]]
    barest = cross[: len(horizons)] if len(horizons) > 1 else cross
    return tuple(dict.fromkeys((tuple(cross + rest), tuple(cross), tuple(barest))))


def make_plan(choices: Sequence[tuple[Arm, ...]], prices: Prices, seconds: float, longest: int) -> Plan | None:
    """The fullest set of arms, and with it the longest rungs, that `seconds` pay for; None when nothing does.

    Nothing is planned beyond `longest` steps. Up to 4 samples per problem are taken where the first rung stays good.
    """
    for arms in choices:
        most = longest // rungs_for(len(arms), 1)[-1].steps
        for samples, least in ((4, GOOD_STEPS), (2, GOOD_STEPS), (1, LEAST_STEPS)):
            for first in range(most, least - 1, -1):
                plan = Plan(arms, rungs_for(len(arms), first), samples, prices)
                if plan.cost.seconds <= seconds:
                    return plan
    return None


def cheapest(choices: Sequence[tuple[Arm, ...]], prices: Prices) -> Cost:
    """Price of the smallest pilot there is."""
    return Plan(choices[-1], rungs_for(len(choices[-1]), LEAST_STEPS), 1, prices).cost


def rungs_for(arms: int, first: int) -> tuple[Rung, ...]:
    """Rungs until no more than ETA arms are left, each ETA times as long as the last.

    Half as many arms again as must be kept are planned for, because arms within noise of each other stay together.
    """
    rungs = [Rung(first, arms, arms)]
    while rungs[-1].keep > ETA:
        keep = math.ceil(rungs[-1].keep / ETA)
        rungs.append(Rung(rungs[-1].steps * ETA, keep, min(rungs[-1].room, math.ceil(1.5 * keep))))
    return tuple(rungs)


# --- training in rungs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """A student after a rung: the share of right answers per problem, in a fixed order (empty when its loss was not
    finite), and what this rung took, training and evaluation together. After 0 steps it is the untrained student."""

    steps: int
    scores: tuple[float, ...]
    cost: Cost

    @property
    def accuracy(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    def to_json(self) -> dict[str, Any]:
        figures = {"steps": self.steps, "accuracy": self.accuracy, "interval": list(mean_interval(self.scores))}
        return {**figures, "generated_tokens": round(self.cost.tokens), "seconds": self.cost.seconds}


@dataclass(slots=True)
class Trial:
    """One arm and its outcomes, rung by rung; `reason` says why it was dropped."""

    arm: Arm
    outcomes: list[Outcome] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def steps(self) -> int:
        return self.outcomes[-1].steps if self.outcomes else 0

    @property
    def scores(self) -> tuple[float, ...]:
        return self.outcomes[-1].scores

    def to_json(self) -> dict[str, Any]:
        rungs = [outcome.to_json() for outcome in self.outcomes if outcome.scores]
        dropped = None if self.reason is None else self.steps
        return {**asdict(self.arm), "rungs": rungs, "dropped_after": dropped, "reason": self.reason}


def halving(plan: Plan, seconds: float, run: Callable[[Arm, int], Outcome]) -> tuple[Trial, ...]:
    """Take the arms through the rungs; `run(arm, rung)` trains an arm up to that rung and grades it.

    After each rung the best third is kept, and with it every arm within noise (paired 95% interval) of the last of
    that third, as far as `seconds` reach. Nothing is started whose price does not fit; prices are scaled up once the
    machine proves slower than they say.
    """
    trials = alive = [Trial(arm) for arm in plan.arms]
    priced, spent = Cost(), Cost()
    for number, rung in enumerate(plan.rungs):
        bar = alive[min(rung.keep, len(alive)) - 1].scores if number and alive else ()
        for place, trial in enumerate(alive):
            if place >= rung.keep and not within_noise(bar, trial.scores):
                trial.reason = "behind"
                continue
            price = plan.unit(trial.arm, number)
            needed = price if place < rung.keep else price + _later(plan, number, alive)
            slower = max(1.0, spent.seconds / priced.seconds) if priced.seconds else 1.0
            if spent.seconds + slower * needed.seconds > seconds:
                trial.reason = "budget"
                continue
            outcome = run(trial.arm, number)
            priced, spent = priced + price, spent + outcome.cost
            trial.outcomes.append(outcome)
            if not outcome.scores:
                trial.reason = "not finite"
        alive = ranked(trial for trial in alive if trial.reason is None)
    return tuple(trials)


def _later(plan: Plan, rung: int, alive: Sequence[Trial]) -> Cost:
    """What the rungs after `rung` cost with no arm within noise kept: it may not be spent on one."""
    arms = [trial.arm for trial in alive]
    return sum((plan.rung_cost(n, arms, plan.rungs[n].keep) for n in range(rung + 1, len(plan.rungs))), Cost())


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The most accurate first; of equals the cheaper, then the one with the smaller learning rate."""
    return sorted(trials, key=lambda trial: (-trial.outcomes[-1].accuracy, trial.arm))


def within_noise(better: Sequence[float], other: Sequence[float], z: float = 1.96) -> bool:
    """Whether `other` may be as good: the paired interval of the difference reaches zero."""
    return paired_difference(better, other, z)[1][0] <= 0.0


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Winner:
    """The cheapest finalist within one standard error of the best one (the rule of Breiman et al., 1984), graded after
    `steps`; its gain over the untrained student, and the finalists that are within noise of it."""

    arm: Arm
    steps: int
    accuracy: float
    interval: tuple[float, float]
    gain: Estimate
    tied: tuple[Arm, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields.pop("arm"), **fields}


def choose(trials: Iterable[Trial], start: Sequence[float]) -> Winner | None:
    """The winner among the arms that came farthest; None when no arm was graded.

    Horizons differ in price and a longer one is seldom worse, so the best mean alone would pay for noise.
    """
    graded = [trial for trial in trials if trial.outcomes and trial.reason != "not finite"]
    farthest = max((trial.steps for trial in graded), default=0)
    finalists = ranked(trial for trial in graded if trial.steps == farthest)
    if not finalists:
        return None
    best = finalists[0].scores
    winner = min((t for t in finalists if within_noise(best, t.scores, z=1.0)), key=lambda trial: trial.arm)
    alike = [t for t in finalists if within_noise(t.scores, winner.scores) and within_noise(winner.scores, t.scores)]
    value, (low, high) = paired_difference(winner.scores, start)
    interval = mean_interval(winner.scores)
    tied = tuple(t.arm for t in alike if t is not winner)
    return Winner(winner.arm, farthest, winner.outcomes[-1].accuracy, interval, Estimate(value, low, high), tied)


@dataclass(frozen=True, slots=True)
class Pilot:
    """A finished pilot. `share` of the price of `full_steps` full-rollout steps was its budget; `start` is the
    untrained student."""

    task: str
    plan: Plan
    trials: tuple[Trial, ...]
    start: Outcome
    share: float
    full_steps: int

    @property
    def winner(self) -> Winner | None:
        return choose(self.trials, self.start.scores)

    @property
    def spent(self) -> Cost:
        outcomes = [self.start, *(outcome for trial in self.trials for outcome in trial.outcomes)]
        return sum((outcome.cost for outcome in outcomes), self.plan.prices.timing)

    @property
    def spent_share(self) -> float:
        """Seconds spent over those of a full-rollout run."""
        return self.spent.seconds / (self.plan.prices.full_step.seconds * self.full_steps)

    @property
    def sentence(self) -> str:
        return " ".join([_verdict(self), *_caveats(self)])

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        """`diagnose/pilot.json`: shares in 0..1, seconds, tokens; a rung's tokens and seconds are those of that rung,
        evaluation included."""
        prices, winner, spent = self.plan.prices, self.winner, self.spent
        planned = self.plan.cost + prices.timing
        return {
            "format": 1,
            "task": self.task,
            "problems": len(self.start.scores),
            "samples": self.plan.samples,
            "start": self.start.to_json(),
            "arms": [trial.to_json() for trial in self.trials],
            "winner": None if winner is None else winner.to_json(),
            "budget": {
                "share": self.share,
                "full_steps": self.full_steps,
                "seconds_per_full_step": prices.full_step.seconds,
                "seconds": prices.full_step.seconds * self.full_steps * self.share,
                "planned_seconds": planned.seconds,
                "planned_tokens": round(planned.tokens),
            },
            "spent": {
                "seconds": spent.seconds,
                "generated_tokens": round(spent.tokens),
                "timing_seconds": prices.timing.seconds,
                "share": self.spent_share,
            },
            "sentence": self.sentence,
        }


def _verdict(pilot: Pilot) -> str:
    winner = pilot.winner
    if winner is None:
        return "No arm could be graded: every loss was not finite, or the budget was spent. Lower the learning rates."
    gain, (low, high) = winner.gain, winner.interval
    reading = (
        f"{winner.accuracy:.1%} [{low:.1%}, {high:.1%}] on {len(pilot.start.scores)} development problems after "
        f"{winner.steps} steps, {100 * (gain.value or 0.0):+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] over the untrained student"
    )
    if gain.low <= 0.0:
        return f"No arm is clearly better than the untrained student; the first choice is {winner.arm}: {reading}."
    return f"Use {winner.arm}: {reading}."


def _caveats(pilot: Pilot) -> list[str]:
    """What the figures do not settle, one sentence each."""
    winner, sentences = pilot.winner, []
    if winner and winner.tied:
        sentences.append(f"Within noise of it: {', '.join(map(str, winner.tied))}.")
    if cut := [trial.arm for trial in pilot.trials if trial.reason == "budget"]:
        sentences.append(f"The budget, not the evidence, dropped {', '.join(map(str, cut))}.")
    rates = [trial.arm.lr for trial in pilot.trials]
    if winner and winner.arm.lr == max(rates) > min(rates) and 2 * winner.steps < pilot.full_steps:
        sentences.append(
            f"The highest rate won over {winner.steps} of {pilot.full_steps} steps; in a longer run it can drift."
        )
    return [*sentences, f"Price: {pilot.spent_share:.1%} of a full-rollout run."]
