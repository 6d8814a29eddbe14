"""The quickstart: diagnose a bundled pair, distil it with early stopping and with full rollouts, explain what changed.

Everything runs through the same code as any other run: an ordinary diagnosis and two ordinary runs from the same
student, the same prompts and the same engine, then an explanation. Nothing is chosen from what the test problems show;
learning rates and batch were chosen on the dev split (docs/results/quickstart.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.explanation.run import explain
from headstart.reports.run import read_run

Pair = Literal["strong", "weak", "cross"]
EXPLAINED = 32
"""Of the test problems, how many the explanation reads."""
FOLDERS = ("esr", "full", "diagnosis")
"""What the quickstart makes, in the order its report reads it."""
SETTINGS = (
    *("training.device=cpu", "tracking.rollouts_every=20", "diagnosis.batch_size=256"),
    *("checkpoint.keep_last=1", "checkpoint.keep_best=false"),
)
"""What both arms set on top of their recipes: a page with few points, and one checkpoint, at the end."""


def arms(pair: Pair, seed: int) -> dict[str, Config]:
    """The runs with early stopping and with full rollouts, by folder: `recipe:tiny-esr` and `recipe:tiny-full`.

    Each has the learning rate that was best for it on the dev split.
    """
    shared = [*SETTINGS, f"training.seed={seed}", f"diagnosis.seed={seed}"]
    early = ["evaluation.every=20", "checkpoint.every=60"]
    if pair == "cross":
        shared.append("teacher.path=tiny:teacher-cross")
    if pair == "weak":
        shared.append("student.path=tiny:student-weak")
        early.append("optimizer.lr=1e-4")
    return {
        "esr": load("recipe:tiny-esr", [*shared, *early]),
        "full": load("recipe:tiny-full", [*shared, "evaluation.every=8", "checkpoint.every=40"]),
    }


def quickstart(out: Path, pair: Pair = "strong", seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it all into the folders `diagnosis`, `esr` and `full` in `out`; about 100 seconds on two cores.

    Returns the diagnosis' decay and the seconds it all took; every other figure lies in the three folders.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    runs = arms(pair, seed)
    say("Diagnosing: each model finishes what the other began ...")
    say(diagnose(runs["esr"], out=out / "diagnosis").recommendation.sentence)
    for name, config in runs.items():
        say(f"Distilling: {name}, {config.training.steps} steps ...")
        distill(config, out=out / name)
    say("Explaining: what training did to the tokens it never saw ...")
    explain(out / "esr", twin=out / "full", overrides=[f"evaluation.limit={EXPLAINED}"])
    return {"decay": read_run(out / "diagnosis").readings["diagnose/decay"], "seconds": time.perf_counter() - start}
