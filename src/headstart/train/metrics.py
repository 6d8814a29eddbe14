"""What a step measured, from per-token readings to the one dictionary that is written to `metrics.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headstart.records import PositionStats, Rollout, RolloutBatch, StepReport
from headstart.runtime import Runtime

BIN_EDGES = (0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000)
"""Edges (completion tokens) of `divergence_by_position`."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class MicroReadings:
    """Per-token readings of one micro-batch on the CPU, in row order; `rollouts` are the rows themselves."""

    rollouts: list[Rollout]
    position: Array
    weight: Array
    divergence: Array
    student_entropy: Array
    teacher_entropy: Array
    student_logprob: Array
    teacher_logprob: Array
    teacher_rank: Array


def readings_of(
    rollouts: list[Rollout], batch: RolloutBatch, weights_M: Tensor, value_M: Tensor, stats: PositionStats
) -> MicroReadings:
    """Move one micro-batch's readings to the CPU."""

    def cpu(tensor: Tensor) -> Array:
        array: Array = tensor.detach().cpu().numpy()
        return array

    return MicroReadings(
        rollouts=rollouts,
        position=cpu(batch.position_M),
        weight=cpu(weights_M),
        divergence=cpu(value_M),
        student_entropy=cpu(stats.student_entropy_M),
        teacher_entropy=cpu(stats.teacher_entropy_M),
        student_logprob=cpu(stats.student_logprob_M),
        teacher_logprob=cpu(stats.teacher_logprob_M),
        teacher_rank=cpu(stats.teacher_rank_M),
    )


@dataclass(slots=True)
class Clock:
    """Seconds per phase of one step, device included."""

    runtime: Runtime
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.runtime.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _RankSummary:
    """What one rank sends to all others: plain arrays, a few bytes per token."""

    tokens: dict[str, Array]
    lengths: list[int]
    stopped: int
    prompt_tokens: int


def _rank_summary(readings: Sequence[MicroReadings]) -> _RankSummary:
    names = ("position", "weight", "divergence", "student_entropy", "teacher_entropy", "student_logprob",
             "teacher_logprob", "teacher_rank")  # fmt: skip
    rollouts = [rollout for micro in readings for rollout in micro.rollouts]
    return _RankSummary(
        tokens={name: np.concatenate([getattr(micro, name) for micro in readings] or [np.zeros(0)]) for name in names},
        lengths=[len(r.completion_ids) for r in rollouts],
        stopped=sum(r.stopped for r in rollouts),
        prompt_tokens=sum(len(r.prompt.token_ids) for r in rollouts),
    )


def summarise(
    runtime: Runtime,
    readings: Sequence[MicroReadings],
    clock: Clock,
    *,
    step: int,
    horizon: int,
    grad_norm: float,
    lr: float,
    generated_so_far: int,
) -> StepReport:
    """The step's metrics over all ranks (`docs/reference/metrics.md`). Divergences and entropies in nats per token."""
    ranks = runtime.gather(_rank_summary(readings))
    token = {name: np.concatenate([r.tokens[name] for r in ranks]) for name in ranks[0].tokens}
    lengths = np.array([n for r in ranks for n in r.lengths])
    rollouts, tokens = len(lengths), int(lengths.sum())
    stopped = sum(r.stopped for r in ranks)
    seconds = time.perf_counter() - clock.started
    rank = token["teacher_rank"]
    metrics: dict[str, Any] = {
        "step": step,
        "horizon": horizon,
        "loss": float((token["weight"] * token["divergence"]).sum()),
        "divergence": float(token["divergence"].mean()),
        "divergence_by_position": by_position(token["position"], token["divergence"]),
        "rollouts": rollouts,
        "tokens": tokens,
        "tokens_trained": int((token["weight"] > 0).sum()),
        "generated_tokens": generated_so_far + tokens,
        "prompt_tokens": sum(r.prompt_tokens for r in ranks),
        "share_stopped": stopped / rollouts,
        "share_reached_horizon": 1.0 - stopped / rollouts,
        "completion_length_mean": float(lengths.mean()),
        **{f"completion_length_p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90)},
        "completion_length_max": int(lengths.max()),
        "teacher_rank_1": float((rank == 1).mean()),
        "teacher_rank_2_5": float(((rank >= 2) & (rank <= 5)).mean()),
        "teacher_rank_6_10": float(((rank >= 6) & (rank <= 10)).mean()),
        "teacher_rank_over_10": float((rank > 10).mean()),
        **{
            name: float(token[name].mean())
            for name in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
        },
        "grad_norm": grad_norm,
        "lr": lr,
        "seconds": seconds,
        **{f"seconds_{p}": clock.seconds.get(p, 0.0) for p in ("rollout", "teacher", "student", "optimizer")},
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": max(runtime.gather(runtime.peak_memory_gib())),
    }
    return StepReport(step, metrics)


def by_position(position: Array, value: Array) -> dict[str, float]:
    """Mean of `value` in bins of completion position, keyed `first-last` (inclusive); empty bins are left out."""
    means: dict[str, float] = {}
    for low, high in zip(BIN_EDGES, BIN_EDGES[1:], strict=False):
        inside = (position >= low) & (position < high)
        if inside.any():
            means[f"{low}-{high - 1}"] = float(value[inside].mean())
    return means
