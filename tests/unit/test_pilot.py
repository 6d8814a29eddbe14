"""Successive halving within a budget: plans that fit, arms that stay, and what is said in the end."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from headstart.study.halving import (
    Arm,
    Cost,
    Outcome,
    Pilot,
    Plan,
    Prices,
    Rung,
    Trial,
    cheapest,
    choose,
    grids,
    halving,
    make_plan,
    rungs_for,
)

HORIZONS, RATES = (16, 8, 32), (3e-4, 1e-4, 9e-4)


def prices(evaluation: float = 1.0, overhead: float = 0.0) -> Prices:
    step = {n: Cost(n / 100, 8.0 * n) for n in (4, *HORIZONS)}
    return Prices(step, Cost(2.0, 1600.0), Cost(evaluation, 64.0), Cost(overhead), Cost(1.0, 100.0))


def plan_of(arms: tuple[Arm, ...], *rungs: Rung, **kwargs: float) -> Plan:
    return Plan(arms, rungs, 1, prices(**kwargs))


def bits(right: int, n: int = 64) -> tuple[float, ...]:
    """The first `right` of `n` problems answered well: two such arms differ in exactly those between."""
    return tuple(float(i < right) for i in range(n))


def test_grids_go_from_every_combination_to_one_rate() -> None:
    full, cross, one_rate = grids(HORIZONS, RATES)
    assert set(full) == {Arm(n, lr) for n in HORIZONS for lr in RATES}
    assert cross == (Arm(16, 3e-4), Arm(8, 3e-4), Arm(32, 3e-4), Arm(16, 1e-4), Arm(16, 9e-4))
    assert one_rate == (Arm(16, 3e-4), Arm(8, 3e-4), Arm(32, 3e-4))
    assert full[0] == Arm(16, 3e-4)  # the likeliest is run first
    assert grids((16,), RATES) == (tuple(Arm(16, lr) for lr in RATES),)
    assert grids((16,), (1e-4,)) == ((Arm(16, 1e-4),),)


def test_a_third_goes_on_three_times_as_long_with_room_for_ties() -> None:
    assert rungs_for(9, 10) == (Rung(10, 9, 9), Rung(30, 3, 5))
    assert rungs_for(12, 5) == (Rung(5, 12, 12), Rung(15, 4, 6), Rung(45, 2, 3))
    assert rungs_for(3, 7) == (Rung(7, 3, 3),)


def test_the_price_of_a_plan_by_hand() -> None:
    arms = (Arm(16, 1e-4), Arm(8, 1e-4), Arm(32, 1e-4))
    plan = plan_of(arms, Rung(10, 3, 3), Rung(30, 1, 2), overhead=0.5)
    first = 10 * (0.16 + 0.08 + 0.32) + 3 * 1.5
    second = 20 * (0.32 + 0.16) + 2 * 1.5  # the two dearest
    assert plan.cost.seconds == pytest.approx(first + second)
    assert plan.cost.tokens == pytest.approx(10 * 8 * 56 + 3 * 64 + 20 * 8 * 48 + 2 * 64)
    twice = replace(plan, samples=2)  # then the timing's evaluation of the untrained student is too small, too
    assert twice.cost.seconds == pytest.approx(first + second + 5 * 1.0 + 2 * 1.0)


@settings(max_examples=60, deadline=None)
@given(seconds=st.floats(0.0, 400.0), evaluation=st.floats(0.01, 20.0), longest=st.integers(1, 300))
def test_a_plan_fits_its_budget_and_no_longer_one_does(seconds: float, evaluation: float, longest: int) -> None:
    choices, table = grids(HORIZONS, RATES), prices(evaluation)
    plan = make_plan(choices, table, seconds, longest)
    if plan is None:
        assert cheapest(choices, table).seconds > seconds or longest < 10
        return
    assert plan.cost.seconds <= seconds
    assert plan.rungs[0].steps >= 10
    assert plan.rungs[-1].steps <= longest
    longer = Plan(plan.arms, rungs_for(len(plan.arms), plan.rungs[0].steps + 1), plan.samples, table)
    assert longer.cost.seconds > seconds or longer.rungs[-1].steps > longest


def test_more_seconds_buy_more_arms_then_more_samples() -> None:
    choices, table = grids(HORIZONS, RATES), prices()
    found = [make_plan(choices, table, seconds, 200) for seconds in (15, 40, 60, 250)]
    assert [(len(p.arms), p.samples) for p in found if p] == [(3, 1), (5, 1), (9, 1), (9, 4)]


class Curves:
    """Arms with known accuracies after each rung; problems are shared, so that arms compare paired."""

    def __init__(self, plan: Plan, final: dict[Arm, float], seed: int, slow: float = 1.0, problems: int = 64) -> None:
        self.plan, self.final, self.slow = plan, final, slow
        self.random = np.random.default_rng(seed)
        self.problems = problems
        self.spent = 0.0
        self.calls: list[tuple[Arm, int]] = []

    def __call__(self, arm: Arm, rung: int) -> Outcome:
        self.calls.append((arm, rung))
        steps = self.plan.rungs[rung].steps
        accuracy = 0.4 + (self.final[arm] - 0.4) * (1 - math.exp(-3 * steps / self.plan.rungs[-1].steps))
        scores = self.random.random(self.problems) < accuracy
        seconds = self.plan.unit(arm, rung).seconds * self.slow
        self.spent += seconds
        return Outcome(steps, tuple(map(float, scores)), Cost(seconds))


def test_the_best_arm_survives_and_wins() -> None:
    """Nine arms, the best 15 points above the next: it must be in the last rung nearly always, and win mostly."""
    arms = grids(HORIZONS, RATES)[0]
    plan = Plan(arms, rungs_for(9, 20), 1, prices())
    best = Arm(16, 9e-4)
    final = {arm: 0.95 if arm == best else 0.8 - 0.05 * place for place, arm in enumerate(arms)}
    reached = won = 0
    for seed in range(200):
        trials = halving(plan, plan.cost.seconds, Curves(plan, final, seed))
        (trial,) = [t for t in trials if t.arm == best]
        reached += len(trial.outcomes) == 2
        winner = choose(trials, bits(26))
        won += winner is not None and winner.arm == best
    assert reached >= 196
    assert won >= 170  # 15 points are 2 standard errors of 64 problems, and a cheaper arm within one is preferred


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.floats(0.0, 120.0),
    seed=st.integers(0, 10**6),
    accuracies=st.lists(st.floats(0.3, 1.0), min_size=9, max_size=9),
)
def test_the_budget_is_never_exceeded(seconds: float, seed: int, accuracies: list[float]) -> None:
    arms = grids(HORIZONS, RATES)[0]
    plan = Plan(arms, rungs_for(9, 20), 1, prices())
    curves = Curves(plan, dict(zip(arms, accuracies, strict=True)), seed)
    trials = halving(plan, seconds, curves)
    assert curves.spent <= seconds + 1e-9
    assert sum(outcome.cost.seconds for trial in trials for outcome in trial.outcomes) == pytest.approx(curves.spent)
    # Every arm has an end: dropped with a reason, or a finalist.
    for trial in trials:
        assert (trial.reason is None) == (bool(trial.outcomes) and trial.outcomes[-1].steps == plan.rungs[-1].steps)


def test_a_slower_machine_is_noticed_after_one_unit() -> None:
    arms = grids(HORIZONS, RATES)[0]
    plan = Plan(arms, rungs_for(9, 20), 1, prices())
    curves = Curves(plan, dict.fromkeys(arms, 0.9), 0, slow=3.0)
    trials = halving(plan, plan.cost.seconds, curves)
    assert curves.spent <= plan.cost.seconds
    assert any(trial.reason == "budget" for trial in trials)


def fixed(plan: Plan, right: dict[Arm, int | None]):  # type: ignore[no-untyped-def]
    def run(arm: Arm, rung: int) -> Outcome:
        scores = () if right[arm] is None else bits(right[arm])  # type: ignore[arg-type]
        return Outcome(plan.rungs[rung].steps, scores, Cost(plan.unit(arm, rung).seconds, 10))

    return run


def test_arms_within_noise_stay_as_long_as_the_budget_pays() -> None:
    """Of five arms two must go on; two more are within noise of the second, one is clearly behind."""
    arms = grids(HORIZONS, RATES)[1]
    plan = Plan(arms, rungs_for(5, 10), 1, prices())
    right: dict[Arm, int | None] = dict(zip(arms, (60, 59, 58, 58, 30), strict=True))

    rich = halving(plan, 1000.0, fixed(plan, right))
    assert [(t.to_json()["dropped_after"], t.reason) for t in rich] == [(None, None)] * 4 + [(10, "behind")]

    # Rung 1 costs 5 + 10 * (3 * .16 + .08 + .32) = 13.8, rung 2 for three arms 3 + 20 * (.16 + .08 + .16) = 11.
    poor = halving(plan, 13.8 + 11.0 + 0.1, fixed(plan, right))
    by_arm = {t.arm: t for t in poor}
    assert by_arm[Arm(16, 1e-4)].reason is None  # of two equals the gentler rate came first
    assert (by_arm[Arm(32, 3e-4)].steps, by_arm[Arm(32, 3e-4)].reason) == (10, "budget")
    assert by_arm[Arm(16, 9e-4)].reason == "behind"


def test_an_arm_whose_loss_is_not_finite_is_dropped_and_never_wins() -> None:
    arms = (Arm(16, 3e-4), Arm(8, 3e-4), Arm(32, 3e-4))
    plan = plan_of(arms, *rungs_for(3, 10))
    trials = halving(plan, 100.0, fixed(plan, {arms[0]: None, arms[1]: 40, arms[2]: 41}))
    assert trials[0].reason == "not finite"
    assert _pilot(plan, trials).to_json()["arms"][0]["rungs"] == []
    winner = choose(trials, bits(20))
    assert winner is not None
    assert winner.arm == arms[1]
    none = halving(plan, 100.0, fixed(plan, dict.fromkeys(arms, None)))
    assert choose(none, bits(20)) is None
    assert _pilot(plan, none).to_json()["winner"] is None
    assert "Lower the learning rates" in _pilot(plan, none).sentence


def _trial(arm: Arm, right: int, steps: int = 30) -> Trial:
    return Trial(arm, [Outcome(steps, bits(right), Cost(2.0, 100))])


def test_the_cheapest_within_one_standard_error_wins() -> None:
    """Differences of 1 of 64 have a standard error of 1/64 (just within), of 20 of 64 one of 3.7 (far beyond)."""
    short, middle, long = Arm(8, 3e-4), Arm(16, 3e-4), Arm(64, 3e-4)
    winner = choose([_trial(long, 61), _trial(middle, 60), _trial(short, 41)], bits(31))
    assert winner is not None
    assert (winner.arm, winner.tied) == (middle, (long,))
    assert winner.accuracy == 60 / 64
    assert winner.gain.value == pytest.approx(29 / 64)
    assert winner.gain.low > 0.3
    # Only those that came farthest are compared.
    winner = choose([_trial(long, 64, steps=10), _trial(middle, 60), _trial(short, 41)], bits(31))
    assert winner is not None
    assert winner.arm == middle
    # Of equals at one horizon the gentler rate.
    winner = choose([_trial(Arm(16, 9e-4), 60), _trial(middle, 60)], bits(31))
    assert winner is not None
    assert winner.arm == middle


def _pilot(plan: Plan, trials: tuple[Trial, ...], right: int = 31) -> Pilot:
    return Pilot("dev", plan, trials, Outcome(0, bits(right), Cost(1.0, 64)), share=0.1, full_steps=200)


def test_the_sentence_says_what_was_found_and_what_was_not() -> None:
    arms = grids(HORIZONS, RATES)[1]
    plan = Plan(arms, rungs_for(5, 10), 1, prices())
    right: dict[Arm, int | None] = dict(zip(arms, (58, 57, 57, 30, 60), strict=True))
    pilot = _pilot(plan, halving(plan, 13.8 + 11.0, fixed(plan, right)))
    text = pilot.sentence
    assert text.startswith("Use N = 16 at lr 0.0009: 93.8%")
    assert "The budget, not the evidence, dropped N = 32 at lr 0.0003." in text
    assert "The highest rate won over 30 of 200 steps" in text

    flat = _pilot(plan, halving(plan, 1000.0, fixed(plan, dict.fromkeys(arms, 31))))
    assert flat.sentence.startswith("No arm is clearly better than the untrained student")


def test_the_record_adds_up() -> None:
    arms = grids(HORIZONS, RATES)[1]
    plan = Plan(arms, rungs_for(5, 10), 1, prices())
    pilot = _pilot(plan, halving(plan, 1000.0, fixed(plan, dict.fromkeys(arms, 50))))
    record = json.loads(json.dumps(pilot.to_json()))
    rungs = [rung for arm in record["arms"] for rung in arm["rungs"]]
    assert record["budget"]["seconds"] == pytest.approx(0.1 * 200 * 2.0)
    assert record["spent"]["seconds"] == pytest.approx(1.0 + 1.0 + sum(rung["seconds"] for rung in rungs))
    assert record["spent"]["generated_tokens"] == 100 + 64 + 10 * len(rungs)
    assert record["winner"]["tokens"] == 8
    low, high = record["winner"]["interval"]
    assert low < record["winner"]["accuracy"] == 50 / 64 < high


def test_prices_are_read_as_they_were_written() -> None:
    assert TypeAdapter(Prices).validate_python(json.loads(json.dumps(asdict(prices())))) == prices()
