"""Horizons that follow what the teacher can still repair, probed every `probes.every` steps.

R(N) is the teacher's accuracy after the student's first N tokens, A_S the student's and A_T = R(0) the teacher's own.
`damage`: the smallest N at which D(N) = (A_T - R(N)) / (A_T - A_S) >= target: what is still repaired after N is at most
1 - target of the lead. Early errors vanish in training, so the horizon follows the rest of the damage outward.
`recoverability`: the largest N with R(N) >= target * R(0).

Both are signs of a mean over problems, so that no quotient of noisy numbers is needed and 16 problems go a long way:
R(N) - target A_S - (1 - target) A_T > 0 says that damage is left after N, R(N) - target A_T > 0 that N is recoverable.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from headstart.config.horizon import ProbedHorizon
from headstart.horizon.measured import MovingHorizon, doubling, neighbour
from headstart.interfaces import Observation, Probe
from headstart.stats import paired_difference

ENOUGH = 16
"""Problems on which the teacher's own accuracy is measured; it never changes, and weighs little in the decisions."""
ONE_SIDED = 1.645
"""Normal quantile of the 95% one-sided interval that a move must clear: what makes the horizon hold under noise."""
FEWEST = 8
"""Problems before anything is decided."""


class TeacherLevel:
    """A_T, and the control: continuing its own prefix must leave the teacher where it was."""

    def __init__(self) -> None:
        self.own: list[int] = []
        self.again: list[int] = []

    def measure(self, probe: Probe, length: int) -> None:
        """Ask the probe unless enough is known; warn where the control is off."""
        if len(self.own) >= ENOUGH:
            return
        own, again = probe.teacher(length)
        self.own, self.again = [*self.own, *map(int, own)], [*self.again, *map(int, again)]
        fall, (low, _) = paired_difference(self.own, self.again)
        if low > 0 and len(self.own) >= FEWEST:
            warnings.warn(
                f"the teacher loses {100 * fall:.0f} points when it continues its own first {length} tokens, which "
                "should change nothing, so R(N) cannot be trusted; check the prompts' views with headstart preflight",
                stacklevel=2,
            )

    @property
    def mean(self) -> float:
        """Each continuation of its own prefix is a further sample of the same accuracy."""
        return sum(self.own + self.again) / max(1, len(self.own) + len(self.again))

    def state_dict(self) -> dict[str, Any]:
        return {"own": self.own, "again": self.again}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.own, self.again = list(state["own"]), list(state["again"])


class ProbedPolicy(MovingHorizon):
    """Walks the grid one place at a time, and only where the newest `memory` problems speak beyond noise."""

    def __init__(self, config: ProbedHorizon) -> None:
        super().__init__(config.tokens, config.min_tokens, config.max_tokens)
        self.config = config
        self.grid = config.grid or doubling(config.min_tokens, config.max_tokens)
        self.level = TeacherLevel()
        self.evidence: dict[int, list[tuple[int, int]]] = {}
        """By length: (student right, teacher right after the student's prefix) of the newest problems."""

    def observe(self, seen: Observation) -> None:
        if seen.probe is None:
            return
        self.level.measure(seen.probe, self.now)
        now = self._left(seen.probe, self.now)
        up = now is True if self.config.type == "damage" else now is not False
        other = neighbour(self.grid, self.now, up)
        if now is None or other is None:
            return
        # Damage left after N moves outward at once; to move back, or a recoverable N outward, the next length must
        # agree: there the question is whether N is still the smallest, or the largest.
        if now is (self.config.type == "damage") or self._left(seen.probe, other) is now:
            self.now = other

    def _left(self, probe: Probe, length: int) -> bool | None:
        """Is the mean (see the module) above zero at `length`? None: not beyond noise, or there is no lead."""
        found = probe.continuations(length)
        pairs = [(int(s), int(a)) for s, a in zip(found.student, found.after, strict=True)]
        known = self.evidence[length] = [*self.evidence.get(length, []), *pairs][-self.config.memory :]
        students, afters = [s for s, _ in known], [a for _, a in known]
        if len(known) < FEWEST or self.level.mean <= sum(students) / len(known):
            return None
        share = self.config.target
        if self.config.type == "damage":
            bar = [share * s + (1 - share) * self.level.mean for s in students]
        else:
            bar = [share * self.level.mean] * len(known)
        _, (low, high) = paired_difference(afters, bar, ONE_SIDED)
        return True if low > 0 else False if high < 0 else None

    def state_dict(self) -> dict[str, Any]:
        evidence = {str(n): pairs for n, pairs in self.evidence.items()}
        return {**super().state_dict(), "teacher": self.level.state_dict(), "evidence": evidence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.level.load_state_dict(state["teacher"])
        self.evidence = {int(n): [(int(s), int(a)) for s, a in pairs] for n, pairs in state["evidence"].items()}
