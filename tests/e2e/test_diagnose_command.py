"""`headstart diagnose` as a user types it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

import quick

RECIPE = "recipe:tiny-esr"
SMALL = ("diagnosis.task={type: tiny, split: dev}", "diagnosis.problems=16", "diagnosis.grid=[16]")


def command(*arguments: object) -> list[str]:
    return quick.command("diagnose", *arguments)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return quick.run("diagnose", *arguments)


def test_it_says_its_cost_prints_the_tables_and_ends_with_advice(tmp_path: Path) -> None:
    done = run(RECIPE, *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("tiny, 16 problems: right answers")
    assert "16 problems: at most 224 generations" in before  # 2 own, 4 continuations and 8 further gifts each
    assert "tokens a second" in before
    record = json.loads((tmp_path / "diagnose" / "recommendation.json").read_text())
    assert "16 full rollouts of the student, by position" in after
    assert record["sentence"] in after
    assert all(reason in after for reason in record["reasons"])
    rows = [line for line in after.splitlines() if line.lstrip()[:1].isdigit() and "  " in line.strip()]
    assert len(rows) > 4
    assert max(map(len, rows)) <= 80


@pytest.mark.slow
def test_a_killed_diagnosis_goes_on(tmp_path: Path) -> None:
    slow = (RECIPE, *SMALL[:1], "diagnosis.problems=10", "diagnosis.grid=[100]", "diagnosis.batch_size=1")
    process = subprocess.Popen(command(*slow, "--out", tmp_path / "cut"), stdout=subprocess.DEVNULL)
    outcomes = tmp_path / "cut" / "diagnose" / "decay.jsonl"
    while not outcomes.exists() or outcomes.stat().st_size == 0:
        assert process.poll() is None, "the diagnosis ended before it could be killed"
        time.sleep(0.01)
    quick.kill(process)
    process.wait()
    before = outcomes.read_text().rpartition("\n")[0].splitlines()
    assert 0 < len(before) < 10
    assert run(*slow, "--out", tmp_path / "cut").returncode == 0
    assert run(*slow, "--out", tmp_path / "whole").returncode == 0
    assert outcomes.read_text().splitlines()[: len(before)] == before
    for name in ("decay.json", "positions.json"):
        cut, whole = (json.loads((tmp_path / kind / "diagnose" / name).read_text()) for kind in ("cut", "whole"))
        assert {**cut, "seconds": 0} == {**whole, "seconds": 0}


def test_errors_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    none = run()
    assert (none.returncode, none.stdout) == (2, "")
    assert "which run?" in none.stderr
    wrong = run(RECIPE, "diagnosis.votes=1")
    assert wrong.returncode == 2
    assert "diagnosis.votes" in wrong.stderr
    (tmp_path / "notes.txt").touch()
    foreign = run(RECIPE, *SMALL, "--out", tmp_path)
    assert foreign.returncode == 1
    assert "holds no diagnosis or run" in foreign.stderr
    assert "Traceback" not in none.stderr + wrong.stderr + foreign.stderr
