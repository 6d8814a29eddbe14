"""Horizons that depend on the step alone: fixed, and drawn (mostly short, now and then full, or from a power law).

A long rollout now and then anchors what the short ones never see. With weights 1 / P(H >= t) on position t the expected
loss is exactly that of full rollouts (Russian roulette): E[1(H >= t) / P(H >= t)] = 1 for every t. That needs a loss
that is a plain sum over a rollout's tokens (`denominator: sum`); a mean divides by the length of the cut rollout, which
depends on H. One draw per step, not per prompt: a step decodes as long as its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from headstart.config.horizon import MixedHorizon, RouletteHorizon
from headstart.interfaces import Observation
from headstart.streams import uniforms


class FixedHorizon:
    """Every rollout ends after `tokens` completion tokens, or at its stop token if that comes first.

    Full rollouts are the same policy with a bound nobody is meant to reach.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, step: int) -> int:
        return self._tokens

    def observe(self, seen: Observation) -> None:
        """A fixed horizon learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class DrawnHorizon(FixedHorizon):
    """`tokens` and `reach` of one configuration. Draws come from the stream (seed, "horizon", step): no state."""

    signals: tuple[str, ...] = ()

    def __init__(self, config: MixedHorizon | RouletteHorizon, seed: int) -> None:
        super().__init__(config.tokens)
        self.config, self.seed = config, seed

    def tokens(self, step: int) -> int:
        c = self.config
        if isinstance(c, MixedHorizon) and not c.weighted:
            return c.max_tokens if step % c.every == c.every - 1 else c.tokens
        return self.quantile(1.0 - float(uniforms((self.seed, "horizon", step), [(0, 0)], 0, 1)[0, 0]))

    def quantile(self, u: float) -> int:
        """The horizon H for u uniform on (0, 1]: u <= P(H >= t) exactly where t <= H."""
        c = self.config
        if isinstance(c, MixedHorizon):
            return c.max_tokens if u <= 1 / c.every else c.tokens
        return min(int(c.tokens * u ** (-1 / c.exponent)), c.max_tokens)

    def reach(self, t: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """P(H >= t) for token counts t from 1 to max_tokens."""
        c = self.config
        if isinstance(c, MixedHorizon):
            return np.where(t <= c.tokens, 1.0, 1 / c.every)
        return np.minimum(1.0, (c.tokens / np.asarray(t, dtype=np.float64)) ** c.exponent)

    def factors(self, length: int, signals: Mapping[str, Any]) -> npt.NDArray[np.float64]:
        """Weights of a rollout's positions, see `interfaces.TokenFactors`."""
        return 1.0 / self.reach(np.arange(1, length + 1))
