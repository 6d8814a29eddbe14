"""The divergences as plain functions of tensors, for use in any trainer. Nats, temperature 1, float32 inside.

    loss = headstart.reverse_kl(student_logits, teacher_logits, mask=labels != -100)

Gradients reach the student only. Position t of both logits must predict the same token, over the same vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headstart.config.schema import DivergenceConfig, ForwardKL, FullSupport, GeneralizedJSD, ReverseKL, TopKSupport
from headstart.errors import VocabularyError
from headstart.losses.chunked import Head, default_chunk, weighted_divergence
from headstart.losses.divergence import divergence_rows
from headstart.losses.products import linear

Reduction = Literal["mean", "sum", "none"]


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(student || teacher) of logits `[..., V]`: what on-policy distillation minimises (arXiv 2605.27028).

    `mask` `[...]` says which positions count (all by default); `mean` is over those, `none` returns `[...]` with 0
    elsewhere. `top_k` sums over the student's k most probable ids and one bucket for the rest: a lower bound. Raises
    VocabularyError when the shapes differ.
    """
    return _reduced(ReverseKL(support=_support(top_k)), student_logits, teacher_logits, mask, reduction)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher || student), otherwise as `reverse_kl`."""
    return _reduced(ForwardKL(support=_support(top_k)), student_logits, teacher_logits, mask, reduction)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    top_k: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student; as `reverse_kl`."""
    config = GeneralizedJSD(beta=beta, support=_support(top_k))
    return _reduced(config, student_logits, teacher_logits, mask, reduction)


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    weights: Tensor | None = None,
    *,
    divergence: DivergenceConfig | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum of `weights` times the divergence, from hidden states and heads, without `[..., V]` logits ever existing.

    Hidden states `[..., D]` (each model its own D), heads `[V, D]` (`lm_head.weight`, cut to the same V rows), weights
    `[...]`; by default their mean. Reverse KL unless `divergence` says otherwise. Memory: `chunk` rows of logits, by
    default as many as fit 256 MiB, and a gradient as large as the student's head where that is trained. Raises
    VocabularyError when the heads differ in rows.
    """
    if len(student_weight) != len(teacher_weight):
        raise VocabularyError(
            f"the student's head has {len(student_weight):,} rows and the teacher's {len(teacher_weight):,}: cut both "
            "to the ids the tokenizer can produce, such as lm_head.weight[:len(tokenizer)]"
        )
    hidden_MD, teacher_MD = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    M = len(hidden_MD)
    if len(teacher_MD) != M:
        raise VocabularyError(f"{M} student positions and {len(teacher_MD)} teacher positions: both need the same ones")
    weights_M = hidden_MD.new_full((M,), 1 / max(M, 1), dtype=torch.float32) if weights is None else weights.flatten()
    head = Head(lambda h_mD: linear(h_mD, student_weight).float(), (student_weight,), student_weight)
    result = weighted_divergence(
        divergence or ReverseKL(),
        hidden_MD,
        head,
        _TeacherLogits(teacher_MD, teacher_weight.detach()),
        torch.zeros(M, dtype=torch.int64, device=hidden_MD.device),  # exact divergences look at no sampled token
        weights_M.float(),
        chunk=chunk or default_chunk(len(student_weight)),
    )
    return result.loss


class _TeacherLogits:
    """Fits `interfaces.LogitSource`."""

    def __init__(self, hidden_MD: Tensor, weight_VD: Tensor) -> None:
        self.hidden_MD, self.weight_VD = hidden_MD, weight_VD

    def logits(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad():
            return linear(self.hidden_MD[rows], self.weight_VD).float()


def _support(top_k: int | None) -> FullSupport | TopKSupport:
    return FullSupport() if top_k is None else TopKSupport(k=top_k)


def _reduced(
    config: DivergenceConfig, student: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction
) -> Tensor:
    if mask is not None and mask.shape != student.shape[:-1]:
        raise VocabularyError(f"the mask is {tuple(mask.shape)}, but the logits are {tuple(student.shape)}")
    if student.shape != teacher.shape:
        raise VocabularyError(
            f"student logits are {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}: cut both to the ids "
            "the tokenizer can produce, such as logits[..., :len(tokenizer)]"
        )
    chosen = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    student_MV = student[chosen]
    tokens_M = torch.zeros(len(student_MV), dtype=torch.int64, device=student.device)
    value_M = divergence_rows(config, student_MV, teacher[chosen], tokens_M).surrogate_M
    match reduction:
        case "none":
            return value_M.new_zeros(chosen.shape).masked_scatter(chosen, value_M)
        case "sum":
            return value_M.sum()
        case "mean":
            return value_M.sum() / max(len(value_M), 1)
