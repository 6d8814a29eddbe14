"""The models an explanation compares, on the same problems. Each response is sampled and scored once for all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from headstart.assemble.pair import Pair
from headstart.diagnosis import probes
from headstart.diagnosis.positions import TokenReadings, read_tokens
from headstart.interfaces import Task
from headstart.models.causal import CausalModel
from headstart.models.collate import completion_text
from headstart.records import Problem, Prompt, Rollout, Verdict
from headstart.stats import Array, Estimate, by_problem, share

Source = Literal["before", "after", "twin", "teacher"]
"""The student before and after training, the student after full rollouts, the teacher."""
SOURCES: tuple[Source, ...] = ("before", "after", "twin", "teacher")
NAMES = dict(zip(SOURCES, ("the student before", "the student after", "the counterpart", "the teacher"), strict=True))
OPENING = 16
"""Tokens of a response that count as its opening."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Base of what `explain/<name>.json` holds; `sentence` is its outcome in words."""

    sentence: str

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


@dataclass(slots=True)
class Models:
    """`pair` holds the teacher and the student before; `students` the trained ones. `Prompt.index` is the problem's
    index in `problems`. `horizon` is the longest window (tokens) the run trained. Without a task nothing is graded.

    Rollouts are sampled as in training (temperature, top-p, top-k), `samples` a problem, at most `max_tokens` long,
    `batch_size` at once; `read_batch` are scored at once. `progress` is called before each sampling and
    each scoring, with its name.
    """

    pair: Pair
    students: Mapping[Source, CausalModel]
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    task: Task | None
    horizon: int
    samples: int
    max_tokens: int
    batch_size: int
    read_batch: int = 8
    seed: int = 0
    progress: Callable[[str], None] = lambda text: None
    _responses: dict[Source, list[Rollout]] = field(default_factory=dict)
    _read: dict[tuple[Source, Source], TokenReadings] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The models that are compared, in the order of SOURCES."""
        return tuple(s for s in SOURCES if s in ("before", "teacher") or s in self.students)

    @property
    def everyone(self) -> tuple[CausalModel, ...]:
        """All models that are compared."""
        return self.pair.student, self.pair.teacher, *self.students.values()

    def responses(self, source: Source) -> list[Rollout]:
        """`samples` rollouts of every prompt, prompt-major. All sources share the draws, so they compare paired."""
        if source not in self._responses:
            self._responses[source] = self._sample(source, self.prompts, self.samples, self.max_tokens, "explain")
        return self._responses[source]

    def read(self, student: Source, source: Source) -> TokenReadings:
        """The responses of `source` under `student` and the teacher. For student "teacher" the student before is read,
        and only the teacher's columns mean something."""
        if (student, source) not in self._read:
            responses = self.responses(source)
            self.progress(f"scoring responses of {NAMES[source]} under {NAMES[student]}")
            self._read[student, source] = read_tokens(self._pair(student), responses, batch_size=self.read_batch)
        return self._read[student, source]

    def finish(self, source: Source, begun: Sequence[Rollout], length: int) -> list[Rollout]:
        """Whole responses: the first `length` tokens of `begun`, the rest from `source`. A rollout that ends before
        stays as it is."""

        def sample(prompts: list[Prompt]) -> list[Rollout]:
            return self._sample(source, prompts, 1, self.max_tokens - length, "explain-tail")

        open_ended = [(length, r) for r in begun if len(r.completion_ids) > length]
        aligner = self.pair.vocabulary.aligner if source == "teacher" else None
        finished = iter(probes.finish(open_ended, sample, aligner=aligner))
        return [next(finished) if len(r.completion_ids) > length else r for r in begun]

    def verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        assert self.task is not None
        return probes.grade(self.task, self.problems, self.pair.tokenizer, rollouts)

    def problem_of(self, rollouts: Sequence[Rollout]) -> Array:
        """The problem of each rollout, int64."""
        return np.array([r.prompt.index for r in rollouts], dtype=np.int64)

    def _pair(self, student: Source) -> Pair:
        return self.pair.with_student(self.students[student]) if student in self.students else self.pair

    def _sample(
        self, source: Source, prompts: Sequence[Prompt], samples: int, max_tokens: int, purpose: str
    ) -> list[Rollout]:
        if not prompts:
            return []
        tails = "tails" if purpose == "explain-tail" else "responses"
        self.progress(f"sampling {tails} of {NAMES[source]}")
        return self._pair(source).sample(
            prompts,
            who="teacher" if source == "teacher" else "student",
            max_tokens=max_tokens,
            purpose=purpose,
            samples=samples,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def opening(tokenizer: Any, rollout: Rollout, tokens: int = OPENING) -> str:
    """The text of the rollout's first tokens."""
    cut = len(rollout.completion_ids) > tokens
    first = replace(rollout, completion_ids=rollout.completion_ids[:tokens], stopped=False) if cut else rollout
    return completion_text(tokenizer, first)


def token_share(counts_RP: Array, problem_M: Array, value_M: Array) -> Estimate | None:
    """Mean over tokens of a value in 0..1, resampled over problems; None without tokens."""
    return share(counts_RP, *by_problem(problem_M, value_M, counts_RP.shape[1]))
