"""Efficiency: what a step and a run cost, early stopping beside full rollouts in the same engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import RunFolderError
from headstart.stats import Estimate, estimate, resamples

PHASES = ("rollout", "teacher", "student", "optimizer")
MACHINE = ("headstart", "torch", "transformers", "python", "platform", "cpus", "threads", "gpu")
"""Entries of environment.json that make seconds comparable."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A run's cost, evaluations not counted. Per step: means with intervals over steps. `accuracy` is the last
    evaluation's, with its interval."""

    steps: int
    seconds: float
    phases: Mapping[str, float]
    generated_tokens: int
    peak_memory_gib: float
    seconds_per_step: Estimate | None
    tokens_per_step: Estimate | None
    accuracy: Estimate | None


@dataclass(frozen=True, slots=True)
class Efficiency:
    """`ratios` are twin / run; `differences` names what differs between the two machines or installations."""

    sentence: str
    run: Cost
    twin: Cost | None
    ratios: Mapping[str, Estimate | float | None]
    differences: Mapping[str, tuple[Any, Any]]

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def explain_efficiency(run: Path, twin: Path | None = None) -> Efficiency:
    """From both folders' metrics.jsonl and environment.json alone. Raises RunFolderError when there are no steps."""
    lines = {name: _lines(path) for name, path in (("run", run), ("twin", twin)) if path is not None}
    own = cost(lines["run"])
    if twin is None:
        text = f"The run took {own.seconds:.1f} s and {own.generated_tokens:,} tokens in {own.steps} steps; --twin "
        return Efficiency(f"{text}names a full-rollout run to compare it with.", own, None, {}, {})
    other = cost(lines["twin"])
    ratios: dict[str, Estimate | float | None] = {
        name: _ratio(_column(lines["twin"], key), _column(lines["run"], key))
        for name, key in (("seconds_per_step", "seconds"), ("tokens_per_step", "tokens"))
    }
    ratios |= {
        "seconds": other.seconds / own.seconds,
        "generated_tokens": other.generated_tokens / own.generated_tokens,
        "peak_memory_gib": other.peak_memory_gib / own.peak_memory_gib,
    }
    environments = [json.loads((path / "environment.json").read_text(encoding="utf-8")) for path in (run, twin)]
    a, b = environments
    differences = {name: (a.get(name), b.get(name)) for name in MACHINE if a.get(name) != b.get(name)}
    return Efficiency(_sentence(own, other, ratios, differences), own, other, ratios, differences)


def cost(lines: Sequence[Mapping[str, Any]]) -> Cost:
    """The cost of a run from the lines of its metrics.jsonl."""
    steps = [line for line in lines if line["event"] == "step"]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    last = evaluations[-1] if evaluations else None
    return Cost(
        steps=len(steps),
        seconds=sum(line["seconds"] for line in steps),
        phases={name: sum(line[f"seconds_{name}"] for line in steps) for name in PHASES},
        generated_tokens=sum(line["tokens"] for line in steps),
        peak_memory_gib=max(line["peak_memory_gib"] for line in steps),
        seconds_per_step=_mean(_column(steps, "seconds")),
        tokens_per_step=_mean(_column(steps, "tokens")),
        accuracy=Estimate(last["accuracy"], *last["interval"]) if last else None,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    metrics = path / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    if not any(line["event"] == "step" for line in lines):
        raise RunFolderError(f"{metrics} holds no training step, so there is no cost to read; give a finished run")
    return lines


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray[Any, Any]:
    return np.array([line[key] for line in lines if line["event"] == "step"], dtype=np.float64)


def _mean(values: np.ndarray[Any, Any]) -> Estimate | None:
    return estimate(resamples(len(values), 0) @ values / len(values))


def _ratio(top: np.ndarray[Any, Any], bottom: np.ndarray[Any, Any]) -> Estimate | None:
    means = [resamples(len(values), seed) @ values / len(values) for seed, values in enumerate((top, bottom))]
    return estimate(means[0] / means[1])


def _sentence(own: Cost, other: Cost, ratios: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    step: Estimate | None = ratios["seconds_per_step"]
    assert step is not None
    said = (
        f"A step of the twin took {step.value:.1f} times as long [{step.low:.1f}, {step.high:.1f}]; the whole runs "
        f"took {own.seconds:.1f} s and {own.generated_tokens:,} tokens in {own.steps} steps against "
        f"{other.seconds:.1f} s and {other.generated_tokens:,} tokens in {other.steps}"
    )
    if own.accuracy and other.accuracy:
        overlap = own.accuracy.low <= other.accuracy.high and other.accuracy.low <= own.accuracy.high
        noise = ", intervals overlap" if overlap else ""
        said += f", and ended at {own.accuracy.value:.1%} against {other.accuracy.value:.1%}{noise}"
    if differences:
        said += f". Seconds are not comparable: {', '.join(differences)} differ"
    return f"{said}."
