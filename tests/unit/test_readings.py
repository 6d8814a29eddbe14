"""Readings of graded responses against counts made by hand and by enumeration."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import ConfigError, DataError
from headstart.evaluation.readings import maj_at_k, pass_at_k, repetition, summary
from headstart.evaluation.store import compare, read_rows, to_line
from headstart.records import GradedResponse, Verdict
from headstart.stats import mcnemar


def row(problem: str, sample: int, correct: bool, answer: str | None = None, **changes: object) -> GradedResponse:
    status = str(changes.pop("status", "correct" if correct else "wrong"))
    fields = {"response": "a b c", "tokens": 10, "stopped": True, **changes}
    verdict = Verdict(correct, status, {"last_box": correct, "first_box": True}, answer)
    return GradedResponse(problem, sample, verdict=verdict, **fields)  # type: ignore[arg-type]


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(outcomes: list[bool], k: int) -> None:
    n = len(outcomes)
    if k > n:
        with pytest.raises(ConfigError, match=f"pass@{k} needs at least {k} samples"):
            pass_at_k(sum(outcomes), n, k)
        return
    draws = [any(draw) for draw in combinations(outcomes, k)]
    assert pass_at_k(sum(outcomes), n, k) == pytest.approx(sum(draws) / len(draws))


def test_majority_vote() -> None:
    votes = [row("p", 0, False, "3"), row("p", 1, True, "4"), row("p", 2, True, "4"), row("p", 3, False, None)]
    assert maj_at_k(votes) is True
    assert maj_at_k(votes[:2]) is False, "a tie goes to the earliest answer"
    assert maj_at_k(votes[3:]) is None


def test_repetition() -> None:
    assert repetition("one two three four five six") == 0.0
    assert repetition("la " * 100) > 0.98
    assert repetition("short") == 0.0


def test_summary_counts() -> None:
    rows = [
        row("p", 0, True, "4"),
        row("p", 1, False, "5", stopped=False, tokens=30),
        row("q", 0, False, None, status="no_answer"),
        row("q", 1, False, "1", status="timeout"),
    ]
    found = summary("task", rows)
    assert (found["problems"], found["k"], found["samples"]) == (2, 2, 2)
    assert found["accuracy"] == 0.25
    assert found["pass_at_k"] == 0.5
    assert found["maj_at_k"] == 0.5
    assert found["se"] == pytest.approx(0.25)
    assert (found["truncated"], found["no_answer"], found["timeout"]) == (0.25, 0.25, 0.25)
    assert found["first_box_minus_last_box"] == 0.75
    assert found["length_p50"] == 10
    assert found["interval"][0] < 0.25 < found["interval"][1]
    with pytest.raises(ConfigError, match="pass@3"):
        summary("task", rows, k=3)


def test_unknown_endings_stay_unknown() -> None:
    found = summary("task", [row("p", 0, True, tokens=None, stopped=None)])
    assert found["truncated"] is None
    assert found["length_p50"] is None


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_exact_two_sided_coin_test(a: int, b: int) -> None:
    n = a + b
    as_extreme = [k for k in range(n + 1) if abs(k - n / 2) >= abs(a - n / 2)]
    from math import comb

    expected = sum(comb(n, k) for k in as_extreme) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, expected))


def write(folder: Path, rows: list[GradedResponse]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(map(to_line, rows)))
    return folder


def test_compare_pairs_problems(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [row(str(i), 0, i % 2 == 0) for i in range(40)])
    b = write(tmp_path / "b", [row(str(i), 0, i % 4 == 0) for i in reversed(range(40))])
    found = compare(a, b)
    assert (found.a, found.b, found.difference) == (0.5, 0.25, 0.25)
    assert (found.only_a, found.only_b) == (10, 0)
    assert found.mcnemar == pytest.approx(2 / 2**10)
    assert found.interval[0] > 0
    same = compare(a, a)
    assert (same.difference, same.mcnemar) == (0.0, 1.0)
    with pytest.raises(DataError, match="share no problem ids"):
        compare(a, write(tmp_path / "c", [row("x", 0, True)]))


def test_rows_read_back_equal_and_damage_is_named(tmp_path: Path) -> None:
    rows = [row("p", 0, True, "ü\n"), row("p", 1, False, None, tokens=None, stopped=None)]
    path = write(tmp_path / "a", rows) / "rows.jsonl"
    assert read_rows(path) == rows
    path.write_text(path.read_text() + '{"problem_id": "q"}')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: not a graded response"):
        read_rows(path)
