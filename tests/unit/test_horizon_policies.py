"""Every horizon policy on signals made so that its answer is known; no model."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from examples.horizons.gradient_audit import GradientAudit
from examples.horizons.loss_side import ChangePoint, SoftWeights, downward_change
from examples.horizons.low_kl_stop import LowKLStop

from headstart.config.horizon import (
    FractionHorizon,
    KLCoverageHorizon,
    MixedHorizon,
    OverlapHorizon,
    ProbedHorizon,
    RouletteHorizon,
    ScheduledHorizon,
)
from headstart.horizon.fixed import DrawnHorizon
from headstart.horizon.measured import OverlapBudget, doubling, drift_worth, measured_once
from headstart.horizon.probed import ProbedPolicy
from headstart.horizon.scheduled import ScheduledPolicy
from headstart.interfaces import Observation
from headstart.records import Continuations, LongReadings, StepTokens


def tokens(lengths: list[int], *, stopped: bool = False, **signals: Any) -> StepTokens:
    """A step's tokens; signals not given are 0 everywhere."""
    total = sum(lengths)
    names = [name for name in StepTokens.__slots__ if name.endswith("_M")]
    arrays = {name: np.zeros(total) for name in names} | {k: np.asarray(v, np.float64) for k, v in signals.items()}
    arrays["position_M"] = np.concatenate([np.arange(n) for n in lengths])
    return StepTokens(np.array(lengths), np.full(len(lengths), stopped), 0, scored_B=np.array(lengths), **arrays)


def seen(step: int = 0, of: StepTokens | None = None, probe: Any = None, gradient: Any = None) -> Observation:
    return Observation(step, 0, of or tokens([4]), probe, gradient)


class World:
    """A probe of n problems: the student is right on `student` of them, the teacher on all, and after the first N
    tokens of the student on those and the share `repaired(N)` of the rest. Counts what it was asked."""

    def __init__(self, student: int, repaired: Any, n: int = 16, control: bool = True) -> None:
        self.student, self.repaired, self.n, self.control = student, repaired, n, control
        self.asked: list[int] = []
        self.overlap = lambda position: np.ones(len(position))
        self.stopped = 1.0

    def continuations(self, length: int) -> Continuations:
        self.asked.append(length)
        rest = round(self.repaired(length) * (self.n - self.student))
        right = [i < self.student for i in range(self.n)]
        return Continuations(tuple(right), tuple(i < self.student + rest for i in range(self.n)))

    def teacher(self, length: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        return (True,) * self.n, (self.control,) * self.n

    def long(self) -> LongReadings:
        position = np.arange(400)
        stops = np.arange(10) < 10 * self.stopped
        return LongReadings(np.full(10, 40), stops, position, np.zeros(400), self.overlap(position))


def step_at(n: int) -> Any:
    """The teacher repairs everything before position n and nothing after it."""
    return lambda length: float(length < n)


# --- measured once ---------------------------------------------------------------------------------------------------


def test_fraction_and_coverage_measure_the_first_step_and_then_hold() -> None:
    fraction = measured_once(FractionHorizon(share=0.1, min_tokens=2, max_tokens=500))
    assert fraction.tokens(0) == 500
    fraction.observe(seen(of=tokens([90, 101, 400])))
    assert fraction.tokens(1) == 11  # a tenth of 101, rounded up
    fraction.observe(seen(1, tokens([11, 11])))
    assert fraction.tokens(2) == 11
    covered = measured_once(KLCoverageHorizon(share=0.45, min_tokens=1, max_tokens=9))
    covered.observe(seen(of=tokens([4, 2], divergence_M=[1, 1, 1, 3, 2, 2])))  # by position 3, 3, 1, 3 of 10
    assert covered.tokens(1) == 2
    assert measured_once(KLCoverageHorizon(share=0.3, min_tokens=1, max_tokens=9)).choose(
        tokens([4, 2], divergence_M=[1, 1, 1, 3, 2, 2])
    ) == 1  # fmt: skip


# --- drawn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        RouletteHorizon(tokens=3, max_tokens=12, exponent=1.0, weighted=True),
        RouletteHorizon(tokens=2, max_tokens=9, exponent=1.7, weighted=True),
        MixedHorizon(tokens=3, max_tokens=12, every=4, weighted=True),
    ],
)
def test_the_weighted_sum_is_the_full_rollout_s_in_expectation(config: RouletteHorizon | MixedHorizon) -> None:
    """By enumeration of every horizon and every rollout of a small world with gradients: exact for `sum`, not for a
    mean over the cut rollout."""
    policy = DrawnHorizon(config, seed=0)
    t = np.arange(1, config.max_tokens + 1)
    reach = policy.reach(t)
    chance = reach - np.append(reach[1:], 0.0)  # P(H = t)
    assert chance.sum() == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    full = summed = mean_full = mean = 0.0
    for length in (1, 4, config.max_tokens):  # rollouts that end by themselves, of probability 1 / 3 each
        gradient = rng.normal(size=length)  # what each token adds to the gradient of some weight
        full += gradient.sum() / 3
        mean_full += gradient.mean() / 3
        for horizon, p in zip(t, chance, strict=True):
            n = min(length, int(horizon))
            part = policy.factors(n, {}) * gradient[:n]
            summed += p * part.sum() / 3
            mean += p * part.mean() / 3
    assert summed == pytest.approx(full, abs=1e-12)
    assert abs(mean - mean_full) > 1e-3


def test_draws_follow_their_distribution_and_only_seed_and_step() -> None:
    config = RouletteHorizon(tokens=10, max_tokens=200, exponent=1.0)
    policy = DrawnHorizon(config, seed=3)
    drawn = np.array([policy.tokens(step) for step in range(4000)])
    assert drawn.min() == 10
    assert drawn.max() == 200
    for t in (11, 20, 50, 200):
        assert (drawn >= t).mean() == pytest.approx(policy.reach(np.array([t]))[0], abs=0.025)
    assert [DrawnHorizon(config, 3).tokens(s) for s in (7, 3)] == [drawn[7], drawn[3]]
    mixed = DrawnHorizon(MixedHorizon(tokens=4, max_tokens=9, every=3), seed=0)
    assert [mixed.tokens(s) for s in range(6)] == [4, 4, 9, 4, 4, 9]
    lots = [
        DrawnHorizon(MixedHorizon(tokens=4, max_tokens=9, every=5, weighted=True), 1).tokens(s) for s in range(2000)
    ]
    assert lots.count(9) / 2000 == pytest.approx(0.2, abs=0.03)


# --- probed ----------------------------------------------------------------------------------------------------------


def probed(kind: Any, start: int, **more: Any) -> ProbedPolicy:
    return ProbedPolicy(ProbedHorizon(type=kind, tokens=start, min_tokens=4, max_tokens=64, memory=40, **more))


@pytest.mark.parametrize("start", [4, 16, 64])
def test_damage_finds_the_smallest_horizon_past_the_damage_from_either_side(start: int) -> None:
    policy = probed("damage", start)
    for step in range(6):
        policy.observe(seen(step, probe=World(4, step_at(12))))
    assert policy.tokens(9) == 16  # the grid is 4, 8, 16, 32, 64; at 8 all is still repaired


def test_damage_follows_the_remaining_damage_outward() -> None:
    policy = probed("damage", 16)
    policy.observe(seen(0, probe=World(4, step_at(12))))
    assert policy.tokens(1) == 16
    # The early errors are gone; those left are made at position 40.
    horizons = []
    for step in range(1, 5):
        policy.observe(seen(step, probe=World(8, step_at(40))))
        horizons.append(policy.tokens(step))
    assert horizons == [32, 64, 64, 64]


@pytest.mark.parametrize("start", [4, 16, 64])
def test_recoverability_finds_the_largest_recoverable_horizon(start: int) -> None:
    policy = probed("recoverability", start)
    for step in range(6):  # 16 right of 16 would not yet tell an R(N) of 1 from one of 0.9
        policy.observe(seen(step, probe=World(4, step_at(12), n=40)))
    assert policy.tokens(9) == 8


def test_probes_hold_within_noise_without_a_lead_and_without_a_probe() -> None:
    policy = probed("damage", 16)
    policy.observe(seen(0, probe=World(8, lambda n: 0.25)))  # 2 of 16 repaired, bar .8: not beyond noise
    policy.observe(seen(1, probe=World(16, lambda n: 1.0)))  # the student is as good as the teacher
    policy.observe(seen(2))
    assert policy.tokens(3) == 16
    few = probed("damage", 16)
    few.observe(seen(0, probe=World(1, step_at(30), n=4)))
    assert few.tokens(1) == 16


def test_a_teacher_that_fails_its_own_control_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match="the teacher loses 100 points when it continues its own first 16 tokens"):
        probed("damage", 16).observe(seen(probe=World(4, step_at(12), control=False)))


# --- scheduled -------------------------------------------------------------------------------------------------------


def test_plans_grow_as_they_say() -> None:
    def plan(shape: Any, **more: Any) -> list[int]:
        policy = ScheduledPolicy(ScheduledHorizon(shape=shape, tokens=10, max_tokens=80, **more), steps=4)
        found = []
        for step in range(5):
            found.append(policy.tokens(step))
            policy.observe(seen(step))
        return found

    assert plan("linear") == [10, 33, 57, 80, 80]
    assert plan("exponential") == [10, 20, 40, 80, 80]
    assert plan("steps", increment=30, every=2) == [10, 10, 40, 40, 70]


@pytest.mark.parametrize("gate", ["recoverability", "overlap"])
def test_a_gate_stops_growth_at_the_edge_of_what_is_good(gate: Any) -> None:
    config = ScheduledHorizon(shape="steps", tokens=10, max_tokens=80, increment=10, every=1, gate=gate, threshold=0.9)
    policy = ScheduledPolicy(config, steps=20)
    world = World(0, step_at(41))
    world.overlap = lambda position: (position < 40).astype(float)
    found = []
    for step in range(12):
        found.append(policy.tokens(step))
        policy.observe(seen(step, probe=world))
    assert max(found) == 40
    assert found[-4:] == [40] * 4
    ungated = ScheduledPolicy(config.model_copy(update={"gate": None}), steps=20)
    for step in range(12):
        ungated.observe(seen(step))
    assert ungated.tokens(12) == 80


def test_a_gate_that_fails_at_the_present_edge_takes_growth_back() -> None:
    config = ScheduledHorizon(shape="steps", tokens=10, max_tokens=80, increment=10, every=1, gate="overlap")
    policy = ScheduledPolicy(config, steps=20)
    good, bad, rambling = World(0, step_at(99)), World(0, step_at(99)), World(0, step_at(99))
    bad.overlap = lambda position: (position < 15).astype(float)
    rambling.stopped = 0.8
    for step in range(3):
        policy.observe(seen(step, probe=good))
    assert policy.tokens(3) == 40
    policy.observe(seen(3, probe=rambling))  # one rollout in five no longer ends: not clean
    assert policy.tokens(4) == 30
    policy.observe(seen(4, probe=bad))
    assert policy.tokens(5) == 20


# --- overlap, agreement, gradients -----------------------------------------------------------------------------------


def test_worth_decays_with_every_drift_and_starts_anew_with_every_rollout() -> None:
    drifts = np.array([False, True, False, True, True, False])
    worth = drift_worth(np.array([4, 2]), drifts, 0.5)
    assert worth.tolist() == [1.0, 1.0, 0.5, 0.5, 1.0, 0.5]


def test_the_overlap_budget_grows_without_drift_and_settles_where_drift_begins() -> None:
    config = OverlapHorizon(tokens=20, min_tokens=4, max_tokens=200, threshold=0.5, decay=0.0, slack=1.25, rate=0.5)

    def after(drift_at: int, steps: int) -> int:
        policy = OverlapBudget(config)
        for step in range(steps):
            n = policy.tokens(step)
            overlap = (np.arange(n) != drift_at).astype(float)
            policy.observe(seen(step, tokens([n, n], overlap_M=np.tile(overlap, 2))))
        return policy.tokens(steps)

    assert after(drift_at=999, steps=40) == 200
    assert after(drift_at=39, steps=40) == pytest.approx(1.25 * 40, abs=2)  # 40 positions are worth something


def test_low_divergence_must_last_to_end_a_rollout() -> None:
    policy = LowKLStop(tokens=48, min_tokens=4, max_tokens=96, window=4, patience=2, quantile=0.5, memory=8)
    high, low = [1.0] * 4, [0.0] * 4
    # One low window alone does not count; two in a row end at window 5, token 20.
    gap = [*high, *low, *high, *low, *low, *high * 7]
    policy.lowest = [0.5] * 8
    policy.observe(seen(of=tokens([48, 48], student_logprob_M=gap * 2)))
    assert policy.tokens(1) == 20
    assert policy.lowest == [0.5] * 6 + [0.0, 0.0]  # the memory is first in, first out
    policy.observe(seen(of=tokens([20], student_logprob_M=[1.0] * 20)))
    assert policy.tokens(2) == 24  # cut before an end was found: one window more


def test_the_audit_takes_the_smallest_window_with_the_same_direction() -> None:
    policy = GradientAudit(min_tokens=4, max_tokens=64, threshold=0.9, every=3)
    assert policy.tokens(0) == 64
    asked: list[int | None] = []

    def gradient(cosine: Any) -> Any:
        """Vectors of other lengths than 1 that have `cosine(n)` with the whole."""

        def of(n: int | None) -> torch.Tensor:
            asked.append(n)
            c = 1.0 if n is None else cosine(n)
            return 3.0 * torch.tensor([c, (1 - c * c) ** 0.5], dtype=torch.float64)

        return of

    policy.observe(seen(0, gradient=gradient(lambda n: 0.95 if n >= 16 else 0.5)))
    assert asked == [None, 4, 8, 16]
    assert [policy.tokens(s) for s in (1, 2, 3, 4)] == [16, 16, 64, 16]
    policy.observe(seen(1, gradient=gradient(lambda n: 1.0)))  # not an audit
    assert policy.tokens(1) == 16
    policy.observe(seen(3, gradient=gradient(lambda n: 0.0)))
    assert policy.tokens(4) == 64


# --- loss side -------------------------------------------------------------------------------------------------------


def test_soft_weights_against_the_formula() -> None:
    policy = SoftWeights(largest=1.5)
    found = policy.factors(4, {"gap": np.array([1.0, -2.0, 0.0, 1.0])})
    assert found == pytest.approx([1.5, 1 + 0.5 * 3 / 4, 1 + 0.5 / 4, 1 + 0.5 / 4])
    assert policy.factors(2, {"gap": np.zeros(2)}) == pytest.approx([1.5, 1.5])
    halves = SoftWeights(rule="exponential", half_life=2.0).factors(5, {})
    assert halves == pytest.approx([1, 2**-0.5, 0.5, 2**-1.5, 0.25])


def test_one_downward_change_point_is_found_and_others_are_not() -> None:
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0.0, 0.1, -0.1, 0.0])
    assert downward_change(noise + np.repeat([3.0, 1.0], [6, 4]), 2.0) == 6
    assert downward_change(noise + np.repeat([1.0, 3.0], [6, 4]), 2.0) is None  # upward
    assert downward_change(noise, 2.0) is None
    assert downward_change(np.full(9, 0.7), 2.0) is None
    assert downward_change(np.array([3.0, 1.0]), 2.0) is None  # too short to say
    policy = ChangePoint(segment=4, penalty=2.0)
    margins = np.repeat([3.0, 3.1, 2.9, 1.0, 1.1, 0.9], 4)[:22]
    assert policy.factors(22, {"margin": margins}).tolist() == [1.0] * 12 + [0.0] * 10


def test_bic_agrees_with_a_brute_force_likelihood_ratio() -> None:
    """Delta BIC is twice the gain in Gaussian log-likelihood (variance profiled out) less p ln S."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        series = rng.normal(size=12) + np.repeat([rng.uniform(0, 2), 0.0], 6)

        def likelihood(parts: list[np.ndarray]) -> float:
            residual = np.concatenate([part - part.mean() for part in parts])
            variance = float((residual**2).mean())
            return float(-0.5 * (np.log(2 * np.pi * variance) + residual**2 / variance).sum())

        falls = [t for t in range(1, 12) if series[:t].mean() > series[t:].mean()]
        best, at = max(((likelihood([series[:t], series[t:]]), t) for t in falls), default=(-np.inf, 0))
        gain = 2 * (best - likelihood([series])) - 2 * np.log(12)
        assert downward_change(series, 2.0) == (at if gain > 0 else None)


# --- state -----------------------------------------------------------------------------------------------------------


def test_the_grid_doubles_and_ends_at_the_longest() -> None:
    assert doubling(4, 64) == (4, 8, 16, 32, 64)
    assert doubling(10, 35) == (10, 20, 35)
    assert doubling(5, 5) == (5,)


MAKERS = {
    "fraction": lambda: measured_once(FractionHorizon(max_tokens=64)),
    "kl_coverage": lambda: measured_once(KLCoverageHorizon(max_tokens=64)),
    "damage": lambda: probed("damage", 16),
    "recoverability": lambda: probed("recoverability", 16),
    "scheduled": lambda: ScheduledPolicy(
        ScheduledHorizon(shape="linear", tokens=4, max_tokens=60, gate="recoverability"), steps=9
    ),
    "overlap": lambda: OverlapBudget(OverlapHorizon(tokens=20, min_tokens=4, max_tokens=99)),
    "low_kl": lambda: LowKLStop(tokens=20, min_tokens=4, max_tokens=99, window=4),
    "audit": lambda: GradientAudit(min_tokens=4, max_tokens=64, every=4),
    "roulette": lambda: DrawnHorizon(RouletteHorizon(tokens=4, max_tokens=64), 0),
}


@pytest.mark.parametrize(("name", "cut"), itertools.product(MAKERS, (1, 4)))
def test_a_policy_goes_on_from_its_state_as_if_it_had_never_stopped(name: str, cut: int) -> None:
    def drive(policy: Any, steps: range) -> list[int]:
        found = []
        for step in steps:
            n = policy.tokens(step)
            rng = np.random.default_rng(step)
            signals = {key: rng.random(2 * n) for key in ("overlap_M", "divergence_M", "student_logprob_M")}
            world = World(4, step_at(8 + 6 * step))
            draws = {None: torch.ones(3), **{k: torch.from_numpy(rng.random(3)) - 0.3 for k in (4, 8, 16, 32)}}
            policy.observe(seen(step, tokens([n, n], **signals), world, lambda k, d=draws: d[k].double()))
            found.append(n)
        return [*found, policy.tokens(steps.stop)]

    straight = drive(MAKERS[name](), range(9))
    first = MAKERS[name]()
    drive(first, range(cut))
    second = MAKERS[name]()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(second, range(cut, 9)) == straight[cut:]
    if name not in ("overlap", "low_kl"):
        assert len(set(straight)) > 1, "the signals moved nothing, so nothing was tested"
