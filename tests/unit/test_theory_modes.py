"""Statement (d) of docs/explanation/theory.md: when the student keeps one of the teacher's modes, and which."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from examples.theory import (
    World,
    blind_world,
    left_out,
    mode_weights,
    random_world,
    resting_points,
    sequence_gradient,
    trained_gradient,
    visits,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from small_worlds import close, context, few, free_worlds, vector, with_rows


def sequence_kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def with_weights(theta: Tensor, weights: Tensor) -> Tensor:
    """Parameters of a free student whose first token has these probabilities."""
    return torch.cat([weights.log(), theta[len(weights) :]])


@few
@given(free_worlds, st.integers(1, 4))
def test_d1_d2_which_weights_the_two_gradients_leave_alone(made: tuple[World, Tensor], horizon: int) -> None:
    world, theta = made
    kept, taught = mode_weights(world, theta, horizon), world.teacher_CV[0].exp()
    nothing = torch.zeros(3).double()
    at_kept, at_taught = with_weights(theta, kept), with_weights(theta, taught)
    assert close(sequence_gradient(world, at_kept, horizon)[:3], nothing)
    assert close(trained_gradient(world, at_taught, 0, horizon)[:3], nothing)
    if horizon > 1:
        assert float(trained_gradient(world, at_kept, 0, horizon)[:3].norm()) > 1e-9
        assert close(sequence_gradient(world, at_taught, horizon)[:3], left_out(world, at_taught, 1).choice_D[:3]) == (
            horizon == 4
        )


@few
@given(free_worlds, st.integers(2, 4), st.integers(0, 10**6))
def test_d1_no_other_weights_have_a_smaller_divergence(made: tuple[World, Tensor], horizon: int, seed: int) -> None:
    world, theta = made
    q = visits(world, world.teacher_CV)[horizon]

    def at(weights: Tensor) -> float:
        return sequence_kl(visits(world, world.student(with_weights(theta, weights)))[horizon], q)

    best = at(mode_weights(world, theta, horizon))
    others = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)
    assert all(at(weights) >= best - 1e-12 for weights in others)
    # Modes one at a time: their costs, hence the least value in closed form.
    alone = torch.stack([q.view(3, -1)[m] / q.view(3, -1)[m].sum() for m in range(3)])  # the teacher within each mode
    mine = visits(world, world.student(theta))[horizon].view(3, -1)
    cost = vector([sequence_kl(mine[m] / mine[m].sum(), alone[m]) for m in range(3)])
    assert best == pytest.approx(-float(torch.logsumexp(world.teacher_CV[0] - cost, 0)), abs=1e-11)


def test_d1_one_mode_is_kept_and_a_longer_window_may_choose_the_other() -> None:
    """The frequent mode begins easily and goes on as the student cannot; the rare one is the reverse."""
    world, _ = random_world(0, 2, 4)
    easy, hard = [0.5, 0.5], [1e-9, 1 - 1e-9]
    begun_0 = {context(world, 0): easy} | {context(world, 0, a): hard for a in (0, 1)}
    begun_1 = {context(world, 1): [0.05, 0.95]} | {context(world, 1, a): easy for a in (0, 1)}
    late = {context(world, a, b, c): easy for a, b, c in itertools.product((0, 1), repeat=3)}
    world = replace(world, teacher_CV=with_rows(world.teacher_CV, {0: [0.8, 0.2]} | begun_0 | begun_1 | late))
    theta = torch.zeros(len(world.features_CVD) * 2).double()
    assert float(mode_weights(world, theta, 1)[0]) == pytest.approx(0.8)
    assert float(mode_weights(world, theta, 2)[0]) > 0.9
    assert float(mode_weights(world, theta, 4)[1]) > 0.99


def test_d1_is_only_an_upper_bound_where_modes_overlap() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2, 2, 6, generator=draw).double() + 0.01).unbind(0)
    w, pi = vector([0.3, 0.7]), vector([0.6, 0.4])
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    parts = sum(float(w[m]) * (math.log(w[m] / pi[m]) + sequence_kl(p[m], q[m])) for m in range(2))
    assert sequence_kl(w @ p, pi @ q) < parts - 0.05


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
@pytest.mark.parametrize("margin", [1.0, 2.4, 3.2, 4.4, 7.0])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.95])
def test_d3_where_the_blind_student_rests(horizon: int, margin: float, share: float) -> None:
    world, rests = blind_world(5, margin, share), resting_points(horizon, margin, share)
    for z in rests:
        assert abs(float(trained_gradient(world, vector([z]), 0, horizon))) < 1e-9
    grid = torch.linspace(-12, 12, 241).double() + 1e-3
    signs = [float(trained_gradient(world, z[None], 0, horizon)) > 0 for z in grid]
    assert sum(a != b for a, b in itertools.pairwise(signs)) == len(rests)
    if share == 0.5:
        assert (len(rests) == 3) == (horizon > 1 and margin > 2 * horizon / (horizon - 1))


@pytest.mark.parametrize(("start", "ends_in_mode_0"), [(0.4, True), (-0.4, False)])
def test_d3_it_keeps_the_mode_it_began_with(start: float, ends_in_mode_0: bool) -> None:
    """Teacher at even odds. One token keeps both modes; four keep one, from 60% of it on."""
    world, z, one = blind_world(4, 5.0, 0.5), vector([start]), vector([start])
    for _ in range(400):
        z = z - 0.5 * trained_gradient(world, z, 0, 4)
        one = one - 0.5 * trained_gradient(world, one, 0, 1)
    assert float(one) == pytest.approx(0.0, abs=1e-3)
    assert (float(z) > 3.0) == ends_in_mode_0
    assert float(z) == pytest.approx(resting_points(4, 5.0, 0.5)[2 if ends_in_mode_0 else 0], abs=1e-3)


def test_d3_a_rare_mode_is_kept_if_the_window_is_long_and_lost_if_it_is_short() -> None:
    """The teacher has it one time in ten, the student at first nine times in ten."""
    ends = []
    for horizon in (2, 4):
        world, z = blind_world(4, 5.0, 0.9), vector([-2.2])
        for _ in range(600):
            z = z - 0.5 * trained_gradient(world, z, 0, horizon)
        ends.append(float(z))
    assert ends[0] > 2.0
    assert ends[1] < -2.0
