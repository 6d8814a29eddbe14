"""Efficiency: what a step and a run cost, early stopping beside full rollouts in the same engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import RunFolderError
from headstart.explanation.models import Reading
from headstart.stats import Array, Estimate, estimate, resamples

PHASES = ("rollout", "teacher", "student", "optimizer")
MACHINE = ("headstart", "torch", "transformers", "python", "platform", "cpus", "threads", "gpu")
"""Entries of environment.json that make seconds comparable."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A run's cost without its evaluations. Per step: means with intervals over steps. `accuracy` is the last
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
class Efficiency(Reading):
    """`twin` is the run's full-rollout counterpart, `ratios` are twin / run; `differences` names what differs between
    the two machines or installations."""

    run: Cost
    twin: Cost | None
    ratios: Mapping[str, Estimate | float | None]
    differences: Mapping[str, tuple[Any, Any]]


def explain_efficiency(run: Path, twin: Path | None = None) -> Efficiency:
    """From both folders' metrics.jsonl and environment.json alone. Raises RunFolderError when there are no steps."""
    steps, own = _cost(run)
    if twin is None:
        text = f"The run took {own.seconds:.1f} s and {own.generated_tokens:,} tokens in {own.steps} steps; --twin "
        return Efficiency(f"{text}names a full-rollout run to compare it with.", own, None, {}, {})
    other_steps, other = _cost(twin)
    ratios: dict[str, Estimate | float | None] = {
        f"{name}_per_step": estimate(_means(other_steps, name, 0) / _means(steps, name, 1))
        for name in ("seconds", "tokens")
    }
    ratios |= {
        name: getattr(other, name) / getattr(own, name) for name in ("seconds", "generated_tokens", "peak_memory_gib")
    }
    a, b = (json.loads((path / "environment.json").read_text(encoding="utf-8")) for path in (run, twin))
    differences = {name: (a.get(name), b.get(name)) for name in MACHINE if a.get(name) != b.get(name)}
    return Efficiency(_sentence(own, other, ratios, differences), own, other, ratios, differences)


def metric_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations in a metrics.jsonl. Raises RunFolderError when there are no steps."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    steps, evaluations = ([line for line in lines if line["event"] == event] for event in ("step", "evaluation"))
    if not steps:
        raise RunFolderError(f"{path} holds no training step, so there is nothing to explain; give a finished run")
    return steps, evaluations


def _cost(run: Path) -> tuple[list[dict[str, Any]], Cost]:
    """The steps of a run, and what they cost."""
    steps, evaluations = metric_lines(run / "metrics.jsonl")
    last = evaluations[-1] if evaluations else None
    return steps, Cost(
        steps=len(steps),
        seconds=sum(line["seconds"] for line in steps),
        phases={name: sum(line[f"seconds_{name}"] for line in steps) for name in PHASES},
        generated_tokens=sum(line["tokens"] for line in steps),
        peak_memory_gib=max(line["peak_memory_gib"] for line in steps),
        seconds_per_step=estimate(_means(steps, "seconds", 0)),
        tokens_per_step=estimate(_means(steps, "tokens", 0)),
        accuracy=Estimate(last["accuracy"], *last["interval"]) if last else None,
    )


def _means(steps: list[dict[str, Any]], key: str, seed: int) -> Array:
    """The mean over steps, resampled over steps."""
    means: Array = resamples(len(steps), seed) @ np.array([line[key] for line in steps], dtype=np.float64) / len(steps)
    return means


def _sentence(own: Cost, other: Cost, ratios: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    step: Estimate = ratios["seconds_per_step"]
    text = (
        f"A step of the full-rollout run took {step.value:.1f} times as long [{step.low:.1f}, {step.high:.1f}]; the "
        f"whole runs took {own.seconds:.1f} s and {own.generated_tokens:,} tokens in {own.steps} steps against "
        f"{other.seconds:.1f} s and {other.generated_tokens:,} tokens in {other.steps}"
    )
    if own.accuracy and other.accuracy:
        overlap = own.accuracy.low <= other.accuracy.high and other.accuracy.low <= own.accuracy.high
        noise = ", intervals overlap" if overlap else ""
        text += f", and ended at {own.accuracy.value:.1%} against {other.accuracy.value:.1%}{noise}"
    if differences:
        text += f". Seconds are not comparable: {', '.join(differences)} differ"
    return f"{text}."
