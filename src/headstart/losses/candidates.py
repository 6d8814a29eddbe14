"""Reverse KL from a teacher's log-probabilities of a few candidate tokens at each row, in nats.

A teacher behind a URL cannot send [M, V] numbers. It sends K per row: of the ids that the student found most probable
when it decoded (the support S), and of the sampled token, always in the last column. What S leaves over is the tail R,
whose masses P_R (student) and Q_R (teacher) follow from the rest. With d = ln p - ln q:

    bucket     sum_S p d + P_R ln(P_R / Q_R)                                  a lower bound, no noise
    unbiased   bucket + 1[y in R] (d(y) - ln(P_R / Q_R))                      the exact value as its mean over y ~ p

The surrogate of the added term is the same coefficient times ln p(y), which makes the gradient exact in the mean, too.
S must not depend on the sampled token y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.losses.divergence import token_logprobs, with_tail, working
from headstart.losses.events import REMOVED
from headstart.records import Divergence

FLOOR = 2.0**-23
"""Least tail mass that differs from 0: log-probabilities come in float32, so 1 - sum_S q is uncertain by about this
much and may be negative. Both tails are floored alike, so that models that agree have no gap."""


def candidate_divergence(
    student_mV: Tensor, candidates_mK: Tensor, teacher_mK: Tensor, *, unbiased: bool = False
) -> Divergence:
    """Reverse KL of m rows from the student's logits and the teacher's log-probabilities of K candidates (int64).

    The last column is the sampled token; the others are the support, in any order. Repeated ids count once, and -1
    stands for an id that the teacher's answer lacks: it falls into the tail. With K = 1 everything is tail, and
    `unbiased` is the policy gradient. `Divergence.tail_M2` are P_R and Q_R, the latter 0 where it was floored.
    """
    logits_mV, ids_mS, token_m = working(student_mV), candidates_mK[:, :-1], candidates_mK[:, -1]
    logq_mK = working(teacher_mK.detach()).to(logits_mV.dtype)
    kept_mS = distinct(ids_mS)
    logp_mS, logrest_m = _support(logits_mV, ids_mS, kept_mS)
    q_m = logq_mK[:, :-1].double().exp().masked_fill(~kept_mS, 0.0).sum(-1)
    tail_m2 = torch.stack([logrest_m.detach().double().exp(), 1.0 - q_m], dim=-1)
    gap_m = torch.sub(*tail_m2.clamp_min(FLOOR).log().to(logits_mV.dtype).unbind(-1))
    tail_m2[:, 1].masked_fill_(tail_m2[:, 1] < FLOOR, 0.0)
    d_mS = (logp_mS.detach() - logq_mK[:, :-1]).masked_fill(~kept_mS, 0.0)
    p_mS = logp_mS.exp().masked_fill(~kept_mS, 0.0)
    # 0 * inf counts as 0, as in the exact form.
    coarse_m = (p_mS * d_mS.masked_fill(p_mS.detach() == 0, 0.0)).sum(-1) + logrest_m.exp() * gap_m
    result = Divergence(coarse_m.detach().clamp_min(0.0), coarse_m, tail_m2.to(logits_mV.dtype))
    if not unbiased:
        return result
    inside_m = ((ids_mS == token_m[:, None]) & kept_mS).any(-1)
    return with_tail(result, token_logprobs(logits_mV, token_m), logq_mK[:, -1], gap_m, inside_m)


def distinct(ids_mS: Tensor) -> Tensor:
    """Which ids count: those that are one (not -1), and of equal ones in a row the first; bool `[m, S]`."""
    sorted_mS, order_mS = ids_mS.sort(dim=-1, stable=True)
    repeats_mS = torch.zeros_like(ids_mS, dtype=torch.bool)
    repeats_mS[:, 1:] = sorted_mS[:, 1:] == sorted_mS[:, :-1]
    return ~torch.zeros_like(repeats_mS).scatter(-1, order_mS, repeats_mS) & (ids_mS >= 0)


def _support(logits_mV: Tensor, ids_mS: Tensor, kept_mS: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[m, S]` of the support and `[m]` of the tail, which is summed directly."""
    ids_mS = ids_mS.clamp_min(0)
    total_m1 = logits_mV.logsumexp(-1, keepdim=True)
    count_mV = torch.zeros_like(logits_mV, dtype=torch.uint8).scatter_add_(-1, ids_mS, kept_mS.to(torch.uint8))
    rest_m = logits_mV.masked_fill(count_mV > 0, REMOVED).logsumexp(-1)
    return logits_mV.gather(-1, ids_mS) - total_m1, rest_m - total_m1.squeeze(-1)
