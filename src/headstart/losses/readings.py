"""Readings of two distributions at each token beside their divergence, and tables of them (nats; shares in 0..1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

OVERLAP_K = 16
"""Ids of the top-k sets whose overlap is read (arXiv 2605.07804 reads k = 16)."""
ALTERNATIVES = 3
"""Favourite tokens of the teacher that are kept for each position."""


class TokenTable:
    """Base of dataclasses whose fields are columns, numpy arrays with one row for each of M tokens; a column that was
    not read is None. Subclasses declare the columns."""

    __slots__ = ()

    @classmethod
    def of(cls, columns: dict[str, Any]) -> Self:
        """From tensors on any device, or arrays."""
        return cls(**{k: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})

    @classmethod
    def concat(cls, tables: Sequence[Self]) -> Self:
        """The tokens of all `tables`, in order; at least one."""
        columns = zip(*(table.columns().items() for table in tables), strict=True)
        return cls(**{c[0][0]: None if c[0][1] is None else np.concatenate([v for _, v in c]) for c in columns})

    def where(self, chosen: Any) -> Self:
        """The tokens that a boolean array or an array of indices chooses."""
        return type(self)(**{k: None if v is None else v[chosen] for k, v in self.columns().items()})

    def columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@torch.no_grad()
def pair_readings(student_logits_MV: Tensor, teacher_logits_MV: Tensor, k: int = OVERLAP_K) -> dict[str, Tensor]:
    """Readings of M positions from raw logits over one vocabulary; `k` is cut to the vocabulary's size.

    `student_top` and `teacher_top` are the largest probabilities (the teacher's is its confidence); `agree`: the two
    favourite tokens are the same. `overlap` is |S_k & T_k| / k for the top-k sets of both, `shared_mass` the teacher's
    probability on the student's top k. `teacher_ids` (`[M, ALTERNATIVES]`) are the teacher's favourites, best first,
    with their probabilities in `teacher_probs`.
    """
    V = student_logits_MV.shape[-1]
    k = min(k, V)
    teacher_MV = log_softmax(teacher_logits_MV.float(), -1)
    student_top = student_logits_MV.topk(k, dim=-1)
    teacher_top = teacher_MV.topk(max(k, min(ALTERNATIVES, V)), dim=-1)
    return {
        "student_top": (student_top.values[:, 0] - student_logits_MV.float().logsumexp(-1)).exp(),
        "teacher_top": teacher_top.values[:, 0].exp(),
        "agree": student_top.indices[:, 0] == teacher_top.indices[:, 0],
        "overlap": _overlap(student_top.indices, teacher_top.indices[:, :k], V),
        "shared_mass": teacher_MV.gather(-1, student_top.indices).exp().sum(-1),
        "teacher_ids": teacher_top.indices[:, :ALTERNATIVES],
        "teacher_probs": teacher_top.values[:, :ALTERNATIVES].exp(),
    }


@torch.no_grad()
def overlap_and_margin(student_logits_MV: Tensor, teacher_logits_MV: Tensor, k: int = OVERLAP_K) -> Tensor:
    """float32 `[M, 2]`: |S_k & T_k| / k, and the teacher's margin over the student's top k: how far (nats) its
    favourite of them lies above its second."""
    V = student_logits_MV.shape[-1]
    k = min(k, V)
    student_MK, teacher_MK = (logits_MV.topk(k, dim=-1).indices for logits_MV in (student_logits_MV, teacher_logits_MV))
    best_M2 = teacher_logits_MV.float().gather(-1, student_MK).topk(min(2, k), dim=-1).values
    return torch.stack([_overlap(student_MK, teacher_MK, V), best_M2[:, 0] - best_M2[:, -1]], dim=-1)


def _overlap(student_MK: Tensor, teacher_MK: Tensor, vocabulary: int) -> Tensor:
    """The share of the teacher's ids that are among the student's, `[M]`."""
    member_MV = student_MK.new_zeros((len(student_MK), vocabulary), dtype=torch.bool).scatter_(-1, student_MK, True)
    return member_MV.gather(-1, teacher_MK).float().mean(-1)
