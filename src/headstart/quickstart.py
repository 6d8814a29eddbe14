"""The quickstart: diagnose a bundled pair, distil it with early stopping and with full rollouts, explain what changed.

Everything runs through the same code as any other run: an ordinary diagnosis and two ordinary runs from the same
student, the same prompts and the same engine, then an explanation. Nothing is chosen from what the test problems show;
learning rates and batch were chosen on the dev split (docs/results/quickstart.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from headstart.config.evaluation import DiagnosisConfig, EvaluationConfig, TinyTask
from headstart.config.horizon import FixedHorizon, FullHorizon
from headstart.config.schema import (
    CheckpointConfig,
    Config,
    FullTuning,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RolloutConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import distill
from headstart.explanation.run import explain
from headstart.files import write_json
from headstart.reports.contents import teacher
from headstart.reports.run import Run, labels, read_run

Pair = Literal["strong", "weak"]
STUDENTS = {"strong": "tiny:student", "weak": "tiny:student-weak"}
LONGEST = 200
"""Completion tokens that hold any right response (154 or 192)."""
PROBLEMS, SAMPLES = 96, 4
EXPLAINED = 32
"""Of the test problems, how many the explanation reads."""
FOLDERS = ("esr", "full", "diagnosis")
"""What the quickstart makes, in the order its report reads it."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train: everything else is equal between the arms."""

    key: str
    horizon: FixedHorizon | FullHorizon
    lr: float
    steps: int
    evaluate_every: int


def arms(pair: Pair) -> tuple[Arm, Arm]:
    """Early stopping and full rollouts, each with the learning rate that was best for it on the dev split."""
    short = FixedHorizon(tokens=16)
    return (
        Arm("esr", short, 3e-4 if pair == "strong" else 1e-4, steps=60, evaluate_every=20),
        Arm("full", FullHorizon(max_tokens=LONGEST), lr=1e-3, steps=40, evaluate_every=8),
    )


def arm_config(arm: Arm, pair: Pair, seed: int) -> Config:
    """The run of one arm; `recipes/tiny-esr.yaml` and `recipes/tiny-full.yaml` hold the same for the strong pair."""
    return Config(
        student=ModelConfig(path=STUDENTS[pair]),
        teacher=ModelConfig(path="tiny:teacher"),
        tuning=FullTuning(),
        prompts=PromptsConfig(source="tiny"),
        rollout=RolloutConfig(temperature=1.0, top_p=1.0),
        horizon=arm.horizon,
        optimizer=OptimizerConfig(lr=arm.lr),
        schedule=ScheduleConfig(type="constant", warmup=0.05),
        training=TrainingConfig(steps=arm.steps, prompts_per_step=8, seed=seed, device="cpu"),
        evaluation=EvaluationConfig(
            task=TinyTask(split="test"),
            every=arm.evaluate_every,
            limit=PROBLEMS,
            samples=SAMPLES,
            temperature=1.0,
            top_p=1.0,
            max_tokens=LONGEST,
            batch_size=PROBLEMS * SAMPLES,
        ),
        diagnosis=DiagnosisConfig(batch_size=256, seed=seed),
        checkpoint=CheckpointConfig(every=arm.steps, keep_last=1, keep_best=False),
        tracking=TrackingConfig(rollouts_every=20),
    )


def quickstart(out: Path, pair: Pair = "strong", seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it all into the folders `diagnosis`, `esr` and `full` in `out`; about 100 seconds on two cores.

    Returns the figures as plain JSON types, also written to `out/quickstart.json`.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    early, full = arms(pair)
    say("Diagnosing: each model finishes what the other began ...")
    say(diagnose(arm_config(early, pair, seed), out=out / "diagnosis").recommendation.sentence)
    for arm in (early, full):
        say(f"Distilling: {arm.key}, {arm.steps} steps ...")
        distill(arm_config(arm, pair, seed), out=out / arm.key)
    say("Explaining: what training did to the tokens it never saw ...")
    explain(out / early.key, twin=out / full.key, overrides=[f"evaluation.limit={EXPLAINED}"])
    figures = results([read_run(out / name) for name in FOLDERS], pair, seed, time.perf_counter() - start)
    write_json(out / "quickstart.json", figures)
    return figures


def results(runs: Sequence[Run], pair: Pair, seed: int, seconds: float) -> dict[str, Any]:
    """The figures of the folders in FOLDERS, in the form of `docs/results/quickstart-*.json`."""
    early, full, diagnosis = runs
    own = teacher(runs)
    return {
        "pair": pair,
        "seed": seed,
        "environment": early.environment,
        "student": early.points[0].evaluation,
        "teacher": own[1] if own else None,
        "decay": diagnosis.readings["diagnose/decay"],
        "recommendation": diagnosis.readings["diagnose/recommendation"],
        "arms": [_arm(name, run) for name, run in zip(labels(runs), (early, full), strict=False)],
        "seconds": seconds,
    }


def _arm(name: str, run: Run) -> dict[str, Any]:
    training = run.config["training"]
    points = [
        {"step": p.step, "seconds": p.seconds, "generated_tokens": p.generated_tokens, "eval": p.evaluation}
        for p in run.points
    ]
    settings = {
        "horizon": run.steps[0]["horizon"],
        "steps": training["steps"],
        "prompts_per_step": training["prompts_per_step"],
        "lr": run.config["optimizer"]["lr"],
        "divergence": run.config["divergence"]["type"],
    }
    return {"key": run.path.name, "name": name, "settings": settings, "points": points}
