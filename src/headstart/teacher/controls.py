"""Losses across tokenizers that others use, as controls beside our own: they compare something else than distributions
over common events."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.losses.chunked import default_chunk, read_logprobs
from headstart.losses.divergence import token_logprobs
from headstart.models.causal import CausalModel
from headstart.records import Divergence, Rollout

SURE = 1e-4
"""Probabilities of a span are kept this far from 0 and 1, where its odds are infinite."""


class SortedScores:
    """The sum of |p - q| over both distributions sorted by size, token i of one beside token i of the other (ULD,
    arXiv 2402.12030). What the tokens say plays no part. Not in nats."""

    def __init__(self, model: CausalModel, hidden_MD: Tensor) -> None:
        self._model, self._hidden_MD = model, hidden_MD

    def logits(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad():
            return self._model.head(self._hidden_MD[rows])

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        """See `losses.chunked.Comparing`."""
        both = [x.softmax(-1).sort(-1, descending=True).values for x in (student_mV, self.logits(rows))]
        widest = max(x.shape[-1] for x in both)
        p_mV, q_mV = (pad(x, (0, widest - x.shape[-1])) for x in both)
        distance_m = (p_mV - q_mV).abs().sum(-1)
        return Divergence(distance_m.detach(), distance_m)


class ChunkScores:
    """Reverse KL between two yes-or-no events for each span from one shared start to the next: both models' probability
    of the span that was written (after ALM, arXiv 2503.20083). A span's value is divided among its tokens."""

    def __init__(self, model: CausalModel, hidden_MD: Tensor, tokens_M: Tensor, rollouts: Sequence[Rollout]) -> None:
        """`hidden_MD` and `tokens_M` are the teacher's own rows, all of them up to the last shared start."""
        spans = [pair for r in rollouts if r.aligned is not None for pair in pairwise(r.aligned.spans)]
        device = hidden_MD.device
        lengths = torch.tensor([[b[k] - a[k] for a, b in spans] for k in (0, 1)], device=device)
        self._span_M, theirs_M = (
            torch.repeat_interleave(torch.arange(len(spans), device=device), lengths[k]) for k in (0, 1)
        )
        self._count_G = lengths[0]
        logprob_M = read_logprobs(hidden_MD, model.head, tokens_M, default_chunk(model.vocabulary))
        zero_G = torch.zeros(len(spans), device=device, dtype=torch.float64)
        self._teacher_G = zero_G.index_add_(0, theirs_M, logprob_M.double())

    def logits(self, rows: slice | Tensor) -> Tensor:
        raise NotImplementedError("spans have probabilities, and no distribution at a token")

    def prepare(self, logprob_M: Tensor) -> None:
        """The student's log-probabilities of its own tokens, which the spans' values and gradients follow from."""
        student_G = torch.zeros_like(self._teacher_G).index_add_(0, self._span_M, logprob_M.double())
        p_G, q_G = (x.exp().clamp(SURE, 1 - SURE) for x in (student_G, self._teacher_G))
        odds_G = p_G.log() - q_G.log(), (1 - p_G).log() - (1 - q_G).log()
        value_G = p_G * odds_G[0] + (1 - p_G) * odds_G[1]
        self._value_M = (value_G / self._count_G)[self._span_M].float()
        self._slope_M = (p_G * (odds_G[0] - odds_G[1]))[self._span_M].float()

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        """See `losses.chunked.Comparing`. The surrogate's gradient is the value's; its number is not."""
        return Divergence(self._value_M[rows], self._slope_M[rows] * token_logprobs(student_mV, tokens_m))
