"""A teacher in this process: any causal language model that shares the student's tokenisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.errors import ConfigError
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
    """Scores rollouts from the teacher's own view of the prompt. Never trained, never in training mode.

    `shuffled` is a control: every rollout gets the distributions that belong to the next one of the same call.
    """

    def __init__(self, model: CausalModel, *, shuffled: bool = False) -> None:
        self.model, self.shuffled = model, shuffled
        self.model.model.eval().requires_grad_(False)

    def score(self, rollouts: Sequence[Rollout]) -> HiddenScores:
        batch = self.model.batch(rollouts, "teacher")
        with self.model.sampling_mode():
            hidden_MD = self.model.completion_hidden(batch)
        if self.shuffled:
            hidden_MD = hidden_MD[_of_the_next([len(r.completion_ids) for r in rollouts])]
        return HiddenScores(self.model, hidden_MD)


def _of_the_next(lengths: Sequence[int]) -> list[int]:
    """For each token, the place of the next rollout's token at the same position (its last where it is shorter); the
    last rollout gets the first. Raises ConfigError when there is no other rollout."""
    if len(lengths) == 1:
        raise ConfigError(
            "training.shuffle_teacher needs two rollouts in a micro-batch (found 1); raise "
            "training.prompts_per_step or training.micro_batch"
        )
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    others = [(row + 1) % len(lengths) for row in range(len(lengths))]
    return [starts[o] + min(t, lengths[o] - 1) for n, o in zip(lengths, others, strict=True) for t in range(n)]
