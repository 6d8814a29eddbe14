"""The divergence from several teachers: of each row from the one that it names, or from all of them by weight.

Teacher k scores some rows with a weight w_k > 0, q_k is its distribution and p the student's. Row m has the value

    losses         D(m) = sum_k v_k(m) D(p || q_k),  v_k(m) = w_k / sum of w_j over the teachers j that score m
    distributions  D(m) = D(p || sum_k w_k q_k),     weights that sum to 1

A row that one teacher scores has v = 1: that is routing. A token that not all teachers can score (other tokenizers) is
judged by those that can. KL is convex in its second argument, so by Jensen's inequality the second value is never above
the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from headstart.config.schema import DivergenceConfig
from headstart.errors import ConfigError
from headstart.interfaces import LogitSource
from headstart.losses import chunked
from headstart.losses.chunked import Head, WeightedDivergence
from headstart.records import PositionStats


@dataclass(frozen=True, slots=True)
class Share:
    """What one teacher scores of M rows: `rows_m` (int64), each with the weight `weight_m` in the row's value.

    `head` is the student's as it is compared with this teacher: over the ids and events that the two share. `seen` is
    called with the rows' divergences.
    """

    rows_m: Tensor
    weight_m: Tensor
    head: Head
    scores: LogitSource
    seen: Callable[[Tensor], None] = lambda value_m: None


class SeveralScores:
    """Fits `interfaces.LogitSource` where rows are judged by several teachers, each by itself."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = [share for share in shares if len(share.rows_m)] or [*shares[:1]]

    def logits(self, rows: slice | Tensor) -> Tensor:
        raise ConfigError("several teachers have no common distribution, which something in this run reads; use one")

    def joined(self, parts: Sequence[Tensor], M: int) -> Tensor:
        """The weighted sum `[M, ...]` of what the shares have at their rows; whole numbers are rounded."""
        total = torch.zeros(M, *parts[0].shape[1:], dtype=torch.promote_types(parts[0].dtype, torch.float32))
        total = total.to(parts[0].device)
        for share, part in zip(self.shares, parts, strict=True):
            weight = share.weight_m.to(total.dtype).view(-1, *[1] * (part.dim() - 1))
            total.index_add_(0, share.rows_m, weight * part)
        return total if parts[0].is_floating_point() else total.round().to(parts[0].dtype)

    def joined_stats(self, parts: Sequence[PositionStats], M: int) -> PositionStats:
        """Each statistic as `joined`."""
        return PositionStats(*(self.joined([getattr(p, n) for p in parts], M) for n in PositionStats.__slots__))


class MixtureScores:
    """Logits of the weighted sum of several teachers' distributions over the same ids: ln sum_k w_k q_k."""

    def __init__(self, scores: Sequence[LogitSource], weights: Sequence[float]) -> None:
        self._scores = scores
        self._log_weights = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64).log().tolist()

    def logits(self, rows: slice | Tensor) -> Tensor:
        total_mV = self._scores[0].logits(rows)
        if len(self._scores) > 1:
            total_mV = log_softmax(total_mV, -1).add_(self._log_weights[0])
        for scores, log_weight in zip(self._scores[1:], self._log_weights[1:], strict=True):
            torch.logaddexp(total_mV, log_softmax(scores.logits(rows), -1).add_(log_weight), out=total_mV)
        return total_mV


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
    """`chunked.weighted_divergence`, by shares where there are several; statistics are weighted as values are."""
    if not isinstance(teacher, SeveralScores):
        return chunked.weighted_divergence(config, hidden_MD, head, teacher, tokens_M, weights_M, chunk=chunk)
    found = []
    for s in teacher.shares:
        rows_m, weights_m = s.rows_m, weights_M[s.rows_m] * s.weight_m
        inputs = (hidden_MD[rows_m], s.head, s.scores, tokens_M[rows_m], weights_m)
        found.append(chunked.weighted_divergence(config, *inputs, chunk=chunk))
        s.seen(found[-1].value_M)
    M = len(hidden_MD)

    def masses(columns: Sequence[Tensor | None]) -> Tensor | None:
        """A teacher without such a mass leaves out nothing."""
        if all(column is None for column in columns):
            return None
        nothing = [one.value_M.new_zeros(len(one.value_M), 2) for one in found]
        return teacher.joined([n if c is None else c for n, c in zip(nothing, columns, strict=True)], M)

    return WeightedDivergence(
        torch.stack([one.loss for one in found]).sum(),
        teacher.joined([one.value_M for one in found], M),
        teacher.joined_stats([one.stats for one in found], M),
        masses([one.rest_M2 for one in found]),
        masses([one.tail_M2 for one in found]),
    )


def read_divergence(
    config: DivergenceConfig, hidden_MD: Tensor, head: Head, teacher: LogitSource, tokens_M: Tensor, *, chunk: int
) -> tuple[Tensor, PositionStats]:
    """Only the values (nats, `[M]`) and the statistics of M tokens."""
    if not isinstance(teacher, SeveralScores):
        return chunked.read_divergence(config, hidden_MD, head, teacher, tokens_M, chunk=chunk)
    found = [
        chunked.read_divergence(config, hidden_MD[s.rows_m], s.head, s.scores, tokens_M[s.rows_m], chunk=chunk)
        for s in teacher.shares
    ]
    M = len(hidden_MD)
    return teacher.joined([value for value, _ in found], M), teacher.joined_stats([stats for _, stats in found], M)


def read_rows(
    read: Callable[[Tensor, Tensor], Tensor], hidden_MD: Tensor, head: Head, teacher: LogitSource, *, chunk: int
) -> Tensor:
    """`chunked.read_rows`, by shares where there are several."""
    if not isinstance(teacher, SeveralScores):
        return chunked.read_rows(read, hidden_MD, head, teacher, chunk=chunk)
    parts = [chunked.read_rows(read, hidden_MD[s.rows_m], s.head, s.scores, chunk=chunk) for s in teacher.shares]
    return teacher.joined(parts, len(hidden_MD))
