"""A small real study on the bundled pair: two arms, two seeds, a tuned rate; killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headstart.config.loader import Study, load_study
from headstart.errors import RunFolderError
from headstart.study.run import cell_config, final_cells, run_study, trial_cells
from headstart.study.table import Choice, collect

STUDY = {
    "base": {
        "student": {"path": "tiny:student"}, "teacher": {"path": "tiny:teacher"}, "prompts": {"source": "tiny"},
        "tuning": {"type": "full"}, "training": {"steps": 4, "prompts_per_step": 4, "device": "cpu"},
        "horizon": {"tokens": 8}, "checkpoint": {"every": 1},
        "evaluation": {"task": {"type": "tiny", "split": "test"}, "every": 2, "limit": 6, "samples": 2,
                       "max_tokens": 40},
    },
    "arms": {"N = 8": {}, "N = 4": {"horizon.tokens": 4}},
    "seeds": [0, 1],
    "tuning": {"rates": [1e-3, 3e-4], "task": {"type": "tiny", "split": "dev"}},
}  # fmt: skip


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(json.dumps(STUDY))
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, list[str]]:
    """The study run in one go, two cells at a time, and the cells in the order they ended."""
    base = tmp_path_factory.mktemp("study")
    study, names = load_study(write(base)), []
    run_study(study, base / "out", 2, lambda done, total, text="": names.append(f"{done}/{total} {text}"))
    return study, base / "out", names


def trained(cell: Path) -> list[Any]:
    """What a cell's steps and evaluations were, without the clock."""
    lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"], line.get("loss"), line.get("accuracy")) for line in lines]


def test_every_cell_is_an_ordinary_run_with_the_chosen_rate(straight: tuple[Study, Path, list[str]]) -> None:
    study, out, names = straight
    assert len(names) == 8
    assert names[-1].startswith("8/8 ")
    record = collect(study.config, out)
    assert [arm["name"] for arm in record["arms"]] == ["N = 8", "N = 4"]
    for arm in record["arms"]:
        assert arm["lr"] in (1e-3, 3e-4)
        assert arm["chosen_step"] in (2, 4)
        assert [[point["step"] for point in cell["points"]] for cell in arm["cells"]] == [[0, 2, 4]] * 2
        assert [cell["points"][-1]["tokens"] <= 4 * 4 * 8 for cell in arm["cells"]] == [True, True]
        assert all(len(point["scores"]) == 6 for cell in arm["cells"] for point in cell["points"])
    starts = [cell["points"][0]["scores"] for arm in record["arms"] for cell in arm["cells"]]
    assert starts == [starts[0]] * 4
    assert not list(out.glob("*/*/*/checkpoints"))


def test_the_start_that_cells_share_is_the_one_they_would_have_measured(
    straight: tuple[Study, Path, list[str]], tmp_path: Path
) -> None:
    from headstart.distillation.run import distill

    study, out, _ = straight
    alone = distill(cell_config(study.arms["N = 4"], 1, 3e-4), out=tmp_path / "alone")
    shared = json.loads((out / "cells/N-4/seed-1/eval/step_000000.json").read_text())
    assert alone.before is not None
    assert (alone.before.accuracy, alone.before.mean_tokens) == (shared["accuracy"], shared["mean_tokens"])


def test_a_finished_study_runs_nothing_and_other_settings_are_refused(straight: tuple[Study, Path, list[str]]) -> None:
    study, out, _ = straight
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run_study(study, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    other = load_study(write(out.parent), ["base.training.steps=5"])
    with pytest.raises(
        RunFolderError, match=r"holds a run with other settings than tuning N = 8, lr 0\.001, seed 1000"
    ):
        run_study(other, out)


def test_a_run_whose_loss_is_not_finite_is_a_finding_and_the_study_goes_on(tmp_path: Path) -> None:
    """At a rate of 1e30 the weights are no numbers after a step. The other arm's run is finished, the record says which
    failed and why, and nothing is run again."""
    path, out, names = tmp_path / "study.yaml", tmp_path / "out", list[str]()
    arms = {"wild": {"optimizer.lr": 1e30}, "N = 8": {}}
    path.write_text(json.dumps({"base": STUDY["base"], "arms": arms, "reference": "N = 8", "seeds": [0]}))
    study = load_study(path)
    run_study(study, out, 1, lambda done, total, text="": names.append(text))
    metrics = out / "cells/wild/seed-0/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    run_study(study, out, 1, lambda done, total, text="": names.append(text))
    assert names == ["wild, seed 0, failed", "N = 8, seed 0, finished"] * 2
    assert metrics.stat().st_mtime_ns == before
    (wild,), (sound,) = (arm["cells"] for arm in collect(study.config, out)["arms"])
    assert "at step 2; the weights were not changed. Lower optimizer.lr" in wild["failed"]
    assert [point["step"] for point in wild["points"]] == [0]
    assert sound["failed"] is None


def test_cells_are_interleaved_over_arms() -> None:
    study = Study(config=_config(), arms=dict.fromkeys(("a", "b"), next(iter(load_arms()))))
    names = [cell.name for cell in final_cells(study, Path("x"), {"a": Choice(0.1, 2), "b": Choice(0.2, 4)})]
    assert names == ["a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1"]
    assert [cell.config.optimizer.lr for cell in final_cells(study, Path("x"), {})] == [None] * 4
    assert [cell.name for cell in trial_cells(study, Path("x"))][:2] == [
        "tuning a, lr 0.001, seed 1000", "tuning b, lr 0.001, seed 1000"]  # fmt: skip
    for cell in trial_cells(study, Path("x")):
        cell.refuse_other_settings()


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(straight: tuple[Study, Path, list[str]], tmp_path: Path) -> None:
    """Killed without warning in the middle of a cell: the worker goes too, and the end is that of the straight run."""
    study, out, _ = straight
    mine = tmp_path / "out"
    shutil.copytree(out / "tuning", mine / "tuning")  # finished trials: not run again
    words = [sys.executable, "-m", "headstart", "compare", str(write(tmp_path)), "--out", str(mine)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 600
        cut = mine / "cells/N-4/seed-0"
        while not list(cut.glob("checkpoints/step_*/manifest.json")) and time.monotonic() < until:
            assert first.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (mine / "cells/N-8/seed-0/model").exists()
    finished = (mine / "cells/N-8/seed-0/metrics.jsonl").stat().st_mtime_ns
    time.sleep(1)  # the worker notices that its parent is gone
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compare: N = 4, seed 1, finished (8 of 8)" in done.stderr
    assert (mine / "cells/N-8/seed-0/metrics.jsonl").stat().st_mtime_ns == finished
    for cell in sorted(path.parent.relative_to(out) for path in out.glob("*/*/*/metrics.jsonl")):
        assert trained(mine / cell) == trained(out / cell), cell
    for name in ("study.json", "study.html", "study.md"):
        assert (mine / name).stat().st_size > 1000
    ours, theirs = (collect(study.config, path)["table"]["columns"][0] for path in (mine, out))
    assert ours == theirs


def test_bad_input_ends_with_one_message(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({**STUDY, "sedes": [1]}))
    for words, said in ((["compare"], "STUDY.yaml"), (["compare", str(path)], "did you mean seeds?"),
                        (["compare", str(tmp_path / "no.yaml")], "no such file")):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "headstart", *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def _config() -> Any:
    from headstart.config.study import StudyConfig

    return StudyConfig.model_validate({key: value for key, value in STUDY.items() if key != "arms"} | {
        "arms": {"a": {}, "b": {}}, "seeds": (0, 1), "tuning": {"rates": (1e-3, 3e-4), "task": {"type": "tiny"}}
    })  # fmt: skip


def load_arms() -> list[Any]:
    from headstart.config.loader import parse

    return [parse(STUDY["base"])]  # type: ignore[arg-type]
