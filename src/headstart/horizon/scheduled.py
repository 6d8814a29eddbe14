"""Horizons that grow by plan: linear, in steps (POPD, arXiv 2605.31490), exponential; blindly, or gated by probes.

Ungated growth after a short stage has collapsed where stopping was never trained. The gate is asked at every probe: is
the horizon that the plan reaches by the next one still good (the teacher repairs what the student began, or the two
models still look at the same tokens there), and do rollouts still end by themselves? If not, the plan's clock stands
still; where the present edge fails too, it goes back by as much. Between probes nothing grows past what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from headstart.config.horizon import ScheduledHorizon
from headstart.horizon.probed import TeacherLevel
from headstart.interfaces import Observation, Probe

STOPS = 0.1
"""How much the share of rollouts that end by themselves may fall below its first value in a clean stop audit."""


class ScheduledPolicy:
    """`clock` counts the steps on which the plan went on; the horizon is a function of it. `edge` is the longest one
    that passed the gate."""

    def __init__(self, config: ScheduledHorizon, steps: int) -> None:
        self.config, self.steps = config, config.steps or steps
        self.clock, self.last = 0, 0
        self.edge = config.tokens if config.gate else config.max_tokens
        self.level = TeacherLevel()
        self.first_stopped: float | None = None

    def plan(self, clock: int) -> int:
        """The horizon (tokens) after `clock` steps of growth."""
        c, done = self.config, min(clock / max(1, self.steps - 1), 1.0)
        match c.shape:
            case "steps":
                tokens: float = c.tokens + c.increment * (clock // c.every)
            case "linear":
                tokens = c.tokens + (c.max_tokens - c.tokens) * done
            case "exponential":
                tokens = c.tokens * (c.max_tokens / c.tokens) ** done
        return min(round(tokens), c.max_tokens)

    def tokens(self, step: int) -> int:
        return self.plan(self.clock)

    def observe(self, seen: Observation) -> None:
        if seen.probe is not None and self.config.gate is not None:
            passed = max(1, seen.step - self.last)
            before, now, ahead = (self.plan(max(0, self.clock + n)) for n in (-passed, 0, passed))
            clean = self._stops_cleanly(seen.probe)
            if clean and self._good(seen.probe, now, ahead):
                self.edge = ahead
            elif not (clean and self._good(seen.probe, before, now)):
                self.clock = max(0, self.clock - passed)
                self.edge = self.plan(self.clock)
            self.last = seen.step
        if self.plan(self.clock + 1) <= self.edge:
            self.clock += 1

    def _stops_cleanly(self, probe: Probe) -> bool:
        share = float(np.mean(probe.long().stopped_B))
        self.first_stopped = share if self.first_stopped is None else self.first_stopped
        return share >= self.first_stopped - STOPS

    def _good(self, probe: Probe, before: int, edge: int) -> bool:
        """Does the horizon `edge` pass the gate; for overlap, the stretch from `before` to it?"""
        if self.config.gate == "recoverability":
            self.level.measure(probe, edge)
            after = probe.continuations(edge).after
            return float(np.mean(after)) >= self.config.threshold * self.level.mean
        long = probe.long()
        there = long.overlap_M[(long.position_M >= min(before, edge - 1)) & (long.position_M < edge)]
        return len(there) == 0 or float(there.mean()) >= self.config.threshold

    def state_dict(self) -> dict[str, Any]:
        names = ("clock", "edge", "last", "first_stopped")
        return {**{name: getattr(self, name) for name in names}, "teacher": self.level.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("clock", "edge", "last", "first_stopped"):
            setattr(self, name, state[name])
        self.level.load_state_dict(state["teacher"])
