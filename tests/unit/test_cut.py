"""A figure over responses that were mostly cut says so beside itself, with the length to give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.cli.evaluate import _print_summary
from headstart.config.study import StudyConfig
from headstart.evaluation.readings import summary
from headstart.records import GradedResponse, Verdict
from headstart.reports.contents import before_and_after, build_page, table_rows
from headstart.reports.page import markdown
from headstart.reports.run import read_run
from headstart.reports.wording import cut_mark, decay_cuts, outcome
from headstart.stats import CUT, cut_note, longer
from headstart.study.page import accuracy_table, study_page
from headstart.study.table import collect
from run_folders import decay, write_run

EARLY = [(0, 0.0, 0, 0.4), (10, 1.0, 900, 0.6)]
MOSTLY_CUT = (
    "63% of the responses were cut at 256 tokens: the accuracy is that of mostly cut responses, not that of the model; "
    "set evaluation.max_tokens=2048"
)


def cut_run(folder: Path, *shares: float) -> Path:
    """A run with an evaluation per share of responses cut at 256 tokens."""
    write_run(folder, EARLY)
    for file, share in zip(sorted((folder / "eval").glob("*.json")), shares, strict=True):
        record = json.loads(file.read_text()) | {"truncated": share, "settings": {"max_tokens": 256}}
        file.write_text(json.dumps(record))
    return folder


def test_notes_by_the_share_that_was_cut() -> None:
    assert cut_note(None, 256) == cut_note(0.0, 256) == cut_note(CUT, 256) == ""
    assert cut_note(0.23, 256) == (
        "23% of the responses were cut at 256 tokens and hardly count as right, so the accuracy is a lower bound; "
        "set evaluation.max_tokens=512"
    )
    assert cut_note(0.63, 256) == MOSTLY_CUT
    assert cut_note(1.0, None, "x", "the teacher's responses") == (
        "100% of the teacher's responses were cut: the accuracy is that of mostly cut responses, not that of the "
        "model; at least double x"
    )
    assert [cut_mark(share) for share in (None, 0.1, 0.23, 0.63)] == ["", "", " (23% cut)", " (mostly cut: 63%)"]


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_the_length_to_give_is_two_to_eight_times_as_long_and_enough_at_the_rate_so_far(share: float, n: int) -> None:
    given_length = longer(share, n)
    assert given_length in (2 * n, 4 * n, 8 * n)
    assert share ** (given_length / n) <= CUT + 1e-9 or given_length == 8 * n


def test_a_run_says_it_in_its_table_its_outcome_and_on_its_page(tmp_path: Path) -> None:
    run = read_run(cut_run(tmp_path / "run", 0.23, 0.63))
    assert before_and_after("run", run.points).rows[0][:3] == ["accuracy", "40.0% (23% cut)", "60.0% (mostly cut: 63%)"]
    before, end = table_rows([("run", run)])
    assert before[2].endswith("] (23% cut)")
    assert end[2].endswith("] (mostly cut: 63%)")
    _, first, last = outcome([run])
    assert first.startswith("early stopping, N = 16, step 0: 23% of the responses were cut at 256 tokens and")
    assert last == f"early stopping, N = 16, step 10: {MOSTLY_CUT}."
    page = markdown(build_page([run]), "figures")
    assert all(text in page for text in ("40.0% (23% cut)", "not that of the model; set evaluation.max"))


def test_a_run_whose_responses_ended_says_nothing(tmp_path: Path) -> None:
    run = read_run(cut_run(tmp_path / "run", 0.05, 0.1))
    assert not re.search("% cut|mostly cut", markdown(build_page([run]), "figures"))


def test_a_study_says_it_beside_the_arm(tmp_path: Path) -> None:
    for arm, share in (("short", 0.63), ("full", 0.0)):
        cut_run(tmp_path / "cells" / arm / "seed-0", 0.0, share)
    record = collect(StudyConfig(base={}, arms={"short": {}, "full": {}}, seeds=(0,)), tmp_path)
    assert [row[0] for row in accuracy_table(record).rows] == ["short (ref.) (mostly cut: 63%)", "full"]
    page = markdown(study_page(record), "figures")
    assert "short, at the end: 63% of the responses were cut: the accuracy is that of mostly cut responses" in page
    assert "full, at the end" not in page


def test_a_diagnosis_says_it_of_each_model() -> None:
    assert decay_cuts(decay()) == decay_cuts(decay() | {"student_cut": 0.1, "teacher_cut": 0.0}) == []
    student, teacher = decay_cuts(decay() | {"student_cut": 0.2, "teacher_cut": 0.9, "max_tokens": 64})
    assert student.startswith("20% of the student's responses were cut at 64 tokens and hardly count")
    assert teacher.endswith("not that of the model; set diagnosis.max_tokens=512.")


@pytest.mark.parametrize(("stopped", "said"), [(True, False), (False, True), (None, False)])
def test_evaluate_says_it_under_its_table(capsys: pytest.CaptureFixture[str], stopped: bool | None, said: bool) -> None:
    verdict = Verdict(correct=False, status="wrong")
    tokens = None if stopped is None else 256
    rows = [GradedResponse(f"p{i}", 0, "text", tokens, stopped, verdict) for i in range(4)]
    found: dict[str, Any] = summary("made", rows) | {"grader": "g", "settings": {"max_tokens": 256}}
    _print_summary(found)
    shown = capsys.readouterr().out
    assert ("(mostly cut: 100%)" in shown) == said
    assert ("mostly cut responses, not that of the model; set evaluation.max_tokens=2048" in shown) == said
