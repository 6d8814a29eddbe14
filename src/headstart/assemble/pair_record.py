"""A student and its teacher, loaded and ready to speak and to judge: what every diagnosis starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from headstart.config.schema import Config
from headstart.models.causal import CausalModel
from headstart.models.vocabulary import SharedVocabulary
from headstart.records import Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime

Speaker = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models cut to the vocabulary they share. `student` may be any model of the student's tokenisation."""

    config: Config
    runtime: Runtime
    tokenizer: Any
    teacher_tokenizer: Any
    vocabulary: SharedVocabulary
    student: CausalModel
    teacher: CausalModel

    def with_student(self, student: CausalModel) -> Pair:
        """The same teacher beside another student, such as the trained one."""
        return replace(self, student=student)

    def engine(self, who: Speaker) -> InProcessEngine:
        return InProcessEngine(self.student if who == "student" else self.teacher, self.vocabulary.stop_ids)

    def sample(
        self,
        who: Speaker,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        purpose: str,
        samples: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
    ) -> list[Rollout]:
        """`samples` rollouts a prompt, spoken by `who` from its own view; each carries the prompt with both views.

        Draws depend on (seed, purpose, prompt index, sample, position) alone. `sampling` is the run's own by default.
        """
        own = prompts if who == "student" else [replace(p, token_ids=p.teacher_token_ids) for p in prompts]
        rollouts = self.engine(who).generate(
            own,
            samples=samples,
            max_tokens=max_tokens,
            sampling=sampling or self.config.rollout.sampling,
            key=(seed, purpose, 0),
            batch_size=batch_size,
        )
        both = [prompt for prompt in prompts for _ in range(samples)]
        return [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts, both, strict=True)]
