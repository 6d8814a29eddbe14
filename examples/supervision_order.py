"""In which order to supervise decisions when one error misleads the teacher: all schedules of a small world, and the
best of them (docs/explanation/theory.md, statement (e)).

    python -m examples.supervision_order        # two seconds, no sampling

T decisions in a row; the last axis of every array is T. M schedules, K steps, N choices of what to supervise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from examples.theory import World

Array = np.ndarray


@dataclass(frozen=True)
class Decisions:
    """The student makes each decision with one logit, whatever came before. The teacher is right with log odds `sure`
    after a prefix without an error, and with `misled` after one."""

    sure: float
    misled: float
    rate: float
    natural: bool = True
    """Divides the gradient by p (1 - p), roughly as Adam does; False is plain gradient descent."""

    def clean(self, logit: Array) -> Array:
        """P(every decision before is right)."""
        p = chance(logit)
        return np.concatenate([np.ones_like(p[..., :1]), p.cumprod(-1)[..., :-1]], -1)

    def target(self, logit: Array) -> Array:
        """Where supervision pulls each logit: the mean of the teacher's log odds over the student's contexts."""
        clean = self.clean(logit)
        return clean * self.sure + (1 - clean) * self.misled

    def step(self, logit: Array, chosen: Array) -> Array:
        p = chance(logit)
        scale = 1.0 if self.natural else p * (1 - p)
        return logit - self.rate * chosen * scale * (logit - self.target(logit))

    def helped(self, logit: Array) -> Array:
        """1 where supervision makes a right decision likelier, else 0: the choice of (e2)."""
        return (logit < self.target(logit)).astype(float)

    def world(self, decisions: int) -> World:
        """The same world response by response; its parameters are the logits, token 0 is right."""
        logit = np.concatenate([np.where(np.arange(2**t) == 0, self.sure, self.misled) for t in range(decisions)])
        features = np.zeros((2**decisions - 1, 2, decisions))
        for t in range(decisions):
            features[2**t - 1 : 2 ** (t + 1) - 1, 0, t] = 1.0
        teacher = torch.log_softmax(torch.tensor(np.stack([logit, np.zeros_like(logit)], -1)), -1)
        right = torch.tensor((np.arange(2**decisions) == 0).astype(float))
        return World(2, decisions, torch.tensor(features), teacher, right)


def chance(logit: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-logit))
    return found


def accuracy(logit: Array) -> Array:
    """Probability that every decision is right."""
    found: Array = chance(logit).prod(-1)
    return found


def horizons(decisions: int) -> Array:
    """What a horizon of 0 .. T decisions supervises, a row each."""
    return np.tril(np.ones((decisions + 1, decisions)), -1)


def subsets(decisions: int) -> Array:
    """All choices of decisions to supervise, a row each."""
    return np.stack(np.meshgrid(*[[0.0, 1.0]] * decisions, indexing="ij"), -1).reshape(-1, decisions)


def growing(world: Decisions, start: Array, steps: int) -> tuple[Array, Array]:
    """What (e2) supervises at each step [K, T], and the accuracy after it [K]."""
    logit, chosen, after = start, [], []
    for _ in range(steps):
        chosen.append(world.helped(logit))
        logit = world.step(logit, chosen[-1])
        after.append(accuracy(logit))
    return np.array(chosen), np.array(after)


@dataclass(frozen=True)
class Schedules:
    """All schedules of K steps."""

    choice_MK: Array
    """Row of the choices that each step takes."""
    accuracy_MK: Array
    cost_MK: Array
    """Decisions sampled so far; a choice samples up to its last decision."""

    def cheapest(self, accuracy: float) -> tuple[int, list[int]] | None:
        """Cost and choices of a schedule that reaches this accuracy at the least cost; None where none does."""
        cost_MK = np.where(self.accuracy_MK >= accuracy, self.cost_MK, np.inf)
        cost_MK = cost_MK + 1e-6 * np.arange(cost_MK.shape[1])  # of equal costs, the fewest steps
        row, last = np.unravel_index(int(cost_MK.argmin()), cost_MK.shape)
        if not np.isfinite(cost_MK[row, last]):
            return None
        return int(cost_MK[row, last]), [int(n) for n in self.choice_MK[row, : last + 1]]


def every_schedule(world: Decisions, start: Array, choices_NT: Array, steps: int) -> Schedules:
    """By following all N ** K of them."""
    reach_N = (choices_NT * np.arange(1, len(start) + 1)).max(-1)
    N, logit_MT, choice_MK, accuracy_MK, cost_MK = len(choices_NT), start[None], *np.zeros((3, 1, 0))
    for _ in range(steps):
        M = len(logit_MT)
        logit_MT = world.step(logit_MT[:, None], choices_NT[None]).reshape(M * N, -1)
        spent_M = (cost_MK[:, -1:].sum(-1)[:, None] + reach_N).reshape(-1)
        new = (np.tile(np.arange(N), M), accuracy(logit_MT), spent_M)
        choice_MK, accuracy_MK, cost_MK = (
            np.concatenate([old.repeat(N, 0), column[:, None]], 1)
            for old, column in zip((choice_MK, accuracy_MK, cost_MK), new, strict=True)
        )
    return Schedules(choice_MK, accuracy_MK, cost_MK)


def main() -> None:
    world, start, steps = Decisions(sure=4.6, misled=-4.6, rate=0.4), np.full(4, 1.0), 7
    found = every_schedule(world, start, horizons(4), steps)
    chosen, after = growing(world, start, steps)
    print(f"4 decisions, right with {chance(start)[0]:.2f}; accuracy after 1 .. {steps} steps ({5**steps} schedules)")
    print("  best of all  ", found.accuracy_MK.max(0).round(3))
    print("  (e2)         ", after.round(3), " N =", chosen.sum(-1).astype(int))
    for n in range(1, 5):
        print(f"  fixed, N = {n} ", found.accuracy_MK[(found.choice_MK == n).all(1)][0].round(3))
    for target in (0.8, 0.9):
        for name, kept in (("any", slice(None)), ("fixed", (found.choice_MK == found.choice_MK[:, :1]).all(1))):
            some = Schedules(found.choice_MK[kept], found.accuracy_MK[kept], found.cost_MK[kept])
            print(f"  cheapest to {target}, {name}: {some.cheapest(target)}")


if __name__ == "__main__":
    main()
