"""Statement (e) of docs/explanation/theory.md: when supervision of a decision helps, and the best order of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples.supervision_order import (
    Array,
    Decisions,
    Schedules,
    accuracy,
    chance,
    every_schedule,
    growing,
    horizons,
    subsets,
)
from examples.tabular_world import MOVING, WORLDS, trained
from examples.theory import accuracy as enumerated_accuracy
from examples.theory import trained_gradient
from hypothesis import given
from hypothesis import strategies as st

from headstart.horizon.fixed import FixedHorizon
from small_worlds import few

logits = st.floats(-3.0, 3.0)
decisions = st.builds(Decisions, st.floats(3.0, 6.0), st.floats(-6.0, -1.0), st.floats(0.05, 0.9))
gentle = st.builds(Decisions, st.floats(3.0, 6.0), st.floats(-6.0, -1.0), st.floats(0.05, 0.8), st.just(False))


def odds(p: float) -> float:
    return float(np.log(p / (1 - p)))


def best(found: Schedules) -> Array:
    return np.asarray(found.accuracy_MK.max(0))


def fixed(world: Decisions, start: Array, n: int, steps: int) -> Array:
    logit, after = start, []
    for _ in range(steps):
        logit = world.step(logit, horizons(len(start))[n])
        after.append(accuracy(logit))
    return np.array(after)


# --- (e1) what supervision does to one decision -----------------------------------------------------------------------


@few
@given(decisions, st.lists(logits, min_size=4, max_size=4))
def test_e1_the_trained_gradient_pulls_each_decision_to_its_target(world: Decisions, start: list[float]) -> None:
    """By summing over all responses; and each decision has its threshold on the share of clean prefixes."""
    logit = np.array(start)
    p, table = chance(logit), world.world(4)
    theta = torch.tensor(logit)
    assert enumerated_accuracy(table, theta) == pytest.approx(float(accuracy(logit)))
    gradient = trained_gradient(table, theta, 0, 4).numpy()
    assert gradient == pytest.approx(p * (1 - p) * (logit - world.target(logit)), abs=1e-10)
    threshold = (logit - world.misled) / (world.sure - world.misled)
    clear = np.abs(world.clean(logit) - threshold) > 1e-9
    assert np.array_equal(world.helped(logit)[clear], (world.clean(logit) > threshold)[clear])
    assert np.array_equal(gradient[clear] < 0, world.helped(logit)[clear] > 0)


def test_e1_a_wrong_lesson_turns_into_a_right_one_when_earlier_decisions_are_learned() -> None:
    world, logit = Decisions(5.8, -5.8, 0.2), np.full(5, odds(0.73))
    assert world.helped(logit).tolist() == [1, 1, 0, 0, 0]
    learned = np.concatenate([np.full(4, 5.0), logit[4:]])
    assert world.helped(learned).tolist() == [1, 1, 1, 1, 1]


# --- (e2) the best order ----------------------------------------------------------------------------------------------


@few
@given(st.one_of(decisions, gentle), st.lists(logits, min_size=3, max_size=3))
def test_e2_no_choice_of_decisions_is_ever_ahead(world: Decisions, start: list[float]) -> None:
    """At each number of steps, among all sequences of subsets, from any start."""
    found = every_schedule(world, np.array(start), subsets(3), 4)
    assert len(found.choice_MK) == 8**4
    assert growing(world, np.array(start), 4)[1] == pytest.approx(best(found), abs=1e-12)


@few
@given(st.one_of(decisions, gentle), st.lists(logits, min_size=4, max_size=4).map(sorted))
def test_e2_it_is_a_growing_horizon_where_no_decision_starts_below_an_earlier_one(
    world: Decisions, start: list[float]
) -> None:
    chosen, after = growing(world, np.array(start), 5)
    lengths = chosen.sum(-1).astype(int)
    assert np.array_equal(chosen, horizons(4)[lengths])
    assert (np.diff(lengths) >= 0).all()
    assert after == pytest.approx(best(every_schedule(world, np.array(start), horizons(4), 5)), abs=1e-12)


def test_e2_is_no_horizon_where_a_late_decision_is_worse_than_an_early_one() -> None:
    """The second decision is better than the teacher's lesson there, the third far worse: leave out the second."""
    world, start = Decisions(4.6, -4.6, 0.4), np.array([odds(0.73), odds(0.97), odds(0.1)])
    chosen, after = growing(world, start, 1)
    assert chosen[0].tolist() == [1, 0, 1]
    assert best(every_schedule(world, start, horizons(3), 1))[0] < after[0] - 0.001


def test_e2_full_rollouts_are_best_from_the_first_step_where_nothing_misleads_the_teacher() -> None:
    world, start = Decisions(4.6, 4.6, 0.4), np.full(4, odds(0.73))
    chosen, after = growing(world, start, 5)
    assert chosen.all()
    assert fixed(world, start, 4, 5) == pytest.approx(after)
    assert after == pytest.approx(best(every_schedule(world, start, horizons(4), 5)))


@pytest.mark.parametrize("chance_at_first", [0.4, 0.73, 0.9])
def test_e3_the_cheapest_schedules_grow_too(chance_at_first: float) -> None:
    """By enumeration alone, in these worlds: counted in sampled decisions, to several accuracies."""
    world, start = Decisions(4.6, -4.6, 0.4), np.full(4, odds(chance_at_first))
    found = every_schedule(world, start, horizons(4), 7)
    same = (found.choice_MK == found.choice_MK[:, :1]).all(1)
    alone = Schedules(found.choice_MK[same], found.accuracy_MK[same], found.cost_MK[same])
    for target in (0.8, 0.85, 0.89):
        cheapest, one = found.cheapest(target), alone.cheapest(target)
        assert cheapest is not None
        assert cheapest[1] == sorted(cheapest[1])
        assert one is None or cheapest[0] < one[0]


def test_e3_figures_of_the_page() -> None:
    world, start = Decisions(4.6, -4.6, 0.4), np.full(4, 1.0)
    found, (chosen, after) = every_schedule(world, start, horizons(4), 7), growing(world, start, 7)
    assert after.round(3).tolist() == [0.398, 0.529, 0.689, 0.82, 0.887, 0.919, 0.935]
    assert chosen.sum(-1).tolist() == [2, 3, 4, 4, 4, 4, 4]
    assert fixed(world, start, 4, 7).round(3).tolist() == [0.276, 0.373, 0.587, 0.779, 0.873, 0.913, 0.932]
    assert fixed(world, start, 2, 7).round(3).tolist() == [0.398, 0.473, 0.502, 0.513, 0.518, 0.52, 0.522]
    assert found.cheapest(0.8) == (12, [1, 2, 2, 3, 4])
    assert found.cheapest(0.9) == (18, [1, 2, 3, 4, 4, 4])
    assert found.cheapest(0.99) is None


# --- (e4) where all of them end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "natural", "steps"), [(0, True, 400), (1, True, 400), (2, True, 400), (3, False, 6000)]
)
def test_e4_every_schedule_that_goes_on_supervising_all_ends_alike(seed: int, natural: bool, steps: int) -> None:
    draw = np.random.default_rng(seed)
    world, start = Decisions(draw.uniform(3, 4), draw.uniform(-4, -1), 0.3, natural), draw.uniform(-2, 2, 4)
    rests = np.zeros(4)
    for t in range(4):
        rests[t] = world.target(rests)[t]
    logit, full = start, start
    for _ in range(steps):
        logit = world.step(logit, horizons(4)[draw.choice([0, 1, 2, 4, 4])])
        full = world.step(full, np.ones(4))
    assert logit == pytest.approx(rests, abs=1e-6)
    assert full == pytest.approx(rests, abs=1e-6)


def test_e4_growth_recovers_in_the_exact_world_where_200_steps_show_a_ruin() -> None:
    make = WORLDS["decisions early, weak tail"]
    after = {steps: trained(make, MOVING["growth, ungated"](), steps)[0].accuracy for steps in (200, 400, 600)}
    assert {steps: round(reached, 3) for steps, reached in after.items()} == {200: 0.0, 400: 0.957, 600: 0.962}
    assert round(trained(make, FixedHorizon(16), 600)[0].accuracy, 3) == 0.772


def test_e_figures_beside_the_late_pair() -> None:
    """Five decisions at .73 and a teacher as sure when misled: where full rollouts pass, what the order saves."""
    world, start = Decisions(5.8, -5.8, 0.1), np.full(5, odds(0.73))
    logit = start
    for _ in range(4):
        logit = world.step(logit, np.ones(5))
    assert chance(logit).round(2).tolist() == [0.93, 0.88, 0.79, 0.65, 0.49]

    def saved(world: Decisions) -> float:
        full, ordered, spent = start, start, [0.0, 0.0]
        while accuracy(full) < 0.9:
            full, spent[0] = world.step(full, np.ones(5)), spent[0] + 5
        while accuracy(ordered) < 0.9:
            chosen = world.helped(ordered)
            ordered, spent[1] = world.step(ordered, chosen), spent[1] + chosen.sum()
        return round(1 - spent[1] / spent[0], 2)

    assert (saved(world), saved(Decisions(5.8, -9.0, 0.1))) == (0.18, 0.31)


@pytest.mark.parametrize(
    ("count", "world", "full", "ordered"),
    [
        (4, Decisions(4.6, -4.6, 0.2), 14, 13),
        (4, Decisions(4.6, -4.6, 0.2, natural=False), 128, 126),
        (8, Decisions(6.9, -9.0, 0.2), 29, 17),
        (8, Decisions(6.9, -9.0, 0.2, natural=False), 354, 168),
    ],
)
def test_e4_what_the_order_saves(count: int, world: Decisions, full: int, ordered: int) -> None:
    """Steps from 0.4 at each decision to an accuracy of 0.85: little for few decisions, half of them for many and a
    teacher that is very sure when it is wrong."""

    def steps(order: bool) -> int:
        logit, taken = np.full(count, odds(0.4)), 0
        while accuracy(logit) < 0.85:
            logit = world.step(logit, world.helped(logit) if order else np.ones(count))
            taken += 1
        return taken

    assert (steps(order=False), steps(order=True)) == (full, ordered)
