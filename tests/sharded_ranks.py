"""What one rank of tests/invariants/test_sharding.py does: `python sharded_ranks.py OUT WORK CONFIG...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from headstart.config.loader import load
from headstart.distillation.run import build
from headstart.runtime import Runtime
from headstart.sharding import full_tensor
from headstart.train.step import train_step


def trajectory(config_file: str, out: Path, *overrides: str) -> None:
    """Train without a run folder; losses, norms, lengths and the weights at the end go to `out` (rank 0)."""
    config = load(config_file, overrides)
    runtime = Runtime.start("cpu")
    parts = build(config, runtime, lambda: None)
    steps, generated = [], 0
    for step in range(config.training.steps):
        report, _ = train_step(parts, step, generated)
        generated = report.metrics["generated_tokens"]
        steps.append({name: report.metrics[name] for name in ("loss", "grad_norm", "tokens")})
    weights = {name: full_tensor(p.detach()).clone() for name, p in parts.student.trainable().items()}
    if runtime.is_main:
        torch.save({"steps": steps, "weights": weights}, out)


if __name__ == "__main__":
    trajectory(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
