"""Sub-mode commitment: openings, modes, ranks and lengths with known answers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.diagnosis.positions import TokenReadings
from headstart.explanation.commitment import (
    choices,
    distinct,
    histogram_edges,
    lengths,
    on_modes,
    on_other_samples,
)
from headstart.stats import resamples


def test_distinct_openings_and_the_teachers_modes() -> None:
    teacher = [["a", "a", "b", "c"], ["x", "x", "x", "x"]]
    student = [["a", "b", "z", "z"], ["y", "y", "y", "x"]]
    assert distinct(student).tolist() == [0.75, 0.5]
    assert distinct(teacher).tolist() == [0.75, 0.25]
    # The teacher's modes of problem 0: a (twice), then b, then c (alphabetical); of problem 1: x.
    assert on_modes(student, teacher).tolist() == [[0.25, 0.25, 0.0], [0.25, 0.0, 0.0]]
    assert on_modes(teacher, teacher).sum(axis=1).tolist() == [1.0, 1.0]
    assert on_other_samples(teacher).tolist() == [0.5, 1.0]


def test_a_student_that_has_settled_on_one_mode() -> None:
    teacher = [[f"{m}" for m in "abcd"] for _ in range(20)]
    settled, spread = [["a"] * 4 for _ in range(20)], [list("abcd") for _ in range(20)]
    assert distinct(settled).mean() == 0.25 < distinct(spread).mean() == 1.0
    assert on_modes(settled, teacher).mean(axis=0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert on_modes(spread, teacher).mean(axis=0).tolist() == [0.25] * 4


def readings(rank: list[int], agree: list[bool], top: list[float], row: list[int]) -> TokenReadings:
    size = len(rank)
    plain = {name: np.zeros(size, dtype=np.float32) for name in TokenReadings.__slots__}
    named = {"teacher_rank": rank, "agree": agree, "student_top": top, "row": row}
    return TokenReadings(**{**plain, **{name: np.array(column) for name, column in named.items()}})


def test_ranks_are_counted_where_the_favourites_differ() -> None:
    read = readings([1, 3, 9, 1, 1, 4], [True, False, False, False, True, True], [0.9, 0.5, 0.6, 0.4, 1.0, 0.8],
                    [0, 0, 0, 1, 1, 1])  # fmt: skip
    found = choices(read, np.array([0, 1]), resamples(2, 0), is_teacher=False)
    assert found.divergent is not None
    assert found.divergent.value == 0.5
    assert [rank.value for rank in found.ranks.values() if rank] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found.own_top is not None
    assert found.own_top.value == pytest.approx(0.7)
    assert found.top_there is not None
    assert found.top_there.value == pytest.approx(0.5)
    everywhere = choices(read, np.array([0, 1]), resamples(2, 0), is_teacher=True)
    assert everywhere.divergent is None
    assert [rank.value for rank in everywhere.ranks.values() if rank] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    agreed = readings([1, 1], [True, True], [0.9, 0.8], [0, 1])
    assert set(choices(agreed, np.array([0, 1]), resamples(2, 0), is_teacher=False).ranks.values()) == {None}


@given(st.lists(st.lists(st.integers(1, 300), min_size=3, max_size=3), min_size=2, max_size=9))
def test_length_percentiles_are_those_of_all_samples(table: list[list[int]]) -> None:
    length_PK = np.array(table)
    edges = histogram_edges(length_PK)
    found = lengths(length_PK, [True] * length_PK.size, edges, resamples(len(table), 0)[:3])
    for q, estimate in ((10, found.p10), (50, found.p50), (90, found.p90)):
        assert estimate is not None
        assert estimate.value == np.percentile(length_PK, q, method="inverted_cdf")
    assert sum(found.rollouts) == length_PK.size
    for i, (low, high) in enumerate(pairwise(edges)):
        assert found.rollouts[i] == ((length_PK >= low) & (length_PK < high)).sum()
