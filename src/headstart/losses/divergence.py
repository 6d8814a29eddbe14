"""Divergences between student and teacher at each completion token, on raw logits, in nats.

p is the student's distribution, q the teacher's, d = ln p - ln q. Gradients reach the student's logits only.
`full` and `top_k` write the surrogate as sum_v p_v A_v with A_v = dD/dp_v detached (up to a constant, which drops out
because sum_v p_v = 1): the exact gradient p_v (A_v - sum_u p_u A_u), exactly zero where the models agree, with one
[M, V] tensor less to keep than differentiating both factors. Everything runs in float32 (float64 stays float64).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from headstart.config.schema import (
    DivergenceConfig,
    ForwardKL,
    FullSupport,
    GeneralizedJSD,
    ReverseKL,
    SampledSupport,
    TopKSupport,
)
from headstart.errors import VocabularyError
from headstart.losses.events import REMOVED
from headstart.records import Divergence, PositionStats

SKEW = 0.05
"""Share of the student in what it is compared with inside a teacher's token."""


def divergence_rows(
    config: DivergenceConfig, student_logits_MV: Tensor, teacher_logits_MV: Tensor, tokens_M: Tensor
) -> Divergence:
    """Divergence at each of M positions, from raw logits over one shared vocabulary and the sampled tokens (int64).

    reverse_kl KL(p || q); forward_kl KL(q || p); jsd beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1-beta) p.
    full: over all ids, exact. top_k: between the distributions on the student's k most probable ids and one bucket
    for the rest, hence at most the full value; with tail `unbiased` (reverse KL only) the sampled token adds what the
    bucket hides, and the mean over tokens drawn from p is the full value and gradient. sampled: estimates from the
    sampled token alone, which have the full value and gradient as their mean over tokens drawn from p (single values
    may be negative).
    The value is +inf where it is mathematically infinite (q = 0 < p in reverse KL), never NaN for want of 0 * inf = 0.
    Raises VocabularyError when the logits differ in shape.
    """
    if student_logits_MV.shape != teacher_logits_MV.shape:
        raise VocabularyError(
            f"student logits are {tuple(student_logits_MV.shape)} and teacher logits {tuple(teacher_logits_MV.shape)}: "
            "cut both heads to the ids the tokenizer can produce before comparing them"
        )
    student_MV, teacher_MV = working(student_logits_MV), working(teacher_logits_MV.detach())
    match config.support:
        case TopKSupport(k=k) if k < student_MV.shape[-1]:
            return _top_k(config, config.support, student_MV, teacher_MV, tokens_M)
        case FullSupport() | TopKSupport():
            return _exact(config, log_softmax(student_MV, -1), log_softmax(teacher_MV, -1))
        case SampledSupport():
            return _sampled(config, token_logprobs(student_MV, tokens_M), token_logprobs(teacher_MV, tokens_M))


def inside_rows(
    config: DivergenceConfig, student_MC: Tensor, teacher_MC: Tensor, tokens_M: Tensor, inside_M: Tensor | None
) -> Divergence:
    """`divergence_rows`, but for reverse KL at the positions that `inside_M` (bool) names: KL(p || (1 - e) q + e p).

    There q is 0 wherever the bytes written so far rule an event out, and the plain value is infinite; the mixture with
    e = SKEW bounds it by ln(1 / e). Its gradient includes the mixture's.
    """
    result = divergence_rows(config, student_MC, teacher_MC, tokens_M)
    if inside_M is None or not isinstance(config, ReverseKL) or not bool(inside_M.any()):
        return result
    logp_MC, logq_MC = log_softmax(working(student_MC), -1), log_softmax(working(teacher_MC), -1)
    mixture_MC = torch.logaddexp(logq_MC + math.log1p(-SKEW), logp_MC + math.log(SKEW))
    skewed_M = (logp_MC.exp() * (logp_MC - mixture_MC)).sum(-1)
    surrogate_M = torch.where(inside_M, skewed_M, result.surrogate_M)
    return replace(
        result,
        value_M=torch.where(inside_M, skewed_M.detach().clamp_min(0.0), result.value_M),
        surrogate_M=surrogate_M,
    )


@torch.no_grad()
def position_stats(student_logits_MV: Tensor, teacher_logits_MV: Tensor, tokens_M: Tensor) -> PositionStats:
    """Entropies (nats), log-probabilities of the sampled token, and its rank with the teacher; each `[M]`, detached.

    The rank is 1 + the number of ids with a strictly greater teacher logit, so tied ids share the best rank.
    """
    teacher_M1 = teacher_logits_MV.gather(-1, tokens_M[:, None])
    rank_M = 1 + (teacher_logits_MV > teacher_M1).sum(-1)
    student_entropy_M, student_logprob_M = _readings(student_logits_MV, tokens_M)
    teacher_entropy_M, teacher_logprob_M = _readings(teacher_logits_MV, tokens_M)
    return PositionStats(student_entropy_M, teacher_entropy_M, student_logprob_M, teacher_logprob_M, rank_M)


def _readings(logits_MV: Tensor, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability of the token, with two [M, V] tensors beside the logits."""
    logprobs_MV = log_softmax(working(logits_MV), -1)
    logprob_M = logprobs_MV.gather(-1, tokens_M[:, None]).squeeze(-1)
    p_MV = logprobs_MV.exp()
    return -p_MV.mul_(logprobs_MV.clamp_min_(REMOVED)).sum(-1), logprob_M


def _top_k(
    config: DivergenceConfig, support: TopKSupport, student_MV: Tensor, teacher_MV: Tensor, tokens_M: Tensor
) -> Divergence:
    """Between the distributions on the student's k most probable ids and one bucket."""
    ids_MK = student_MV.detach().topk(support.k, dim=-1).indices
    logp_MC, logq_MC = _buckets(student_MV, ids_MK), _buckets(teacher_MV, ids_MK)
    tail_M2 = torch.stack([logp_MC[:, -1].detach(), logq_MC[:, -1]], dim=-1)
    gap_M = tail_M2[:, 0] - tail_M2[:, 1]
    result = replace(_exact(config, logp_MC, logq_MC), tail_M2=tail_M2.exp())
    if support.tail == "bucket":
        return result
    logp_M, logq_M = token_logprobs(student_MV, tokens_M), token_logprobs(teacher_MV, tokens_M)
    return with_tail(result, logp_M, logq_M, gap_M, (ids_MK == tokens_M[:, None]).any(-1))


def with_tail(result: Divergence, logp_m: Tensor, logq_m: Tensor, gap_m: Tensor, inside_m: Tensor) -> Divergence:
    """`result` with the in-tail term of the sampled tokens; `gap_m` is ln(P_R / Q_R), `inside_m` says which tokens are
    in the support, where there is nothing to add."""
    excess_m = (logp_m.detach() - logq_m - gap_m).masked_fill(inside_m, 0.0)
    return Divergence(result.value_M + excess_m, result.surrogate_M + excess_m * logp_m, result.tail_M2)


def _exact(config: DivergenceConfig, logp_MC: Tensor, logq_MC: Tensor) -> Divergence:
    """The divergence between two distributions over C classes given as log-probabilities; logp carries the gradient."""
    match config:
        case ReverseKL():
            p_MC = logp_MC.exp()
            d_MC = _supported(logq_MC.neg_().add_(logp_MC.detach()), p_MC)  # in place: logq_MC is ours and huge
            surrogate_M = (p_MC * d_MC).sum(-1)
        case ForwardKL():
            # Through ln p, not p: dD/dp_v = -q_v / p_v overflows where p underflows.
            q_MC = logq_MC.exp()
            surrogate_M = (q_MC * _supported(logq_MC - logp_MC, q_MC)).sum(-1)
        case GeneralizedJSD(beta=beta):
            p_MC, q_MC = logp_MC.exp(), logq_MC.exp()
            log_ratio_MC = logq_MC - logp_MC.detach()
            teacher_M = (q_MC * _supported(_over_mixture(beta, -log_ratio_MC), q_MC)).sum(-1)
            student_M = (p_MC * _supported(_over_mixture(1 - beta, log_ratio_MC), p_MC)).sum(-1)
            surrogate_M = beta * teacher_M + (1 - beta) * student_M
    return Divergence(value_M=surrogate_M.detach().clamp_min(0.0), surrogate_M=surrogate_M)


def _sampled(config: DivergenceConfig, logp_M: Tensor, logq_M: Tensor) -> Divergence:
    """Single-sample estimates from the sampled tokens' log-probabilities, with policy-gradient surrogates A ln p(y)."""
    p_M, q_M = logp_M.detach(), logq_M
    ratio_M = (q_M - p_M).exp()
    match config:
        case ReverseKL():
            value_M = advantage_M = p_M - q_M
        case ForwardKL():
            value_M, advantage_M = ratio_M * _supported(q_M - p_M, ratio_M), -ratio_M
        case GeneralizedJSD(beta=beta):
            advantage_M = (1 - beta) * _over_mixture(1 - beta, q_M - p_M)
            value_M = beta * ratio_M * _supported(_over_mixture(beta, p_M - q_M), ratio_M) + advantage_M
    return Divergence(value_M=value_M, surrogate_M=advantage_M * logp_M)


def _buckets(logits_MV: Tensor, ids_MK: Tensor) -> Tensor:
    """Log-probabilities of K ids and of all the rest together, `[M, K + 1]`.

    The rest is summed directly: 1 - sum_k p_k would lose a tail below 1e-7 in float32.
    """
    total_M1 = logits_MV.logsumexp(-1, keepdim=True)
    rest_M1 = logits_MV.scatter(-1, ids_MK, REMOVED).logsumexp(-1, keepdim=True)
    return torch.cat([logits_MV.gather(-1, ids_MK), rest_M1], -1) - total_M1


def _supported(difference: Tensor, probability: Tensor) -> Tensor:
    """`difference` with 0 where the probability it will be multiplied by is 0: 0 * inf and 0 * NaN count as 0."""
    return difference.masked_fill_(probability.detach() == 0, 0.0)


def _over_mixture(share: float, log_ratio: Tensor) -> Tensor:
    """ln(a / m) for m = share a + (1 - share) b, from ln(b / a): small where a and b are near, so little is rounded."""
    return -torch.logaddexp(log_ratio + math.log1p(-share), log_ratio.new_full((), math.log(share)))


def token_logprobs(logits_MV: Tensor, tokens_M: Tensor) -> Tensor:
    """Log-probability `[M]` of each token (int64)."""
    return log_softmax(logits_MV, -1).gather(-1, tokens_M[:, None]).squeeze(-1)


def working(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
