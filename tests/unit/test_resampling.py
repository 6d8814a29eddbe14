"""Resampled intervals: known values, coverage, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.stats import RESAMPLES, Estimate, by_problem, estimate, is_noise, ratio, resamples, share


def test_row_zero_is_the_data_and_every_row_draws_as_many_problems() -> None:
    counts = resamples(7, 3)
    assert counts.shape == (1 + RESAMPLES, 7)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 7).all()
    assert counts[1:].mean() == pytest.approx(1.0)
    assert counts[1:].var() == pytest.approx(6 / 7, abs=0.05)  # binomial(7, 1/7)
    assert np.array_equal(counts, resamples(7, 3))
    assert not np.array_equal(counts, resamples(7, 4))


def test_ratio_is_the_mean_over_tokens_and_its_interval_the_textbook_one() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, 400)
    sums, number = by_problem(np.arange(400), draws, 400)
    found = estimate(ratio(resamples(400, 0), sums, number))
    assert found is not None
    assert found.value == pytest.approx(draws.mean())
    half = 1.96 * draws.std(ddof=1) / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_tokens_of_one_problem_are_not_independent_evidence() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 40)
    problem = np.repeat(np.arange(40), 50)
    alone = estimate(ratio(resamples(40, 0), *by_problem(np.arange(40), values, 40)))
    repeated = estimate(ratio(resamples(40, 0), *by_problem(problem, np.repeat(values, 50), 40)))
    assert alone is not None
    assert repeated is not None
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_undefined_and_constant_figures() -> None:
    counts = resamples(30, 0)
    assert estimate(ratio(counts, np.zeros(30), np.zeros(30))) is None
    one = share(counts, np.ones(30), np.ones(30))
    assert one == Estimate(1.0, pytest.approx(0.9), 1.0)
    assert share(counts, np.full(30, 0.25), np.ones(30)) == Estimate(0.25, pytest.approx(0.15), pytest.approx(0.35))
    alone = np.eye(30)[7]  # all that counts lies in one problem
    assert share(counts, 5 * alone, 6 * alone) == Estimate(pytest.approx(5 / 6), 0.0, 1.0)
    assert is_noise(None)
    assert is_noise(Estimate(0.1, -0.1, 0.3))
    assert not is_noise(Estimate(0.2, 0.1, 0.3))
