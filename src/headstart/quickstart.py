"""The quickstart: measure a bundled pair, see the teacher decay, distil with early stopping and with full rollouts.

Everything runs through the same code as any other run: both arms are ordinary `distill` runs from the same student,
the same prompts and the same engine. Nothing is chosen from what the test problems show; learning rates and batch were
chosen on the dev split (docs/results/quickstart.md).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from headstart.build import distill, load_pair, load_questions
from headstart.config.evaluation import EvaluationConfig, TinyTask
from headstart.config.schema import (
    CheckpointConfig,
    Config,
    FixedHorizon,
    FullHorizon,
    FullTuning,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RolloutConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from headstart.diagnose.decay import DecayProbe
from headstart.evaluate.evaluator import TaskEvaluator
from headstart.models.load import load_tokenizer
from headstart.records import EvalReport
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime

Pair = Literal["strong", "weak"]
STUDENTS = {"strong": "tiny:student", "weak": "tiny:student-weak"}
LONGEST = 200
"""Completion tokens that hold any right response (154 or 192)."""
GRID = (0, 5, 10, 16, 32, 64, 128)
"""Prefix lengths of the decay curve: before, between and after the three decisions of the plan, then deep inside."""
PROBLEMS, SAMPLES = 96, 4


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train: everything else is equal between the arms."""

    key: str
    name: str
    horizon: FixedHorizon | FullHorizon
    lr: float
    steps: int
    evaluate_every: int


def arms(pair: Pair) -> tuple[Arm, Arm]:
    """Early stopping and full rollouts, each with the learning rate that was best for it on the dev split."""
    short = FixedHorizon(tokens=16)
    return (
        Arm("esr", "early stopping, N = 16", short, 3e-4 if pair == "strong" else 1e-4, steps=60, evaluate_every=20),
        Arm("full", "full rollouts", FullHorizon(max_tokens=LONGEST), lr=1e-3, steps=40, evaluate_every=8),
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
        checkpoint=CheckpointConfig(every=arm.steps, keep_last=1, keep_best=False),
        tracking=TrackingConfig(rollouts_every=20),
    )


def quickstart(out: Path, pair: Pair = "strong", seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it all into `out` and return the results (plain JSON types). About 100 seconds on two cores."""
    start = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    config = arm_config(arms(pair)[0], pair, seed)
    say("Measuring the student, the teacher, and the teacher after the student's first tokens ...")
    results: dict[str, Any] = {"pair": pair, "seed": seed, "environment": _environment(), **measure(config)}
    done = []
    for arm in arms(pair):
        say(f"Distilling: {arm.name} ({arm.steps} steps) ...")
        done.append(run_arm(arm, arm_config(arm, pair, seed), out / arm.key))
    return {**results, "arms": done, "seconds": time.perf_counter() - start}


def measure(config: Config) -> dict[str, Any]:
    """Accuracy of student and teacher on the test problems, and the teacher-decay curve with its controls."""
    runtime = Runtime.start(config.training.device)
    tokenizer, teacher_tokenizer = load_tokenizer(config.student), load_tokenizer(config.teacher)
    student, teacher, vocabulary = load_pair(config, runtime, tokenizer, teacher_tokenizer)
    engines = {
        "student": InProcessEngine(student, vocabulary.stop_ids),
        "teacher": InProcessEngine(teacher, vocabulary.stop_ids),
    }
    questions = load_questions(config, tokenizer)
    reports = {
        name: TaskEvaluator(questions, engine, tokenizer, runtime).evaluate(0) for name, engine in engines.items()
    }
    probe = DecayProbe(
        questions.task,
        questions.problems,
        questions.prompts,
        engines["student"],
        engines["teacher"],
        tokenizer,
        questions.settings.sampling,
        LONGEST,
    )
    return {**{name: evaluation(report) for name, report in reports.items()}, "decay": probe.measure(GRID).to_json()}


def run_arm(arm: Arm, config: Config, folder: Path) -> dict[str, Any]:
    """Train one arm; its evaluations against training seconds (evaluation excluded) and generated tokens."""
    distill(config, out=folder)
    cost = {0: (0.0, 0)}
    seconds = 0.0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            seconds += record["seconds"]
            cost[record["step"]] = (seconds, record["generated_tokens"])
    points = []
    for path in sorted((folder / "eval").glob("step_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        report.pop("settings")
        at = cost[report["step"]]
        points.append({"step": report["step"], "seconds": at[0], "generated_tokens": at[1], "eval": report})
    return {
        "key": arm.key,
        "name": arm.name,
        "settings": {
            "horizon": getattr(arm.horizon, "tokens", None) or getattr(arm.horizon, "max_tokens", None),
            "steps": arm.steps,
            "prompts_per_step": config.training.prompts_per_step,
            "lr": arm.lr,
            "divergence": config.divergence.type,
        },
        "points": points,
    }


def evaluation(report: EvalReport) -> dict[str, Any]:
    """An evaluation's figures as plain JSON types."""
    return {k: v for k, v in asdict(replace(report, rows=())).items() if k not in ("rows", "settings")}


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
