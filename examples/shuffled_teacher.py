"""A control arm: the teacher judges another text. What survives it is not the teacher's knowledge.

    parts = build(config)
    parts = dataclasses.replace(parts, teacher=ShuffledTeacher(parts.teacher))

Every rollout gets the distributions of the next one of its micro-batch, position by position (its last where it is
shorter). The gradient therefore depends on micro-batches and ranks, unlike that of every other setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.interfaces import LogitSource, Teacher
from headstart.records import Rollout


class ShuffledTeacher(Teacher):
    """Scores the next rollout in place of each; fits `headstart.interfaces.Teacher`. Needs two rollouts."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> LogitSource:
        others = [*rollouts[1:], *rollouts[:1]]
        return ShuffledScores(self.teacher.score(others), rollouts, others)


class ShuffledScores:
    """Logits that `scores` has for `others`, read at the positions of `rollouts`."""

    def __init__(self, scores: LogitSource, rollouts: Sequence[Rollout], others: Sequence[Rollout]) -> None:
        self._scores, rows, end = scores, [], 0
        for rollout, other in zip(rollouts, others, strict=True):
            start, end = end, end + len(other.completion_ids)
            rows += [min(start + t, end - 1) for t in range(len(rollout.completion_ids))]
        self._row_M = torch.tensor(rows)

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self._scores.logits(self._row_M[rows])
