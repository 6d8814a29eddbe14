"""Does a step fit into the device, and how long does it take?"""

from __future__ import annotations

from dataclasses import asdict

from headstart.assemble.cost import Cost
from headstart.checks.findings import Finding
from headstart.config.schema import Config
from headstart.models.memory import GIB, Memory

NEAR = 0.9
"""Share of the free memory from which fragments and other processes decide whether a step fits."""


def memory_finding(needed: Memory, free_bytes: int, horizon: int, device: str) -> Finding:
    """A step's peak against what is free now, when both models are loaded already."""
    need, free = needed.peak - needed.weights, free_bytes / GIB
    figures = {**asdict(needed), "needed_gib": need, "free_gib": free, "horizon": horizon}
    largest = max(("rollout", "teacher", "student", "optimizer"), key=lambda phase: float(figures[phase]))
    text = (
        f"a step at horizon {horizon:,} needs {_gib(need)} beside the loaded weights ({_gib(needed.weights)}), most in "
        f"the {largest} phase; {_gib(free)} are free on the {device}"
    )
    if need <= NEAR * free:
        return Finding("memory", "ok", text, None, figures)
    remedy = {
        "rollout": "lower rollout.batch_size",
        "optimizer": "use tuning.type=lora",
    }.get(largest, "lower the horizon, set tuning.gradient_checkpointing=true, or leave training.micro_batch at null")
    return Finding("memory", "blocking" if need > free else "warning", text, remedy, figures)


def time_finding(cost: Cost, config: Config) -> Finding:
    """Seconds of a step by phase and of the whole run, evaluations left out."""
    if cost.seconds is None:
        text = "not measured: not even a short step fits into the free memory"
        return Finding("time", "note", text, None, {"horizon": cost.tokens})
    s, steps = cost.seconds, config.training.steps
    figures = {**asdict(s), "total": s.total, "steps": steps, "run": steps * s.total, "horizon": cost.tokens}
    phases = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in asdict(s).items())
    text = (
        f"a step at horizon {cost.tokens:,} takes about {s.total:.2g} s ({phases}), all {steps:,} steps "
        f"{_duration(steps * s.total)} without evaluations"
    )
    return Finding("time", "ok", text, None, figures)


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
