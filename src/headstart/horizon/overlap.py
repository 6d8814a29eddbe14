"""A budget that follows how long the two models still look at the same tokens (after Prune-OPD, arXiv 2605.07804)."""

from __future__ import annotations

import numpy as np

from headstart.config.horizon import OverlapHorizon
from headstart.horizon.moving import MovingHorizon
from headstart.interfaces import Observation


class OverlapBudget(MovingHorizon):
    """o_t = |S_k & T_k| / k. A position with o_t < threshold multiplies the worth of all that follows it by `decay`; a
    rollout's effective length is the sum of its positions' worths. The horizon moves towards the mean effective
    length times `slack`: it grows where nothing drifts and shrinks where much does."""

    def __init__(self, config: OverlapHorizon) -> None:
        super().__init__(config.tokens, config.min_tokens, config.max_tokens)
        self.config = config

    def observe(self, seen: Observation) -> None:
        c, tokens = self.config, seen.tokens
        worth_M = drift_worth(tokens.lengths_B, np.asarray(tokens.overlap_M) < c.threshold, c.decay)
        effective = float(worth_M.sum()) / len(tokens.lengths_B)
        # A rollout that stopped by itself asks for no more than it is long; a cut one may ask for more.
        self.move(self.now + c.rate * (c.slack * effective - self.now))


def drift_worth(lengths_B: np.ndarray, drifts_M: np.ndarray, decay: float) -> np.ndarray:
    """decay ** (drift events before a position, in its rollout), float64 `[M]`."""
    events_M = np.cumsum(drifts_M) - drifts_M
    starts_B = np.cumsum(lengths_B) - lengths_B
    worth: np.ndarray = decay ** (events_M - np.repeat(events_M[starts_B], lengths_B)).astype(np.float64)
    return worth
