"""How a step's time and memory grow with its horizon, batch, samples per prompt, vocabulary and models.

    OMP_NUM_THREADS=1 python -m bench.scaling --out docs/results/scaling-cpu.json

One quantity at a time is varied around C1. Every phase's seconds (the fastest over a few rounds through all points: a
busy machine only ever adds) are fitted over all points at once as a sum of the analytic cost model's terms
(bench/cost.py), each with one non-negative coefficient; the error told is that of points that were left out of the fit.
Memory is what torch allocates over the loaded models, beside the formula of headstart.models.memory, which has
nothing to fit. Where N is varied, headstart.assemble.cost (from a few short timings) is asked, too. A picture
is drawn beside the JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench import picture
from bench.contenders import Headstart
from bench.cost import PHASES, Cost, costs
from bench.step import environment, timed
from bench.workloads import QWEN_06, QWEN_4, QWEN_17, WORKLOADS, Workload, small
from headstart.assemble.cost import estimate, memory, nonnegative
from headstart.models.memory import GIB, WORKSPACE

TERMS: dict[str, tuple[str, ...]] = {
    "rollout": ("decode steps", "GFLOP", "GB", "G logits"),
    "teacher": ("once", "linear GFLOP", "attention GFLOP"),
    "student": ("once", "linear GFLOP", "attention GFLOP", "G logits"),
    "optimizer": ("once", "GB"),
}
"""What a phase's seconds are a sum of. A coefficient is seconds per unit: 1 / GFLOP is a rate in GFLOP/s."""


def sweeps(base: Workload, tiny: bool = False) -> dict[str, dict[float, Workload]]:
    """Name of the quantity -> its value -> the workload."""
    lengths = (8, 16) if tiny else (25, 50, 100, 200, 400)
    if tiny:
        base = replace(base, student=small(32), teacher=small(64), vocabulary=64, prompts=2)
        return {"N": {n: replace(base, tokens=n) for n in lengths}}
    pairs = {h: (small(h), small(2 * h)) for h in (64, 128, 256, 384)}
    vocabularies = (1024, 4096, 16_384, 65_536)
    if base.device == "cuda":
        pairs = {s.hidden: (s, t) for s, t in ((QWEN_06, QWEN_17), (QWEN_06, QWEN_4), (QWEN_17, QWEN_4))}
        vocabularies = (16_384, 65_536, 151_936)
    return {
        "N": {n: replace(base, tokens=n) for n in lengths},
        "prompts": {b: replace(base, prompts=b) for b in (2, 4, 8, 16, 32)},
        "samples": {g: replace(base, prompts=4, samples=g) for g in (1, 2, 4, 8)},
        "vocabulary": {v: replace(base, vocabulary=v) for v in vocabularies},
        "student hidden": {h: replace(base, student=s, teacher=t) for h, (s, t) in pairs.items()},
    }


def seconds(work: Workload) -> dict[str, float]:
    """Seconds by phase, the faster of two steps on the same prompts after one to warm up."""
    engine = Headstart(work, *work.models())
    _, *runs = (timed(engine, work, 0)["phases"] for _ in range(3))
    return {phase: min(run[phase] for run in runs) for phase in TERMS}


def point(work: Workload, value: float, ask: bool) -> dict[str, Any]:
    """What is known of one workload but its seconds: GiB over the models, measured and by formula; the model's terms;
    if `ask`, the seconds that `headstart.assemble.cost` expects."""
    engine = Headstart(work, *work.models())
    engine.step(0)
    parts, pair = engine.parts, engine.pair
    predicted = memory(pair, parts.config, parts.prompts, work.tokens)
    line = estimate(pair, parts.config, parts.prompts[: work.prompts], [work.tokens])[0].seconds if ask else None
    terms = features(work, costs(work, work.lengths(0)))
    return {
        "value": value,
        "terms": {phase: dict(zip(TERMS[phase], terms[phase], strict=True)) for phase in TERMS},
        "gib": allocated(work, lambda: engine.step(0)) / GIB,
        # AdamW's averages are there since the first step.
        "gib_predicted": predicted.peak - predicted.weights - predicted.states - WORKSPACE / GIB,
        "seconds_estimated": None if line is None else line.total,
    }


def features(work: Workload, by_phase: dict[str, Cost]) -> dict[str, list[float]]:
    """The numbers behind TERMS, in billions."""

    def total(phase: str, of: Callable[[Cost], float]) -> float:
        return sum(of(cost) for name, cost in by_phase.items() if PHASES[name] == phase) / 1e9

    found = {}
    for phase, names in TERMS.items():
        terms = {
            "once": 1.0,
            "decode steps": float(work.tokens),
            "GFLOP": total(phase, lambda c: c.flops),
            "linear GFLOP": total(phase, lambda c: c.linear),
            "attention GFLOP": total(phase, lambda c: c.attention),
            "GB": total(phase, lambda c: c.moved),
            "G logits": total(phase, lambda c: c.logits),
        }
        found[phase] = [terms[name] for name in names]
    return found


def allocated(work: Workload, run: Callable[[], object]) -> float:
    """Bytes that `run` held at most beyond what was there, as torch's allocator tells."""
    gc.collect()
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - base)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return float(max(itertools.accumulate((e.nbytes() for e in events), initial=0)))


def errors_left_out(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Relative error at each point of the fit to all others."""
    found = []
    for place, (row, value) in enumerate(zip(rows, seconds, strict=True)):
        others = [i for i in range(len(rows)) if i != place]
        coefficients = nonnegative([rows[i] for i in others], [seconds[i] for i in others])
        found.append(abs(float(np.dot(row, coefficients)) - value) / value)
    return found


def fitted(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Coefficients and errors by phase over all sweeps; every point gets what the fit says of it."""
    points = [point for sweep in found.values() for point in sweep]
    told = {}
    for phase, names in TERMS.items():
        rows = [list(point["terms"][phase].values()) for point in points]
        seconds = [point["seconds"][phase] for point in points]
        coefficients, errors = nonnegative(rows, seconds), errors_left_out(rows, seconds)
        for one, row in zip(points, rows, strict=True):
            one.setdefault("fitted", {})[phase] = float(np.dot(row, coefficients))
        told[phase] = {
            "seconds_per": dict(zip(names, coefficients, strict=True)),
            "error": {"median": statistics.median(errors), "max": max(errors)},
        }
    return told


def table(record: dict[str, Any]) -> str:
    lines = ["| phase | seconds per unit of each term | error left out: median, most |", "|---|---|---|"]
    for phase, found in record["fit"].items():
        terms = ", ".join(f"{name} {value:.2g}" for name, value in found["seconds_per"].items() if value)
        lines.append(f"| {phase} | {terms} | {found['error']['median']:.0%}, {found['error']['max']:.0%} |")
    lines += [
        "",
        "| varied | value | seconds | fitted | estimated | GiB | by formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, points in record["sweeps"].items():
        for p in points:
            seconds = [sum(p["seconds"].values()), sum(p["fitted"].values()), p["seconds_estimated"]]
            cells = [
                *("" if s is None else f"{s:.3f}" for s in seconds),
                f"{p['gib']:.3f}",
                f"{p['gib_predicted']:.3f}",
            ]
            lines.append(f"| {name} | {p['value']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="through all points")
    parser.add_argument("--tiny", action="store_true", help="two points, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the raw figures go, as JSON; the picture goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    base = WORKLOADS["C1" if options.device == "cpu" else "G1"]
    started, wanted = environment(), sweeps(base, options.tiny)
    timings: dict[str, dict[float, list[dict[str, float]]]] = {n: {v: [] for v in w} for n, w in wanted.items()}
    for turn in range(options.rounds):
        for name, values in wanted.items():
            for value, work in values.items():
                timings[name][value].append(seconds(work))
            print(f"round {turn + 1}: {name} done", file=sys.stderr, flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in wanted.items():
        found[name] = [point(work, value, name == "N") for value, work in values.items()]
        for one in found[name]:
            runs = timings[name][one["value"]]
            one["seconds"] = {phase: min(run[phase] for run in runs) for phase in TERMS}
    command = " ".join(["python -m bench.scaling", *arguments])
    record = {"command": command, "environment": started, "fit": fitted(found), "sweeps": found}
    print(table(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        picture.scaling(record, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
