"""The teacher on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from headstart.interfaces import LogitSource, Teacher
from headstart.losses.events import REMOVED, join
from headstart.models.alignment import Aligner
from headstart.models.causal import CausalModel
from headstart.models.decoder import Prefill
from headstart.records import Prompt, Rollout
from headstart.teacher.controls import ChunkScores, SortedScores


class HiddenScores:
    """Teacher logits on demand: hidden states `[M, D]` are kept, the head runs for the rows asked for. Its ids are
    joined to the events that the pair is compared over."""

    inside_M: Tensor | None = None

    def __init__(self, model: CausalModel, hidden_MD: Tensor) -> None:
        self._model = model
        self._hidden_MD = hidden_MD

    def logits(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad():
            return join(self._model.events, self._model.head(self._hidden_MD[rows]))


class ByteScores(HiddenScores):
    """Also scores rows inside one of the teacher's tokens: what its tokens that begin with the bytes written so far
    (`emitted[m]`, empty at a token's start) still say, renormalised over them."""

    def __init__(self, model: CausalModel, hidden_MD: Tensor, aligner: Aligner, emitted: Sequence[bytes]) -> None:
        super().__init__(model, hidden_MD)
        self._aligner, self._emitted = aligner, emitted
        self.inside_M = torch.tensor([bool(e) for e in emitted], dtype=torch.bool, device=hidden_MD.device)

    def logits(self, rows: slice | Tensor) -> Tensor:
        with torch.no_grad():
            logits_mV = self._model.head(self._hidden_MD[rows])
            joined_mC = join(self._model.events, logits_mV)
            numbers = range(len(self._emitted))[rows] if isinstance(rows, slice) else rows.tolist()
            for k, m in enumerate(numbers):
                if self._emitted[m]:
                    ids, events = (x.to(logits_mV.device) for x in self._aligner.remainders(self._emitted[m]))
                    own = logits_mV[k, ids]
                    sums_C = torch.zeros_like(joined_mC[k]).index_add_(0, events, (own - own.max()).exp())
                    joined_mC[k] = (sums_C.log() + own.max()).clamp_min(REMOVED)
            return joined_mC


class LocalTeacher(Teacher):
    """Scores rollouts from the teacher's own view of the prompt. Never trained, never in training mode.

    `aligner` is needed where the teacher has another tokenizer than the student.
    """

    def __init__(self, model: CausalModel, aligner: Aligner | None = None) -> None:
        self._model = model
        self.aligner = aligner
        self.model.model.eval().requires_grad_(False)
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def model(self) -> CausalModel:
        return self._model

    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """See `Teacher.prefill`. On a GPU it has a stream of its own, beside the decoding, which leaves most of the GPU
        idle."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            return self.model.prefill([prompt.teacher_token_ids for prompt in prompts])

    def align(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """See `Teacher.align`."""
        return [*rollouts] if self.aligner is None else [self.aligner.align(rollout) for rollout in rollouts]

    def score(self, rollouts: Sequence[Rollout], prefill: Prefill | None = None) -> LogitSource:
        if self.stream is not None:
            torch.cuda.current_stream(self.model.device).wait_stream(self.stream)
        assert self.aligner is None or all(r.aligned is not None for r in rollouts), "rollouts must be aligned first"
        batch = self.model.batch(rollouts, "teacher")
        with self.model.sampling_mode():
            hidden_MD = self.model.completion_hidden(batch, prefill)
        if self.aligner is not None and self.aligner.kind == "sorted":
            return SortedScores(self.model, hidden_MD)
        if self.aligner is not None and self.aligner.kind == "chunk":
            return ChunkScores(self.model, hidden_MD, batch.tokens_M, rollouts)
        emitted = [e for r in rollouts if r.aligned is not None for e in r.aligned.inside]
        if self.aligner is None or not any(emitted):
            return HiddenScores(self.model, hidden_MD)
        return ByteScores(self.model, hidden_MD, self.aligner, emitted)
