"""Statements (a) to (c) of docs/explanation/theory.md in random worlds, both sides; where a bound is tight, and what
happens where a condition does not hold."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples.theory import (
    Readings,
    World,
    accuracy,
    after_training,
    alignment,
    cascade,
    divergence,
    first_order,
    left_out,
    random_world,
    readings,
    sequence_gradient,
    trained_gradient,
    values,
    visits,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import headstart
from small_worlds import close, context, few, free_worlds, vector, with_rows, worlds

DIAGNOSES = Path(__file__).parents[2] / "docs/results/second-pair-diagnosis.json"


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.cosine_similarity(left, right, dim=0))


def by_hand(world: World, table: Tensor, response: tuple[int, ...]) -> float:
    return math.prod(float(table[context(world, *response[:t]), y].exp()) for t, y in enumerate(response))


# --- the ground: the program's sums against loops over responses ------------------------------------------------------


def test_visits_values_and_accuracy_are_sums_over_responses() -> None:
    world, theta = random_world(1, 3, 3)
    table = world.student(theta)
    total, from_one = 0.0, 0.0
    for i, response in enumerate(itertools.product(range(3), repeat=3)):
        chance = by_hand(world, table, response)
        assert float(visits(world, table)[-1][i]) == pytest.approx(chance)
        total += chance * float(world.right_Y[i])
        from_one += chance * float(world.right_Y[i]) * (response[:1] == (1,))
    assert accuracy(world, theta) == pytest.approx(total)
    assert float(values(world, table, 1)[1] * visits(world, table)[1][1]) == pytest.approx(from_one)


def test_trained_gradient_is_that_of_the_trainers_loss() -> None:
    """`headstart.reverse_kl` on the logits of the contexts that rollouts of N tokens meet, weighted by how often."""
    world, theta = random_world(2, 3, 4, 6)
    theta = theta.requires_grad_()
    met = torch.cat(visits(world, world.student(theta.detach()))[:-1]) * (world.depth < 2)
    loss = headstart.reverse_kl(world.features_CVD @ theta, world.teacher_CV, reduction="none")
    (met * loss).sum().backward()
    assert theta.grad is not None
    assert close(theta.grad, trained_gradient(world, theta, 0, 2), within=1e-5)


# --- (a) --------------------------------------------------------------------------------------------------------------


@few
@given(worlds, st.integers(1, 3))
def test_a1_a2_what_a_window_leaves_out(made: tuple[World, Tensor], horizon: int) -> None:
    world, theta = made
    T = world.length
    rest = left_out(world, theta, horizon)
    assert close(trained_gradient(world, theta, 0, T) - trained_gradient(world, theta, 0, horizon), rest.later_D)
    whole, window = sequence_gradient(world, theta, T), sequence_gradient(world, theta, horizon)
    assert close(whole - window, rest.later_D + rest.choice_D)


@few
@given(free_worlds)
def test_a1_with_nothing_shared_both_horizons_train_the_window_alike(made: tuple[World, Tensor]) -> None:
    world, theta = made
    long, short = theta.clone(), theta.clone()
    for _ in range(20):
        long -= 0.5 * trained_gradient(world, long, 0, 4)
        short -= 0.5 * trained_gradient(world, short, 0, 2)
    early = (world.depth < 2).repeat_interleave(3)
    assert torch.equal(short[~early], theta[~early])
    assert close(long[early], short[early])


def test_a1_with_shared_parameters_they_do_not() -> None:
    world, theta = random_world(3, 3, 4, 6)
    one_step = [theta - 0.5 * trained_gradient(world, theta, 0, n) for n in (2, 4)]
    window = [sum(divergence(world, world.student(after))[world.depth < 2]) for after in one_step]
    assert abs(float(window[0] - window[1])) > 1e-3


@few
@given(free_worlds)
def test_a1_with_nothing_shared_it_vanishes_only_where_the_teacher_is_matched(made: tuple[World, Tensor]) -> None:
    world, theta = made
    assert float(left_out(world, theta, 2).later_D.norm()) > 1e-4
    late = (world.depth >= 2).repeat_interleave(3)
    matched = torch.where(late, world.teacher_CV.flatten(), theta)
    assert close(left_out(world, matched, 2).later_D, torch.zeros_like(theta))


@few
@given(free_worlds)
def test_a2_early_bias_vanishes_where_every_opening_leads_to_equal_divergence(made: tuple[World, Tensor]) -> None:
    """The same late rows in every context of a length, for both models: later predictions are still left out, but
    nothing at positions before N. In the world as drawn something is."""
    world, theta = made
    early = world.depth < 2

    def at_early(some: World, parameters: Tensor) -> Tensor:
        return left_out(some, parameters, 2).choice_D.view(-1, 3)[early]

    assert float(at_early(world, theta).norm()) > 1e-5
    same = torch.where(early, torch.arange(len(early)), (early.sum() + (world.depth == 3) * 9))
    level, flat = replace(world, teacher_CV=world.teacher_CV[same]), theta.view(-1, 3)[same].flatten()
    assert close(at_early(level, flat), torch.zeros_like(at_early(level, flat)))
    assert float(left_out(level, flat, 2).later_D.norm()) > 1e-4


def test_a2_the_window_can_point_away_from_the_sequence_gradient() -> None:
    """The teacher prefers token 0 a little; after it the student cannot follow, after token 1 it can."""
    world, _ = random_world(0, 2, 2)
    student = with_rows(world.teacher_CV, {0: [0.5, 0.5], 1: [0.5, 0.5], 2: [0.5, 0.5]})
    world = replace(world, teacher_CV=with_rows(world.teacher_CV, {0: [0.6, 0.4], 1: [0.99, 0.01], 2: [0.5, 0.5]}))
    theta = student.flatten()
    assert cosine(trained_gradient(world, theta, 0, 1), sequence_gradient(world, theta, 2)) < 0
    assert float(trained_gradient(world, theta, 0, 2)[0]) < 0 < float(sequence_gradient(world, theta, 2)[0])


def test_a3_what_is_trained_is_no_gradient_from_two_tokens_on() -> None:
    """The Jacobian of a gradient is symmetric."""
    world, theta = random_world(4, 2, 3)

    def jacobian(n: int) -> Tensor:
        step = 1e-6 * torch.eye(len(theta), dtype=theta.dtype)
        ahead = [
            trained_gradient(world, theta + row, 0, n) - trained_gradient(world, theta - row, 0, n) for row in step
        ]
        return torch.stack(ahead) / 2e-6

    assert close(jacobian(1), jacobian(1).T, within=1e-8)
    assert float((jacobian(2) - jacobian(2).T).abs().max()) > 1e-3


# --- (b) --------------------------------------------------------------------------------------------------------------


def better_after(world: World, theta: Tensor, horizon: int, beta: float) -> World:
    """A teacher that after N tokens is the student tilted towards what comes out right, so that it finishes no prefix
    worse; before N it is what it was."""
    table, value = world.student(theta).clone(), world.right_Y
    for depth in reversed(range(horizon, world.length)):
        rows = world.depth == depth
        table[rows] = torch.log_softmax(table[rows] + beta * value.view(-1, world.vocabulary), -1)
        value = (table[rows].exp() * value.view(-1, world.vocabulary)).sum(-1)
    early = (world.depth < horizon)[:, None]
    return replace(world, teacher_CV=torch.where(early, world.teacher_CV, table))


@few
@given(worlds, st.integers(1, 2), st.floats(0.1, 3.0))
def test_b1_accuracy_is_gift_opening_and_tail_and_the_opening_is_bounded(
    made: tuple[World, Tensor], horizon: int, rate: float
) -> None:
    world, before = made
    after = before - rate * trained_gradient(world, before, 0, horizon)
    found = after_training(world, before, after, horizon)
    assert accuracy(world, after) == pytest.approx(found.gift + found.opening + found.tail, abs=1e-12)
    assert abs(found.opening) <= found.opening_at_most + 1e-12


@few
@given(free_worlds)
def test_b1_a_student_that_learned_the_window_and_kept_its_tail_has_the_gift(made: tuple[World, Tensor]) -> None:
    world, before = made
    early = (world.depth < 2).repeat_interleave(3)
    learned = torch.where(early, world.teacher_CV.flatten(), before)
    assert accuracy(world, learned) == pytest.approx(readings(world, before, 2).gift)


def test_b1_the_bound_on_the_opening_is_approached_at_even_odds() -> None:
    """One token, right or wrong, teacher at 1/2: Pinsker's inequality is an equality to second order."""
    world, _ = random_world(0, 2, 1)
    world = replace(world, teacher_CV=with_rows(world.teacher_CV, {0: [0.5, 0.5]}), right_Y=vector([1.0, 0.0]))
    before = torch.zeros(2).double()
    for gap, at_least in ((0.1, 0.99), (0.01, 0.9999)):
        found = after_training(world, before, vector([0.5 + gap, 0.5 - gap]).log(), 1)
        # The window is the whole response, so a right first token finishes with 1 and a wrong one with 0.
        assert at_least < found.opening / found.opening_at_most <= 1.0


def test_b1_without_the_tail_the_bound_breaks_where_parameters_are_shared() -> None:
    broken = 0
    for seed in range(60):
        world, theta = random_world(seed, 2, 5, 4)
        after = theta
        for _ in range(60):
            after = after - 0.5 * trained_gradient(world, after, 0, 2)
        found = after_training(world, theta, after, 2)
        broken += abs(accuracy(world, after) - found.gift) > found.opening_at_most
    assert broken > 0


@few
@given(worlds, st.integers(1, 2), st.floats(0.5, 4.0))
def test_b2_the_gift_is_bounded_by_the_damage_share(made: tuple[World, Tensor], horizon: int, beta: float) -> None:
    world, theta = made
    world = better_after(world, theta, horizon, beta)
    found = readings(world, theta, horizon)
    assert found.gift >= found.gift_at_least - 1e-12
    interaction = (found.teacher - found.gift) - (found.recoverability - found.student)
    assert found.gift == pytest.approx(found.student + found.damage * found.lead - interaction)


@few
@given(free_worlds)
def test_b2_is_an_equality_where_one_error_cannot_be_repaired(made: tuple[World, Tensor]) -> None:
    world, theta = made
    world = better_after(replace(world, right_Y=(torch.arange(81) == 0).double()), theta, 2, 2.0)
    found = readings(world, theta, 2)
    assert found.gift == pytest.approx(found.gift_at_least)


def test_b2_figures_of_the_late_pair() -> None:
    """The page's table, from the committed diagnoses."""
    runs = json.loads(DIAGNOSES.read_text(encoding="utf-8"))
    decays = [runs[f"late seed {seed}"]["decay"] for seed in range(3)]
    own = sum(decay["student"]["successes"] for decay in decays) / 288
    taught = sum(decay["teacher"]["successes"] for decay in decays) / 288
    table = []
    for points in zip(*(decay["points"][2:9] for decay in decays), strict=True):
        count = {name: sum(point[name]["n"] for point in points) for name in ("after_clean", "after_wrong")}
        right = {name: sum(point[name]["successes"] for point in points) / 288 for name in ("after_student", "gift")}
        ratio = 1 + count["after_wrong"] / count["after_clean"]
        found = Readings(own, right["after_student"], right["gift"], taught, ratio)
        percent = [round(100 * x) for x in (found.damage, found.gift_at_least, found.gift)]
        table.append([points[0]["prefix_tokens"], round(ratio, 1), *percent])
    assert table == [
        [8, 1.4, 34, 37, 41],
        [32, 1.5, 38, 36, 42],
        [64, 2.0, 61, 46, 48],
        [96, 2.6, 83, 66, 65],
        [128, 3.8, 93, 78, 77],
        [160, 4.7, 98, 90, 88],
        [192, 4.6, 100, 95, 95],
    ]


def test_b2_breaks_where_the_teacher_finishes_some_prefixes_worse() -> None:
    """Misled after the student's wrong first token, it makes R too small and D too large."""
    world, _ = random_world(0, 2, 2)
    world = replace(world, right_Y=vector([1.0, 0.0, 1.0, 0.0]))
    teacher = with_rows(world.teacher_CV, {0: [0.99, 0.01], 1: [0.95, 0.05], 2: [0.01, 0.99]})
    student = with_rows(world.teacher_CV, {0: [0.5, 0.5], 1: [0.6, 0.4], 2: [0.6, 0.4]})
    found = readings(replace(world, teacher_CV=teacher), student.flatten(), 1)
    assert found.damage > 1
    assert found.gift < found.gift_at_least - 0.3


# --- (c) --------------------------------------------------------------------------------------------------------------


@few
@given(worlds, st.integers(1, 2))
def test_c1_the_parts_add_up(made: tuple[World, Tensor], horizon: int) -> None:
    world, before = made
    after = before - 0.7 * trained_gradient(world, before, 0, horizon)
    late = world.depth >= horizon

    def beyond(theta: Tensor) -> float:
        table = world.student(theta)
        return float((torch.cat(visits(world, table)[:-1]) * divergence(world, table))[late].sum())

    parts = cascade(world, before, after, horizon)
    assert parts.mixture + parts.within == pytest.approx(beyond(after) - beyond(before), abs=1e-11)
    assert abs(parts.mixture) + abs(parts.within) > 0


@few
@given(free_worlds)
def test_c1_with_nothing_shared_all_is_mixture(made: tuple[World, Tensor]) -> None:
    world, before = made
    parts = cascade(world, before, before - 5.0 * trained_gradient(world, before, 0, 2), 2)
    assert parts.within == 0.0
    assert parts.mixture != 0.0


@few
@given(worlds, st.integers(1, 2))
def test_c2_both_parts_to_first_order(made: tuple[World, Tensor], horizon: int) -> None:
    """The rest of the Taylor series is of second order: a tenth of the step leaves a tenth of the error."""
    world, theta = made
    gradient, rate = trained_gradient(world, theta, 0, horizon), first_order(world, theta, horizon)

    def error(step: float) -> tuple[float, float]:
        parts = cascade(world, theta, theta - step * gradient, horizon)
        return abs(parts.mixture / step - rate.mixture), abs(parts.within / step - rate.within)

    size = 1 + abs(rate.mixture) + abs(rate.within) + float(gradient.norm()) ** 2
    for coarse, fine in zip(error(1e-3), error(1e-4), strict=True):
        assert fine < 0.05 * size
        assert fine < 0.2 * coarse + 1e-7 * size


@few
@given(worlds, st.integers(1, 2))
def test_c2_within_is_a_sum_over_pairs_of_contexts(made: tuple[World, Tensor], horizon: int) -> None:
    world, theta = made
    early = world.depth < horizon
    pairs = alignment(world, theta)
    assert -float(pairs[~early][:, early].sum()) == pytest.approx(first_order(world, theta, horizon).within, abs=1e-11)


@pytest.mark.parametrize(("late", "sign"), [([0.9, 0.1], -1), ([0.5, 0.5], 0), ([0.1, 0.9], 1)])
def test_c2_one_shared_row_cascades_as_the_teacher_agrees_with_itself(late: list[float], sign: int) -> None:
    """One row of logits for all contexts. The teacher wants 0.9 early; later the same, nothing new, or the opposite."""
    world, _ = random_world(0, 2, 2)
    teacher = with_rows(world.teacher_CV, {0: [0.9, 0.1], 1: late, 2: late})
    world = replace(world, teacher_CV=teacher, features_CVD=torch.eye(2).double().expand(3, 2, 2))
    theta = torch.zeros(2).double()
    within = cascade(world, theta, theta - 0.1 * trained_gradient(world, theta, 0, 1), 1).within
    slope = first_order(world, theta, 1).within
    assert (slope > 1e-12) - (slope < -1e-12) == sign
    # Where the slope is zero, what remains is of second order: a matched prediction can only be disturbed.
    assert within * sign > 0 if sign else 0 < within < 0.01
