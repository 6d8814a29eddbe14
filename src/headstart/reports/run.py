"""Read-only view of a run or diagnosis folder for reports: plain JSON records, no torch.

An unreadable file becomes one line in `problems`, which the page shows; only a folder without a run is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from headstart.errors import RunFolderError

Record = Mapping[str, Any]
FORMAT = 1
READINGS = (
    "diagnose/preflight", "diagnose/plan", "diagnose/decay", "diagnose/recommendation", "diagnose/positions",
    "diagnose/pilot", "explain/cascade", "explain/commitment", "explain/swap", "explain/selection",
    "explain/efficiency", "explain/samples",
)  # fmt: skip


def failure_file(folder: Path) -> Path:
    """Where it stands why the run in `folder` failed: beside it, like its log."""
    return folder.with_name(f"{folder.name}.failed.txt")


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation with the training cost up to it: seconds (evaluations not counted) and generated tokens."""

    step: int
    seconds: float
    generated_tokens: int
    evaluation: Record
    rows: Path
    """One graded response per line."""

    @property
    def accuracy(self) -> float:
        return float(self.evaluation["accuracy"])

    def graded(self) -> dict[str, dict[str, float]]:
        """Reading -> problem id -> mean over its samples, for `correct`, `stopped` and the task's own readings.

        Empty when the responses are not there or cannot be read.
        """
        samples: dict[str, dict[str, list[float]]] = {}
        try:
            for line in filter(None, self.rows.read_text(encoding="utf-8").split("\n")):
                row = json.loads(line)
                verdict = row["verdict"]
                values = {"correct": verdict["correct"], "stopped": row["stopped"], **verdict["details"]}
                for name, value in values.items():
                    samples.setdefault(name, {}).setdefault(row["problem_id"], []).append(float(value))
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {name: {problem: fmean(v) for problem, v in of.items()} for name, of in samples.items()}


@dataclass(frozen=True, slots=True)
class Run:
    """One folder. `steps` are the step lines of metrics.jsonl, `points` its evaluations in step order (both empty for
    a diagnosis folder), `readings` the files of `diagnose/` and `explain/` by name (`diagnose/decay`)."""

    path: Path
    config: Record
    environment: Record
    steps: Sequence[Record]
    points: Sequence[Point]
    readings: Mapping[str, Record]
    problems: Sequence[str]
    samples: Mapping[int, Sequence[Record]] = field(default_factory=dict)
    """Sample rollouts of the first and the last step that has any."""

    def setting(self, section: str, key: str) -> Any:
        """A setting of the configuration; None where there is none."""
        settings = self.config.get(section)
        return settings.get(key) if isinstance(settings, dict) else None

    @property
    def failure(self) -> str | None:
        """Why a run of a comparison failed; None where it did not."""
        file = failure_file(self.path)
        return file.read_text(encoding="utf-8").strip() if file.exists() else None

    @property
    def description(self) -> str:
        """What kind of run it is, by its horizon: `early stopping, N = 16` or `full rollouts`."""
        kind = self.setting("horizon", "type")
        if kind == "fixed":
            return f"early stopping, N = {self.setting('horizon', 'tokens')}"
        if kind == "full":
            return "full rollouts"
        return f"{kind or 'unknown'} horizon" + (f", N = {self.steps[-1].get('horizon')}" if self.steps else "")


def read_run(path: Path) -> Run:
    """Everything a report needs from the folder at `path`. Raises RunFolderError when there is no run in it."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        reason = "it has no config.yaml" if path.is_dir() else "no such folder"
        raise RunFolderError(
            f"{path} is not a run folder ({reason}). Give one that `headstart distill` or `headstart diagnose` made."
        )
    problems: list[str] = []
    config = _record(path / "config.yaml", problems)
    steps = [line for line in _lines(path / "metrics.jsonl", problems) if line.get("event") == "step"]
    readings: dict[str, Record] = {}
    for name in READINGS:
        record = _record(path / f"{name}.json", problems)
        if record.get("format") == FORMAT:
            readings[name] = record
        elif record:
            given = f"{name}.json has format {record.get('format')!r}"
            problems.append(f"{given}, this version reads {FORMAT}: run the command that wrote it again")
    environment = _record(path / "environment.json", problems)
    saved = sorted((path / "rollouts").glob("step_*.jsonl"))
    samples = {int(file.stem.removeprefix("step_")): _lines(file, problems) for file in [*saved[:1], *saved[1:][-1:]]}
    return Run(path, config, environment, steps, _points(path, steps, problems), readings, problems, samples)


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its description where that tells it from the others, else its folder's name. A folder
    without training is called by its name."""
    folders = [run.path.resolve().name for run in runs]
    described = [run.description if run.steps or run.points else "" for run in runs]
    pairs = zip(described, folders, strict=True)
    names = [text if text and described.count(text) == 1 else folder for text, folder in pairs]
    return [name if names.count(name) == 1 else str(run.path) for run, name in zip(runs, names, strict=True)]


def _points(path: Path, steps: Sequence[Record], problems: list[str]) -> list[Point]:
    cost, seconds = [(0, 0.0, 0)], 0.0
    for line in steps:
        seconds += line.get("seconds") or 0.0
        cost.append((line.get("step", 0), seconds, line.get("generated_tokens", 0)))
    points = []
    for file in sorted((path / "eval").glob("step_*.json")):
        evaluation = _record(file, problems)
        if not {"step", "accuracy", "interval"} <= evaluation.keys():
            if evaluation:
                problems.append(f"eval/{file.name} holds no accuracy")
            continue
        _, spent, tokens = max((at for at in cost if at[0] <= evaluation["step"]), key=lambda at: at[0])
        points.append(Point(evaluation["step"], spent, tokens, evaluation, file.with_suffix(".jsonl")))
    return points


def _record(path: Path, problems: list[str]) -> Record:
    """A JSON or YAML file that holds a mapping; empty when there is none, with a line in `problems` when it is bad."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        value = str(error).splitlines()[0]
    if isinstance(value, dict):
        return value
    what = value if isinstance(value, str) else f"it holds a {type(value).__name__}"
    problems.append(f"{path.parent.name}/{path.name} cannot be read ({what})")
    return {}


def _lines(path: Path, problems: list[str]) -> list[Record]:
    """The lines of a JSONL file that can be read; how many could not becomes a problem."""
    if not path.exists():
        return []
    records: list[Record] = []
    lines = list(filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")))
    for line in lines:
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                records.append(record)
    if len(records) < len(lines):
        problems.append(f"{path.name}: {len(lines) - len(records)} lines cannot be read and are left out")
    return records
