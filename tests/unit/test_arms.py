"""Resampling seeds and problems together, and Holm's correction, against direct computation and known worlds."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.stats import RESAMPLES, crossed_means, holm, interval, p_value


def test_holm_against_a_worked_example() -> None:
    # Sorted: .01 x 4, .015 x 3, .03 x 2, .04 x 1, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.015]) == pytest.approx([0.04, 0.06, 0.06, 0.045])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_equal_values_have_no_width_and_no_difference() -> None:
    drawn = crossed_means(np.full((3, 5), 0.4))
    assert drawn.shape == (RESAMPLES,)
    assert interval(drawn) == pytest.approx((0.4, 0.4))
    assert p_value(crossed_means(np.zeros((3, 5)))) == 1.0
    assert p_value(np.array([1e-17, -1e-17, 0.3, 0.2, 0.1])) == p_value(np.array([0.0, 0.0, 0.3, 0.2, 0.1])) == 1.0


def test_spread_is_that_of_the_textbook_when_only_seeds_or_only_problems_differ() -> None:
    seeds_S = np.array([0.1, 0.4, 0.7])
    by_seed = crossed_means(np.repeat(seeds_S[:, None], 50, axis=1))
    assert by_seed.std() == pytest.approx(seeds_S.std(ddof=1) / np.sqrt(3), rel=0.05)  # right for three seeds
    assert by_seed.mean() == pytest.approx(0.4, abs=0.01)
    problems_P = (np.arange(40) % 4 == 0).astype(float)
    by_problem = crossed_means(np.repeat(problems_P[None], 3, axis=0))
    assert by_problem.std() == pytest.approx(problems_P.std() / np.sqrt(40), rel=0.05)
    alone = crossed_means(problems_P[None])  # one seed: the same spread, nothing from seeds
    assert alone.std() == pytest.approx(by_problem.std(), rel=0.05)


def test_seeds_that_disagree_are_noise_however_many_problems_there_are() -> None:
    gaps_S = np.array([0.3, 0.2, -0.05])
    wild = crossed_means(np.repeat(gaps_S[:, None], 400, axis=1))
    assert p_value(wild) > 0.1
    sure = crossed_means(np.full((3, 400), 0.1) + 0.01 * np.random.default_rng(0).normal(size=(3, 400)))
    assert p_value(sure) == pytest.approx(2 / (RESAMPLES + 1))


def test_intervals_of_differences_hold_the_truth_often_enough() -> None:
    """Three seeds, 60 problems, spread between seeds, problems and their meeting: about 95%, rather above."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(150):
        seed_S1, problem_1P = rng.normal(0, 0.03, (3, 1)), rng.normal(0, 0.15, (1, 60))
        low, high = interval(crossed_means(seed_S1 + problem_1P + rng.normal(0, 0.2, (3, 60))))
        held += low <= 0.0 <= high
    assert held >= 0.9 * 150
