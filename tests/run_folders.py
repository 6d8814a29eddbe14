"""Run folders with made-up but consistent content, for tests of reports. Written in the toolkit's own formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.reports.readings import PLAN_ITEMS
from headstart.stats import mean_interval, wilson

Curve = Sequence[tuple[int, float, int, float]]
"""(step, training seconds, generated tokens, accuracy) of each evaluation."""
PROBLEMS = 100


def write_run(folder: Path, curve: Curve, horizon: dict[str, Any] | None = None, task: str = "tiny") -> Path:
    """A run with one evaluation for each point of `curve`, of PROBLEMS problems with one sample: the first ones are
    right. One step line leads to each point."""
    config = {
        "student": {"path": "a"}, "teacher": {"path": "b"}, "horizon": horizon or {"type": "fixed", "tokens": 16},
        "optimizer": {"lr": 3e-4}, "training": {"steps": curve[-1][0] if curve else 0, "seed": 0},
    }  # fmt: skip
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "cpus": 2, "command": f"run {folder.name}"}))
    lines, spent = [], 0.0
    for step, seconds, tokens, accuracy in curve:
        if step:
            lines.append(step_line(step, seconds - spent, tokens))
            spent = seconds
        write_evaluation(folder, step, accuracy, task)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def step_line(step: int, seconds: float, tokens: int) -> dict[str, Any]:
    return {
        "event": "step", "step": step, "horizon": 16, "loss": 1.0 / step, "divergence": 0.5 / step, "grad_norm": 1.0,
        "completion_length_mean": 16.0, "share_stopped": 0.0, "share_reached_horizon": 1.0,
        "seconds": seconds, "generated_tokens": tokens,
    }  # fmt: skip


def write_evaluation(folder: Path, step: int, accuracy: float, task: str = "tiny") -> None:
    right = [place < round(accuracy * PROBLEMS) for place in range(PROBLEMS)]
    low, high = mean_interval([float(r) for r in right])
    record = {
        "task": task, "step": step, "problems": PROBLEMS, "samples": 1, "accuracy": sum(right) / PROBLEMS,
        "interval": [low, high], "details": {"plan_right": sum(right) / PROBLEMS}, "truncated": 0.0,
        "mean_tokens": 171.0,
    }  # fmt: skip
    rows = [
        {
            "problem_id": f"{task}/{place}", "sample_index": 0, "response": "", "tokens": 171, "stopped": True,
            "verdict": {"correct": correct, "status": "", "details": {"plan_right": correct}, "answer": None},
        }
        for place, correct in enumerate(right)
    ]  # fmt: skip
    stem = folder / "eval" / f"step_{step:06d}"
    stem.with_suffix(".json").write_text(json.dumps(record))
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def share(successes: int, n: int) -> dict[str, Any]:
    low, high = wilson(successes, n)
    return {"successes": successes, "n": n, "low": low, "high": high}


def estimate(value: float | None, half: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": (value or 0.0) - half, "high": (value or 0.0) + half}


def decay(prompts: int = 64) -> dict[str, Any]:
    """Ever more prefixes spoiled; the teacher is right after 98% of the clean ones and 8% of the wrong ones."""
    points = []
    for length, spoiled in zip((0, 4, 8, 16, 64), (0.0, 0.1, 0.3, 0.5, 0.5), strict=True):
        wrong = round(spoiled * prompts)
        clean = prompts - wrong
        right_clean, right_wrong = round(0.98 * clean), round(0.08 * wrong)
        points.append(
            {
                "prefix_tokens": length,
                "after_student": share(right_clean + right_wrong, prompts),
                "after_clean": share(right_clean, clean),
                "after_wrong": share(right_wrong, wrong),
                "after_finished": share(0, 0),
                "after_own": share(round(0.97 * prompts), prompts),
                "student_continues": share(prompts // 2, prompts),
                "gift": share(prompts // 2 + wrong // 2, prompts),
                "damage": estimate(2 * spoiled),
            }
        )
    return {
        "format": 1, "task": "tiny", "labelled": True, "prompts": prompts, "grid": [4, 8, 16, 64], "max_tokens": 200,
        "student": share(prompts // 2, prompts), "teacher": share(round(0.98 * prompts), prompts), "points": points,
    }  # fmt: skip


def readings() -> dict[str, dict[str, Any]]:
    """One small file of every kind a report reads."""
    levels = {"tokens": 9, "before": estimate(0.5), "after": estimate(0.1, 0.05), "fixed": estimate(0.4)}
    speaker = {
        "lengths": {
            "p10": estimate(20, 2),
            "p50": estimate(40, 2),
            "p90": estimate(60, 2),
            "stopped": estimate(0.9),
            "edges": [0, 50, 100],
            "rollouts": [8, 2],
        },
        "choices": {"divergent": estimate(0.1), "ranks": {"1": estimate(0.2), "2-5": None}, "own_top": estimate(0.9)},
        "openings": {"distinct": estimate(0.5), "on_teacher": estimate(0.4)},
    }
    cost = {
        "steps": 4, "seconds": 2.0, "phases": {"rollout": 1.0, "teacher": 0.5, "student": 0.4, "optimizer": 0.1},
        "generated_tokens": 4321, "peak_memory_gib": 0.5, "seconds_per_step": estimate(0.5), "tokens_per_step": None,
    }  # fmt: skip
    sample = {
        "problem_id": "tiny/7", "prompt": "<user> why?", "correct": False, "stopped": True,
        "tokens": ["use", " B", " <eos>"], "divergence": [0.0, 5.83, 0.1], "rank": [1, 3, 1],
        "alternatives": [[["use", 1.0]], [[" A", 0.98], [" B", 0.02], [" C", 0.0]], [[" <eos>", 1.0]]],
    }  # fmt: skip
    world = {"nodes": 2, "gpus": 8, "gib": 80.0}
    found: dict[str, dict[str, Any]] = {
        "diagnose/preflight": {"findings": [
            {"check": "prompts", "severity": "warning", "message": "3 are duplicates", "remedy": "Drop them"},
            {"check": "vocabulary", "severity": "ok", "message": "100 shared ids", "remedy": None}]},
        "diagnose/plan": {
            "student": "a", "student_parameters": 32_000_000_000, "trained_parameters": 9_000_000, "teacher": "b",
            "teacher_parameters": 0, "tuning": "lora", "checkpointing": True, "prompt_tokens": 200, "horizon": 100,
            "world": world, "shards": 8, "other_activations": 2.0, "peak": 9.0, "exit_code": 0,
            "memory": {"weights": 1.0, "states": 0.5, "rollout": 2.0, "teacher": 0.0, "student": 7.5, "optimizer": 0.5,
                       "items": {**dict.fromkeys(PLAN_ITEMS, 0.0), "student_weights": 1.0, "micro_batch": 4}},
            "smallest": [{"tuning": "lora", "teacher": "url", "world": world, "peak": 9.0},
                         {"tuning": "full", "teacher": "url", "world": None, "peak": 99.0}]},
        "diagnose/decay": decay(),
        "diagnose/recommendation": {
            "tokens": 16, "low": 8, "high": 20, "supported": True, "sentence": "Start with N = 16.",
            "reasons": ["Damage: all of it."], "costs": [{"tokens": 16, "seconds": 0.1, "gib": 1}]},
        "diagnose/positions": {"rollouts": 8, "tokens": 99, "coverage": {"0.5": 16}, "bins": [
            {"first": at, "last": at + 15, "divergence_share": s, **{k: {"mean": 0.3, "se": 0.1} for k in (
                "divergence", "student_entropy", "teacher_entropy", "agree", "teacher_top", "overlap")}}
            for at, s in ((0, 0.5), (16, 1.0))]},
        "diagnose/pilot": {"sentence": "Use N = 16.", "arms": [{"tokens": 16, "lr": 3e-4, "rungs": [
            {"steps": 8, "accuracy": 0.6, "interval": [0.5, 0.7], "seconds": 1.5}]}]},
        "explain/cascade": {"sentence": "It fell.", "untrained": True, "first": 16, "problems": 9, "samples": 2,
                            "modes_by": "its state", "levels": levels, "bins": [{"first": 0, "levels": levels},
                                                                               {"first": 16, "levels": levels}],
                            "parts": {"change": estimate(-0.4), "mixture": estimate(-0.3), "within": None},
                            "modes": [{"mode": "clean", "share_before": estimate(0.4), "share_after": estimate(0.9),
                                       "levels": levels}]},
        "explain/commitment": {
            "sentence": "Shorter.", "speakers": dict.fromkeys(("before", "after", "teacher"), speaker)},
        "explain/swap": {"sentence": "In the prefix.", "prefix_tokens": 16, "problems": 9, "cells": [
            {"prefix": "after", "tail": "before", "accuracy": share(9, 10)},
            {"prefix": "before", "tail": "before", "accuracy": share(4, 10)}]},
        "explain/selection": {"sentence": "First.", "tokens": 16, "rollouts": 9, "classes": {},
                              "picked": {"first": {"mean_position": 7.5, "divergence_share": estimate(0.6)}}},
        "explain/efficiency": {"sentence": "Cheaper.", "run": cost, "twin": cost},
        "explain/samples": {"sentence": "One.", "before": [sample], "after": [sample]},
    }  # fmt: skip
    return {name: {"format": 1, **record} for name, record in found.items()}


def write_readings(folder: Path, only: Sequence[str] | None = None) -> None:
    for name, record in readings().items():
        if only is None or name in only:
            path = folder / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record))
