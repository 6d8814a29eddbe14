"""What one rank of tests/invariants/test_sharding.py does: every scenario of a JSON file, one after the other.

A scenario is {"name", "work", "config": a YAML file, "overrides"}; rank 0 saves what each gave to NAME.pt beside the
file. The same functions run in one process for comparison.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.distillation.run import build
from headstart.models import sharded
from headstart.runtime import Runtime
from headstart.sharding import full_tensor, is_sharded, local_tensor
from headstart.train.parts import Parts
from headstart.train.step import sample_rollouts, train_step


def trajectory(parts: Parts) -> dict[str, Any]:
    """Losses, gradient norms, tokens and the trained weights at the end."""
    steps, generated = [], 0
    for step in range(parts.config.training.steps):
        report, _ = train_step(parts, step, generated)
        generated = report.metrics["generated_tokens"]
        steps.append({name: report.metrics[name] for name in ("loss", "grad_norm", "tokens")})
    return {"steps": steps, "weights": weights(parts)}


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: full_tensor(p.detach()).clone() for name, p in parts.student.trainable().items()}


def apart(work: Callable[[Parts], dict[str, Any]]) -> Callable[[Parts], dict[str, Any]]:
    """The same where a gathered model never fits into memory."""

    def found(parts: Parts) -> dict[str, Any]:
        with patch.object(sharded, "_fits", lambda model: False):
            return work(parts)

    return found


def sampled(parts: Parts) -> dict[str, Any]:
    """Every rank's rollouts of two steps, in the order of the prompts; whether models were divided afterwards."""
    rollouts = [r for step in range(2) for r in sample_rollouts(parts, step, 12)]
    rows = [
        (r.prompt.problem_id, r.prompt.index, r.sample_index, r.completion_ids)
        for rank in parts.runtime.gather(rollouts)
        for r in rank
    ]
    return {"rollouts": sorted(rows), "divided": is_sharded(parts.student.model)}


def evaluated(parts: Parts) -> dict[str, Any]:
    assert parts.evaluator is not None
    report = parts.evaluator.evaluate(0)
    return {"responses": [(row.problem_id, row.response) for row in report.rows]}


def memory(parts: Parts) -> dict[str, Any]:
    """Bytes of weights, gradients and averages that this rank holds after a step; those of all ranks."""
    train_step(parts, 0, 0)
    held = {"weights": [*parts.student.model.parameters()]}
    held["gradients"] = [p.grad for p in parts.student.trainable().values()]
    held["averages"] = [t for state in parts.optimizer.state.values() for t in state.values()]
    mine = {name: sum(local_tensor(t).nbytes for t in tensors) for name, tensors in held.items()}
    return {"ranks": parts.runtime.gather(mine)}


WORK: dict[str, Callable[[Parts], dict[str, Any]]] = {
    "trajectory": trajectory,
    "trajectory apart": apart(trajectory),
    "sampled": sampled,
    "sampled apart": apart(sampled),
    "evaluated": evaluated,
    "evaluated apart": apart(evaluated),
    "memory": memory,
}


def run(work: str, config: Config) -> dict[str, Any]:
    return WORK[work](build(config, Runtime.start("cpu"), lambda: None))


if __name__ == "__main__":
    file = Path(sys.argv[1])
    for scenario in json.loads(file.read_text()):
        found = run(scenario["work"], load(scenario["config"], scenario["overrides"]))
        if Runtime.start("cpu").is_main:
            torch.save(found, file.parent / f"{scenario['name']}.pt")
