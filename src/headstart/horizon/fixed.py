"""Horizons that never change: a fixed number of tokens (Early Stopping Rollout, arXiv 2605.27028) and full rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.interfaces import Observation


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
