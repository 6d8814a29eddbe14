"""Runs side by side: which evaluations are compared, what is called noise, and the sentence about the outcome."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.reports.contents import TABLE_HEADER, table_rows
from headstart.reports.run import Point, Run, labels, read_run
from headstart.reports.wording import (
    at_equal_steps,
    first_level_with,
    first_past,
    gap,
    last_within,
    outcome,
    paired,
    unpaired,
)
from headstart.stats import Estimate, is_noise, wilson
from run_folders import Curve, write_run

FULL = {"type": "full", "max_tokens": 200}
EARLY: Curve = [(0, 0.0, 0, 0.46), (40, 1.4, 5120, 0.95), (60, 2.1, 7680, 0.97)]
LATE: Curve = [(0, 0.0, 0, 0.46), (5, 1.1, 6900, 0.52), (10, 2.2, 13800, 0.69), (20, 4.2, 27600, 0.92),
               (40, 8.7, 55200, 0.97)]  # fmt: skip
Make = Callable[..., list[Run]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def runs(early: Curve, late: Curve | None = None, task: str = "tiny") -> list[Run]:
        folders = [write_run(tmp_path / "esr", early)]
        if late is not None:
            folders.append(write_run(tmp_path / "full", late, FULL, task))
        return [read_run(folder) for folder in folders]

    return runs


def curve(accuracies: list[float], pace: float) -> Curve:
    """Evaluated before and at steps 10, 20, ...; `pace` seconds a step."""
    return [(0, 0.0, 0, 0.46)] + [(10 * i, 10 * i * pace, 1000 * i, a) for i, a in enumerate(accuracies, start=1)]


def rows(runs: list[Run]) -> list[list[str]]:
    return table_rows(list(zip(labels(runs), runs, strict=True)))


# --- the table -------------------------------------------------------------------------------------------------------


def test_rows_show_equal_cost_equal_steps_and_the_ends(make: Make) -> None:
    found = rows(make(EARLY, LATE))
    assert {len(row) for row in found} == {len(TABLE_HEADER)}
    assert [(row[0], row[1]) for row in found] == [
        ("student before", "0"),
        ("early stopping, N = 16: 40 steps", "40"),
        ("early stopping, N = 16: end", "60"),
        ("full rollouts: last within 2.1 s", "5"),
        ("full rollouts: first past 2.1 s", "10"),
        ("full rollouts: end", "40"),
    ]
    assert found[2][2:] == ["97.0% [91.5, 99.0]", "-", "7,680", "2.1"]
    assert found[3][4:] == ["6,900", "1.1"]
    assert found[5][3] == "+0.0 [-3.0, +3.0]"  # the same answers: the rule of three
    assert found[0][3].startswith("-51.0 [")


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (20, 4.0, [("last within 4.0 s", "10"), ("equal steps", "20"), ("end", "30")]),
        (20, 4.5, [("last within 4.5 s", "10"), ("equal steps, first past 4.5 s", "20"), ("end", "30")]),
        (30, 1.0, [("first past 1.0 s", "10"), ("end, equal steps", "30")]),
        (25, 99.0, [("nearest to 25 steps", "20"), ("end, last within 99.0 s", "30")]),
    ],
)
def test_roles_share_a_row_where_they_meet(
    make: Make, step: int, seconds: float, expected: list[tuple[str, str]]
) -> None:
    runs = make([(0, 0.0, 0, 0.46), (step, seconds, 100, 0.8)], curve([0.5, 0.7, 0.9], 0.4))
    found = [row for row in rows(runs) if row[0].startswith("full")]
    found_roles = [(row[0].removeprefix("full rollouts: "), row[1]) for row in found]
    assert found_roles == expected


def test_a_run_alone_and_nothing_at_all(make: Make, tmp_path: Path) -> None:
    assert [row[0] for row in rows(make(EARLY))] == ["student before", "early stopping, N = 16"]
    assert rows([read_run(write_run(tmp_path / "empty", []))]) == []
    assert outcome([read_run(tmp_path / "empty")]) == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100)), min_size=1, max_size=8),
    st.integers(0, 60),
    st.floats(0, 120),
)
def test_chosen_points_are_the_latest_that_fit(pairs: list[tuple[int, float]], step: int, seconds: float) -> None:
    steps, costs = sorted({s for s, _ in pairs}), sorted(c for _, c in pairs)
    points = [Point(s, c, 0, {}, Path()) for s, c in zip(steps, costs, strict=False)]
    same, within, past = at_equal_steps(points, step), last_within(points, seconds), first_past(points, seconds)
    assert (same and same.step) == max((p.step for p in points if p.step <= step), default=None)
    fitting = [p.step for p in points if p.seconds <= seconds and p.step > 0]
    assert (within and within.step) == max(fitting, default=None)
    assert (past and past.step) == min((p.step for p in points if p.seconds > seconds), default=None)


# --- differences -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40))
def test_paired_differences_against_numpy_and_antisymmetric(values: list[tuple[float, float]]) -> None:
    a, b = ({f"p{i}": pair[side] for i, pair in enumerate(values)} for side in (0, 1))
    there, back = paired(a, {**b, "only here": 1.0}), paired(b, a)
    assert there is not None
    assert back is not None
    differences = np.array([x - y for x, y in values])
    assert there.value == pytest.approx(100 * differences.mean(), abs=1e-9)
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(values))
    if half > 1e-5:
        assert there.high == pytest.approx(min(100.0, 100 * (differences.mean() + half)), abs=1e-6)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_unpaired_gap_against_a_published_example() -> None:
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    a, b = (Estimate(x / n, *wilson(x, n)) for x, n in ((56, 70), (48, 80)))
    found = unpaired(a, b)
    assert (found.low, found.high) == pytest.approx((5.24, 33.39), abs=0.02)
    assert is_noise(unpaired(a, a))


def test_pairing_narrows_what_the_responses_allow(make: Make) -> None:
    early, late = (run.points[-1] for run in make(EARLY, curve([0.93], 0.4)))
    found = gap(late, early)
    assert found is not None
    assert found.value == pytest.approx(-4.0)
    assert found.high < 0  # 93 against 97 of 100 are noise to independent arms, four problems lost are not
    late.rows.unlink()
    apart = gap(late, early)
    assert apart is not None
    assert is_noise(apart)


def test_other_tasks_are_not_compared(make: Make) -> None:
    runs = make(EARLY, LATE, "other")
    assert gap(runs[0].points[-1], runs[1].points[-1]) is None
    assert outcome(runs)[0].endswith("ended at 97.0% after 8.7 s, on other problems, so the two are not compared.")
    assert rows(runs)[-1][3] == "-"


def test_level_is_at_most_one_standard_error_below() -> None:
    def point(accuracy: float, half: float = 0.0) -> Point:
        record = {"accuracy": accuracy, "interval": (accuracy - half, accuracy + half)}
        return Point(1, 1.0, 1, record, Path())

    target, near, far = point(0.9, 1.96 * 0.02), point(0.881), point(0.879)
    assert first_level_with([far, near], target) is near
    assert first_level_with([far], target) is None


# --- the sentence ----------------------------------------------------------------------------------------------------


def test_outcome_level_at_the_end(make: Make) -> None:
    assert outcome(make(EARLY, LATE)) == [
        "Early stopping, N = 16 took the student from 46.0% to 97.0% in 2.1 s of training; "
        "full rollouts came level at the last evaluation, after 8.7 s (97.0%, 4.1 times as long)."
    ]


def test_outcome_level_before_the_end(make: Make) -> None:
    (sentence,) = outcome(make(curve([0.8, 0.9], 0.1), curve([0.7, 0.9, 0.91], 0.4)))
    assert sentence.endswith(
        "came level after 8.0 s (90.0%, 4.0 times as long) and ended at 91.0% after 12.0 s, within noise of it."
    )


def test_outcome_others_end_higher(make: Make) -> None:
    (sentence,) = outcome(make(curve([0.7, 0.79], 0.1), curve([0.6, 0.8, 0.93], 0.4)))
    assert "came level after 8.0 s (80.0%, 4.0 times as long)" in sentence
    assert re.search(r"ended at 93.0% after 12.0 s, 14.0 points \(95% interval 7.\d to 20.\d\) higher\.$", sentence)


def test_outcome_others_never_get_there(make: Make) -> None:
    (sentence,) = outcome(make(curve([0.8, 0.97], 0.1), curve([0.5, 0.7], 0.4)))
    assert "full rollouts did not get there and ended at 70.0%" in sentence
    assert sentence.endswith("lower.")


@pytest.mark.parametrize(
    ("end", "words"), [(0.46, "did not move the student beyond noise"), (0.3, "made the student worse")]
)
def test_outcome_without_a_gain(make: Make, end: float, words: str) -> None:
    (sentence,) = outcome(make(curve([end], 0.1), curve([0.9], 0.4)))
    assert words in sentence
    assert "came level" not in sentence
    assert "higher" in sentence


def test_outcome_survives_points_without_cost(make: Make) -> None:
    (sentence,) = outcome(make([(0, 0.0, 0, 0.46), (9, 0.0, 0, 0.9)], [(0, 0.0, 0, 0.46), (9, 0.0, 0, 0.9)]))
    assert "times as long" not in sentence


def test_outcome_of_a_run_alone(make: Make) -> None:
    assert outcome(make(EARLY)) == ["Early stopping, N = 16 took the student from 46.0% to 97.0% in 2.1 s of training."]


def test_outcome_of_a_single_evaluation(make: Make) -> None:
    assert outcome(make(EARLY[:1])) == ["Early stopping, N = 16 was evaluated only once, at step 0: 46.0%."]
