"""The tabular proving ground: exact readings, a known best fixed horizon, and real policies trained in it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from examples.tabular_world import GRID, MISLED, MOVING, RIGHT, WORLDS, T, World, best_fixed, readings, trained


def test_readings_against_enumeration_of_all_responses() -> None:
    """Positions 0 to 4 decided at random, the rest always right: R, G and accuracy by summing over every response."""
    world = World({t: 0.3 + 0.1 * t for t in range(5)}, known=1 - 1e-13)
    accuracy, after = 0.0, np.zeros(6)
    for right in itertools.product([True, False], repeat=5):
        chance = float(np.prod([p if r else 1 - p for p, r in zip(world.p, right, strict=False)]))
        accuracy += chance * all(right)
        for n in range(6):  # the first n of this response, then the teacher; the later tokens of it sum out
            after[n] += chance * all(right[:n]) * RIGHT ** (T - n)
    assert world.accuracy == pytest.approx(accuracy)
    assert [world.recoverability(n) for n in range(6)] == pytest.approx(after)
    assert world.gift(3) == pytest.approx(RIGHT**3 * world.p[3] * world.p[4])
    assert (world.damage(0), world.damage(T)) == pytest.approx((0.0, 1.0))


def test_a_step_is_the_gradient_that_autograd_finds() -> None:
    """In float64, with the chance of being clean held constant; the natural gradient divides by p (1 - p)."""
    world = World({2: 0.3, 9: 0.6}, known=0.9)
    logit = torch.tensor(world.logit, requires_grad=True)
    clean = torch.tensor(world.clean[:T])
    p = torch.sigmoid(logit)

    def kl(q: np.ndarray) -> torch.Tensor:
        other = torch.tensor(q)
        return p * (p / other).log() + (1 - p) * ((1 - p) / (1 - other)).log()

    expected = clean * kl(world.teacher_after(False)) + (1 - clean) * kl(world.teacher_after(True))
    assert expected.detach().numpy() == pytest.approx(world.divergence())
    (gradient,) = torch.autograd.grad(expected.sum(), logit)
    before, q = world.logit.copy(), world.p
    world.step(12)
    natural = gradient.numpy() / (q * (1 - q))
    assert (before - world.logit)[:12] == pytest.approx(0.02 * natural[:12])
    assert np.array_equal(world.logit[12:], before[12:])
    assert world.teacher_after(True)[8] == MISLED


def steps_off(name: str) -> dict[str, int]:
    after = best_fixed(WORLDS[name])
    best = max(after, key=lambda n: after[n])
    return {reading: abs(GRID.index(n) - GRID.index(best)) for reading, n in readings(WORLDS[name]()).items()}


def test_which_readings_find_the_best_fixed_horizon_within_one_grid_step() -> None:
    off = {name: steps_off(name) for name in WORLDS}
    misses = {reading: [name for name in WORLDS if off[name][reading] > 1] for reading in off["damage everywhere"]}
    early = ["decisions early, sure tail", "decisions early, weak tail"]
    assert misses == {
        "D(N) >= 0.9, smallest": [],
        "G(N) >= 0.9 A_T, smallest": [],
        "KL coverage 45%": [early[0]],
        "overlap >= 0.5, largest": early,
        "R(N) >= 0.9 R(0), largest": [*early, "damage everywhere"],
    }


def test_late_supervision_harms_ungated_growth_and_neither_gates_nor_damage() -> None:
    make = WORLDS["decisions early, weak tail"]
    after = best_fixed(make)
    assert max(after.values()) == after[16] > 0.75
    assert after[32] < 0.01  # full rollouts teach wrong tails while most prefixes are spoiled, for ever
    found = {name: trained(make, begin())[0].accuracy for name, begin in MOVING.items()}
    assert found["growth, ungated"] < 0.01
    assert found["growth, gated by R"] == pytest.approx(after[8], abs=1e-3)  # holds: as good as where it started
    assert found["growth, gated by overlap"] > after[16] + 0.1
    assert found["damage-following"] > after[16] + 0.1


def test_damage_following_is_no_worse_than_the_best_fixed_horizon_in_any_world() -> None:
    for make in WORLDS.values():
        assert trained(make, MOVING["damage-following"]())[0].accuracy > max(best_fixed(make).values()) - 0.005


def test_what_recoverability_asks_for_stops_before_the_decisions() -> None:
    make = WORLDS["one decision, late"]
    start = make().accuracy
    for name in ("growth, gated by R", "recoverability-following"):
        world, horizons = trained(make, MOVING[name]())
        assert max(horizons) < 14
        assert world.accuracy == pytest.approx(start, abs=1e-3)
