"""A small exact world in which late supervision harms: no network, no sampling, every number a sum.

    python examples/tabular_world.py        # the tables of docs/results/readings.md

A response has T = 32 tokens; at every position one token is right. At most positions the student knows it; at the
decisions it mostly does not. A response is right if every token is; a prefix with a wrong token is spoiled, and the
teacher, which is right with 0.999 before, is confidently wrong after position 7 of a spoiled prefix (right with 0.02):
it carries on what was begun. The student does not see whether its prefix is spoiled: one logit per position, which is
what lets a wrong lesson in spoiled contexts reach clean ones. A step is exact gradient descent on the mean over the
window of the expected reverse KL, no gradient through sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headstart.config.horizon import ProbedHorizon, ScheduledHorizon
from headstart.horizon import fixed
from headstart.horizon.probed import ProbedPolicy
from headstart.horizon.scheduled import ScheduledPolicy
from headstart.interfaces import Observation
from headstart.records import Continuations, LongReadings, StepTokens

T = 32
GRID = (1, 2, 4, 8, 16, 32)
RIGHT, MISLED = 0.999, 0.02
STEPS, RATE = 200, 0.02
PROBLEMS = 400
"""Problems of a probe, which are shares in disguise: many, so that rounding does not matter."""


def reverse_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    found: np.ndarray = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return found


@dataclass
class World:
    """`chance` maps positions to how often the student is right there; `known` holds elsewhere."""

    chance: Mapping[int, float]
    known: float
    late: int = 8
    """From here on a spoiled prefix misleads the teacher."""
    logit: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        p = np.array([self.chance.get(t, self.known) for t in range(T)])
        self.logit = np.log(p / (1 - p))

    @property
    def p(self) -> np.ndarray:
        found: np.ndarray = 1 / (1 + np.exp(-self.logit))
        return found

    @property
    def clean(self) -> np.ndarray:
        """P(the first N tokens are all right), N = 0 .. T."""
        return np.concatenate([[1.0], np.cumprod(self.p)])

    @property
    def accuracy(self) -> float:
        return float(self.clean[T])

    def teacher_after(self, spoiled: bool) -> np.ndarray:
        return np.where((np.arange(T) >= self.late) & spoiled, MISLED, RIGHT)

    def divergence(self) -> np.ndarray:
        """Expected reverse KL at every position of the student's own rollouts, nats."""
        c = self.clean[:T]
        p = self.p
        return c * reverse_kl(p, self.teacher_after(False)) + (1 - c) * reverse_kl(p, self.teacher_after(True))

    def step(self, horizon: int) -> None:
        """d KL(p || q) / d logit = p (1 - p) (logit p - logit q), averaged over contexts. The natural
        gradient leaves out p (1 - p), so that sure positions move as readily as unsure ones, as under Adam."""
        c = self.clean[:T]
        gap = [self.logit - np.log(q / (1 - q)) for q in (self.teacher_after(False), self.teacher_after(True))]
        gradient = c * gap[0] + (1 - c) * gap[1]
        self.logit = np.where(np.arange(T) < horizon, self.logit - RATE * gradient, self.logit)

    # --- readings, exact ---

    def recoverability(self, n: int) -> float:
        return float(self.clean[n]) * RIGHT ** (T - n)

    def damage(self, n: int) -> float:
        return (self.recoverability(0) - self.recoverability(n)) / (self.recoverability(0) - self.accuracy)

    def gift(self, n: int) -> float:
        return float(RIGHT**n * np.prod(self.p[n:]))

    def overlap(self) -> np.ndarray:
        """Chance that both favourite tokens are one (two tokens, so top 1), by position."""
        right = self.p > 0.5
        c = self.clean[:T]
        return c * right + (1 - c) * (right == (self.teacher_after(True) > 0.5))


def trained(make: Callable[[], World], policy: Any, steps: int = STEPS) -> tuple[World, list[int]]:
    """The world after `steps` steps with a real horizon policy, which may probe every tenth; the horizons it chose."""
    world, horizons = make(), []
    for step in range(steps):
        n = min(policy.tokens(step), T)
        horizons.append(n)
        probe = ExactProbe(world) if step % 10 == 0 else None
        world.step(n)
        policy.observe(Observation(step, n, _tokens(n), probe, lambda k: 1.0))
    return world, horizons


def _tokens(n: int) -> StepTokens:
    zeros = np.zeros(n)
    rest = {name: zeros for name in StepTokens.__slots__ if name.endswith("_M")} | {"position_M": np.arange(n)}
    return StepTokens(np.array([n]), np.array([True]), 0, scored_B=np.array([n]), **rest)


class ExactProbe:
    """`interfaces.Probe` with exact shares: of PROBLEMS, the student's right ones are among those whose prefix the
    teacher finishes rightly."""

    def __init__(self, world: World) -> None:
        self.right = round(world.accuracy * PROBLEMS)
        self.after = {n: round(world.recoverability(n) * PROBLEMS) for n in range(T + 1)}
        self.overlap = world.overlap()

    def continuations(self, length: int) -> Continuations:
        after = self.right if length >= T else self.after[length]
        first = [tuple(i < k for i in range(PROBLEMS)) for k in (self.right, max(after, self.right))]
        return Continuations(*first)

    def teacher(self, length: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        own = tuple(i < round(RIGHT**T * PROBLEMS) for i in range(PROBLEMS))
        return own, own

    def long(self) -> LongReadings:
        return LongReadings(np.array([T]), np.array([True]), np.arange(T), np.zeros(T), self.overlap)


WORLDS: dict[str, Callable[[], World]] = {
    "decisions early, sure tail": lambda: World({2: 0.3, 5: 0.35, 7: 0.4}, known=0.999),
    "decisions early, weak tail": lambda: World({2: 0.3, 5: 0.35, 7: 0.4}, known=0.985),
    "one decision, late": lambda: World({13: 0.3}, known=0.999, late=14),
    "damage everywhere": lambda: World({}, known=0.95, late=T),
}
"""In the last the teacher is never misled: supervision never harms, and full rollouts are best."""


def best_fixed(make: Callable[[], World]) -> dict[int, float]:
    """Accuracy after training, for each fixed horizon of the grid."""
    return {n: trained(make, fixed.FixedHorizon(n))[0].accuracy for n in GRID}


def readings(world: World) -> dict[str, int]:
    """The horizon of the grid that each reading names before training."""

    def first(good: Callable[[int], bool]) -> int:
        return next((n for n in GRID if good(n)), T)

    mass = np.cumsum(world.divergence()) / world.divergence().sum()
    drifts = np.flatnonzero(world.overlap() < 0.5)
    last_sure = int(drifts[0]) if len(drifts) else T
    return {
        "D(N) >= 0.9, smallest": first(lambda n: world.damage(n) >= 0.9),
        "G(N) >= 0.9 A_T, smallest": first(lambda n: world.gift(n) >= 0.9 * RIGHT**T),
        "R(N) >= 0.9 R(0), largest": max(
            (n for n in GRID if world.recoverability(n) >= 0.9 * world.recoverability(0)), default=GRID[0]
        ),
        "KL coverage 45%": first(lambda n: bool(mass[n - 1] >= 0.45)),
        "overlap >= 0.5, largest": max((n for n in GRID if n <= last_sure), default=GRID[0]),
    }


def growth(gate: Any) -> ScheduledPolicy:
    """Fourfold from 8 to 32 within 10 steps, gated or not."""
    config = ScheduledHorizon(shape="exponential", tokens=8, max_tokens=T, steps=10, gate=gate, threshold=0.8)
    return ScheduledPolicy(config, STEPS)


def followed(kind: Any) -> ProbedPolicy:
    """From 8, by the damage share or by recoverability."""
    return ProbedPolicy(ProbedHorizon(type=kind, tokens=8, min_tokens=1, max_tokens=T, grid=GRID, memory=PROBLEMS))


MOVING: dict[str, Callable[[], Any]] = {
    "growth, ungated": lambda: growth(None),
    "growth, gated by R": lambda: growth("recoverability"),
    "growth, gated by overlap": lambda: growth("overlap"),
    "damage-following": lambda: followed("damage"),
    "recoverability-following": lambda: followed("recoverability"),
}


def main() -> None:
    for name, make in WORLDS.items():
        after = best_fixed(make)
        best = max(after, key=lambda n: after[n])
        print(f"\n{name}: start {make().accuracy:.3f}, teacher {RIGHT**T:.3f}")
        print("  fixed  " + "  ".join(f"{n}: {accuracy:.3f}" for n, accuracy in after.items()) + f"   best {best}")
        for reading, n in readings(make()).items():
            off = abs(GRID.index(n) - GRID.index(best))
            print(f"  {reading:26} {n:3}  {'within one step' if off <= 1 else f'{off} steps off'}")
        for policy, begin in MOVING.items():
            world, horizons = trained(make, begin())
            print(f"  {policy:26} {world.accuracy:.3f}  N = {', '.join(map(str, horizons[::40]))} at every 40th step")


if __name__ == "__main__":
    main()
