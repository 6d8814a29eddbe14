"""Experimental: the smallest window whose gradient points where the full rollouts' does (ADWIN, arXiv 2605.28396)."""

from __future__ import annotations

from headstart.config.horizon import GradientAuditHorizon
from headstart.horizon.moving import MovingHorizon, doubling
from headstart.interfaces import Observation


class GradientAudit(MovingHorizon):
    """Every `every` steps the rollouts are full. On that step the smallest window of the grid is accepted whose
    gradient has at least the cosine `threshold` with the step's own; the longest horizon where none has."""

    def __init__(self, config: GradientAuditHorizon) -> None:
        super().__init__(config.max_tokens, config.min_tokens, config.max_tokens)
        self.config = config
        self.grid = config.grid or doubling(config.min_tokens, config.max_tokens)

    def tokens(self, step: int) -> int:
        return self.high if step % self.config.every == 0 else self.now

    def observe(self, seen: Observation) -> None:
        if seen.step % self.config.every == 0:
            good = (n for n in sorted(self.grid) if n < self.high and seen.cosine(n) >= self.config.threshold)
            self.now = next(good, self.high)
