"""What a step measured, from per-token readings to the one dictionary that is written to `metrics.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headstart.losses.chunked import WeightedDivergence
from headstart.progress import doing
from headstart.ranks.runtime import Runtime
from headstart.records import Rollout, RolloutBatch, StepReport, StepTokens
from headstart.stats import by_position

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
    overlap: Array | None = None
    student_rest: Array | None = None
    teacher_rest: Array | None = None
    student_tail: Array | None = None
    teacher_tail: Array | None = None
    engine_logprob: Array | None = None


def readings_of(
    rollouts: list[Rollout],
    batch: RolloutBatch,
    weights_M: Tensor,
    result: WeightedDivergence,
    overlap_M: Tensor | None = None,
) -> MicroReadings:
    """Move one micro-batch's readings to the CPU."""
    tensors = {"position": batch.position_M, "weight": weights_M, "divergence": result.value_M, "overlap": overlap_M}
    tensors |= {field.name.removesuffix("_M"): getattr(result.stats, field.name) for field in fields(result.stats)}
    if result.rest_M2 is not None:
        tensors |= {"student_rest": result.rest_M2[:, 0], "teacher_rest": result.rest_M2[:, 1]}
    if result.tail_M2 is not None:
        tensors |= {"student_tail": result.tail_M2[:, 0], "teacher_tail": result.tail_M2[:, 1]}
    arrays = {name: t.detach().cpu().numpy() for name, t in tensors.items() if t is not None}
    if rollouts and all(r.engine_logprobs is not None and r.aligned is None for r in rollouts):
        arrays["engine_logprob"] = np.concatenate([r.engine_logprobs[: len(r.completion_ids)] for r in rollouts])
    return MicroReadings(rollouts, **arrays)


@dataclass(slots=True)
class Clock:
    """Seconds per phase of one step, device included."""

    runtime: Runtime
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with doing(name):
            yield
            self.runtime.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


_TOKENS = ("position", "weight", "divergence", "student_entropy", "teacher_entropy", "student_logprob",
           "teacher_logprob", "teacher_rank", "overlap", "student_rest", "teacher_rest", "student_tail",
           "teacher_tail", "engine_logprob")  # fmt: skip


def collect(runtime: Runtime, readings: Sequence[MicroReadings]) -> StepTokens:
    """The step's tokens over all ranks, on every rank: a few bytes per token travel."""
    names = [name for name in _TOKENS if all(getattr(micro, name) is not None for micro in readings)]
    rollouts = [rollout for micro in readings for rollout in micro.rollouts]
    mine = {name: np.concatenate([getattr(micro, name) for micro in readings] or [np.zeros(0)]) for name in names}
    mine["lengths"] = np.array([len(r.completion_ids) for r in rollouts], dtype=np.int64)
    mine["stopped"] = np.array([r.stopped for r in rollouts], dtype=bool)
    mine["scored"] = np.array([len(r.rows) for r in rollouts], dtype=np.int64)
    if any(r.aligned is not None for r in rollouts):
        mine["dropped"] = np.array([r.aligned is not None and r.aligned.dropped for r in rollouts], dtype=bool)
    mine["prompts"] = np.array([len(r.prompt.token_ids) for r in rollouts], dtype=np.int64)
    ranks = [rank for rank in runtime.gather(mine) if len(rank["lengths"])]
    token = {name: np.concatenate([rank[name] for rank in ranks]) for name in ranks[0]}
    return StepTokens(
        lengths_B=token["lengths"],
        stopped_B=token["stopped"],
        prompt_tokens=int(token["prompts"].sum()),
        scored_B=token["scored"],
        dropped_B=token.get("dropped"),
        **{f"{name}_M": token.get(name) for name in _TOKENS},
    )


def summarise(
    runtime: Runtime,
    tokens: StepTokens,
    clock: Clock,
    probed: Mapping[str, Any],
    *,
    step: int,
    horizon: int,
    grad_norm: float,
    lr: float,
    generated_so_far: int,
) -> StepReport:
    """The step's metrics over all ranks (`docs/reference/metrics.md`). Divergences and entropies in nats per token.

    `probed` is what probes add; what they generated and how long they took is in the step's totals.
    """
    lengths = tokens.lengths_B
    rollouts, generated = len(lengths), int(lengths.sum())
    stopped = float(tokens.stopped_B.mean())
    seconds = time.perf_counter() - clock.started
    metrics: dict[str, Any] = {
        "step": step,
        "horizon": horizon,
        "loss": float((tokens.weight_M * tokens.divergence_M).sum()),
        "divergence": _mean(tokens.divergence_M),
        "divergence_by_position": by_position(tokens.position_M, tokens.divergence_M),
        "rollouts": rollouts,
        "tokens": generated,
        "tokens_trained": int((tokens.weight_M > 0).sum()),
        "generated_tokens": generated_so_far + generated + probed.get("probe_tokens", 0),
        "prompt_tokens": tokens.prompt_tokens,
        "share_stopped": stopped,
        "share_reached_horizon": 1.0 - stopped,
        "completion_length_mean": float(lengths.mean()),
        **{f"completion_length_p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90)},
        "completion_length_max": int(lengths.max()),
        **_aligned(tokens),
        **_engine_gap(tokens),
        **_tails(tokens),
        **_ranks(tokens.teacher_rank_M),
        **{
            name: _mean(getattr(tokens, f"{name}_M"))
            for name in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
        },
        "grad_norm": grad_norm,
        "lr": lr,
        "seconds": seconds,
        **{f"seconds_{p}": clock.seconds.get(p, 0.0) for p in ("rollout", "teacher", "student", "optimizer", "probe")},
        "probe_tokens": 0,
        **probed,
        "tokens_per_second": generated / seconds,
        "peak_memory_gib": max(runtime.gather(runtime.peak_memory_gib())),
    }
    return StepReport(step, metrics)


def summed(runtime: Runtime, counts: Mapping[str, float]) -> dict[str, float]:
    """Each count over all ranks, which all have the same."""
    return dict(zip(counts, runtime.sum(*counts.values()), strict=True)) if counts else {}


def _aligned(tokens: StepTokens) -> dict[str, float]:
    """What a teacher with another tokenizer could score of the step's completions; nothing with one tokenizer."""
    if tokens.dropped_B is None:
        return {}
    return {
        "share_scored": float(tokens.scored_B.sum() / tokens.lengths_B.sum()),
        "student_rest": 0.0 if tokens.student_rest_M is None else _mean(tokens.student_rest_M),
        "teacher_rest": 0.0 if tokens.teacher_rest_M is None else _mean(tokens.teacher_rest_M),
        "rollouts_dropped": int(tokens.dropped_B.sum()),
    }


def _tails(tokens: StepTokens) -> dict[str, float]:
    """What a top-k support leaves out, on both sides; nothing for other supports."""
    if tokens.teacher_tail_M is None:
        return {}
    return {
        "student_tail": _mean(tokens.student_tail_M),
        "teacher_tail": _mean(tokens.teacher_tail_M),
        "tails_floored": int((tokens.teacher_tail_M == 0).sum()),
    }


def _ranks(rank: Array) -> dict[str, float]:
    """Shares of the sampled tokens by the teacher's rank; NaN where no rank is known (0)."""
    bands = {"1": (1, 1), "2_5": (2, 5), "6_10": (6, 10), "over_10": (11, np.inf)}
    unknown = len(rank) > 0 and not rank.any()
    return {
        f"teacher_rank_{name}": float("nan") if unknown else _mean((rank >= low) & (rank <= high))
        for name, (low, high) in bands.items()
    }


def _engine_gap(tokens: StepTokens) -> dict[str, float]:
    """How far a server's log-probabilities of the sampled tokens are from the trainer's; nothing in process."""
    if tokens.engine_logprob_M is None:
        return {}
    gap_M = np.abs(tokens.engine_logprob_M - tokens.student_logprob_M)
    return {"engine_gap_mean": _mean(gap_M), "engine_gap_max": float(gap_M.max(initial=0.0))}


def _mean(values: Array) -> float:
    """0 where nothing was scored."""
    return float(values.mean()) if len(values) else 0.0
