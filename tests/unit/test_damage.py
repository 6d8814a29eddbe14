"""The damage share and the plateau against independent references, and their properties."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.diagnosis.curve import damage_share, plateau
from headstart.stats import UNDEFINED


def draw(seed: int, n: int, *chances: float) -> list[list[bool]]:
    """Nested outcomes: a problem that is right at a small chance is right at every larger one."""
    uniform = random.Random(seed)
    draws = [uniform.random() for _ in range(n)]
    return [[u < chance for u in draws] for chance in chances]


def test_the_value_is_the_ratio_of_the_two_differences() -> None:
    teacher, after, student = draw(0, 64, 0.95, 0.6, 0.4)
    found = damage_share(teacher, after, student)
    exact = Fraction(sum(teacher) - sum(after), sum(teacher) - sum(student))
    assert found.value == pytest.approx(float(exact), rel=1e-12)
    assert found.low < float(exact) < found.high


def test_the_interval_agrees_with_a_plain_bootstrap() -> None:
    teacher, after, student = draw(3, 80, 0.9, 0.7, 0.3)
    found = damage_share(teacher, after, student, seed=5)
    generator = random.Random(1)
    shares = []
    for _ in range(4000):
        places = [generator.randrange(80) for _ in range(80)]
        r0, rn, s = (sum(arm[i] for i in places) / 80 for arm in (teacher, after, student))
        if r0 > s:
            shares.append((r0 - rn) / (r0 - s))
    assert found.low == pytest.approx(float(np.quantile(shares, 0.025)), abs=0.03)
    assert found.high == pytest.approx(float(np.quantile(shares, 0.975)), abs=0.03)


def test_the_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    truth = (0.9 - 0.6) / (0.9 - 0.3)
    found = [damage_share(*draw(seed, 100, 0.9, 0.6, 0.3)) for seed in range(200)]
    assert 0.90 <= sum(d.low <= truth <= d.high for d in found) / 200 <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(30, 100))
def test_no_damage_is_zero_and_all_of_it_is_one_with_some_width(seed: int, n: int) -> None:
    teacher, student = draw(seed, n, 0.95, 0.2)
    none, everything = damage_share(teacher, teacher, student), damage_share(teacher, student, student)
    assert (none.value, everything.value) == (0.0, 1.0)
    for found in (none, everything):
        assert found.low < (found.value or 0.0) < found.high


def test_without_a_lead_beyond_noise_there_is_no_share() -> None:
    teacher, after, student = draw(1, 64, 0.5, 0.45, 0.5)
    assert damage_share(teacher, after, student) == UNDEFINED
    assert damage_share(student, after, draw(1, 64, 0.9)[0]) == UNDEFINED
    one_apart = [True] * 64, [True] * 63 + [False]
    assert damage_share(one_apart[0], one_apart[1], one_apart[1]) == UNDEFINED


def test_the_same_seed_gives_the_same_interval() -> None:
    arms = draw(2, 40, 0.9, 0.5, 0.3)
    assert damage_share(*arms, seed=1) == damage_share(*arms, seed=1)
    assert damage_share(*arms, seed=1) != damage_share(*arms, seed=2)


def test_the_plateau_is_the_mean_gift_and_its_shortfall_is_paired() -> None:
    teacher = [1.0] * 60 + [0.0] * 4
    short = plateau(16, teacher, [0.75] * 60 + [0.0] * 4)
    assert short.gift.value == pytest.approx(0.75 * 60 / 64)
    assert short.gift.low < short.gift.value < short.gift.high  # type: ignore[operator]
    differences = [0.25] * 60 + [0.0] * 4
    half = 1.96 * float(np.std(differences, ddof=1)) / 8
    assert short.shortfall.value == pytest.approx(float(np.mean(differences)))
    assert (short.shortfall.low, short.shortfall.high) == pytest.approx(
        (np.mean(differences) - half, np.mean(differences) + half)
    )
    assert short.falls_short
    assert not plateau(16, teacher, teacher).falls_short
    assert not plateau(16, teacher, [0.99] * 60 + [0.0] * 4).falls_short  # certain, but less than two points
