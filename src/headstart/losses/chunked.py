"""The divergence of M tokens with the logits of only a few rows in existence at once, and its gradient with it.

16 rollouts x 100 tokens x 151,936 ids are 0.97 GB per float32 copy of the logits, and the computation needs several.

Rows are independent, and a token's weight in the loss is known beforehand: so each chunk's logits are made once, turned
into their own gradient in place, and forgotten. There is no second pair of products with the heads in the backward
pass. For the exact reverse KL the gradient is written down rather than recorded,

    d KL / d z_v = p_v ((ln p_v - ln q_v) - KL),

which takes three [rows, V] tensors instead of seven, and stays in the processor's cache block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headstart.config.schema import DivergenceConfig, FullSupport, ReverseKL, TopKSupport
from headstart.interfaces import LogitSource
from headstart.losses.divergence import inside_rows, position_stats, token_logprobs
from headstart.losses.events import REMOVED, Events, join
from headstart.losses.products import linear
from headstart.losses.reverse_kl import reverse_kl_block
from headstart.records import Divergence, PositionStats

CACHE_ELEMENTS = 2**18
"""Numbers of one [rows, V] tensor that are worked on at once on a CPU: 1 MiB, so that three stay in a core's cache."""
MOST_LEFT_OUT = 0.1
"""Probability outside the shared vocabulary above which a renormalised row is not trained: it would compare what is
left of two distributions."""


def default_chunk(vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """Rows to compute at once so that their `[rows, vocabulary]` tensors fit `budget_bytes`; 16 to 512.

    Both logits and what is computed from them are 3 float32 copies for the exact reverse KL (7 to 10 for others).
    """
    return min(512, max(16, budget_bytes // (3 * 4 * vocabulary)))


@dataclass(frozen=True, slots=True)
class WeightedDivergence:
    """`loss` is sum_m weights_m * surrogate_m, differentiable once; the rest is detached, `[M]`, nats.

    `rest_M2` are the probabilities that student and teacher give to what the other vocabulary cannot express; None
    within one vocabulary. `tail_M2` are those of what a top-k support leaves out; None for other supports.
    """

    loss: Tensor
    value_M: Tensor
    stats: PositionStats
    rest_M2: Tensor | None = None
    tail_M2: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The student's head: `logits` maps hidden states `[m, D]` to float32 logits `[m, V]`.

    `parameters` names every tensor with a gradient that it uses. `weight_VD` is the whole head where it is one bare
    projection (no bias, scale or soft-capping), a view of the first of `parameters` if that is trained, else None.
    `events` joins the student's ids where they are compared over events; a LogitSource gives logits over the same.
    """

    logits: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()
    weight_VD: Tensor | None = None
    events: Events | None = None

    def joined(self, hidden_mD: Tensor) -> Tensor:
        """Logits over events, with their gradient."""
        return join(self.events, self.logits(hidden_mD))

    def of_tokens(self, tokens_M: Tensor) -> Tensor:
        """The events of the sampled tokens."""
        return tokens_M if self.events is None else self.events.of_tokens(tokens_M)


class Comparing(Protocol):
    """A LogitSource that compares itself with the student, where that is no divergence of two distributions."""

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        """What takes the divergence's place at these rows; `student_mV` are the student's own logits, with gradient.
        One that has `prepare(logprob_M)` is first given the student's log-probabilities of all tokens."""
        ...


def weighted_divergence(
    config: DivergenceConfig,
    hidden_MD: Tensor,
    head: Head,
    teacher: LogitSource,
    tokens_M: Tensor,
    weights_M: Tensor,
    *,
    chunk: int,
) -> WeightedDivergence:
    """The loss of M tokens and what was read at each; at most `chunk` rows of logits exist at once.

    Gradients reach `hidden_MD` and `head.parameters`. M = 0 gives empty tensors and zero gradients.
    """
    trained = [parameter for parameter in head.parameters if parameter.requires_grad]
    work = _Work(config, head, teacher, head.of_tokens(tokens_M), weights_M, chunk)
    if (prepare := getattr(teacher, "prepare", None)) is not None:
        prepare(read_logprobs(hidden_MD, head.logits, tokens_M, chunk))
    loss, value_M, rest_M2, tail_M2, *stats = _Weighted.apply(work, hidden_MD, *trained)  # type: ignore[no-untyped-call]
    return WeightedDivergence(
        loss, value_M, PositionStats(*stats), rest_M2 if work.has_rest else None, tail_M2 if work.has_tail else None
    )


@torch.no_grad()
def read_logprobs(hidden_MD: Tensor, logits: Callable[[Tensor], Tensor], tokens_M: Tensor, chunk: int) -> Tensor:
    """Log-probability `[M]` of every token; `logits` is a model's head."""
    parts = [token_logprobs(logits(hidden_MD[rows]), tokens_M[rows]) for rows in slices(len(hidden_MD), chunk)]
    return torch.cat(parts) if parts else hidden_MD.new_zeros(0)


@torch.no_grad()
def read_divergence(
    config: DivergenceConfig,
    hidden_MD: Tensor,
    head: Head,
    teacher: LogitSource,
    tokens_M: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, PositionStats]:
    """Only the values (nats, `[M]`) and the statistics of M tokens, as `weighted_divergence` reads them."""
    if (prepare := getattr(teacher, "prepare", None)) is not None:
        prepare(read_logprobs(hidden_MD, head.logits, tokens_M, chunk))
    compare, tokens_M = getattr(teacher, "compare", None), head.of_tokens(tokens_M)
    parts = []
    for rows in slices(len(hidden_MD), chunk):
        if compare is not None:
            student_mV = head.joined(hidden_MD[rows])
            value_m = compare(student_mV, rows, tokens_M[rows]).value_M
            parts.append((value_m, _stats_of_student(teacher, student_mV, rows, tokens_M[rows])))
            continue
        student_mC, teacher_mC, _ = compared(head, hidden_MD[rows], teacher, rows)
        value_m = inside_rows(config, student_mC, teacher_mC, tokens_M[rows], inside(teacher, rows)).value_M
        parts.append((value_m, position_stats(student_mC, teacher_mC, tokens_M[rows])))
    columns = [(value_m, *(getattr(stats, name) for name in stats.__slots__)) for value_m, stats in parts]
    value_M, *stats_M = (torch.cat(column) for column in zip(*columns, strict=True))
    return value_M, PositionStats(*stats_M)


@torch.no_grad()
def read_rows(
    read: Callable[[Tensor, Tensor], Tensor],
    hidden_MD: Tensor,
    head: Head,
    teacher: LogitSource,
    *,
    chunk: int,
) -> Tensor:
    """`read(student_mC, teacher_mC)` (`[m, ...]` from what is compared) of all M tokens."""
    parts = [read(*compared(head, hidden_MD[rows], teacher, rows)[:2]) for rows in slices(len(hidden_MD), chunk)]
    return torch.cat(parts) if parts else hidden_MD.new_zeros(0)


def compared(
    head: Head, hidden_mD: Tensor, teacher: LogitSource, rows: slice
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Student and teacher logits of some rows over what both can express, and the mass of each that the other cannot
    (None within one vocabulary). Without gradients."""
    with torch.no_grad():
        student_mC, teacher_mC = head.joined(hidden_mD), teacher.logits(rows)
        return student_mC, teacher_mC, _take_rest(head.events, student_mC, teacher_mC)


def inside(teacher: LogitSource, rows: slice) -> Tensor | None:
    """Which of these rows stand inside a token of the teacher; None where none can."""
    inside_M: Tensor | None = getattr(teacher, "inside_M", None)
    return None if inside_M is None else inside_M[rows]


def _take_rest(events: Events | None, student_mC: Tensor, teacher_mC: Tensor) -> tuple[Tensor, Tensor] | None:
    """The probability of REST on both sides, which is taken out of the logits (in place) where that is asked for."""
    if events is None or events.rest is None:
        return None
    both = tuple((x[:, events.rest] - x.logsumexp(-1)).exp() for x in (student_mC, teacher_mC))
    if events.renormalised:
        for x in (student_mC, teacher_mC):
            x[:, events.rest] = REMOVED
    return both[0], both[1]


def _stats_of_student(teacher: LogitSource, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> PositionStats:
    """Where there is no teacher's distribution to read: its entropy is NaN and its rank 0. `teacher_logprobs(rows)` of
    the teacher, where it has it, are the log-probabilities of the sampled tokens."""
    known: Any = getattr(teacher, "teacher_logprobs", None)
    stats = position_stats(student_mV, student_mV, tokens_m)
    nan_m = torch.full_like(stats.teacher_entropy_M, torch.nan)
    return replace(
        stats,
        teacher_entropy_M=nan_m,
        teacher_logprob_M=nan_m if known is None else known(rows).to(nan_m),
        teacher_rank_M=torch.zeros_like(stats.teacher_rank_M),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """What one chunk gives: everything `[rows]`, but the gradient of its weighted loss `[rows, V]`."""

    surrogate_m: Tensor
    value_m: Tensor
    stats: PositionStats
    gradient_mV: Tensor
    rest_m2: Tensor | None = None
    tail_m2: Tensor | None = None

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All but the gradient: surrogate, value, mass of REST, mass of the tail, statistics."""
        none_m2 = self.value_m.new_zeros(len(self.value_m), 2)
        masses = (none_m2 if mass_m2 is None else mass_m2 for mass_m2 in (self.rest_m2, self.tail_m2))
        return self.surrogate_m, self.value_m, *masses, *(getattr(self.stats, name) for name in self.stats.__slots__)


@dataclass(frozen=True, slots=True)
class _Work:
    config: DivergenceConfig
    head: Head
    teacher: LogitSource
    tokens_M: Tensor
    weights_M: Tensor
    chunk: int

    @property
    def has_rest(self) -> bool:
        compares = hasattr(self.teacher, "compare")  # and then reads no mass of REST
        return self.head.events is not None and self.head.events.rest is not None and not compares

    @property
    def has_tail(self) -> bool:
        return isinstance(self.config.support, TopKSupport)

    @property
    def by_hand(self) -> bool:
        return isinstance(self.config, ReverseKL) and isinstance(self.config.support, FullSupport)

    def read(self, student_mV: Tensor, rows: slice) -> _Read:
        """Readings of one chunk and the gradient of its weighted loss with respect to `student_mV`, the student's
        logits over events, which are overwritten."""
        compare: Any = getattr(self.teacher, "compare", None)
        if compare is not None:
            return self._compared(compare, student_mV, rows)
        with torch.no_grad():
            teacher_mV = self.teacher.logits(rows)
            rest = _take_rest(self.head.events, student_mV, teacher_mV)
        tokens_m, weights_m = self.tokens_M[rows], self.weights_M[rows]
        inside_m = inside(self.teacher, rows)
        if rest is None:
            return self._read(student_mV, teacher_mV, tokens_m, weights_m, inside_m)
        rest_m2 = torch.stack(rest, dim=-1)
        if self.head.events is not None and self.head.events.renormalised:
            weights_m = weights_m * (rest_m2 <= MOST_LEFT_OUT).all(-1)
        return replace(self._read(student_mV, teacher_mV, tokens_m, weights_m, inside_m), rest_m2=rest_m2)

    def _compared(self, compare: Callable[..., Divergence], student_mV: Tensor, rows: slice) -> _Read:
        """Where the teacher compares itself."""
        tokens_m = self.tokens_M[rows]
        with torch.enable_grad():
            leaf_mV = student_mV.detach().requires_grad_()
            result = compare(leaf_mV, rows, tokens_m)
        (gradient_mV,) = torch.autograd.grad(result.surrogate_M, leaf_mV, self.weights_M[rows].to(leaf_mV.dtype))
        stats = _stats_of_student(self.teacher, student_mV, rows, tokens_m)
        return _Read(result.value_M, result.value_M, stats, gradient_mV, tail_m2=result.tail_M2)

    def _read(
        self, student_mV: Tensor, teacher_mV: Tensor, tokens_m: Tensor, weights_m: Tensor, inside_m: Tensor | None
    ) -> _Read:
        if self.by_hand and inside_m is None:
            return _reverse_kl(student_mV, teacher_mV, tokens_m, weights_m)
        with torch.enable_grad():
            leaf_mV = student_mV.detach().requires_grad_()
            found = inside_rows(self.config, leaf_mV, teacher_mV, tokens_m, inside_m)
        (gradient_mV,) = torch.autograd.grad(found.surrogate_M, leaf_mV, weights_m.to(found.surrogate_M.dtype))
        stats = position_stats(leaf_mV.detach(), teacher_mV, tokens_m)
        return _Read(found.surrogate_M.detach(), found.value_M, stats, gradient_mV, tail_m2=found.tail_M2)


class _Weighted(torch.autograd.Function):
    """Outputs the loss, the values, the masses of REST and of the tail, and the five statistics; the gradients are made
    on the way."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden_MD: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        # Sums over chunks are kept in float32 at least: adding fifteen bfloat16 chunks would round fifteen times.
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in trained]
        hidden_gradient_MD = torch.empty_like(hidden_MD)
        columns = []
        for rows in slices(len(hidden_MD), work.chunk):
            backward = _bare if work.head.weight_VD is not None else _recorded
            read, hidden_gradient_MD[rows] = backward(work, hidden_MD[rows], rows, trained, sums)
            columns.append(read.columns)  # not the chunk's gradient: all of them together would be [M, V] after all
            del read  # and it would be there beside the next chunk's logits
        surrogate_M, value_M, rest_M2, tail_M2, *stats = _joined(columns, hidden_MD)
        ctx.save_for_backward(hidden_gradient_MD, *(s.to(t.dtype) for s, t in zip(sums, trained, strict=True)))
        loss = (work.weights_M.to(surrogate_M.dtype) * surrogate_M).sum()
        ctx.mark_non_differentiable(value_M, rest_M2, tail_M2, *stats)
        return loss, value_M, rest_M2, tail_M2, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if float(gradient) == 1.0:  # the usual case, and a head's gradient is as large as the head: no copy
            return None, *ctx.saved_tensors
        return None, *(saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors)


def _bare(
    work: _Work, hidden_mD: Tensor, rows: slice, trained: Sequence[Tensor], sums: Sequence[Tensor]
) -> tuple[_Read, Tensor]:
    """A head that is one projection: two products, the second added into the weight's sum where it lies."""
    weight_VD = work.head.weight_VD
    assert weight_VD is not None
    logits_mV, events = work.head.logits(hidden_mD.detach()), work.head.events
    if events is None:
        read = work.read(logits_mV, rows)
        gradient_mV = read.gradient_mV.to(weight_VD.dtype)
    else:
        joined_mC = events.join(logits_mV)
        share_mV = events.share(logits_mV, joined_mC)
        read = work.read(joined_mC, rows)
        gradient_mV = events.spread(read.gradient_mV, share_mV).to(weight_VD.dtype)
    if trained:
        sum_VD = sums[0][: len(weight_VD)]
        if sum_VD.dtype == gradient_mV.dtype:
            sum_VD.addmm_(gradient_mV.T, hidden_mD)
        else:
            sum_VD += gradient_mV.T @ hidden_mD
    return read, linear(gradient_mV, weight_VD.T)


def _recorded(
    work: _Work, hidden_mD: Tensor, rows: slice, trained: Sequence[Tensor], sums: Sequence[Tensor]
) -> tuple[_Read, Tensor]:
    """Any head, through autograd."""
    with torch.enable_grad():
        leaf_mD = hidden_mD.detach().requires_grad_()
        student_mV = work.head.joined(leaf_mD)
    read = work.read(student_mV.detach().clone(), rows)  # the graph may need what reading would overwrite
    found = torch.autograd.grad(
        student_mV,
        [leaf_mD, *trained],
        read.gradient_mV.to(student_mV.dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    for total, gradient in zip(sums, found[1:], strict=True):
        total += gradient
    return read, found[0]


def _reverse_kl(student_mV: Tensor, teacher_mV: Tensor, tokens_m: Tensor, weights_m: Tensor) -> _Read:
    """The exact reverse KL of one chunk, block by block on a CPU; `student_mV` becomes the gradient."""
    student_mV, teacher_mV = student_mV.contiguous(), teacher_mV.contiguous()
    m, V = student_mV.shape
    size = max(1, CACHE_ELEMENTS // V) if student_mV.device.type == "cpu" else max(m, 1)
    # One room for all blocks: fresh memory costs as much as the arithmetic.
    room = student_mV.new_empty(3, min(size, m), V, dtype=torch.promote_types(student_mV.dtype, teacher_mV.dtype))
    blocks = [
        reverse_kl_block(student_mV[rows], teacher_mV[rows], tokens_m[rows], weights_m[rows], room)
        for rows in slices(m, size)
    ]
    value_m, unclamped_m, *stats = (torch.cat(column) for column in zip(*blocks, strict=True))
    return _Read(unclamped_m, value_m, PositionStats(*stats), student_mV)


def _joined(columns: Sequence[tuple[Tensor, ...]], hidden_MD: Tensor) -> tuple[Tensor, ...]:
    """Surrogate, value, masses of REST and of the tail, and statistics of all chunks, in row order."""
    if not columns:
        empty = hidden_MD.new_zeros(0, dtype=torch.float32)
        return (*[empty] * 2, *[empty.view(0, 2)] * 2, *[empty] * 4, empty.long())
    return tuple(torch.cat(column) for column in zip(*columns, strict=True))


def slices(M: int, size: int) -> Iterator[slice]:
    """M rows, at most `size` at a time."""
    return (slice(start, min(start + size, M)) for start in range(0, M, size))
