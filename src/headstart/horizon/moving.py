"""What every horizon that moves shares: one number in the checkpoint, kept within bounds, and the grid it walks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
