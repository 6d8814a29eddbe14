"""A teacher in this process: any causal language model that shares the student's tokenisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.models.causal import CausalModel
from headstart.records import Rollout


class HiddenScores:
    """Teacher logits on demand: hidden states `[M, D]` are kept, the head runs for the rows asked for."""

    def __init__(self, model: CausalModel, hidden_MD: Tensor) -> None:
        self._model = model
        self._hidden_MD = hidden_MD

    def logits(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return self._model.head(self._hidden_MD[rows])


class LocalTeacher:
    """Scores rollouts from the teacher's own view of the prompt. Never trained, never in training mode."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.model.model.eval().requires_grad_(False)

    def score(self, rollouts: Sequence[Rollout]) -> HiddenScores:
        batch = self.model.batch(rollouts, "teacher")
        with self.model.sampling_mode():
            return HiddenScores(self.model, self.model.completion_hidden(batch))
