"""What one rank of tests/invariants/test_sharding.py does: every scenario of a JSON file, one after the other.

A scenario is {"name", "work", "config": a YAML file, "overrides"}; rank 0 saves what each gave to NAME.pt beside the
file. The same functions run in one process for comparison.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from headstart.checks.run import run_preflight
from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.diagnosis.run import diagnose
from headstart.distillation.run import build
from headstart.evaluation.run import evaluate
from headstart.explanation.run import explain
from headstart.models import sharded
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import full_tensor, is_sharded, local_tensor
from headstart.train.metrics import Clock
from headstart.train.observe import _gradient
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step


def trajectory(config: Config, before: Callable[[Parts], None] = lambda parts: None) -> dict[str, Any]:
    """Losses, gradient norms, tokens, what probes read, and the trained weights at the end."""
    parts = assembled(config)
    before(parts)
    steps, generated = [], 0
    for step in range(config.training.steps):
        report, _ = train_step(parts, step, generated)
        generated = report.metrics["generated_tokens"]
        kept = ("loss", "grad_norm", "tokens", "probe_tokens", "probe_continuations", "probe_length_mean")
        steps.append({name: report.metrics.get(name) for name in kept})
    weights = {name: full_tensor(p.detach()).clone() for name, p in parts.student.trainable().items()}
    return {"steps": steps, "weights": weights}


def fails(place: str) -> Callable[[Parts], None]:
    """The last rank runs out of memory once, in the pass of the first micro-batch."""

    def before(parts: Parts) -> None:
        if parts.runtime.world_size == 1 or parts.runtime.rank != parts.runtime.world_size - 1:
            return
        teacher = parts.teacher.model
        assert teacher is not None
        failed: list[str] = []

        def fail(*_: Any) -> None:
            if parts.student.model.training and not failed:
                failed.append(place)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def watch(module: Any, arguments: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(fail)

        match place:
            case "teacher":
                teacher.backbone.layers[1].mlp.register_forward_pre_hook(fail)
            case "forward":
                parts.student.backbone.layers[1].mlp.register_forward_pre_hook(fail)
            case "loss":
                head = parts.student.head
                patch.object(parts.student, "head", lambda hidden: (fail(), head(hidden))[1]).start()
            case "backward":
                parts.student.backbone.layers[0].mlp.register_forward_hook(watch)

    return before


def audited(config: Config) -> dict[str, Any]:
    """The gradient of the step and that of its first three tokens, as a horizon may ask for them."""
    parts = assembled(config)
    rollouts = sample_rollouts(parts, 0, 6)
    again = partial(backward, parts, step=0, clock=Clock(parts.runtime))
    again(rollouts)
    return {"gradients": [_gradient(parts, rollouts, again, tokens) for tokens in (None, 3, None)]}


def sampled(config: Config) -> dict[str, Any]:
    """Every rank's rollouts of two steps, in the order of the prompts; whether models were divided afterwards."""
    parts = assembled(config)
    rollouts = [r for step in range(2) for r in sample_rollouts(parts, step, 12)]
    rows = [
        (r.prompt.problem_id, r.prompt.index, r.sample_index, r.completion_ids)
        for rank in parts.runtime.gather(rollouts)
        for r in rank
    ]
    return {"rollouts": sorted(rows), "divided": is_sharded(parts.student.model)}


def evaluated(config: Config) -> dict[str, Any]:
    """Responses of an evaluation during training, and what the verb writes."""
    evaluator = assembled(config).evaluator
    assert evaluator is not None
    responses = [(row.problem_id, row.response) for row in evaluator.evaluate(0).rows]
    with TemporaryDirectory() as folder:
        summary = evaluate(config, out=Path(folder) / "evaluation")
    return {"responses": responses, "summary": {key: summary[key] for key in ("accuracy", "truncated", "length_p50")}}


def diagnosed(config: Config) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        found = diagnose(config, out=Path(folder) / "diagnosis").to_json()
    return {"decay": {**found["decay"], "seconds": 0.0}, "positions": found["positions"]}


def preflown(config: Config) -> dict[str, Any]:
    found = run_preflight(config).findings
    return {"findings": [(f.check, f.severity) for f in found if f.check not in ("memory", "time")]}


def explained(config: Config) -> dict[str, Any]:
    """What is read of the run in the folder `output.dir`."""
    assert config.output.dir is not None
    sharding = ["sharding.type=fsdp"] if config.sharding.type == "fsdp" else []
    return {**explain(config.output.dir, only=("cascade", "samples"), overrides=sharding)}


def memory(config: Config) -> dict[str, Any]:
    """Bytes of weights, gradients and averages after a step, of all ranks."""
    parts = assembled(config)
    train_step(parts, 0, 0)
    held = {"weights": [*parts.student.model.parameters()]}
    held["gradients"] = [p.grad for p in parts.student.trainable().values() if p.grad is not None]
    held["averages"] = [t for state in parts.optimizer.state.values() for t in state.values()]
    mine = {name: sum(local_tensor(t).nbytes for t in tensors) for name, tensors in held.items()}
    return {"ranks": parts.runtime.gather(mine)}


def assembled(config: Config) -> Parts:
    return build(config, Runtime.start("cpu"), lambda: None)


PLACES = ("teacher", "forward", "loss", "backward")
WORK: dict[str, Callable[[Config], dict[str, Any]]] = {
    "trajectory": trajectory,
    **{f"trajectory, out of memory in {p}": partial(trajectory, before=fails(p)) for p in PLACES},
    "audited": audited,
    "sampled": sampled,
    "evaluated": evaluated,
    "diagnosed": diagnosed,
    "preflown": preflown,
    "explained": explained,
    "memory": memory,
}


def run(work: str, config: Config) -> dict[str, Any]:
    """The work of that name; with `apart` behind it where a gathered model never fits into memory."""
    name = work.removesuffix(" apart")
    with patch.object(sharded, "_fits", lambda model: False) if name != work else nullcontext():
        return WORK[name](config)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    for scenario in json.loads(file.read_text()):
        found = run(scenario["work"], load(scenario["config"], scenario["overrides"]))
        if Runtime.start("cpu").is_main:
            torch.save(found, file.parent / f"{scenario['name']}.pt")
