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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headstart.config.schema import TrackingConfig
from headstart.errors import ConfigError, RunFolderError
from headstart.progress import shown
from headstart.records import EvalReport, GradedResponse, SampleRollout, StepReport, Verdict
from headstart.samples import COLUMNS, as_row, markdown, one_line
from headstart.tracking import (
    ClientTracker,
    ConsoleTracker,
    FanTracker,
    JsonlTracker,
    TensorBoardTracker,
    format_evaluation,
    require_extras,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def report(step: int, **more: Any) -> StepReport:
    metrics = {
        "step": step,
        "loss": 1.5 / step,
        "horizon": 100,
        "share_reached_horizon": 0.75,
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


def test_an_evaluation_of_cut_responses_says_so_in_its_line() -> None:
    cut = dataclasses.replace(evaluation(), truncated=0.63, settings={"max_tokens": 256})
    assert format_evaluation(cut).endswith(
        "truncated 63.0%, mean length 171 (63% of the responses were cut at 256 tokens: the accuracy is that of mostly "
        "cut responses, not that of the model; set evaluation.max_tokens=2048)"
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
        "step 1/200  loss 1.5000 nats/token  1,234 tokens/s  horizon 100  reached by 75%  "
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


# --- samples ---------------------------------------------------------------------------------------------------------

SAMPLE = SampleRollout(
    "gsm8k/7", 0, "<|im_start|>user\n[red]2 + 2?\n", ("It", " is", " 5", ".\n", "\x1b[2J"),
    (0.0, 0.3, 2.5, 0.004, 0.07), 5, False, "unfinished",
)  # fmt: skip


def samples_on(console: Console, steps: range, total: int) -> None:
    tracker = ConsoleTracker(total, console)
    for step in steps:
        tracker.samples(step, [SAMPLE, SAMPLE])
    tracker.close()


def test_a_sample_in_a_log_is_three_lines_that_name_the_tokens_furthest_from_the_teacher() -> None:
    out = io.StringIO()
    samples_on(Console(file=out, force_terminal=False, width=40), range(1, 2), 9)
    assert out.getvalue().splitlines() == [
        "sample at step 1: gsm8k/7 sample 0: 5 tokens, reached the horizon, 0.5748 nats per token, unfinished",
        "  prompt: <|im_start|>user [red]2 + 2?",
        "  response: It is 5. ·[2J; largest divergence (nats): “5” 2.50, “is” 0.30, “·[2J” 0.07",
    ]


def test_a_sample_on_a_terminal_has_its_tokens_coloured_and_obeys_no_control_character() -> None:
    def shown(**more: Any) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system="truecolor", _environ={"TERM": "xterm"}, **more)
        samples_on(console, range(1, 2), 9)
        return out.getvalue()

    text = shown()
    assert re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)\x1b\[0m", text) == [
        ("30;48;2;247;199;168", " is"), ("37;48;2;179;74;0", " 5"), ("30;48;2;251;227;211", "·[2J"),
    ]  # fmt: skip
    assert "\x1b[2J" not in text
    assert "the deeper the orange, the further the teacher is from it" in text
    assert "largest divergence (nats): “5” 2.50" in shown(no_color=True)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    samples_on(Console(file=ascii_only, force_terminal=True, _environ={"TERM": "xterm"}), range(1, 2), 9)
    ascii_only.flush()
    assert b"(nats): \\u201c5\\u201d 2.50" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=50)
@given(total=st.integers(1, 400), every=st.integers(1, 50))
def test_samples_are_about_ten_in_a_run_and_hold_first_and_last(total: int, every: int) -> None:
    out = io.StringIO()
    steps = sorted({1, *range(every, total + 1, every), total})
    samples_on(Console(file=out, force_terminal=False), steps, total)  # type: ignore[arg-type]
    shown = [int(step) for step in re.findall(r"^sample at step (\d+)", out.getvalue(), re.M)]
    assert {1, total} <= set(shown) <= set(steps)
    assert len(shown) <= 10


def test_a_long_prompt_is_cut_in_its_middle() -> None:
    line = one_line("abc\n" * 100, 90)
    assert (line[:8], line[-8:], len(line)) == ("abc abc ", " abc abc", 93)


def test_samples_as_a_markdown_table_are_one_line_each_and_their_markup_is_shown() -> None:
    head, rule, row = markdown([SAMPLE]).splitlines()
    assert head == f"| {' | '.join(COLUMNS)} |"
    assert rule.count("---") == len(re.findall(r"(?<!\\)\|", row)) - 1 == len(COLUMNS)
    assert "&lt;\\|im\\_start\\|>user<br>\\[red\\]2 + 2?" in row
    assert "It is⟨0.30⟩ 5⟨2.50⟩.<br>" in row


# --- TensorBoard, W&B and trackio -------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the tensorboard extra is not installed")
def test_tensorboard_events_are_readable_and_resume_replaces_later_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (2, 3)):
        tracker = TensorBoardTracker(tmp_path)
        for step in steps:
            tracker.step(report(step))
            tracker.samples(step, [SAMPLE])
        tracker.evaluation(evaluation(3))
        tracker.message("hello")
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert [event.step for event in events.Scalars("train/divergence_by_position/0-4")] == [1, 2, 3]
    assert events.Scalars("evaluation/accuracy")[0].value == pytest.approx(0.461)
    assert events.Scalars("evaluation/details/plan_right")[0].value == pytest.approx(0.375)
    texts = events.Tensors("samples/text_summary")
    assert {event.step for event in texts} == {1, 2, 3}
    assert texts[0].tensor_proto.string_val[0].decode() == markdown([SAMPLE])


def test_missing_extras_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard,.*tracking\.tensorboard=false"):
        TensorBoardTracker(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install wandb,.*tracking\.wandb=null"):
        ClientTracker("wandb", project="p")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"pip install trackio,.*tracking\.trackio=null"):
        require_extras(TrackingConfig(trackio="project"))
    require_extras(TrackingConfig())


@pytest.mark.parametrize("client", ["wandb", "trackio"])
def test_a_client_gets_scalars_by_step_and_samples_as_a_table(
    client: Literal["wandb", "trackio"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a recording stand-in: W&B itself needs an account or a server, and trackio is an extra."""
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", (values, step))), finish=lambda: calls.append(("finish", None))
    )
    module = types.ModuleType(client)
    module.init = lambda **kwargs: (calls.append(("init", kwargs)), run)[1]  # type: ignore[attr-defined]
    module.Table = lambda dataframe: dataframe.to_dict("records")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, client, module)
    tracker = ClientTracker(client, project="p", config={"a": 1})
    tracker.step(StepReport(4, {"loss": 0.5, "bins": {"0-4": 1}, "note": "x"}))
    tracker.samples(4, [SAMPLE])
    tracker.close()
    assert calls[:2] == [
        ("init", {"project": "p", "config": {"a": 1}}),
        ("log", ({"train/loss": 0.5, "train/bins/0-4": 1.0}, 4)),
    ]
    assert calls[2] == ("log", ({"samples": [dict(zip(COLUMNS, as_row(SAMPLE), strict=True))]}, 4))
    assert calls[3] == ("finish", None)


# --- fan and documentation -------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.heard: list[object] = []
        self.fails = fails

    def step(self, report: StepReport) -> None:
        self.heard.append(report.step)

    def evaluation(self, report: EvalReport) -> None:
        self.heard.append(report.task)

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        self.heard.append((step, len(samples)))

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
    fan.samples(1, [SAMPLE, SAMPLE])
    fan.message("hello")
    with pytest.raises(RunFolderError, match="full"):
        fan.close()
    assert [tracker.heard for tracker in trackers] == [[1, "tiny", (1, 2), "hello", "closed"]] * 3


def test_every_evaluation_field_is_documented() -> None:
    rows = DOCUMENT.read_text().split("## Evaluation lines")[1].splitlines()
    documented = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert documented == {"event"} | {field.name for field in dataclasses.fields(EvalReport)} - {"rows"}
