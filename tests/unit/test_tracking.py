"""Trackers: what the reader sees, and what is left on disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headstart.errors import ConfigError, RunFolderError
from headstart.progress import shown
from headstart.records import EvalReport, GradedResponse, StepReport, Verdict
from headstart.tracking import (
    ConsoleTracker,
    FanTracker,
    JsonlTracker,
    TensorBoardTracker,
    WandbTracker,
    format_evaluation,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def report(step: int, **more: Any) -> StepReport:
    metrics = {
        "step": step,
        "loss": 1.5 / step,
        "horizon": 100,
        "share_stopped": 0.25,
        "tokens_per_second": 1234.4,
        "seconds": 2.0,
        "seconds_rollout": 1.2,
        "seconds_teacher": 0.3,
        "seconds_student": 0.4,
        "seconds_optimizer": 0.1,
        "peak_memory_gib": 1.25,
        "divergence_by_position": {"0-4": 0.5, "5-9": 0.25},
    }
    return StepReport(step, {**metrics, **more})


def evaluation(step: int = 5) -> EvalReport:
    return EvalReport(
        task="tiny",
        step=step,
        problems=96,
        samples=4,
        accuracy=0.461,
        interval=(0.412, 0.51),
        details={"plan_right": 0.375},
        truncated=0.0,
        no_answer=0.01,
        mean_tokens=171.2,
        generated_tokens=65000,
        seconds=3.5,
        settings={"path": Path("x")},
        rows=(GradedResponse("p", 0, "SECRET ROW", 3, True, Verdict(True, "correct")),),
    )


def test_evaluation_line() -> None:
    assert format_evaluation(evaluation()) == (
        "accuracy 46.1% [41.2, 51.0] (96 problems x 4), plan_right 37.5%, truncated 0.0%, mean length 171"
    )


# --- JSONL -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.read_text().splitlines()]


def test_jsonl_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.step(report(1, student_entropy=float("nan"), divergence_by_position={"0-4": float("inf")}))
    tracker.evaluation(evaluation(1))
    tracker.message("hello")
    assert [line["event"] for line in read(path)] == ["step", "evaluation"]  # before close: a kill loses nothing
    tracker.close()
    tracker.close()
    step, evaluated = read(path)
    assert (step["step"], step["loss"], step["student_entropy"]) == (1, 1.5, None)
    assert step["divergence_by_position"] == {"0-4": None}
    assert evaluated["interval"] == [0.412, 0.51]
    assert evaluated.keys() == {"event"} | {field.name for field in dataclasses.fields(EvalReport)} - {"rows"}
    assert "SECRET" not in path.read_text()


@settings(deadline=None, max_examples=50)
@given(cut=st.integers(0, 2000))
def test_jsonl_stays_valid_after_a_torn_write(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (1, 2, 3):
        tracker.step(report(step))
    tracker.close()
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    again = JsonlTracker(path)
    again.step(report(9))
    again.close()
    assert [line["step"] for line in read(path)] == [*range(1, content.count(b"\n") + 1), 9]


def test_jsonl_says_when_the_disk_refuses(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written: No such file or directory"):
        JsonlTracker(tmp_path / "missing" / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.step(report(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(RunFolderError, match=r"File too large.*--resume"):
            tracker.step(report(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.close()
    JsonlTracker(path).close()
    assert [line["step"] for line in read(path)] == [1]


# --- console ---------------------------------------------------------------------------------------------------------


def run_on(console: Console, steps: range, total: int) -> None:
    tracker = ConsoleTracker(total, console)
    tracker.message("reading [bold]prompts[/bold]")
    for step in steps:
        tracker.step(report(step))
        if step == 5:
            tracker.evaluation(evaluation())
    tracker.close()
    tracker.close()


def test_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    run_on(Console(file=out, force_terminal=False, width=80), range(1, 201), 200)
    lines = out.getvalue().splitlines()
    assert lines[0] == "reading [bold]prompts[/bold]"
    steps = [line for line in lines if line.startswith("step ")]
    assert steps[0] == (
        "step 1/200  loss 1.5000 nats/token  1,234 tokens/s  horizon 100  stopped 25%  "
        "rollout 1.20 s  teacher 0.30 s  student 0.40 s  optimizer 0.10 s  peak 1.25 GiB  ETA 0:06:38"
    )
    assert steps[-1].startswith("step 200/200")
    assert len(steps) == 21
    assert f"evaluation at step 5 on tiny: {format_evaluation(evaluation())}" in lines
    assert "\x1b" not in out.getvalue()


@settings(deadline=None, max_examples=50)
@given(total=st.integers(1, 500), data=st.data())
def test_plain_lines_are_few_and_hold_first_and_last(total: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, total))
    out = io.StringIO()
    run_on(Console(file=out, force_terminal=False), range(first, total + 1), total)
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert steps[0] == f"{first}/{total}"
    assert steps[-1] == f"{total}/{total}"
    assert len(steps) == len(set(steps)) <= 22


def test_on_a_terminal_lines_stand_above_what_is_shown() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=80, _environ={"TERM": "xterm"})
    with shown("training", console):
        run_on(console, range(1, 11), 10)
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert text.index("training") < text.index("step 10/10  loss 0.1500 nats/token")
    assert max(len(line) for line in text.splitlines() if line.startswith("step ")) < 80
    assert f"evaluation at step 5 on tiny: {format_evaluation(evaluation())}" in text.replace("\r", "")


def test_the_time_left_counts_the_evaluations_to_come() -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(10, Console(file=out, force_terminal=False), evaluates_every=4)
    for step in range(11):
        if step:
            tracker.step(report(step))
        if step in (0, 4, 8, 10):
            tracker.evaluation(dataclasses.replace(evaluation(step), seconds=60.0))
    left = [line.partition("ETA ")[2] for line in out.getvalue().splitlines() if "ETA" in line]
    assert left[0] == "0:03:18", "nine steps of two seconds, three evaluations"
    assert left[3:5] == ["0:03:12", "0:02:10"]
    assert left[-1] == "0:01:00"


def test_console_shows_a_dash_for_what_a_step_does_not_report() -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(3, Console(file=out, force_terminal=False))
    tracker.step(StepReport(1, {"loss": float("nan")}))
    assert "loss nan nats/token  - tokens/s" in out.getvalue()


# --- TensorBoard and W&B ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the tensorboard extra is not installed")
def test_tensorboard_events_are_readable_and_resume_replaces_later_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (2, 3)):
        tracker = TensorBoardTracker(tmp_path)
        for step in steps:
            tracker.step(report(step))
        tracker.evaluation(evaluation(3))
        tracker.message("hello")
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert [event.step for event in events.Scalars("train/divergence_by_position/0-4")] == [1, 2, 3]
    assert events.Scalars("evaluation/accuracy")[0].value == pytest.approx(0.461)
    assert events.Scalars("evaluation/details/plan_right")[0].value == pytest.approx(0.375)


def test_missing_extras_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"headstart\[tensorboard\].*tracking\.tensorboard=false"):
        TensorBoardTracker(tmp_path)
    with pytest.raises(ConfigError, match=r"headstart\[wandb\].*tracking\.wandb=null"):
        WandbTracker("project", {}, tmp_path)


def test_wandb_gets_scalars_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a recording stand-in: W&B itself needs an account or a server."""
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (values, step))), finish=lambda: calls.append(("finish", None))
    )
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: (calls.append(("init", kwargs)), run)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = WandbTracker("project", {"a": 1}, tmp_path)
    tracker.step(StepReport(4, {"loss": 0.5, "bins": {"0-4": 1}, "note": "x"}))
    tracker.close()
    assert calls == [
        ("init", {"project": "project", "config": {"a": 1}, "dir": str(tmp_path)}),
        ("log", ({"train/loss": 0.5, "train/bins/0-4": 1.0}, 4)),
        ("finish", None),
    ]


# --- fan and documentation -------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.heard: list[object] = []
        self.fails = fails

    def step(self, report: StepReport) -> None:
        self.heard.append(report.step)

    def evaluation(self, report: EvalReport) -> None:
        self.heard.append(report.task)

    def message(self, text: str) -> None:
        self.heard.append(text)

    def close(self) -> None:
        self.heard.append("closed")
        if self.fails:
            raise RunFolderError("full")


def test_fan_tells_all_and_closes_all() -> None:
    trackers = [Recorder(), Recorder(fails=True), Recorder()]
    fan = FanTracker(trackers)
    fan.step(report(1))
    fan.evaluation(evaluation())
    fan.message("hello")
    with pytest.raises(RunFolderError, match="full"):
        fan.close()
    assert [tracker.heard for tracker in trackers] == [[1, "tiny", "hello", "closed"]] * 3


def test_every_evaluation_field_is_documented() -> None:
    rows = DOCUMENT.read_text().split("## Evaluation lines")[1].splitlines()
    documented = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert documented == {"event"} | {field.name for field in dataclasses.fields(EvalReport)} - {"rows"}
