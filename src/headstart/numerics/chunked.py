"""The divergence of M tokens with logits for only a few rows in existence at once, forward and backward.

16 rollouts x 100 tokens x 151,936 ids are 0.97 GB per float32 copy of the logits, and the computation needs several.
Rows are independent, so the forward pass visits them chunk by chunk and keeps only numbers per row; the backward pass
makes each chunk's logits again (two products with the heads: a few percent of a step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headstart.config.schema import DivergenceConfig
from headstart.interfaces import LogitSource
from headstart.numerics.divergence import divergence_rows, merge_stop_class, merge_tokens, position_stats
from headstart.records import Divergence, PositionStats


def default_chunk(vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """Rows to compute at once so that their `[rows, vocabulary]` tensors fit `budget_bytes`; at least 16.

    Both logits and what is computed from them are 7 float32 copies at the peak (measured; JSD needs 10).
    """
    return max(16, budget_bytes // (7 * 4 * vocabulary))


def chunked_divergence(
    config: DivergenceConfig,
    student_hidden_MD: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher: LogitSource,
    tokens_M: Tensor,
    *,
    chunk: int,
    merge_ids: tuple[int, ...] = (),
    head_parameters: Sequence[Tensor] = (),
) -> tuple[Divergence, PositionStats]:
    """`divergence_rows` and `position_stats` of M tokens, asking both heads for at most `chunk` rows at a time.

    `student_head` maps hidden states `[m, D]` to float32 logits `[m, V]` over the teacher's vocabulary. Gradients reach
    `student_hidden_MD` and `head_parameters`, which must name every tensor with a gradient that `student_head` uses.
    `merge_ids` become one stop class on both sides. M = 0 gives empty tensors and zero gradients.
    """
    rows = _Rows(config, student_head, teacher, merge_tokens(tokens_M, merge_ids), merge_ids)
    M = len(tokens_M)
    if chunk >= M:
        return rows.scored(student_hidden_MD, slice(0, M))
    trained = [parameter for parameter in head_parameters if parameter.requires_grad]
    surrogate_M, value_M, *stats = _Chunked.apply(rows, chunk, student_hidden_MD, *trained)  # type: ignore[no-untyped-call]
    return Divergence(value_M, surrogate_M), PositionStats(*stats)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Everything but the hidden states that scoring a slice of rows needs."""

    config: DivergenceConfig
    student_head: Callable[[Tensor], Tensor]
    teacher: LogitSource
    tokens_M: Tensor
    merge_ids: tuple[int, ...]

    def logits(self, hidden_mD: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_mV = merge_stop_class(self.teacher.logits(rows), self.merge_ids)
        return merge_stop_class(self.student_head(hidden_mD), self.merge_ids), teacher_mV

    def scored(self, hidden_mD: Tensor, rows: slice) -> tuple[Divergence, PositionStats]:
        student_mV, teacher_mV = self.logits(hidden_mD, rows)
        stats = position_stats(student_mV, teacher_mV, self.tokens_M[rows])
        return divergence_rows(self.config, student_mV, teacher_mV, self.tokens_M[rows]), stats

    def surrogate(self, hidden_mD: Tensor, rows: slice) -> Tensor:
        student_mV, teacher_mV = self.logits(hidden_mD, rows)
        return divergence_rows(self.config, student_mV, teacher_mV, self.tokens_M[rows]).surrogate_M


class _Chunked(torch.autograd.Function):
    """Outputs surrogate, value and the five statistics; differentiable in the hidden states and the head's tensors."""

    @staticmethod
    def forward(ctx: Any, rows: _Rows, chunk: int, hidden_MD: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        columns = []
        for part in _slices(len(hidden_MD), chunk):
            divergence, stats = rows.scored(hidden_MD[part], part)
            columns.append(
                (
                    divergence.surrogate_M,
                    divergence.value_M,
                    stats.student_entropy_M,
                    stats.teacher_entropy_M,
                    stats.student_logprob_M,
                    stats.teacher_logprob_M,
                    stats.teacher_rank_M,
                )
            )
        surrogate_M, *detached = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.rows, ctx.chunk = rows, chunk
        ctx.save_for_backward(hidden_MD, *trained)
        ctx.mark_non_differentiable(*detached)
        return surrogate_M, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_M: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, *trained = ctx.saved_tensors
        # Sums over chunks are kept in float32 at least: adding fifteen bfloat16 chunks would round fifteen times.
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in trained]
        hidden_gradient_MD = torch.zeros_like(hidden_MD)
        for part in _slices(len(hidden_MD), ctx.chunk):
            with torch.enable_grad():
                hidden_mD = hidden_MD[part].detach().requires_grad_()
                surrogate_m = ctx.rows.surrogate(hidden_mD, part)
            found = torch.autograd.grad(
                surrogate_m, [hidden_mD, *trained], gradient_M[part], allow_unused=True, materialize_grads=True
            )
            hidden_gradient_MD[part] = found[0]
            for total, gradient in zip(sums, found[1:], strict=True):
                total += gradient
        return None, None, hidden_gradient_MD, *(s.to(t.dtype) for s, t in zip(sums, trained, strict=True))


def _slices(M: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, M)) for start in range(0, M, chunk)]
