"""Pictures of the benchmarks' JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PHASES = {"rollout": "#4C78A8", "teacher": "#F58518", "student": "#54A24B", "optimizer": "#B279A2"}


def steps(record: dict[str, Any], path: Path) -> None:
    """One panel per malloc setting and workload: every contender's median step by phase, and the floor's line."""
    panels = [
        (f"{name}, {'tuned' if run['environment']['malloc'] else 'default'} malloc", result)
        for run in record["runs"]
        for name, result in run["workloads"].items()
        if "arms" not in result and result["median"]
    ]
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(5.0, 3.4 * columns), 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, result) in zip(axes.flat, panels, strict=False):
        names = list(result["median"])
        bottom = [0.0] * len(names)
        for phase, colour in PHASES.items():
            heights = [result["phases"][name][phase] for name in names]
            axis.bar(names, heights, bottom=bottom, color=colour, label=phase)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axis.axhline(sum(result["floor"].values()), color="black", linestyle="--", label="floor")
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
        axis.set_ylabel("seconds a step")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=7)
    _save(figure, path, below=0.05)


def scaling(record: dict[str, Any], path: Path) -> None:
    """One column per sweep: seconds by phase (above) and GiB (below), measured as dots, the cost model as lines."""
    sweeps = record["sweeps"]
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.0 * len(sweeps), 5.6), squeeze=False)
    for column, (name, points) in enumerate(sweeps.items()):
        x = [point["value"] for point in points]
        seconds, memory = axes[0][column], axes[1][column]
        for phase, colour in PHASES.items():
            seconds.plot(x, [point["seconds"][phase] for point in points], "o", color=colour, markersize=4)
            seconds.plot(x, [point["fitted"][phase] for point in points], "-", color=colour, label=phase)
        memory.plot(x, [point["gib"] for point in points], "o", color="black", markersize=4, label="measured")
        memory.plot(x, [point["gib_predicted"] for point in points], "-", color="black", label="formula")
        for axis in (seconds, memory):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(name)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("GiB over the models")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path, below: float = 0.0) -> None:
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
