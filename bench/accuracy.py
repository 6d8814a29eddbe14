"""C5: seconds of training until the bundled pair's student is right 90 times in 100, with early stopping and with full
rollouts: the same engine, prompts and test problems, each arm with the learning rate that was best for it on the dev
split (docs/results/quickstart.md). Evaluations are not counted."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.config.loader import parse
from headstart.distillation.run import distill
from headstart.quickstart import arms
from headstart.reports.run import read_run

TARGET = 0.9
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t, 97.5%, by the number of seeds."""

Curve = list[tuple[float, float]]


def measure(seeds: int, target: float = TARGET) -> dict[str, Any]:
    """Both arms with every seed, alternating."""
    curves: dict[str, list[Curve]] = {"esr": [], "full": []}
    for seed in range(seeds):
        for name, config in arms("strong", seed).items():
            often = parse(config.model_dump(mode="json"), ["evaluation.every=4"])
            with tempfile.TemporaryDirectory() as folder:
                distill(often, out=Path(folder) / "run")
                points = read_run(Path(folder) / "run").points
            curves[name].append([(p.seconds, p.accuracy) for p in points])
    return {"target": target, "arms": curves, **compared(curves, target)}


def compared(curves: dict[str, list[Curve]], target: float) -> dict[str, Any]:
    """Seconds to `target` by arm and seed (None: not reached), and full over early, with a 95% interval of their
    geometric mean over the seeds in which both got there."""
    reached = {arm: [seconds_to(curve, target) for curve in found] for arm, found in curves.items()}
    each = [full / early for early, full in zip(reached["esr"], reached["full"], strict=True) if early and full]
    found: dict[str, Any] = {"seconds": reached, "ratios": each}
    if len(each) > 1:
        logs = [math.log(x) for x in each]
        mean = statistics.fmean(logs)
        half = T95.get(len(each), 2.0) * statistics.stdev(logs) / math.sqrt(len(each))
        found |= {"ratio": math.exp(mean), "interval": [math.exp(mean - half), math.exp(mean + half)]}
    return found


def seconds_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When a curve of (seconds, accuracy) first reaches `target`, on the line between two evaluations."""
    if curve[0][1] >= target:
        return curve[0][0]
    for (s0, a0), (s1, a1) in zip(curve, curve[1:], strict=False):
        if a1 >= target:
            return s0 + (s1 - s0) * (target - a0) / (a1 - a0)
    return None


def sentence(result: dict[str, Any]) -> str:
    times = {
        arm: ", ".join("never" if s is None else f"{s:.2f}" for s in seconds)
        for arm, seconds in result["seconds"].items()
    }
    ratio = "{:.2f} [{:.2f}, {:.2f}]".format(result["ratio"], *result["interval"]) if "ratio" in result else "not known"
    return (
        f"seconds to {result['target']:.0%}: early stopping {times['esr']}; full rollouts {times['full']}; full over "
        f"early {ratio}"
    )
