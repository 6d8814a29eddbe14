"""AdamW and the learning-rate schedule, both functions of the configuration and the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from headstart.config.schema import Config, ScheduleConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW over `parameters`; the learning rate is set before every step from `learning_rate_at`."""
    o = config.optimizer
    return torch.optim.AdamW(
        list(parameters), lr=config.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
    )


def schedule_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then the schedule's shape.

    The first step of a warm-up of w steps uses 1/w; cosine and linear would reach zero one step after the last. With
    `restarts` each leg has a warm-up and a decay of its own; a constant rate warms up once.
    """
    start = max(at for at in (0, *schedule.restarts) if at <= step)
    end = min((at for at in schedule.restarts if at > step), default=steps)
    step, steps = step - start, end - start
    warmup = 0 if start and schedule.type == "constant" else round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match schedule.type:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "constant":
            return 1.0
