"""An engine of a model with another tokenizer, whose completions come back in the student's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Unpack

from headstart.interfaces import Draws, RolloutEngine
from headstart.models.alignment import Aligner
from headstart.records import Prompt, Rollout
from headstart.rollout.decoding import token_limits
from headstart.rollout.engine import InProcessEngine

ROOM = 2
"""Tokens of its own that the teacher may write for each of the student's that are asked for."""


class TranslatingEngine(RolloutEngine):
    """Lengths are counted in the student's tokens everywhere else, so that one number means one thing: the teacher
    writes up to ROOM times `max_tokens` of its own, where its context has the room, and the translation is cut."""

    def __init__(self, engine: InProcessEngine, aligner: Aligner) -> None:
        self.engine, self.aligner = engine, aligner

    def generate(self, prompts: Sequence[Prompt], **draws: Unpack[Draws]) -> list[Rollout]:
        """See `RolloutEngine.generate`. What is translated has no candidates."""
        assert not draws.get("candidates"), "only the student's own engine reports candidates"
        limits = token_limits(draws["max_tokens"], prompts)
        context = self.engine.model.max_positions
        room = [
            ROOM * limit if context is None else max(limit, min(ROOM * limit, context - len(prompt.token_ids)))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        own: Draws = {**draws, "max_tokens": room}
        rollouts = self.engine.generate(prompts, **own)
        longest = (limit for limit in limits for _ in range(draws["samples"]))
        return [self._translated(rollout, limit) for rollout, limit in zip(rollouts, longest, strict=True)]

    def _translated(self, rollout: Rollout, limit: int) -> Rollout:
        ids = self.aligner.translate(rollout.completion_ids, rollout.stopped)
        stopped = rollout.stopped and bool(self.aligner.student.stop_ids) and len(ids) <= limit
        return replace(rollout, completion_ids=ids[:limit], stopped=stopped)

    def alone(self) -> AbstractContextManager[None]:
        """See `RolloutEngine.alone`."""
        return self.engine.alone()

    def fitting(self, prompts: Sequence[Prompt], max_tokens: int) -> int | None:
        """See `RolloutEngine.fitting`."""
        return self.engine.fitting(prompts, max_tokens)
