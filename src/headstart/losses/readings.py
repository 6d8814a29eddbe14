"""What two distributions at one position say of each other, beside their divergence. Nats, shares in 0..1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

OVERLAP_K = 16
"""Ids of the top-k sets whose overlap is read (arXiv 2605.07804 reads k = 16)."""
ALTERNATIVES = 3
"""Favourite tokens of the teacher that are kept for each position."""


@dataclass(frozen=True, slots=True)
class PairReadings:
    """At each of M positions, detached, on the device of the logits.

    `student_top_M` and `teacher_top_M` are the largest probabilities (the teacher's is its confidence); `agree_M` says
    that the two favourite tokens are one. `overlap_M` is |S_k & T_k| / k for the top-k sets of both, `shared_mass_M`
    the teacher's probability on the student's top k. `teacher_ids_MA` are the teacher's favourites, best first, with
    their probabilities in `teacher_probs_MA`.
    """

    student_top_M: Tensor
    teacher_top_M: Tensor
    agree_M: Tensor
    overlap_M: Tensor
    shared_mass_M: Tensor
    teacher_ids_MA: Tensor
    teacher_probs_MA: Tensor


@torch.no_grad()
def pair_readings(student_logits_MV: Tensor, teacher_logits_MV: Tensor, k: int = OVERLAP_K) -> PairReadings:
    """Readings of M positions from raw logits over one vocabulary; `k` is cut to the vocabulary's size."""
    V = student_logits_MV.shape[-1]
    k = min(k, V)
    teacher_MV = log_softmax(teacher_logits_MV.float(), -1)
    student_top = student_logits_MV.topk(k, dim=-1)
    teacher_top = teacher_MV.topk(max(k, min(ALTERNATIVES, V)), dim=-1)
    member_MV = torch.zeros_like(teacher_MV, dtype=torch.bool).scatter_(-1, student_top.indices, True)
    student_top_M = (student_top.values[:, 0] - student_logits_MV.float().logsumexp(-1)).exp()
    return PairReadings(
        student_top_M=student_top_M,
        teacher_top_M=teacher_top.values[:, 0].exp(),
        agree_M=student_top.indices[:, 0] == teacher_top.indices[:, 0],
        overlap_M=member_MV.gather(-1, teacher_top.indices[:, :k]).float().mean(-1),
        shared_mass_M=teacher_MV.gather(-1, student_top.indices).exp().sum(-1),
        teacher_ids_MA=teacher_top.indices[:, :ALTERNATIVES],
        teacher_probs_MA=teacher_top.values[:, :ALTERNATIVES].exp(),
    )


@torch.no_grad()
def overlap_and_margin(student_logits_MV: Tensor, teacher_logits_MV: Tensor, k: int = OVERLAP_K) -> Tensor:
    """float32 `[M, 2]`: |S_k & T_k| / k, and the teacher's margin over the student's top k: how far (nats) its
    favourite of them lies above its second."""
    k = min(k, student_logits_MV.shape[-1])
    student_MK = student_logits_MV.topk(k, dim=-1).indices
    teacher_MK = teacher_logits_MV.topk(k, dim=-1).indices
    member_MV = torch.zeros_like(teacher_logits_MV, dtype=torch.bool).scatter_(-1, student_MK, True)
    best_M2 = teacher_logits_MV.float().gather(-1, student_MK).topk(min(2, k), dim=-1).values
    overlap_M = member_MV.gather(-1, teacher_MK).float().mean(-1)
    return torch.stack([overlap_M, best_M2[:, 0] - best_M2[:, -1]], dim=-1)
