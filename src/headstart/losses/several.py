"""The divergence from several teachers: of each row from the one that it names, or from all of them by weight.

Teacher k scores the rows R_k with a weight w_k > 0, q_k is its distribution and p the student's. The value of row m is

    losses         D(m) = sum_k v_k(m) D(p || q_k),  v_k(m) = w_k / sum of w_j over the teachers j that score m
    distributions  D(m) = D(p || sum_k w_k q_k),     weights that sum to 1

A row that one teacher scores has v = 1: that is routing. A token that not all teachers can score (other tokenizers) is
judged by those that can. KL is convex in its second argument, so by Jensen's inequality the second value is never above
the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    told the rows' divergences.
    """

    rows_m: Tensor
    weight_m: Tensor
    head: Head
    scores: LogitSource
    seen: Callable[[Tensor], None] = lambda value_m: None


class SeveralScores:
    """Fits `interfaces.LogitSource` where rows are judged by several teachers, each by itself."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = shares

    def logits(self, rows: slice | Tensor) -> Tensor:
        raise ConfigError("several teachers have no common distribution, which something in this run reads; use one")


class MixtureScores:
    """Logits of the weighted sum of several teachers' distributions over the same ids: ln sum_k w_k q_k."""

    def __init__(self, scores: Sequence[LogitSource], weights: Sequence[float]) -> None:
        self._scores = scores
        self._log_weights = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64).log().tolist()

    def logits(self, rows: slice | Tensor) -> Tensor:
        if len(self._scores) == 1:
            return self._scores[0].logits(rows)
        total_mV: Tensor | None = None
        for scores, log_weight in zip(self._scores, self._log_weights, strict=True):
            own_mV = log_softmax(scores.logits(rows), -1).add_(log_weight)
            total_mV = own_mV if total_mV is None else torch.logaddexp(total_mV, own_mV, out=total_mV)
        assert total_mV is not None
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
    """`chunked.weighted_divergence`, by shares where there are several. Of what is read at each row the statistics are
    weighted as the values are, but for the rank, which is the first teacher's that scores the row."""
    if not isinstance(teacher, SeveralScores):
        return chunked.weighted_divergence(config, hidden_MD, head, teacher, tokens_M, weights_M, chunk=chunk)
    found = []
    for share in teacher.shares:
        weights_m = weights_M[share.rows_m] * share.weight_m
        of_rows = (hidden_MD[share.rows_m], share.head, share.scores, tokens_M[share.rows_m], weights_m)
        found.append(chunked.weighted_divergence(config, *of_rows, chunk=chunk))
        share.seen(found[-1].value_M)
    M = len(hidden_MD)
    loss = torch.stack([one.loss for one in found]).sum()

    def joined(name: str) -> Tensor | None:
        columns = [getattr(one, name) for one in found]
        if all(column is None for column in columns):
            return None
        nothing = [one.value_M.new_zeros(len(one.value_M), 2) for one in found]
        known = [none if column is None else column for column, none in zip(columns, nothing, strict=True)]
        return _joined(teacher.shares, known, M)

    value_M = _joined(teacher.shares, [one.value_M for one in found], M)
    return WeightedDivergence(
        loss, value_M, _stats(teacher.shares, [one.stats for one in found], M), joined("rest_M2"), joined("tail_M2")
    )


def read_divergence(
    config: DivergenceConfig, hidden_MD: Tensor, head: Head, teacher: LogitSource, tokens_M: Tensor, *, chunk: int
) -> tuple[Tensor, PositionStats]:
    """`chunked.read_divergence`, by shares where there are several."""
    if not isinstance(teacher, SeveralScores):
        return chunked.read_divergence(config, hidden_MD, head, teacher, tokens_M, chunk=chunk)
    some = [share for share in teacher.shares if len(share.rows_m)] or teacher.shares[:1]
    found = [
        chunked.read_divergence(config, hidden_MD[s.rows_m], s.head, s.scores, tokens_M[s.rows_m], chunk=chunk)
        for s in some
    ]
    M = len(hidden_MD)
    return _joined(some, [value for value, _ in found], M), _stats(some, [stats for _, stats in found], M)


def read_rows(
    read: Callable[[Tensor, Tensor], Tensor], hidden_MD: Tensor, head: Head, teacher: LogitSource, *, chunk: int
) -> Tensor:
    """`chunked.read_rows`, by shares where there are several."""
    if not isinstance(teacher, SeveralScores):
        return chunked.read_rows(read, hidden_MD, head, teacher, chunk=chunk)
    some = [share for share in teacher.shares if len(share.rows_m)] or teacher.shares[:1]
    found = [chunked.read_rows(read, hidden_MD[s.rows_m], s.head, s.scores, chunk=chunk) for s in some]
    return _joined(some, found, len(hidden_MD))


def _stats(shares: Sequence[Share], found: Sequence[PositionStats], M: int) -> PositionStats:
    columns: dict[str, Any] = {}
    for name in PositionStats.__slots__:
        parts = [getattr(stats, name) for stats in found]
        if name == "teacher_rank_M":
            rank_M = shares[0].rows_m.new_zeros(M)
            for share, rank_m in reversed([*zip(shares, parts, strict=True)]):
                rank_M[share.rows_m] = rank_m
            columns[name] = rank_M
        else:
            columns[name] = _joined(shares, parts, M)
    return PositionStats(**columns)


def _joined(shares: Sequence[Share], parts: Sequence[Tensor], M: int) -> Tensor:
    """The weighted sum `[M, ...]` of what the shares have at their rows."""
    total = parts[0].new_zeros(M, *parts[0].shape[1:])
    for share, part in zip(shares, parts, strict=True):
        weight = share.weight_m.to(part.dtype).view(-1, *[1] * (part.dim() - 1))
        total.index_add_(0, share.rows_m, weight * part)
    return total
