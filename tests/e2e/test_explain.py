"""`headstart explain` as a user types it, on short runs of the bundled pair."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import quick
from headstart.assemble.speed import Speed
from headstart.config.loader import load
from headstart.distillation.run import distill
from headstart.errors import ConfigError, RunFolderError
from headstart.explanation.run import READINGS, explain

SMALL = ("training.steps=3", "training.prompts_per_step=4", "evaluation.limit=6", "evaluation.samples=2",
         "evaluation.every=null")  # fmt: skip


def make_run(folder: Path, recipe: str, *overrides: str) -> Path:
    distill(load(f"recipe:{recipe}", [*SMALL, *overrides]), out=folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("explain")
    return make_run(folder / "esr", "tiny-esr"), make_run(folder / "full", "tiny-full")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return quick.run("explain", *arguments)


def read(run: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "explain" / f"{name}.json").read_text())
    return loaded


def test_every_reading_is_written_printed_and_the_same_again(runs: tuple[Path, Path]) -> None:
    run, twin = runs
    done = command(run, "--twin", twin)
    assert done.returncode == 0, done.stderr
    found = {name: read(run, name) for name in READINGS}
    for reading in found.values():
        assert reading["format"] == 1
        assert reading["sentence"] in done.stdout
    cascade = found["cascade"]
    assert (cascade["first"], cascade["untrained"], cascade["problems"], cascade["samples"]) == (16, True, 6, 2)
    assert {mode["mode"] for mode in cascade["modes"]} <= {"clean", "wrong"}
    assert any(part["first"] == 16 for part in cascade["bins"])
    assert set(cascade["details"]["after"]) == {"faithful", "plan_right"}
    assert list(found["commitment"]["speakers"]) == ["before", "after", "twin", "teacher"]
    assert len(found["swap"]["cells"]) == 16
    assert found["selection"]["tokens"] == 16
    assert found["efficiency"]["twin"]["steps"] == 3
    again = explain(run, twin=twin, only=("cascade", "swap"))
    assert json.loads(json.dumps(again["cascade"])) == cascade
    assert json.loads(json.dumps(again["swap"])) == found["swap"]


def test_only_and_overrides(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    found = explain(runs[0], only=("commitment",), overrides=["evaluation.limit=3", "evaluation.samples=1"],
                    progress=lambda n, total, text="": done.append((n, total)))  # fmt: skip
    assert set(found) == {"commitment"}
    assert found["commitment"]["problems"] == 3
    assert "evaluation.samples=4" in found["commitment"]["sentence"]
    assert done == [(0, 6)] + [(n, 6) for n in range(7)]


def test_within_minutes_fewer_problems_and_samples(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.explanation.run.timed", lambda *_: Speed(0.01, 0.0, 0.0))
    said: list[str] = []
    overrides = ["evaluation.batch_size=1", "evaluation.limit=4", "evaluation.max_tokens=60"]  # 0.6 s a response
    full = explain(runs[0], only=("commitment",), overrides=overrides, say=said.append)
    less = explain(runs[0], only=("commitment",), overrides=overrides, minutes=0.05, say=said.append)
    assert full["commitment"]["problems"] == 4
    assert (less["commitment"]["problems"], less["commitment"]["samples"]) == (2, 1)
    assert said[0] == "3 x 4 problems x 2 of at most 60 tokens: at most 1,440 tokens, at most about 14 s"
    assert said[1].startswith("In the time given: ")
    assert said[1].endswith(f"In full: {said[0]}")


def test_a_run_of_full_rollouts_has_no_untrained_position(runs: tuple[Path, Path]) -> None:
    found = explain(runs[1], only=("cascade", "swap", "selection"))
    assert not found["cascade"]["untrained"]
    assert "every position was trained" in found["cascade"]["sentence"]
    assert "openings" in found["cascade"]["modes_by"]
    assert found["swap"]["cells"] == ()
    assert 10 <= found["selection"]["tokens"] <= 20


def test_without_a_task_and_with_an_adapter(tmp_path: Path) -> None:
    lora = ("tuning={type: lora, r: 4}", "output.format=adapter", "evaluation=null", "diagnosis.max_tokens=40")
    run = make_run(tmp_path / "run", "tiny-esr", *lora[:2], "optimizer.lr=0.03")
    overrides = [*lora[2:], "prompts.limit=5"]
    found = explain(run, only=("cascade", "commitment", "swap"), overrides=overrides)
    assert found["cascade"]["problems"] == 5
    assert found["cascade"]["levels"]["before"]["value"] != found["cascade"]["levels"]["after"]["value"]
    assert "openings" in found["cascade"]["modes_by"]
    assert "no evaluation task" in found["swap"]["sentence"]


def test_what_cannot_be_explained_is_said_at_once(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = runs
    with pytest.raises(ConfigError, match="no reading 'cascades'; there are cascade, commitment"):
        explain(run, only=("cascades",))
    with pytest.raises(RunFolderError, match="no such folder"):
        explain(tmp_path / "nothing")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (unfinished / name).write_text((run / name).read_text())
    with pytest.raises(RunFolderError, match="no model yet; finish it with headstart distill --resume"):
        explain(unfinished)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text((run / "config.yaml").read_text().replace("tiny:student", "tiny:student-weak"))
    with pytest.raises(RunFolderError, match="has another student"):
        explain(run, twin=foreign)
    with pytest.raises(ConfigError, match="at least two"):
        explain(run, overrides=["evaluation.limit=1"])
    done = command(run, "another")
    assert (done.returncode, "is no setting" in done.stderr) == (2, True)
