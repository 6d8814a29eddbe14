"""Random small worlds of `examples/theory.py` for hypothesis, and tables written row by row."""

from __future__ import annotations

import torch
from examples.theory import World, random_world
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few = settings(deadline=None, max_examples=40)
"""For tests whose every example sums over all responses."""
SHAPES = [(2, 4, None), (3, 3, None), (2, 5, 4), (3, 4, 6), (4, 3, 9)]
"""Vocabulary, length, parameters; up to 81 responses."""
worlds = st.builds(lambda seed, shape: random_world(seed, *shape), st.integers(0, 10**6), st.sampled_from(SHAPES))
free_worlds = st.builds(lambda seed: random_world(seed, 3, 4), st.integers(0, 10**6))


def close(left: Tensor, right: Tensor, within: float = 1e-11) -> bool:
    return bool(torch.allclose(left, right, rtol=1e-9, atol=within))


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def context(world: World, *prefix: int) -> int:
    """The row of a context."""
    V = world.vocabulary
    return sum(V**t for t in range(len(prefix))) + sum(y * V ** (len(prefix) - 1 - t) for t, y in enumerate(prefix))


def with_rows(table: Tensor, rows: dict[int, list[float]]) -> Tensor:
    """The log-probability table with these rows replaced by probabilities."""
    table = table.clone()
    for row, chances in rows.items():
        table[row] = torch.tensor(chances, dtype=table.dtype).log()
    return table
