"""A study: its file, the choice of rate and step, and every cell of the table, on run folders made up for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.config.loader import load_study
from headstart.config.study import StudyConfig, slug
from headstart.errors import ConfigError, RunFolderError
from headstart.reports.page import html, markdown
from headstart.study.page import accuracy_table, cost_table, outcome, study_page
from headstart.study.table import AXES, Choice, choose, collect, price_of, scores_at, table
from run_folders import Curve, write_run

ROOT = Path(__file__).parents[2]
STUDIES = [
    path for path in sorted((ROOT / "docs/results").glob("*.json")) if '"columns"' in path.read_text(encoding="utf-8")
]
BASE = {
    "student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": {"source": "tiny"},
    "evaluation": {"task": {"type": "tiny", "split": "test"}, "every": 10},
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {"N = 16": {}, "full": {"horizon.type": "full"}}
EARLY: Curve = [(0, 0.0, 0, 0.40), (10, 1.0, 1000, 0.80), (20, 2.0, 2000, 0.90)]
LATE: Curve = [(0, 0.0, 0, 0.40), (10, 4.0, 8000, 0.60), (20, 8.0, 16000, 0.95)]
WORSE: Curve = [(0, 0.0, 0, 0.40), (10, 4.0, 8000, 0.30), (20, 8.0, 16000, 0.20)]


def write_study(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(json.dumps({"base": BASE, "arms": ARMS, **changes}))
    return path


def complaint(folder: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(folder, **changes), overrides)
    return str(caught.value)


def cells(out: Path, **curves: list[Curve]) -> None:
    for name, runs in curves.items():
        for seed, curve in enumerate(runs):
            write_run(out / "cells" / name / f"seed-{seed}", curve)


# --- the file --------------------------------------------------------------------------------------------------------


def test_arms_change_the_base_and_overrides_reach_both(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), ["base.training.steps=7", "seeds=[3, 4]"])
    assert study.config.seeds == (3, 4)
    assert study.config.first == "N = 16"
    assert [arm.horizon.type for arm in study.arms.values()] == ["fixed", "full"]
    assert {arm.training.steps for arm in study.arms.values()} == {7}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(BASE))
    assert load_study(write_study(tmp_path, base=str(file))).arms == load_study(write_study(tmp_path)).arms


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    wrong = {"a": {"horizon.tokes": 4}, "b": {"evaluation.limit": 9}, "c": {"training.seed": 5}, "d": {}}
    said = complaint(tmp_path, arms=wrong)
    assert "arm a: horizon.tokes: unknown key for type fixed (found 4); did you mean horizon.tokens?" in said
    assert "arm b: evaluation: every arm is judged alike; change it in the base" in said
    assert "arm c: training.seed: found 5; every arm runs with the study's seeds" in said
    assert said.count("\n") == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "sedes: unknown key (found [1]); did you mean seeds?"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1]; a seed that stands twice is no second run"),
        ({"seeds": []}, "seeds: found []; allowed: a list of at least 1"),
        ({"reference": "ful"}, 'reference: found "ful"; allowed: N = 16, full; did you mean full?'),
        ({"arms": {"a": {}}}, "arms: found 1; a comparison needs at least two"),
        ({"arms": {"a": {}, "b": {"horizon.tokens": 100}}}, "arms: a and b are the same run"),
        ({"arms": {"a b": {}, "a-b": {"horizon.tokens": 5}}}, "arms: a b and a-b would share a folder; rename one"),
        ({"base": {**BASE, "evaluation": None}}, "base.evaluation: missing"),
        ({"base": {"student": {"path": "x"}}}, "teacher: missing, but required"),
        ({"tuning": {"rates": [0.1, 0.2], "task": {"type": "tiny", "split": "test"}}}, "name a development split"),
        ({"tuning": {"rates": [0.1], "task": {"type": "tiny"}}}, "tuning.rates: found [0.1]; allowed: a list of"),
        (
            {"budgets": {"tokens": [0]}},
            "budgets.tokens: found [0]; allowed: a list of at least 0, each a whole number > 0",
        ),
    ],
)
def test_bad_studies(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in complaint(tmp_path, **changes)


def test_a_tuned_rate_is_not_also_set_by_an_arm(tmp_path: Path) -> None:
    tuning = {"rates": [1e-4, 1e-3], "task": {"type": "tiny", "split": "dev"}}
    arms = {**ARMS, "c": {"optimizer.lr": 0.01}}
    assert "arm c: optimizer.lr: found 0.01, but tuning.rates chooses it" in complaint(
        tmp_path, arms=arms, tuning=tuning
    )


def test_curves_of_two_points_are_warned_of(tmp_path: Path) -> None:
    evaluation = {"task": {"type": "tiny", "split": "test"}}
    with pytest.warns(UserWarning, match=r"evaluation\.every is null"):
        load_study(write_study(tmp_path, base={**BASE, "evaluation": evaluation}))


SHIPPED = sorted(path for path in (ROOT / "studies").glob("*.yaml") if path.stem not in ("tiny", "late"))  # their bases


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_studies_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(load_study(path).config.seeds) >= 3


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_at_the_end_and_the_step_along_its_curve(tmp_path: Path) -> None:
    study = StudyConfig(
        base={},
        arms=ARMS,
        tuning={"rates": (1e-4, 1e-3), "task": {"type": "tiny"}, "seeds": (8, 9)},  # type: ignore[arg-type]
    )
    curves = {1e-4: [(0.5, 0.8), (0.9, 0.7)], 1e-3: [(0.9, 0.7), (0.9, 0.7)]}  # ends .75 and .70, peaks .70 and .90
    for arm in ("N-16", "full"):
        for rate, ends in curves.items():
            for seed, (middle, end) in zip((8, 9), ends, strict=True):
                curve = [(0, 0.0, 0, 0.99), (10, 1.0, 10, middle), (20, 2.0, 20, end)]
                write_run(tmp_path / "tuning" / arm / f"lr-{rate:g}-seed-{seed}", curve)
    assert choose(study, tmp_path) == dict.fromkeys(ARMS, Choice(1e-4, 20))


def test_of_rates_that_end_alike_the_one_that_was_higher_on_the_way_is_chosen(tmp_path: Path) -> None:
    tuning = {"rates": (1e-4, 3e-4, 1e-3), "task": {"type": "tiny"}, "seeds": (8,)}
    study = StudyConfig(base={}, arms=ARMS, tuning=tuning)  # type: ignore[arg-type]
    for arm in ("N-16", "full"):
        for rate, (middle, end) in {1e-4: (0.5, 0.8), 3e-4: (0.8, 0.8), 1e-3: (0.8, 0.8)}.items():
            curve = [(0, 0.0, 0, 0.4), (10, 1.0, 10, middle), (20, 2.0, 20, end)]
            write_run(tmp_path / "tuning" / arm / f"lr-{rate:g}-seed-8", curve)
    assert choose(study, tmp_path) == dict.fromkeys(ARMS, Choice(3e-4, 10))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """Three arms with three equal seeds each; one falls below its start."""
    cells(tmp_path, **{"N-16": [EARLY] * 3, "full": [LATE] * 3, "drift": [WORSE, WORSE, LATE]})
    study = StudyConfig(base={}, arms={**ARMS, "drift": {}}, question="Which?")
    return collect(study, tmp_path)


def column(record: dict[str, Any], axis: str) -> dict[str, Any]:
    (found,) = [column for column in record["table"]["columns"] if column["at"] == axis]
    return dict(found)


def test_equal_cost_is_the_most_that_all_reached_on_straight_lines(record: dict[str, Any]) -> None:
    assert [(c["at"], c["cost"]) for c in record["table"]["columns"]] == [
        ("steps", 20), ("tokens", 2000), ("seconds", 2.0), ("end", None)]  # fmt: skip
    accuracy = {
        axis: column(record, axis)["arms"]["full"]["accuracy"] for axis in ("steps", "tokens", "seconds", "end")
    }
    assert accuracy == pytest.approx({"steps": 0.95, "tokens": 0.45, "seconds": 0.5, "end": 0.95})
    assert column(record, "tokens")["arms"]["N = 16"]["accuracy"] == pytest.approx(0.9)


def test_differences_are_paired_tested_and_corrected(record: dict[str, Any]) -> None:
    arms = column(record, "end")["arms"]
    assert "difference" not in arms["N = 16"]
    full, drift = arms["full"]["difference"], arms["drift"]["difference"]
    assert full["value"] == pytest.approx(0.05)  # exactly five of the hundred problems, in every seed
    assert 0 < full["low"] < 0.05 < full["high"] < 0.12
    assert drift["value"] == pytest.approx(0.45 - 0.9)
    smaller, larger = sorted((full["p"], drift["p"]))
    by_p = {full["p"]: full, drift["p"]: drift}
    assert by_p[smaller]["p_holm"] == pytest.approx(2 * smaller)
    assert by_p[larger]["p_holm"] == pytest.approx(max(larger, 2 * smaller))
    assert not full["noise"]
    assert drift["noise"]  # one seed of three did not fall: no telling with so few


def test_equal_arms_are_noise_and_marked(tmp_path: Path) -> None:
    cells(tmp_path, **{"N-16": [EARLY] * 2, "full": [EARLY] * 2})
    found = collect(StudyConfig(base={}, arms=ARMS, seeds=(0, 1)), tmp_path)
    entry = column(found, "end")["arms"]["full"]["difference"]
    assert (entry["value"], entry["p"], entry["noise"]) == (0.0, 1.0, True)
    assert all("\u00a0~" in cell for cell in accuracy_table(found).rows[1][2:])
    assert not any("~" in cell for cell in accuracy_table(found).rows[0])
    assert "Within noise of it: full (90.0%)" in outcome(found)[0]


def test_a_budget_that_an_arm_does_not_reach_leaves_its_cell_empty(tmp_path: Path) -> None:
    cells(tmp_path, **{"N-16": [EARLY], "full": [LATE]})
    budgets = {"tokens": (1500, 12000), "seconds": (1.0,)}
    found = collect(StudyConfig(base={}, arms=ARMS, seeds=(0,), budgets=budgets), tmp_path)  # type: ignore[arg-type]
    both, only_full = (c["arms"] for c in found["table"]["columns"] if c["at"] == "tokens")
    assert both["N = 16"]["accuracy"] == pytest.approx(0.85)
    assert only_full["N = 16"] is None
    assert "difference" not in only_full["full"]
    assert only_full["full"]["accuracy"] == pytest.approx(0.775)
    assert accuracy_table(found).rows[0][4] == "-"
    assert not any(line.startswith("At 12,000 tokens") for line in outcome(found))


def test_costs(record: dict[str, Any]) -> None:
    costs = record["table"]["costs"]
    bar = record["table"]["target"]
    assert 0.8 < bar < 0.9
    early = (bar - 0.8) / 0.1
    assert costs["N = 16"]["to_target"] == pytest.approx(
        {"steps": 10 + 10 * early, "tokens": 1000 + 1000 * early, "seconds": 1 + early})  # fmt: skip
    assert [costs[name]["reached"] for name in costs] == [3, 3, 1]
    assert [costs[name]["below_start"] for name in costs] == [0, 0, 2]
    assert costs["full"]["end"] == {"steps": 20, "tokens": 16000, "seconds": 8.0}
    assert (costs["full"]["truncated"], costs["full"]["mean_tokens"]) == (0.0, 171.0)
    assert cost_table(record).rows[2][1] == "1/3"


def test_a_run_that_failed_has_no_end_and_leaves_the_common_cost_alone(tmp_path: Path) -> None:
    cells(tmp_path, **{"N-16": [EARLY, EARLY], "full": [LATE, LATE[:2]]})
    (tmp_path / "cells/full/seed-1.failed.txt").write_text("the loss is nan at step 13\n")
    found = collect(StudyConfig(base={}, arms=ARMS, seeds=(0, 1)), tmp_path)
    assert [(c["at"], c["cost"]) for c in found["table"]["columns"]][:2] == [("steps", 20), ("tokens", 2000)]
    assert column(found, "end")["arms"]["full"] is None
    assert column(found, "steps")["arms"]["full"] is None
    assert column(found, "tokens")["arms"]["full"]["accuracy"] == pytest.approx(0.45)  # both runs got that far
    assert accuracy_table(found).rows[1][::5] == ["full (1 of 2 failed)", "-"]
    assert cost_table(found).rows[1][0] == "full (1 of 2 failed)"
    assert outcome(found)[0] == "full, seed 1, failed: the loss is nan at step 13."
    assert "the loss is nan at step 13" in html(study_page(found))
    other = collect(StudyConfig(base={}, arms=ARMS, seeds=(0, 1), reference="full"), tmp_path)
    assert other["table"]["target"] is None
    assert cost_table(other).rows[0][1:4] == ["0/2", "-", "-"]
    assert "got to the target, -," in html(study_page(other))


def test_a_trial_that_failed_is_not_chosen(tmp_path: Path) -> None:
    tuning = {"rates": (1e-4, 1e-3), "task": {"type": "tiny"}, "seeds": (8,)}
    study = StudyConfig(base={}, arms=ARMS, tuning=tuning, seeds=(0,))  # type: ignore[arg-type]
    cells(tmp_path, **{"N-16": [EARLY], "full": [EARLY]})
    for arm in ("N-16", "full"):
        write_run(
            tmp_path / "tuning" / arm / "lr-0.0001-seed-8", [(0, 0.0, 0, 0.4), (10, 1.0, 10, 0.5), (20, 2.0, 20, 0.5)]
        )
        folder = write_run(tmp_path / "tuning" / arm / "lr-0.001-seed-8", [(0, 0.0, 0, 0.4), (10, 1.0, 10, 0.9)])
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace('"steps": 10', '"steps": 20'))
        folder.with_name("lr-0.001-seed-8.failed.txt").write_text("the loss is inf at step 20\n")
    assert choose(study, tmp_path) == dict.fromkeys(ARMS, Choice(1e-4, 10))
    twin = markdown(study_page(collect(study, tmp_path)), "figures")
    assert "| N = 16 | 50.0% | 0.0% failed | 10 |" in twin


def test_prices_are_crossings_of_the_curve() -> None:
    points = [
        {"step": s, "tokens": 10 * s, "seconds": s / 10, "scores": [y]} for s, y in ((0, 0.2), (10, 0.6), (20, 0.4))
    ]
    assert price_of(points, 0.4) == pytest.approx({"steps": 5, "tokens": 50, "seconds": 0.5})
    assert price_of(points, 0.2) == {"steps": 0.0, "tokens": 0.0, "seconds": 0.0}
    assert price_of(points, 0.7) is None


def test_the_chosen_step_is_read_off_the_reported_runs(tmp_path: Path) -> None:
    cells(tmp_path, **{"N-16": [WORSE]})
    points = [{"step": s, "tokens": t, "seconds": x, "scores": [y]} for s, x, t, y in WORSE]
    arm = {"chosen_step": 10, "cells": [{"points": points}]}
    assert scores_at(arm, "chosen", None) == pytest.approx(np.array([[0.3]]))
    assert scores_at(arm, "end", None) == pytest.approx(np.array([[0.2]]))
    assert scores_at({**arm, "chosen_step": None}, "chosen", None) is None


def test_cells_judged_on_other_problems_are_refused(tmp_path: Path) -> None:
    cells(tmp_path, **{"N-16": [EARLY]})
    write_run(tmp_path / "cells/full/seed-0", LATE, task="other")
    with pytest.raises(RunFolderError, match="evaluated on other problems than the first cell"):
        collect(StudyConfig(base={}, arms=ARMS, seeds=(0,)), tmp_path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_figures_follow_from_the_committed_curves(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    columns = found["table"]["columns"]
    budgets = {axis: [c["cost"] for c in columns if c["at"] == axis] for axis in AXES}
    again = table(found["arms"], found["reference"], budgets, found["table"]["target"])
    again, committed = leaves(json.loads(json.dumps(again))), leaves(found["table"])
    assert again.keys() == committed.keys()
    for path, value in committed.items():  # processors differ in the last digit of a percentile
        assert again[path] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), path


def leaves(found: Any, path: str = "") -> dict[str, Any]:
    """Every number and word by its path."""
    if not isinstance(found, (dict, list)):
        return {path: found}
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    return {k: v for name, value in pairs for k, v in leaves(value, f"{path}/{name}").items()}


def test_the_page_says_it_all_without_markup_trouble(record: dict[str, Any]) -> None:
    record["question"] = "Which <b>?"
    page = study_page(record, "base: x\n")
    text, twin = html(page), markdown(page, "figures")
    assert "Which &lt;b&gt;?" in text
    for needle in ("2,000 tokens", "N = 16 (ref.)", "end of the run", "Holm-adjusted"):
        assert needle in text
        assert needle in twin
    assert slug("N = 16") == "N-16"
