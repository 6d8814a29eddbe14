"""Cascading alignment in constructed worlds: who moves, the mixture or the modes?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.explanation.cascade import (
    OTHER,
    SETS,
    Decomposition,
    Mode,
    Scored,
    by_frequency,
    decompose,
    levels,
    sentence,
)
from headstart.stats import resamples

Rollouts = Sequence[tuple[int, int, Sequence[float]]]
"""Problem, mode and divergences of each rollout."""


def scored(rollouts: Rollouts) -> Scored:
    return Scored(
        problem=np.array([p for p, _, values in rollouts for _ in values], dtype=np.int64),
        position=np.array([n for _, _, values in rollouts for n in range(len(values))], dtype=np.int64),
        divergence=np.array([v for _, _, values in rollouts for v in values], dtype=np.float32),
        mode=np.array([m for _, m, values in rollouts for _ in values], dtype=np.int64),
    )


def world(wrong: Sequence[bool], clean_nats: float, wrong_nats: float) -> Scored:
    return scored([(p, int(w), [wrong_nats if w else clean_nats] * 4) for p, w in enumerate(wrong)])


def values(parts: Decomposition) -> tuple[float, float, float]:
    assert parts.change is not None
    assert parts.mixture is not None
    assert parts.within is not None
    return parts.change.value, parts.mixture.value, parts.within.value  # type: ignore[return-value]


PROBLEMS = 12
COUNTS = resamples(PROBLEMS, 0)


def test_a_mixture_shift_alone_changes_nothing_within() -> None:
    before = world([p < 9 for p in range(PROBLEMS)], 0.25, 1.5)
    after = world([p < 3 for p in range(PROBLEMS)], 0.25, 1.5)
    parts = decompose(before, after, 2, COUNTS)
    change, mixture, within = values(parts)
    assert within == 0.0
    assert parts.within.low == parts.within.high == 0.0  # type: ignore[union-attr]
    assert change == mixture == pytest.approx(-0.5 * 1.25)
    assert parts.mixture.high < 0  # type: ignore[union-attr]


def test_a_shift_within_the_modes_alone_leaves_the_mixture_at_zero() -> None:
    kinds = [p % 2 == 0 for p in range(PROBLEMS)]
    parts = decompose(world(kinds, 0.25, 1.5), world(kinds, 0.5, 0.5), 2, COUNTS)
    change, mixture, within = values(parts)
    assert mixture == 0.0
    assert parts.mixture.low == parts.mixture.high == 0.0  # type: ignore[union-attr]
    assert change == within == pytest.approx(0.5 * 0.25 - 0.5 * 1.0)


def test_a_mode_that_only_one_side_has_is_all_mixture() -> None:
    before, after = world([True] * PROBLEMS, 0.0, 1.0), world([False] * PROBLEMS, 0.25, 0.0)
    assert values(decompose(before, after, 2, COUNTS)) == pytest.approx((-0.75, -0.75, 0.0))


rollouts = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 2), st.lists(st.floats(0, 8, width=32), min_size=1, max_size=5)),
    min_size=1,
    max_size=8,
)


@given(before=rollouts, after=rollouts)
def test_the_parts_always_add_up_and_swapping_the_sides_changes_their_sign(before: Rollouts, after: Rollouts) -> None:
    a, b, counts = scored(before), scored(after), resamples(5, 0)[:1]
    change, mixture, within = values(decompose(a, b, 3, counts))
    expected = float(b.divergence.astype(np.float64).mean() - a.divergence.astype(np.float64).mean())
    assert change == pytest.approx(expected, abs=1e-9)
    assert mixture + within == pytest.approx(expected, abs=1e-9)
    # By hand, from the definition.
    parts = [0.0, 0.0]
    for mode in range(3):
        mine, theirs = (s.divergence[s.mode == mode].astype(np.float64) for s in (a, b))
        share = [len(mine) / len(a.mode), len(theirs) / len(b.mode)]
        if not len(mine) and not len(theirs):
            continue
        level = [x.mean() if len(x) else y.mean() for x, y in ((mine, theirs), (theirs, mine))]
        parts[0] += (share[1] - share[0]) * (level[0] + level[1]) / 2
        parts[1] += (share[0] + share[1]) / 2 * (level[1] - level[0])
    assert (mixture, within) == pytest.approx(tuple(parts), abs=1e-9)
    back = values(decompose(b, a, 3, counts))
    assert back == pytest.approx((-change, -mixture, -within), abs=1e-9)


def test_levels_and_sentences_call_noise_noise() -> None:
    draws = np.random.default_rng(0)

    def sample(low: float) -> Scored:
        return scored([(p, 0, list(low + draws.random(6))) for p in range(PROBLEMS)])

    same, lower = sample(1.0), sample(0.2)
    moved = levels({"before": same, "after": lower, "fixed": same}, COUNTS)
    assert moved.before is not None
    assert moved.before.value == pytest.approx(same.divergence.mean())
    assert moved.change is not None
    assert moved.change.high < 0
    assert moved.relative is not None
    assert moved.relative.value == pytest.approx(lower.divergence.mean() / same.divergence.mean() - 1, rel=1e-5)
    assert moved.fixed_change is not None
    assert moved.fixed_change.value == 0.0
    modes = [Mode("clean", None, None, moved), Mode("wrong", None, None, levels(dict.fromkeys(SETS, same), COUNTS))]
    text = sentence(moved, decompose(same, lower, 1, COUNTS), modes, 16, True)
    assert "Within a mode: 'clean' fell by 0.72" in text
    assert "wrong" not in text
    assert "fell" in text
    assert "never trained" in text
    assert "old rollouts, which hold the mixture fixed, it did not move beyond noise" in text
    still = levels({"before": same, "after": sample(1.0), "fixed": same}, COUNTS)
    assert "did not move beyond noise" in sentence(still, decompose(same, same, 1, COUNTS), [], 16, True)
    nothing = levels(dict.fromkeys(SETS, same.between(50, 60)), COUNTS)
    assert nothing.before is None
    assert "nothing to compare" in sentence(nothing, decompose(same, same, 1, COUNTS), [], 50, True)


def test_the_most_frequent_openings_are_modes_whatever_the_order() -> None:
    sets = (["a", "b", "a", "c"], ["b", "a", "d"])
    assert by_frequency(sets, 2) == (("a", "b", "a", OTHER), ("b", "a", OTHER))
    assert by_frequency((["z", "y", "x"],), 2) == ((OTHER, "y", "x"),)
    assert by_frequency((["def f():\n    pass"],)) == (("def f(): pass",),)
