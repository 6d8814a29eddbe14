"""The models an explanation compares, on the same problems. What each says is sampled once, for every reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from headstart.assemble.pair import Pair
from headstart.diagnosis.positions import TokenReadings, read_tokens
from headstart.interfaces import Task
from headstart.models.causal import CausalModel
from headstart.models.collate import completion_text
from headstart.records import Problem, Prompt, Rollout, Verdict
from headstart.stats import Array

Voice = Literal["before", "after", "twin", "teacher"]
"""The student before and after training, the student after full rollouts, the teacher."""
VOICES: tuple[Voice, ...] = ("before", "after", "twin", "teacher")


@dataclass(slots=True)
class Cast:
    """`pair` holds the teacher and the student before; `students` the trained ones. `Prompt.index` is the problem's
    place in `problems`. `horizon` is the longest window (tokens) the run trained. Without a task nothing is graded.

    Rollouts are sampled as in training (temperature, top-p, top-k), `samples` a problem, at most `max_tokens` long,
    `batch_size` at once; `read_batch` are scored at once.
    `piece` is called after each piece of work.
    """

    pair: Pair
    students: Mapping[Voice, CausalModel]
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    task: Task | None
    horizon: int
    samples: int
    max_tokens: int
    batch_size: int
    read_batch: int = 8
    seed: int = 0
    piece: Callable[[], None] = lambda: None
    _said: dict[Voice, list[Rollout]] = field(default_factory=dict)
    _read: dict[tuple[Voice, Voice], TokenReadings] = field(default_factory=dict)

    @property
    def voices(self) -> tuple[Voice, ...]:
        """Who is here, in the order of VOICES."""
        return tuple(v for v in VOICES if v in ("before", "teacher") or v in self.students)

    def said(self, voice: Voice) -> list[Rollout]:
        """`samples` rollouts of every prompt, prompt-major. Every voice has the same draws, so they compare paired."""
        if voice not in self._said:
            self._said[voice] = self._speak(voice, self.prompts, self.samples, self.max_tokens, "explain")
        return self._said[voice]

    def read(self, student: Voice, said_by: Voice) -> TokenReadings:
        """The rollouts of `said_by` as `student` and the teacher see them. For student "teacher" the student before is
        read, and only the teacher's columns mean something."""
        if (student, said_by) not in self._read:
            pair = self._pair(student)
            self._read[student, said_by] = read_tokens(pair, self.said(said_by), batch_size=self.read_batch)
            self.piece()
        return self._read[student, said_by]

    def finish(self, voice: Voice, begun: Sequence[Rollout], length: int) -> list[Rollout]:
        """Whole responses: the first `length` tokens of `begun`, the rest from `voice`. Where nothing is left to say
        the rollout stands as it is."""
        open_ = [r for r in begun if len(r.completion_ids) > length]
        prompts = [
            replace(
                r.prompt,
                token_ids=r.prompt.token_ids + r.completion_ids[:length],
                teacher_token_ids=r.prompt.teacher_token_ids + r.completion_ids[:length],
            )
            for r in open_
        ]
        tails = iter(self._speak(voice, prompts, 1, self.max_tokens - length, "explain-tail"))
        finished = []
        for rollout in begun:
            if len(rollout.completion_ids) > length:
                tail = next(tails)
                ids = rollout.completion_ids[:length] + tail.completion_ids
                rollout = Rollout(rollout.prompt, rollout.sample_index, ids, tail.stopped)
            finished.append(rollout)
        return finished

    def verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """The task's verdict on each rollout. In threads: sandboxes and math workers go side by side."""
        task = self.task
        assert task is not None

        def verdict(rollout: Rollout) -> Verdict:
            return task.grade(self.problems[rollout.prompt.index], completion_text(self.pair.tokenizer, rollout))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(verdict, rollouts))

    def problem_of(self, rollouts: Sequence[Rollout]) -> Array:
        """The problem of each rollout, int64."""
        return np.array([r.prompt.index for r in rollouts], dtype=np.int64)

    def _pair(self, student: Voice) -> Pair:
        return self.pair.with_student(self.students[student]) if student in self.students else self.pair

    def _speak(
        self, voice: Voice, prompts: Sequence[Prompt], samples: int, max_tokens: int, purpose: str
    ) -> list[Rollout]:
        if not prompts or max_tokens < 1:
            return []
        rollouts = self._pair(voice).sample(
            prompts,
            who="teacher" if voice == "teacher" else "student",
            max_tokens=max_tokens,
            purpose=purpose,
            samples=samples,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        self.piece()
        return rollouts
