"""A teacher in this process: any causal language model that shares the student's tokenisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from headstart.models.causal import CausalModel
from headstart.records import Prompt, Rollout


class HiddenScores:
    """Teacher logits on demand: hidden states `[M, D]` are kept, the head runs for the rows asked for."""

    def __init__(self, model: CausalModel, hidden_MD: Tensor) -> None:
        self._model = model
        self._hidden_MD = hidden_MD

    def logits(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad():
            return self._model.head(self._hidden_MD[rows])


class LocalTeacher:
    """Scores rollouts from the teacher's own view of the prompt. Never trained, never in training mode."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.model.model.eval().requires_grad_(False)
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def prefilled(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """See `Teacher.prefilled`. On a GPU the prefill runs on a stream of its own, beside the decoding that leaves
        most of the GPU idle."""
        with self.model.keeping_prompts():
            if self.model.fast is not None:
                if self.stream is not None:
                    self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
                with self.model.sampling_mode(), torch.cuda.stream(self.stream) if self.stream else nullcontext():
                    self.model.encode(self.model.fast, [prompt.teacher_token_ids for prompt in prompts])
            yield

    def score(self, rollouts: Sequence[Rollout]) -> HiddenScores:
        if self.stream is not None:
            torch.cuda.current_stream(self.model.device).wait_stream(self.stream)
        batch = self.model.batch(rollouts, "teacher")
        with self.model.sampling_mode():
            return HiddenScores(self.model, self.model.completion_hidden(batch))
