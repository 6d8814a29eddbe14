"""Efficiency: what a step and a run cost, early stopping beside full rollouts in the same engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import RunFolderError
from headstart.explanation.models import Reading
from headstart.reports.run import Run, read_run
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


def explain_efficiency(run: Run, twin: Run | None = None) -> Efficiency:
    """From what both folders hold. Raises RunFolderError when there are no steps."""
    own = _cost(run)
    if twin is None:
        text = f"The run took {own.seconds:.1f} s and {own.generated_tokens:,} tokens in {own.steps} steps; --twin "
        return Efficiency(f"{text}names a full-rollout run to compare it with.", own, None, {}, {})
    other = _cost(twin)
    ratios: dict[str, Estimate | float | None] = {
        f"{name}_per_step": estimate(_means(twin, name, 0) / _means(run, name, 1)) for name in ("seconds", "tokens")
    }
    ratios |= {
        name: getattr(other, name) / getattr(own, name) for name in ("seconds", "generated_tokens", "peak_memory_gib")
    }
    a, b = run.environment, twin.environment
    differences = {name: (a.get(name), b.get(name)) for name in MACHINE if a.get(name) != b.get(name)}
    return Efficiency(_sentence(own, other, ratios, differences), own, other, ratios, differences)


def trained_run(path: Path) -> Run:
    """The run in the folder `path`. Raises RunFolderError when it took no step."""
    run = read_run(path)
    if not run.steps:
        raise RunFolderError(f"{path} holds no training step, so there is nothing to explain; give a finished run")
    return run


def _cost(run: Run) -> Cost:
    last = run.points[-1].evaluation if run.points else None
    return Cost(
        steps=len(run.steps),
        seconds=sum(step["seconds"] for step in run.steps),
        phases={name: sum(step[f"seconds_{name}"] for step in run.steps) for name in PHASES},
        generated_tokens=sum(step["tokens"] for step in run.steps),
        peak_memory_gib=max(step["peak_memory_gib"] for step in run.steps),
        seconds_per_step=estimate(_means(run, "seconds", 0)),
        tokens_per_step=estimate(_means(run, "tokens", 0)),
        accuracy=Estimate(last["accuracy"], *last["interval"]) if last else None,
    )


def _means(run: Run, key: str, seed: int) -> Array:
    """The mean over steps, resampled over steps."""
    counts, values = resamples(len(run.steps), seed), np.array([step[key] for step in run.steps], dtype=np.float64)
    means: Array = counts @ values / len(values)
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
