"""What the checks look at: a pair, its prompts, its test, and a few short responses of both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from headstart.assemble.pair import Pair, Speaker
from headstart.assemble.tasks import Questions, load_questions
from headstart.interfaces import OnProgress, silent
from headstart.models.templates import PromptSet
from headstart.records import Problem, Rollout

RESPONSES = 8
"""Prompts that responses are sampled for, spread over all of them; one from each model."""
TOKENS = 1280
"""Tokens that each model may write in all, divided evenly among its responses: 160 for each of 8. On one core 17
seconds for a model of 135 M."""
SCORED = 32
"""Tokens of a response that are scored where its end does not matter; fewer at a shorter horizon."""
FEW = 4
"""Responses that are enough where two ways to compute the same are compared, which differ everywhere or nowhere."""
ROWS = 16
"""Rollouts that are timed on a CPU."""


@dataclass(slots=True)
class Watched:
    """Says at which check a preflight is, and what is being done inside it."""

    progress: OnProgress = silent
    done: int = 0
    total: int = 0
    name: str = ""

    def at(self, done: int, total: int, name: str) -> None:
        self.done, self.total, self.name = done, total, name
        self.say()

    def say(self, text: str = "") -> None:
        self.progress(self.done, self.total, f"{self.name}: {text}" if text else self.name)

    def within(self, done: int, total: int, text: str = "", /) -> None:
        """The OnProgress of what a check does in parts."""
        self.say(f"{text or 'part'} {done} of {total}")


@dataclass(frozen=True)
class Subject:
    """Responses are sampled, steps timed and the test read when the first check asks for them."""

    pair: Pair
    problems: Sequence[Problem]
    prompts: PromptSet
    asked: Questions | None = None
    """The test, where it is read already."""
    watched: Watched = field(default_factory=Watched)

    @cached_property
    def questions(self) -> Questions | None:
        if self.asked is not None or self.pair.config.evaluation is None:
            return self.asked
        return load_questions(self.pair.config, self.pair.tokenizer)

    @cached_property
    def student_responses(self) -> list[Rollout]:
        return self._responses("student")

    @cached_property
    def teacher_responses(self) -> list[Rollout]:
        return self._responses("teacher")

    @property
    def openings(self) -> list[Rollout]:
        """The beginnings of the student's responses."""
        return cut(self.student_responses, min(SCORED, self.pair.config.horizon.longest or SCORED))

    def _responses(self, who: Speaker) -> list[Rollout]:
        model = self.pair.student if who == "student" else self.pair.teacher
        everything = self.prompts.prompts
        count = min(RESPONSES, len(everything))
        chosen = [everything[index * len(everything) // count] for index in range(count)]
        longest = max(len(p.token_ids if who == "student" else p.teacher_token_ids) for p in chosen)
        room = TOKENS // count if model.max_positions is None else min(TOKENS // count, model.max_positions - longest)
        self.watched.say(f"sampling {count} responses of at most {room} tokens from the {who}")
        seed = self.pair.config.training.seed
        return self.pair.sample(chosen, who=who, max_tokens=max(1, room), purpose=f"preflight-{who}", seed=seed)


def cut(rollouts: Sequence[Rollout], tokens: int) -> list[Rollout]:
    return [replace(r, completion_ids=r.completion_ids[:tokens]) for r in rollouts]
