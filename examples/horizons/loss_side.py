"""Horizons that act on the loss alone: rollouts are full, and positions count for more or less (or for nothing).

Both divide by the denominator that full rollouts would have: a token that counts for nothing still counts among them.

    horizon: {type: custom, path: "examples.horizons.loss_side:SoftWeights", arguments: {max_tokens: 200}}
    horizon: {type: custom, path: "examples.horizons.loss_side:ChangePoint", arguments: {max_tokens: 200}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headstart.horizon.fixed import FixedHorizon

Array = npt.NDArray[np.float64]


class SoftWeights(FixedHorizon):
    """Weights that fall along the rollout. `divergence` is IW-OPD (arXiv 2606.22600)."""

    def __init__(
        self,
        max_tokens: int = 3584,
        rule: Literal["divergence", "exponential"] = "divergence",
        largest: float = 1.5,
        half_life: float = 100.0,
    ) -> None:
        """`rule`: `divergence`, by the share of |ln(student / teacher)| that lies before, from `largest` down to 1;
        `exponential`, by position alone, halved every `half_life` tokens."""
        super().__init__(max_tokens)
        self.rule, self.largest, self.half_life = rule, largest, half_life
        self.signals: tuple[str, ...] = ("gap",) if rule == "divergence" else ()

    def factors(self, length: int, signals: Mapping[str, Any]) -> Array:
        """See `interfaces.TokenFactors`."""
        if self.rule == "exponential":
            weights: Array = 2.0 ** (-np.arange(length) / self.half_life)
            return weights
        size = np.abs(np.asarray(signals["gap"], np.float64))
        before = np.cumsum(size) - size
        return 1.0 + (self.largest - 1.0) * (1.0 - before / max(float(size.sum()), 1e-12))


class ChangePoint(FixedHorizon):
    """No loss past the change point of each rollout (Prefix Teach, Suffix Fade, arXiv 2605.13643)."""

    signals: tuple[str, ...] = ("margin",)

    def __init__(self, max_tokens: int = 3584, segment: int = 16, penalty: float = 2.0) -> None:
        """`segment` tokens' margins are averaged before the change point is looked for; `penalty` is p in the BIC."""
        super().__init__(max_tokens)
        self.segment, self.penalty = segment, penalty

    def factors(self, length: int, signals: Mapping[str, Any]) -> Array:
        """1 up to the change point of the rollout's margins, 0 after it."""
        size = self.segment
        starts = np.arange(0, length, size)
        margins = np.add.reduceat(np.asarray(signals["margin"], np.float64), starts) if length else np.zeros(0)
        kept = downward_change(margins / np.diff([*starts, length]), self.penalty)
        return (np.arange(length) < (length if kept is None else kept * size)).astype(np.float64)


def downward_change(series: Array, penalty: float) -> int | None:
    """How many of S values lie before the one downward step that explains them better than a constant; None without.

    Delta BIC = S ln(RSS0 / S) - [S ln(RSS(tau) / S) + p ln S] > 0, the tau with the smallest RSS among those where the
    mean falls.
    """
    S = len(series)
    if S < 3:
        return None
    flat = _rss(series)
    falls = [(_rss(series[:t]) + _rss(series[t:]), t) for t in range(1, S) if series[:t].mean() > series[t:].mean()]
    # A relative floor: margins that agree to rounding have no change point.
    floor = 1e-12 * float((series**2).sum())
    if not falls or flat <= floor:
        return None
    best, tau = min(falls)
    gain = S * math.log(flat / max(best, floor)) - penalty * math.log(S)
    return tau if gain > 0 else None


def _rss(series: Array) -> float:
    return float(((series - series.mean()) ** 2).sum())
