"""Teacher decay: how well does the teacher finish what the student began? (arXiv 2605.27028)

R(N) is the teacher's accuracy when it continues the student's first N tokens. Two controls say what a fall means: the
teacher continuing *its own* prefix of the same length, and the split by the state of the prefix (still clean, already
wrong), because a fall can be a growing share of spoiled prefixes rather than a teacher that loses the thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headstart.interfaces import RolloutEngine, Task
from headstart.models.collate import completion_text
from headstart.numerics.estimators import wilson
from headstart.records import Problem, Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class Share:
    """`successes` of `n` with the 95% Wilson interval."""

    successes: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Share:
        low, high = wilson(sum(outcomes), len(outcomes)) if outcomes else (0.0, 1.0)
        return cls(sum(outcomes), len(outcomes), low, high)

    @property
    def mean(self) -> float:
        return self.successes / self.n if self.n else float("nan")


@dataclass(frozen=True, slots=True)
class DecayPoint:
    """R at one prefix length (tokens): all prefixes, by their state, and the teacher on its own prefixes."""

    prefix_tokens: int
    after_student: Share
    after_clean: Share
    after_wrong: Share
    after_own: Share


@dataclass(frozen=True, slots=True)
class DecayCurve:
    """R(N) over a grid of N, with controls. `student` is the student's own accuracy, the level R falls to."""

    points: tuple[DecayPoint, ...]
    student: Share
    prompts: int
    generated_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DecayProbe:
    """What the measurement needs: both engines, the task and its problems as prompts for student and teacher."""

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    student: RolloutEngine
    teacher: RolloutEngine
    tokenizer: Any
    sampling: Sampling
    max_tokens: int
    seed: int = 0

    def measure(self, grid: Sequence[int]) -> DecayCurve:
        """One student rollout and one teacher rollout per prompt, then one teacher continuation per grid point.

        Prefix length 0 is the teacher's own answer. A prefix longer than its rollout is the whole rollout.
        """
        students = self._sample(self.student, self.prompts, "decay-student")
        teacher_prompts = [replace(p, token_ids=p.teacher_token_ids) for p in self.prompts]
        owns = self._sample(self.teacher, teacher_prompts, "decay-own")
        generated = sum(len(r.completion_ids) for r in (*students, *owns))
        points = []
        for length in grid:
            after_student, cost_student = self._continue(students, length)
            after_own, cost_own = self._continue(owns, length)
            generated += cost_student + cost_own
            states = [self._state(rollout, length) for rollout in students]
            points.append(
                DecayPoint(
                    prefix_tokens=length,
                    after_student=Share.of(after_student),
                    after_clean=Share.of([o for o, s in zip(after_student, states, strict=True) if s == "clean"]),
                    after_wrong=Share.of([o for o, s in zip(after_student, states, strict=True) if s == "wrong"]),
                    after_own=Share.of(after_own),
                )
            )
        own_accuracy = Share.of([self._correct(r.prompt.index, completion_text(self.tokenizer, r)) for r in students])
        return DecayCurve(tuple(points), own_accuracy, len(self.prompts), generated)

    def _sample(self, engine: RolloutEngine, prompts: Sequence[Prompt], purpose: str) -> list[Rollout]:
        return engine.generate(
            prompts,
            samples=1,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            key=(self.seed, purpose, 0),
        )

    def _continue(self, rollouts: Sequence[Rollout], length: int) -> tuple[list[bool], int]:
        """Is each answer right when the teacher finishes the first `length` tokens? And the tokens this cost."""
        open_prompts = [
            replace(r.prompt, token_ids=r.prompt.teacher_token_ids + r.completion_ids[:length])
            for r in rollouts
            if length < len(r.completion_ids)
        ]
        continued = self._sample(self.teacher, open_prompts, f"decay-continue-{length}") if open_prompts else []
        ending = {c.prompt.index: c for c in continued}
        outcomes = []
        for rollout in rollouts:
            index = rollout.prompt.index
            whole = rollout
            if index in ending:
                tail = ending[index]
                whole = Rollout(tail.prompt, 0, rollout.completion_ids[:length] + tail.completion_ids, tail.stopped)
            outcomes.append(self._correct(index, completion_text(self.tokenizer, whole)))
        return outcomes, sum(len(c.completion_ids) for c in continued)

    def _state(self, rollout: Rollout, length: int) -> str:
        prefix = replace(rollout, completion_ids=rollout.completion_ids[:length], stopped=False)
        return self.task.prefix_state(self.problems[rollout.prompt.index], completion_text(self.tokenizer, prefix))

    def _correct(self, index: int, response: str) -> bool:
        return self.task.grade(self.problems[index], response).correct
