"""The teacher at a URL: it scores the student's candidates, and nothing else of the teacher is here.

A rollout is sent off as soon as it ends, while others are still being sampled; its scores are waited for when its
micro-batch needs them, after the student's forward pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.errors import ConfigError
from headstart.interfaces import Teacher
from headstart.losses.candidates import candidate_divergence
from headstart.losses.events import Events
from headstart.models.vocabulary import SharedVocabulary
from headstart.records import Divergence, Rollout
from headstart.teacher.scorers import Array, CandidateScorer

_Key = tuple[tuple[int, ...], tuple[int, ...], bytes]


@dataclass
class _Counts:
    """What happened since the last step's metrics."""

    requests: int = 0
    asked: int = 0
    known: int = 0
    seconds: float = 0.0

    def taken(self) -> dict[str, float]:
        """The counts, which begin again."""
        counts = {
            "teacher_requests": self.requests,
            "candidates_asked": self.asked,
            "candidates_known": self.known,
            "seconds_teacher_wait": self.seconds,
        }
        self.requests = self.asked = self.known = 0
        self.seconds = 0.0
        return counts


@dataclass
class _Asked:
    """Scores of one rollout on their way. `events` are those of its candidates `[n, K]`; -1: none."""

    events: Array
    wait: Callable[[], Array]
    counts: _Counts

    @cached_property
    def scores(self) -> tuple[Array, Array]:
        """Events and log-probabilities `[n, K]`, waited for once; what the teacher did not say has no event."""
        start = time.perf_counter()
        try:
            logq_NK = self.wait()
        finally:
            self.counts.seconds += time.perf_counter() - start
        known_NK, events_NK = ~np.isnan(logq_NK), self.events.copy()
        support_NK = events_NK[:, :-1] >= 0
        self.counts.asked += int(support_NK.sum())
        self.counts.known += int((support_NK & known_NK[:, :-1]).sum())
        events_NK[:, :-1][~known_NK[:, :-1]] = -1
        return events_NK, np.nan_to_num(logq_NK, nan=-np.inf, neginf=-np.inf)


class ServerTeacher(Teacher):
    """Fits `interfaces.Teacher` with a CandidateScorer. `unbiased` adds the in-tail term of the sampled token;
    `candidates` ids per token are scored, the sampled token included.

    With another tokenizer, rows are those of the alignment, and what is not common to both falls into the tail.
    """

    def __init__(
        self, scorer: CandidateScorer, vocabulary: SharedVocabulary, *, candidates: int, unbiased: bool
    ) -> None:
        self.scorer, self.vocabulary, self.unbiased = scorer, vocabulary, unbiased
        self._candidates = candidates
        self._ids = _Ids.of(vocabulary.events("student"), vocabulary.events("teacher"))
        self._pending: dict[_Key, deque[_Asked]] = {}
        self._counts, self._received = _Counts(), scorer.received()

    @property
    def candidates(self) -> int:
        return self._candidates

    def submit(self, rollout: Rollout) -> None:
        """See `Teacher.submit`."""
        (aligned,) = self.align([rollout])
        self._pending.setdefault(_key(rollout), deque()).append(self._begin(aligned))

    def align(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """See `Teacher.align`."""
        aligner = self.vocabulary.aligner
        return [*rollouts] if aligner is None else [aligner.align(rollout) for rollout in rollouts]

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> CandidateScores:
        """See `Teacher.score`. What was not submitted is asked for now; nothing is waited for."""
        return CandidateScores([self._taken(rollout) for rollout in rollouts], unbiased=self.unbiased)

    def ready(self, rollouts: Sequence[Rollout]) -> None:
        """See `Teacher.ready`."""
        everything = [(rollout, self._taken(rollout)) for rollout in rollouts]
        for rollout, asked in everything:
            _ = asked.scores
            self._pending.setdefault(_key(rollout), deque()).append(asked)

    def metrics(self) -> dict[str, float]:
        """See `Teacher.metrics`."""
        before, self._received = self._received, self.scorer.received()
        self._pending.clear()
        return {**self._counts.taken(), "teacher_bytes": self._received - before}

    def _taken(self, rollout: Rollout) -> _Asked:
        """What was submitted of this rollout, or is submitted now."""
        waiting = self._pending.get(_key(rollout))
        return waiting.popleft() if waiting else self._begin(rollout)

    def _begin(self, rollout: Rollout) -> _Asked:
        n = len(rollout.completion_ids)
        if rollout.candidate_ids is None or len(rollout.candidate_ids) < n:
            raise ConfigError(
                "a teacher at a URL needs the student's candidates of every token, and the rollout engine gave none; "
                "use an engine that reports them (RolloutEngine.generate with candidates)"
            )
        candidates, completion, rows = rollout.candidate_ids[:n], rollout.completion_ids, [*range(n)]
        if rollout.aligned is not None:
            completion, rows = rollout.aligned.ids, [*rollout.aligned.teacher_rows]
            candidates = candidates[list(rollout.aligned.rows)]
        events = self._ids.events(candidates)
        asked = self._ids.asked(events, np.asarray(completion, dtype=np.int64)[rows])
        # Rows of the teacher that no row of the student is compared with ask for nothing.
        every = np.full((len(completion) if len(rows) else 0, asked.shape[1]), -1, dtype=np.int64)
        every[rows] = asked
        self._counts.requests += 1
        wait = self.scorer.begin(rollout.prompt.teacher_token_ids, completion, every)
        return _Asked(events, lambda: self._ids.joined(wait()[rows], asked, events.shape[1]), self._counts)


class CandidateScores:
    """Fits `interfaces.LogitSource` and `losses.chunked.Comparing`: log-probabilities of candidates, waited for when
    the first is needed."""

    def __init__(self, asked: Sequence[_Asked], *, unbiased: bool) -> None:
        self._asked, self._unbiased = asked, unbiased

    def logits(self, rows: slice | Tensor) -> Tensor:
        raise ConfigError(
            "a teacher at a URL gives no distribution over the whole vocabulary, which something in this run reads; "
            "load the teacher here (teacher.path) for it"
        )

    def compare(self, student_mV: Tensor, rows: slice, tokens_m: Tensor) -> Divergence:
        """See `losses.chunked.Comparing`."""
        events_mK, logq_mK = (x[rows].to(student_mV.device) for x in self._both)
        return candidate_divergence(student_mV, events_mK, logq_mK, unbiased=self._unbiased)

    def teacher_logprobs(self, rows: slice) -> Tensor:
        """Log-probabilities of the sampled tokens."""
        return self._both[1][rows, -1]

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        """The events of all candidates and their log-probabilities, `[M, K]`."""
        columns = zip(*(asked.scores for asked in self._asked), strict=True)
        events_MK, logq_MK = (torch.from_numpy(np.concatenate(column)) for column in columns)
        return events_MK, logq_MK


@dataclass(frozen=True)
class _Ids:
    """Candidates of the student as events, and events as ids of the teacher.

    `event_V` is the event of each of the student's ids, -1 for REST; `ids_CE` the teacher's ids of each event, -1 pads.
    None where ids are the events.
    """

    event_V: Array | None
    ids_CE: Array | None

    @classmethod
    def of(cls, student: Events | None, teacher: Events | None) -> _Ids:
        event_V = None if student is None else _without_rest(student)
        if teacher is None:
            return cls(event_V, None)
        theirs_V, size = _without_rest(teacher), teacher.size
        ids = np.flatnonzero(theirs_V >= 0)
        order = np.argsort(theirs_V[ids], kind="stable")
        events, ids = theirs_V[ids][order], ids[order]
        first_C = np.searchsorted(events, np.arange(size))
        place = np.arange(len(ids)) - first_C[events]
        ids_CE = np.full((size, int(place.max()) + 1), -1, dtype=np.int64)
        ids_CE[events, place] = ids
        return cls(event_V, ids_CE)

    def events(self, candidates: Array) -> Array:
        """The events of candidate ids; -1 for what the other side cannot express and for padding."""
        events: Array = candidates.copy() if self.event_V is None else self.event_V[candidates]
        events[candidates < 0] = -1
        return events

    def asked(self, events: Array, tokens: Array) -> Array:
        """The teacher's ids `[n, K * E]` of events `[n, K]`; last in each row stands the sampled one of `tokens`."""
        if self.ids_CE is None:
            asked: Array = events.copy()
            asked[:, -1] = tokens
            return asked
        asked_nKE = np.where(events[..., None] >= 0, self.ids_CE[events], -1)
        own_nE = asked_nKE[:, -1]
        # The sampled token's id goes behind the others of its event.
        own_nE[own_nE == tokens[:, None]] = -1
        ids: Array = np.concatenate([asked_nKE.reshape(len(events), -1), tokens[:, None]], axis=1)
        return ids

    def joined(self, scored: Array, asked: Array, candidates: int) -> Array:
        """Log-probabilities `[n, K]` of the events; NaN where one of an event's ids is not known."""
        if self.ids_CE is None:
            return scored
        own = scored[:, -1]
        each_nKE = scored[:, :-1].reshape(len(scored), candidates, -1).astype(np.float64)
        with np.errstate(divide="ignore"):
            joined = np.log(np.exp(each_nKE).sum(-1))
            joined[:, -1] = np.log(np.nansum(np.exp(each_nKE[:, -1]), axis=-1) + np.exp(own.astype(np.float64)))
        logq_nK: Array = joined.astype(np.float32)
        return logq_nK


def _without_rest(events: Events) -> Array:
    event_V = events.event_V.cpu().numpy().copy()
    if events.rest is not None:
        event_V[event_V == events.rest] = -1
    return event_V


def _key(rollout: Rollout) -> _Key:
    return rollout.prompt.teacher_token_ids, rollout.completion_ids, rollout.candidate_ids.tobytes()
