"""The pilot: which horizon, at which learning rate? Settled by experiment, within a stated budget.

What successive halving found, who won, and how it is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headstart.stats import mean_interval, paired_difference
from headstart.study.halving import Arm, Cost, Plan, Track, rank, within_noise


@dataclass(frozen=True, slots=True)
class Winner:
    """The cheapest finalist within one standard error of the best one (the rule of Breiman et al., 1984), graded after
    `steps`; its gain over the untrained student, and the finalists that cannot be told from it."""

    arm: Arm
    steps: int
    accuracy: float
    interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    tied: tuple[Arm, ...] = ()


def choose(tracks: Sequence[Track], start: Sequence[float]) -> Winner | None:
    """The winner among the arms that came farthest; None when no arm was graded.

    Horizons differ in price and a longer one is seldom worse, so the best mean alone would pay for noise.
    """
    graded = [track for track in tracks if track.outcomes and track.reason != "not finite"]
    farthest = max((track.outcomes[-1].steps for track in graded), default=0)
    finalists = rank([track for track in graded if track.outcomes[-1].steps == farthest])
    if not finalists:
        return None
    best = finalists[0].scores
    winner = min((t for t in finalists if within_noise(best, t.scores, z=1.0)), key=lambda track: track.arm)
    tied = tuple(t.arm for t in finalists if t is not winner and _alike(t.scores, winner.scores))
    gain, gain_interval = paired_difference(winner.scores, start)
    last = winner.outcomes[-1]
    return Winner(winner.arm, farthest, last.accuracy, mean_interval(last.scores), gain, gain_interval, tied)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return within_noise(a, b) and within_noise(b, a)


@dataclass(frozen=True, slots=True)
class Pilot:
    """A finished pilot. `share` of the price of `full_steps` full-rollout steps was its budget; `start` says for each
    problem whether the untrained student got it right (one sample)."""

    task: str
    plan: Plan
    tracks: tuple[Track, ...]
    start: tuple[float, ...]
    share: float
    full_steps: int

    @property
    def winner(self) -> Winner | None:
        return choose(self.tracks, self.start)

    @property
    def full_run(self) -> Cost:
        """The price of a full-rollout run, from one timed step."""
        return self.plan.prices.full_step.times(self.full_steps)

    @property
    def spent(self) -> Cost:
        outcomes = [outcome for track in self.tracks for outcome in track.outcomes]
        used = (Cost(outcome.seconds, outcome.generated_tokens) for outcome in outcomes)
        return sum(used, self.plan.prices.timing)

    @property
    def sentence(self) -> str:
        return " ".join([_verdict(self), *_caveats(self)])

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        """`diagnose/pilot.json`: shares in 0..1, seconds, tokens; a rung's tokens and seconds are those of that rung,
        evaluation included."""
        start_low, start_high = mean_interval(self.start)
        budget, planned = self.full_run.times(self.share), self.plan.cost + self.plan.prices.timing
        return {
            "format": 1,
            "task": self.task,
            "problems": len(self.start),
            "samples": self.plan.samples,
            "start": {"accuracy": math.fsum(self.start) / len(self.start), "interval": [start_low, start_high]},
            "arms": [_arm_json(track) for track in self.tracks],
            "winner": None if self.winner is None else _winner_json(self.winner),
            "budget": {
                "share": self.share,
                "full_steps": self.full_steps,
                "seconds_per_full_step": self.plan.prices.full_step.seconds,
                "seconds": budget.seconds,
                "planned_seconds": planned.seconds,
                "planned_tokens": round(planned.tokens),
            },
            "spent": {
                "seconds": self.spent.seconds,
                "generated_tokens": round(self.spent.tokens),
                "timing_seconds": self.plan.prices.timing.seconds,
                "share": self.spent.seconds / self.full_run.seconds,
            },
            "sentence": self.sentence,
        }


def _arm_json(track: Track) -> dict[str, Any]:
    rungs = [
        {
            "steps": outcome.steps,
            "accuracy": outcome.accuracy,
            "interval": list(mean_interval(outcome.scores)),
            "generated_tokens": outcome.generated_tokens,
            "seconds": outcome.seconds,
        }
        for outcome in track.outcomes
        if outcome.scores
    ]
    return {
        "tokens": track.arm.tokens,
        "lr": track.arm.lr,
        "rungs": rungs,
        "dropped_after": track.dropped_after,
        "reason": track.reason,
    }


def _winner_json(winner: Winner) -> dict[str, Any]:
    low, high = winner.gain_interval
    return {
        "tokens": winner.arm.tokens,
        "lr": winner.arm.lr,
        "steps": winner.steps,
        "accuracy": winner.accuracy,
        "interval": list(winner.interval),
        "gain": {"value": winner.gain, "low": low, "high": high},
        "tied": [{"tokens": arm.tokens, "lr": arm.lr} for arm in winner.tied],
    }


def _verdict(pilot: Pilot) -> str:
    winner = pilot.winner
    if winner is None:
        return "No arm could be graded: every loss was not finite, or the budget was spent. Lower the learning rates."
    low, high = winner.gain_interval
    gain = f"{100 * winner.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    reading = (
        f"{winner.accuracy:.1%} [{winner.interval[0]:.1%}, {winner.interval[1]:.1%}] on {len(pilot.start)} "
        f"development problems after {winner.steps} steps, {gain} over the untrained student"
    )
    if low <= 0.0:
        return f"No arm is clearly better than the untrained student; the first choice is {winner.arm}: {reading}."
    return f"Use {winner.arm}: {reading}."


def _caveats(pilot: Pilot) -> list[str]:
    """What the figures do not settle, one sentence each."""
    winner, said = pilot.winner, []
    if winner is not None and winner.tied:
        said.append(f"Within noise of it: {', '.join(map(str, winner.tied))}.")
    cut = [track.arm for track in pilot.tracks if track.reason == "budget"]
    if cut:
        said.append(f"The budget, not the evidence, dropped {', '.join(map(str, cut))}.")
    rates = [track.arm.lr for track in pilot.tracks]
    if winner and winner.arm.lr == max(rates) > min(rates) and 2 * winner.steps < pilot.full_steps:
        said.append(
            f"The highest rate won over {winner.steps} of {pilot.full_steps} steps; in a longer run it can drift."
        )
    return [*said, f"Price: {pilot.spent.seconds / pilot.full_run.seconds:.1%} of a full-rollout run."]
