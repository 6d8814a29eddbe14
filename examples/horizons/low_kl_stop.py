"""Stop where the two models have agreed for long (after KAT, arXiv 2606.09471): low divergence can mark a trap.

horizon: {type: custom, path: "examples.horizons.low_kl_stop:LowKLStop", arguments: {tokens: 64, max_tokens: 200}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headstart.horizon.measured import MovingHorizon
from headstart.interfaces import Observation


class LowKLStop(MovingHorizon):
    """Windows of W tokens with mean d_t = ln student - ln teacher. A rollout has said enough after `patience`
    consecutive windows below the `quantile` of the lowest windows of recent rollouts. The next step's horizon is the
    median over rollouts of where that was; a rollout that was cut before it asks for one window more."""

    def __init__(
        self,
        tokens: int = 1024,
        min_tokens: int = 16,
        max_tokens: int = 3584,
        window: int = 64,
        patience: int = 4,
        quantile: float = 0.3,
        memory: int = 4096,
    ) -> None:
        """`tokens` is the first horizon; `window` the tokens of one mean; `memory` the rollouts whose lowest window is
        remembered. KAT's values are the defaults."""
        super().__init__(tokens, min_tokens, max_tokens)
        self.window, self.patience, self.quantile, self.memory = window, patience, quantile, memory
        self.lowest: list[float] = []

    def observe(self, seen: Observation) -> None:
        tokens = seen.tokens
        gap_M = np.asarray(tokens.student_logprob_M, np.float64) - tokens.teacher_logprob_M
        ends = np.cumsum(tokens.lengths_B)
        windows = [window_means(gap_M[e - n : e], self.window) for e, n in zip(ends, tokens.lengths_B, strict=True)]
        self.lowest = [*self.lowest, *(float(w.min()) for w in windows if len(w))][-self.memory :]
        if not self.lowest:
            return
        low = float(np.quantile(self.lowest, self.quantile))
        wanted = []
        for means, length, stopped in zip(windows, tokens.lengths_B, tokens.stopped_B, strict=True):
            end = first_run(means < low, self.patience)
            cut = int(length) if stopped else int(length) + self.window
            wanted.append(cut if end is None else end * self.window)
        self.move(float(np.median(wanted)))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lowest": self.lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.lowest = [float(x) for x in state["lowest"]]


def window_means(values_N: np.ndarray, window: int) -> np.ndarray:
    """Means of whole, consecutive windows; what is left over at the end is not looked at."""
    whole = len(values_N) // window
    means: np.ndarray = values_N[: whole * window].reshape(whole, window).mean(axis=1)
    return means


def first_run(low: Sequence[bool] | np.ndarray, patience: int) -> int | None:
    """How many windows there are up to the end of the first `patience` consecutive true ones; None without such."""
    run = 0
    for place, is_low in enumerate(low):
        run = run + 1 if is_low else 0
        if run == patience:
            return place + 1
    return None
