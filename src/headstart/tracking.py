"""Where a run's measurements go: the console, `metrics.jsonl`, TensorBoard, Weights & Biases, trackio.

Every metric is described in `docs/reference/metrics.md`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from headstart.config.schema import TrackingConfig
from headstart.errors import ConfigError, install_command
from headstart.files import append, cut_torn_line, refusal
from headstart.interfaces import Tracker
from headstart.progress import printing
from headstart.records import EvalReport, SampleRollout, StepReport
from headstart.samples import COLUMNS, as_row, coloured, heading, markdown, one_line, worst
from headstart.stats import Estimate, cut_note

_PLAIN_LINES = 20
_SAMPLES = 8  # shown on the console between those of the first and the last step
_WHOLE_LINE = 190  # characters; a narrower terminal shows what matters most, in one line
_EXTRAS = {
    "tensorboard": ("torch.utils.tensorboard", "tracking.tensorboard=false"),
    "wandb": ("wandb", "tracking.wandb=null"),
    "trackio": ("trackio", "tracking.trackio=null"),
}
_PARTS = ("rollout", "teacher", "student", "optimizer")


def format_evaluation(report: EvalReport) -> str:
    """One line: `accuracy 46.1% [41.2, 51.0] (96 problems x 4), plan_right 37.5%, truncated 0.0%, mean length 171`."""
    measured = Estimate(report.accuracy, *report.interval)
    accuracy = f"accuracy {measured:.1%} ({report.problems} problems x {report.samples})"
    shares = [f"{name} {share:.1%}" for name, share in {**report.details, "truncated": report.truncated}.items()]
    note = cut_note(report.truncated, report.settings.get("max_tokens"))
    return ", ".join([accuracy, *shares, f"mean length {report.mean_tokens:.0f}"]) + (f" ({note})" if note else "")


def evaluation_fields(report: EvalReport) -> dict[str, Any]:
    """The report without its rows, as it is written to `metrics.jsonl`."""
    return {field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "rows"}


class JsonlTracker:
    """Appends one JSON line per step (`"event": "step"`) and per evaluation (`"event": "evaluation"`).

    A line reaches the operating system whole before the call returns, so a killed process loses none; a line torn by a
    power cut or a full disk is removed when the file is opened again. Numbers that are not finite become null. Messages
    are not kept. Raises RunFolderError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            cut_torn_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise refusal(self._path, error) from error

    def step(self, report: StepReport) -> None:
        self._write({"event": "step", "step": report.step, **report.metrics})

    def evaluation(self, report: EvalReport) -> None:
        self._write({"event": "evaluation", **evaluation_fields(report)})

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise refusal(self._path, error) from error
        finally:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(record), ensure_ascii=False, default=str) + "\n"
        append(self._path, self._file, line.encode(errors="backslashreplace"))


class ConsoleTracker:
    """Lines: the first and last step, about 20 between, all else. Between them `headstart.progress` shows the rest."""

    def __init__(self, total_steps: int, console: Console | None = None, *, evaluates_every: int | None = None) -> None:
        self._total = total_steps
        self._console = console
        self._evaluates_every = evaluates_every or total_steps
        self._evaluated, self._evaluation_seconds = 0, 0.0
        self._every = max(1, math.ceil(total_steps / _PLAIN_LINES))
        self._recent: deque[float] = deque(maxlen=20)  # seconds of recent steps, for the ETA
        self._step: int | None = None  # the last one
        self._sampled: int | None = None  # the last step of which a sample was shown

    def step(self, report: StepReport) -> None:
        first, self._step = self._step is None, report.step
        self._recent.append(float(report.metrics.get("seconds") or 0.0))
        if first or report.step % self._every == 0 or report.step == self._total:
            console, readings = printing(self._console), _readings(report.metrics)
            if console.is_terminal and console.width < _WHOLE_LINE:
                readings = [*readings[:2], readings[3]]
            self.message(f"step {report.step}/{self._total}  " + "  ".join(readings) + self._eta())

    def evaluation(self, report: EvalReport) -> None:
        self._evaluated, self._evaluation_seconds = report.step, report.seconds or 0.0
        self.message(f"evaluation at step {report.step} on {report.task}: {format_evaluation(report)}")

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        """The first of them, about ten times in a run: with its tokens coloured by divergence on a terminal."""
        if self._sampled is not None and step < min(self._total, self._sampled + self._total / _SAMPLES):
            return
        first, self._sampled, sample, console = self._sampled is None, step, samples[0], printing(self._console)
        colours = console.color_system and not console.no_color and console.encoding.startswith("utf")
        legend = " (the deeper the orange, the further the teacher is from it)" if first and colours else ""
        self.message(f"sample at step {step}: {one_line(heading(sample))}{legend}")
        self.message(f"  prompt: {one_line(sample.prompt, 200)}")
        if colours:
            console.print(coloured(sample, 200), highlight=False)
        else:
            self.message(
                f"  response: {one_line(''.join(sample.tokens), 300)}; largest divergence (nats): "
                f"{worst(sample) or 'none'}"
            )

    def message(self, text: str) -> None:
        console = printing(self._console)
        known = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(known, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None: ...

    def _eta(self) -> str:
        """The time that is left, for steps like the recent ones and evaluations like the last."""
        due = {*range(self._evaluates_every, self._total, self._evaluates_every), self._total}
        evaluations = self._evaluation_seconds * sum(step > self._evaluated for step in due)
        steps = (self._total - (self._step or 0)) * sum(self._recent) / len(self._recent)
        seconds = round(steps + evaluations)
        return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def require_extras(tracking: TrackingConfig) -> None:
    """Raise ConfigError when a tracker that is on is not installed: before any model is loaded."""
    for extra in _EXTRAS:
        if getattr(tracking, extra) not in (None, False):
            _import_extra(extra)


class ScalarTracker:
    """Base of the trackers that keep numbers and tables: `_log` gets scalars by path, such as `train/loss`."""

    def step(self, report: StepReport) -> None:
        self._log(_scalars("train", report.metrics), report.step)

    def evaluation(self, report: EvalReport) -> None:
        self._log(_scalars("evaluation", evaluation_fields(report)), report.step)

    def message(self, text: str) -> None: ...

    def _log(self, scalars: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError


class TensorBoardTracker(ScalarTracker):
    """Writes scalars, and samples as text, for TensorBoard into `folder`. Raises ConfigError when the extra is not
    installed."""

    def __init__(self, folder: Path) -> None:
        self._writer_type = _import_extra("tensorboard").SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        self._log({}, step)
        self._writer.add_text("samples", markdown(samples), step)

    def _log(self, scalars: Mapping[str, Any], step: int) -> None:
        if self._writer is None:  # opened late: purge_step hides what a killed run wrote beyond its checkpoint
            self._writer = self._writer_type(str(self._folder), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)


class ClientTracker(ScalarTracker):
    """Logs scalars and tables with the module of W&B or of trackio, whose methods agree; `settings` are those of
    its `init`. Raises ConfigError when the extra is not installed or does not start."""

    def __init__(self, extra: Literal["wandb", "trackio"], **settings: Any) -> None:
        self._client = _import_extra(extra)
        try:
            self._run = self._client.init(**settings)
        except Exception as error:  # the clients have their own errors for keys, names and networks
            hint = "Run `wandb login`, set WANDB_MODE=offline, or set" if extra == "wandb" else "Set"
            raise ConfigError(
                f"tracking.{extra}: it does not start: {' '.join(str(error).split())}. {hint} {_EXTRAS[extra][1]}"
            ) from error

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        pandas = importlib.import_module("pandas")  # trackio's tables take names of columns from a data frame alone
        rows = pandas.DataFrame([as_row(sample) for sample in samples], columns=COLUMNS)
        self._log({"samples": self._client.Table(dataframe=rows)}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, scalars: Mapping[str, Any], step: int) -> None:
        self._run.log(scalars, step=step)


class FanTracker:
    """Forwards to several trackers. `close` closes all of them, also when one fails."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def step(self, report: StepReport) -> None:
        for tracker in self._trackers:
            tracker.step(report)

    def evaluation(self, report: EvalReport) -> None:
        for tracker in self._trackers:
            tracker.evaluation(report)

    def samples(self, step: int, samples: Sequence[SampleRollout]) -> None:
        for tracker in self._trackers:
            tracker.samples(step, samples)

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def close(self) -> None:
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def _readings(metrics: Mapping[str, Any]) -> list[str]:
    """What the reader watches, in a fixed order; a dash where a metric is absent."""

    def show(key: str, form: str) -> str:
        value = metrics.get(key)
        return "-" if value is None else format(value, form)

    return [
        f"loss {show('loss', '.4f')} nats/token",
        f"{show('tokens_per_second', ',.0f')} tokens/s",
        f"horizon {show('horizon', ',.0f')}",
        f"reached by {show('share_reached_horizon', '.0%')}",
        *(f"{part} {show(f'seconds_{part}', '.2f')} s" for part in _PARTS),
        f"peak {show('peak_memory_gib', '.2f')} GiB",
    ]


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON does not have."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _scalars(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, nested ones by path: `train/divergence_by_position/0-4`."""
    scalars: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            scalars |= _scalars(f"{prefix}/{key}", value)
        elif isinstance(value, bool | int | float):
            scalars[f"{prefix}/{key}"] = float(value)
    return scalars


def _import_extra(extra: str) -> Any:
    """The module of an optional tracker. Raises ConfigError with the remedy when it is not installed."""
    try:
        return importlib.import_module(_EXTRAS[extra][0])
    except ImportError as error:
        raise ConfigError(
            f"tracking.{extra} is on but {extra} is not installed: {install_command(extra)}, "
            f"or set {_EXTRAS[extra][1]}."
        ) from error
