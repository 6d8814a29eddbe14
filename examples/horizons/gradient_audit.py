"""Experimental: the smallest window whose gradient points where the full rollouts' does (ADWIN, arXiv 2605.28396).

    horizon: {type: custom, path: "examples.horizons.gradient_audit:GradientAudit", arguments: {max_tokens: 200}}

It holds two more gradients in memory: meant for LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.horizon.measured import MovingHorizon, doubling
from headstart.interfaces import Observation


class GradientAudit(MovingHorizon):
    """Every `every` steps the rollouts are full. On that step the smallest window of the grid is accepted whose
    gradient has at least the cosine `threshold` with the step's own; the longest horizon where none has."""

    def __init__(
        self,
        min_tokens: int = 16,
        max_tokens: int = 3584,
        threshold: float = 0.9,
        every: int = 50,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__(max_tokens, min_tokens, max_tokens)
        self.threshold, self.every = threshold, every
        self.grid = tuple(grid or doubling(min_tokens, max_tokens))

    def tokens(self, step: int) -> int:
        return self.high if step % self.every == 0 else self.now

    def observe(self, seen: Observation) -> None:
        if seen.step % self.every:
            return
        whole = seen.gradient(None)
        for n in sorted(self.grid):
            if n < self.high:
                window = seen.gradient(n)
                if float(whole @ window / (whole.norm() * window.norm()).clamp_min(1e-30)) >= self.threshold:
                    self.now = n
                    return
        self.now = self.high
