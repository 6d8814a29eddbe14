"""Horizons that follow what a step measured: what all of them share, top-k overlap, and those measured once.

`OverlapBudget` follows how long both models look at the same tokens (Prune-OPD, arXiv 2605.07804); `measured_once`
makes the first step full and reads the horizon off it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from headstart.config.horizon import FractionHorizon, KLCoverageHorizon, OverlapHorizon
from headstart.interfaces import Observation
from headstart.records import StepTokens


class MovingHorizon:
    """Holds the current horizon `now`, within `low` .. `high` (tokens)."""

    def __init__(self, now: int, low: int, high: int) -> None:
        self.now, self.low, self.high = now, low, high

    def tokens(self, step: int) -> int:
        return self.now

    def move(self, tokens: float) -> None:
        self.now = min(max(round(tokens), self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.now = int(state["now"])


def doubling(low: int, high: int) -> tuple[int, ...]:
    """`low`, twice that and so on, and `high` at the end."""
    grid = [low]
    while grid[-1] * 2 < high:
        grid.append(grid[-1] * 2)
    return tuple(dict.fromkeys([*grid, high]))


def neighbour(grid: Sequence[int], now: int, up: bool) -> int | None:
    """The next horizon of `grid` above (or below) `now`; None where there is none."""
    others = [n for n in grid if (n > now if up else n < now)]
    return (min(others) if up else max(others)) if others else None


class OverlapBudget(MovingHorizon):
    """o_t = |S_k & T_k| / k. A position with o_t < threshold multiplies the worth of all that follows it by `decay`; a
    rollout's effective length is the sum of its positions' worths. The horizon moves towards the mean effective
    length times `slack`: it grows where nothing drifts and shrinks where much does."""

    def __init__(self, config: OverlapHorizon) -> None:
        super().__init__(config.tokens, config.min_tokens, config.max_tokens)
        self.config = config

    def observe(self, seen: Observation) -> None:
        c, tokens = self.config, seen.tokens
        worth_M = drift_worth(tokens.scored_B, np.asarray(tokens.overlap_M) < c.threshold, c.decay)
        # Tokens that a teacher with another tokenizer does not score count as those that it does.
        unscored = float(tokens.lengths_B.sum() / max(1, tokens.scored_B.sum()))
        effective = float(worth_M.sum()) * unscored / len(tokens.lengths_B)
        # A rollout that stopped by itself asks for no more than it is long; a cut one may ask for more.
        self.move(self.now + c.rate * (c.slack * effective - self.now))


def drift_worth(lengths_B: np.ndarray, drifts_M: np.ndarray, decay: float) -> np.ndarray:
    """decay ** (drift events before a position, in its rollout), float64 `[M]`."""
    events_M = np.cumsum(drifts_M) - drifts_M
    starts_M = np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    worth: np.ndarray = decay ** (events_M - events_M[starts_M]).astype(np.float64)
    return worth


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
