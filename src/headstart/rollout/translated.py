"""An engine of a model with another tokenizer, whose completions come back in the student's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from headstart.interfaces import RolloutEngine
from headstart.models.alignment import Aligner
from headstart.records import Prompt, Rollout, Sampling


class TranslatingEngine(RolloutEngine):
    """Lengths are counted in the student's tokens everywhere else, so that one number means one thing. `max_tokens` is
    in the teacher's own tokens while it writes, and a longer translation is kept whole."""

    def __init__(self, engine: RolloutEngine, aligner: Aligner) -> None:
        self.engine, self.aligner = engine, aligner

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_tokens: int | Sequence[int],
        sampling: Sampling,
        key: tuple[int, str, int],
        batch_size: int | None = None,
        finished: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        rollouts = self.engine.generate(
            prompts,
            samples=samples,
            max_tokens=max_tokens,
            sampling=sampling,
            key=key,
            batch_size=batch_size,
            finished=finished,
        )
        return [replace(r, completion_ids=self.aligner.translate(r.completion_ids, r.stopped)) for r in rollouts]

    def fitting(self, prompts: Sequence[Prompt], max_tokens: int) -> int | None:
        """See `RolloutEngine.fitting`."""
        return self.engine.fitting(prompts, max_tokens)
