"""Rank correlation and overlap against independent formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import PlacedTokens, TopTokens
from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.token_selection import jaccard, pick, ranks, rules, spearman

numbers = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(numbers)
def test_ranks_against_their_definition(values: list[int]) -> None:
    expected = [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]
    assert ranks(np.array(values)).tolist() == expected


@given(numbers, st.randoms())
def test_spearman_against_a_brute_force(a: list[int], shuffle: Callable[..., None]) -> None:
    b = a.copy()
    shuffle.shuffle(b)  # type: ignore[attr-defined]
    n, x, y = len(a), ranks(np.array(a)), ranks(np.array(b))
    found = spearman(np.array(a), np.array(b))
    if len(set(a)) == 1:
        assert found is None
        return
    covariance = sum((x[i] - x[j]) * (y[i] - y[j]) for i in range(n) for j in range(n))
    variance = sum((x[i] - x[j]) ** 2 for i in range(n) for j in range(n))
    assert found == pytest.approx(covariance / variance)  # b is a permutation of a: both variances are equal


def test_spearman_known_values() -> None:
    position = np.arange(10)
    assert spearman(position, np.exp(-position)) == pytest.approx(-1.0)
    assert spearman(position, position**3) == pytest.approx(1.0)
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) without ties: d = (0, 1, -1), n = 3
    assert spearman(np.array([1, 2, 3]), np.array([1, 3, 2])) == pytest.approx(1 - 6 * 2 / 24)


def reading(lengths: list[int]) -> TokenReadings:
    size = sum(lengths)
    plain = {name: np.zeros(size, dtype=np.float32) for name in TokenReadings.__slots__}
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    return TokenReadings(**{**plain, "row": row, "position": position, "divergence": 1.0 / (1 + position)})


def test_rules_that_pick_the_same_tokens_overlap_fully() -> None:
    read = reading([8, 3, 6])
    first = pick(PlacedTokens(type="first", tokens=4), read, 0)
    assert first.tolist() == [n < 4 for n in read.position]
    assert np.array_equal(pick(TopTokens(by=("divergence",), tokens=4), read, 0), first)
    assert jaccard(first, first, read.row) == 1.0
    last = pick(PlacedTokens(type="last", tokens=4), read, 0)
    assert jaccard(first, last, read.row) == pytest.approx((0 / 8 + 3 / 3 + 2 / 6) / 3)
    assert jaccard(first & False, first & False, read.row) is None
    assert jaccard(first, first | True, read.row) == pytest.approx((4 / 8 + 1 + 4 / 6) / 3)


def test_every_rule_has_the_same_budget() -> None:
    read = reading([30, 12])
    class_M = np.arange(42) % 3  # equally many of the first three classes
    masks = {name: pick(rule, read, 0, class_M) for name, rule in rules(5).items()}
    assert len(masks) == 15
    assert masks.pop("all").all()
    assert masks["format symbol"][class_M == 2].sum() == 9, "the short rollout holds only four"
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: 9 if name.startswith("format") else 10 for name in masks
    }
