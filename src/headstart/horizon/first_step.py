"""Horizons that are measured once, on the full rollouts of the first step, and then stay.

The first step of the warm-up trains next to nothing, so that its long rollouts are a measurement that happens to be
paid for already: `fraction` takes a share of the student's median length (TOPD, arXiv 2605.31490: a tenth of the full
horizon), `kl_coverage` the first tokens that hold a share of all divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from headstart.config.horizon import FractionHorizon, KLCoverageHorizon
from headstart.horizon.moving import MovingHorizon
from headstart.interfaces import Observation
from headstart.records import StepTokens


class MeasuredOnce(MovingHorizon):
    """`high` on the first step, `choose(its tokens)` within the bounds from then on."""

    def __init__(self, choose: Callable[[StepTokens], float], low: int, high: int) -> None:
        super().__init__(high, low, high)
        self.choose, self.measured = choose, False

    def observe(self, seen: Observation) -> None:
        if not self.measured:
            self.measured = True
            self.move(self.choose(seen.tokens))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "measured": self.measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.measured = bool(state["measured"])


def measured_once(c: FractionHorizon | KLCoverageHorizon) -> MeasuredOnce:
    """The policy that a configuration asks for."""
    choose = median_share if isinstance(c, FractionHorizon) else coverage
    return MeasuredOnce(partial(choose, c.share), c.min_tokens, c.max_tokens)


def median_share(share: float, tokens: StepTokens) -> int:
    """`share` of the median length, rounded up: half a token short of a decision would teach nothing of it."""
    return math.ceil(share * float(np.median(tokens.lengths_B)) - 1e-9)


def coverage(share: float, tokens: StepTokens) -> int:
    """The smallest N such that the first N positions hold at least `share` of all divergence."""
    mass_N = np.bincount(tokens.position_M, weights=np.asarray(tokens.divergence_M, dtype=np.float64))
    total = float(mass_N.sum())
    return int(np.searchsorted(np.cumsum(mass_N), share * total - 1e-12 * total) + 1) if total > 0 else 1
