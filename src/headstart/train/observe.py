"""What a step reads for its horizon: signals of each token before the loss, and the observation after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.interfaces import LogitSource, Observation
from headstart.losses.chunked import default_chunk
from headstart.losses.readings import overlap_and_margin
from headstart.losses.several import read_divergence, read_rows
from headstart.ranks.sharding import full_tensor
from headstart.records import Rollout, RolloutBatch, StepTokens
from headstart.train.parts import Parts


def token_signals(parts: Parts, batch: RolloutBatch, hidden_MD: Tensor, scores: LogitSource) -> dict[str, Tensor]:
    """What selection and horizon must know of each token before its loss, `[M]` each; read in passes of their own."""
    wanted = {*getattr(parts.selector.rule, "by", ()), *(parts.factors.signals if parts.factors else ())}
    found: dict[str, Tensor] = {}
    head, chunk = (
        parts.student.trained_head(),
        parts.config.training.logit_chunk or default_chunk(parts.vocabulary.largest),
    )
    if wanted - {"margin"}:
        value_M, stats = read_divergence(parts.config.divergence, hidden_MD, head, scores, batch.tokens_M, chunk=chunk)
        found = {
            "divergence": value_M,
            "student_entropy": stats.student_entropy_M,
            "teacher_entropy": stats.teacher_entropy_M,
            "gap": stats.student_logprob_M - stats.teacher_logprob_M,
        }
    if "margin" in wanted or parts.reads_overlap:
        both_M2 = read_rows(overlap_and_margin, hidden_MD, head, scores, chunk=chunk).reshape(-1, 2)
        found |= {"overlap": both_M2[:, 0], "margin": both_M2[:, 1]}
    return found


def loss_factors(parts: Parts, micro: Sequence[Rollout], signals: dict[str, Tensor]) -> Tensor | None:
    """The loss side of the horizon, float32 `[M]` on the CPU; None where it has none."""
    if parts.factors is None:
        return None
    arrays = {name: signals[name].cpu().numpy() for name in parts.factors.signals}
    found, end = [np.zeros(0)], 0
    for rollout in micro:
        start, end = end, end + len(rollout.rows)
        # A factor goes by the token's place in the rollout; one that is not scored has the signals of the one before.
        N, rows = len(rollout.completion_ids), list(rollout.rows)
        if rows:
            before_N = np.maximum(np.searchsorted(rows, np.arange(N), side="right") - 1, 0)
            whole = {name: a[start:end][before_N] for name, a in arrays.items()}
            found.append(parts.factors.factors(N, whole)[rows])
    return torch.from_numpy(np.concatenate(found)).float()


def observe(
    parts: Parts,
    step: int,
    horizon: int,
    rollouts: list[Rollout],
    tokens: StepTokens,
    backward: Callable[[list[Rollout]], Any],
) -> dict[str, Any]:
    """Tell the horizon of the step, before the weights change; what a probe read, for the metrics.

    `backward` puts the gradient of rollouts in the place of what the student's parameters have.
    """
    probe = parts.prober(step, rollouts)
    gradient = partial(_gradient, parts, rollouts, backward)
    parts.horizon.observe(Observation(step, horizon, tokens, probe, gradient))
    return probe.metrics() if probe else {}


def _gradient(
    parts: Parts, rollouts: list[Rollout], backward: Callable[[list[Rollout]], Any], tokens: int | None
) -> Tensor:
    """`Observation.gradient`; what the step has accumulated stays in place."""
    parameters = list(parts.student.trainable().values())
    own = [p.grad for p in parameters]
    if tokens is None:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    else:
        backward([_cut(rollout, tokens) for rollout in rollouts])
    parts.runtime.sum_gradients(parameters)
    whole = [full_tensor(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
    flat = torch.cat([gradient.flatten().double() for gradient in whole])
    for p, gradient in zip(parameters, own, strict=True):
        p.grad = gradient
    return flat


def _cut(rollout: Rollout, tokens: int) -> Rollout:
    if len(rollout.completion_ids) <= tokens:
        return rollout
    return replace(rollout, completion_ids=rollout.completion_ids[:tokens], stopped=False, aligned=None)
