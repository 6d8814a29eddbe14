"""Probes by continuation: both models' own responses, and every prefix of them finished by both."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from headstart.assemble.pair import Speaker
from headstart.assemble.speed import Speed, timed
from headstart.diagnosis.curve import DecayCurve, PrefixOutcome, ProblemOutcome, decay_curve
from headstart.interfaces import RolloutEngine, Task
from headstart.models.alignment import Aligner
from headstart.models.collate import completion_text
from headstart.progress import doing
from headstart.records import PrefixState, Problem, Prompt, Rollout, Sampling, Verdict

GIFTS = 8
"""Continuations a problem at the one length where the plateau is read."""
SPEAKERS: tuple[Speaker, Speaker] = ("student", "teacher")
LONGEST_PREFIX = 1 << 20
"""Prefix lengths are below this, so that one random-stream key holds problem, origin and length of a continuation."""
FEWEST_VOTES = 2
"""Votes that an answer needs: one alone could be any slip."""

_Prefix = tuple[Speaker, int, Rollout]
"""Whose response it is, how many of its tokens are kept, and the response."""
_Graded = dict[tuple[Speaker, Speaker, int, int], bool]
"""Whether a continuation is right, by who continues whose prefix, its length and the problem's index."""


@dataclass(frozen=True, slots=True)
class Response:
    """A model's own response to a problem, graded. `answer` is what the grader read, where it says so; `seconds` the
    response's share of the time it took."""

    rollout: Rollout
    correct: bool
    answer: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DecayProbe:
    """What the measurement needs: both engines, the task and its problems as prompts for student and teacher.

    `Prompt.index` is the problem's index in `problems`; not every problem needs a prompt. `finished` is called with
    every generation as it ends.
    """

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    student: RolloutEngine
    teacher: RolloutEngine
    tokenizer: Any
    sampling: Sampling
    max_tokens: int
    batch_size: int | None = None
    seed: int = 0
    finished: Callable[[Rollout], None] = lambda rollout: None
    aligner: Aligner | None = None
    """Where the teacher has another tokenizer."""

    def measure(self, grid: Sequence[int]) -> DecayCurve:
        """The whole curve at once, nothing stored: one response of each model a problem, then every continuation."""
        students, teachers = self.respond("student", self.prompts), self.respond("teacher", self.prompts)
        outcomes = self.outcomes(students, teachers, grid)
        return decay_curve(outcomes, task=self.task.name, max_tokens=self.max_tokens, seed=self.seed)

    def respond(
        self, who: Speaker, prompts: Sequence[Prompt], samples: int = 1, purpose: str = "own"
    ) -> list[Response]:
        """`samples` own responses of `who` to each prompt, prompt-major, graded."""
        start = time.perf_counter()
        rollouts = self._generate(who, prompts, samples, self.max_tokens, f"diagnose-{purpose}")
        verdicts = self.grade(rollouts)
        seconds = (time.perf_counter() - start) / max(1, len(rollouts))
        return [Response(r, v.correct, v.answer, seconds) for r, v in zip(rollouts, verdicts, strict=True)]

    def speed(self, who: Speaker, batch: int) -> Speed:
        """How fast `who` is in batches of `batch`."""
        engine, prompts = (self.student, self.prompts) if who == "student" else (self.teacher, _teachers(self.prompts))
        return timed(engine, prompts, batch, self.sampling)

    def outcomes(
        self, students: Sequence[Response], teachers: Sequence[Response], grid: Sequence[int]
    ) -> list[ProblemOutcome]:
        """Every continuation of these problems' responses; `students` and `teachers` hold the same problems in order.

        Lengths are those of `grid` and 0, where the models' own responses are counted. All continuations by one model
        go through one call of its engine. A draw depends on seed, problem, length, speaker and origin alone, so neither
        the grid nor the grouping of problems changes an outcome.
        """
        start = time.perf_counter()
        lengths = sorted({0, *grid})
        own: dict[Speaker, Sequence[Response]] = {"student": students, "teacher": teachers}
        prefixes: list[_Prefix] = [
            (origin, length, response.rollout)
            for length in lengths
            for origin in SPEAKERS
            for response in own[origin]
            if 0 < length < len(response.rollout.completion_ids)
        ]
        right: _Graded = {}
        cost: Counter[int] = Counter()
        for who in SPEAKERS:
            whole = self._finish(who, prefixes)
            for (origin, length, begun), rollout, verdict in zip(prefixes, whole, self.grade(whole), strict=True):
                right[who, origin, length, begun.prompt.index] = verdict.correct
                cost[begun.prompt.index] += len(rollout.completion_ids) - length
        seconds = (time.perf_counter() - start) / len(students)
        return [
            ProblemOutcome(
                index=s.rollout.prompt.index,
                problem_id=s.rollout.prompt.problem_id,
                student=s.correct,
                teacher=t.correct,
                student_tokens=len(s.rollout.completion_ids),
                generated_tokens=sum(len(r.rollout.completion_ids) for r in (s, t)) + cost[s.rollout.prompt.index],
                seconds=s.seconds + t.seconds + seconds,
                points=tuple(self._point(s, t, length, right) for length in lengths),
            )
            for s, t in zip(students, teachers, strict=True)
        ]

    def finish(
        self, who: Speaker, begun: Sequence[Rollout], length: int | None = None, origin: Speaker = "student"
    ) -> list[Rollout]:
        """`begun`, sampled by `origin`, cut after `length` tokens (None: where they end) and finished by `who`.

        A response that ends before, by its stop token or at `max_tokens`, stays as it is.
        """
        cuts = [len(r.completion_ids) if length is None else min(length, len(r.completion_ids)) for r in begun]
        open_ended = [
            i
            for i, (r, cut) in enumerate(zip(begun, cuts, strict=True))
            if cut < len(r.completion_ids) or (not r.stopped and cut < self.max_tokens)
        ]
        finished = self._finish(who, [(origin, cuts[i], begun[i]) for i in open_ended])
        whole = dict(zip(open_ended, finished, strict=True))
        return [whole.get(i, rollout) for i, rollout in enumerate(begun)]

    def gifts(self, teachers: Sequence[Response], length: int, samples: int = GIFTS) -> list[float]:
        """The student's share of right answers after the first `length` tokens of each of the teacher's responses, from
        `samples` continuations a problem: this one length matters more than the rest."""
        begun: list[_Prefix] = [
            ("teacher", length, t.rollout) for t in teachers if length < len(t.rollout.completion_ids)
        ]
        verdicts = iter(self.grade(self._finish("student", begun, samples, "diagnose-gift")))
        return [
            sum(next(verdicts).correct for _ in range(samples)) / samples
            if length < len(t.rollout.completion_ids)
            else float(t.correct)
            for t in teachers
        ]

    def grade(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        return grade(self.task, self.problems, self.tokenizer, rollouts)

    def _point(self, student: Response, teacher: Response, length: int, right: _Graded) -> PrefixOutcome:
        own = {"student": student, "teacher": teacher}
        index = student.rollout.prompt.index

        def outcome(speaker: Speaker, origin: Speaker) -> bool:
            # At length 0 there is no prefix; at the end of a response nothing is left to finish.
            whole = own[speaker if length == 0 else origin].correct
            return right.get((speaker, origin, length, index), whole)

        return PrefixOutcome(
            prefix_tokens=length,
            state=self._state(student.rollout, length),
            after_student=outcome("teacher", "student"),
            after_own=outcome("teacher", "teacher"),
            student_continues=outcome("student", "student"),
            gift=outcome("student", "teacher"),
        )

    def _finish(
        self, who: Speaker, prefixes: Sequence[_Prefix], samples: int = 1, purpose: str = "diagnose-finish"
    ) -> list[Rollout]:
        def sample(prompts: list[Prompt]) -> list[Rollout]:
            keyed = [
                replace(prompt, index=(2 * prompt.index + SPEAKERS.index(origin)) * LONGEST_PREFIX + length)
                for prompt, (origin, length, _) in zip(prompts, prefixes, strict=True)
            ]
            return self._generate(who, keyed, samples, [self.max_tokens - length for _, length, _ in prefixes], purpose)

        aligner = self.aligner if who == "teacher" else None
        return finish([(length, begun) for _, length, begun in prefixes], sample, samples, aligner)

    def _generate(
        self, who: Speaker, prompts: Sequence[Prompt], samples: int, max_tokens: int | Sequence[int], purpose: str
    ) -> list[Rollout]:
        """Rollouts from `who`'s view of the prompts; each carries its prompt with both views."""
        if not prompts:
            return []
        engine = self.student if who == "student" else self.teacher
        rollouts = engine.generate(
            prompts if who == "student" else _teachers(prompts),
            samples=samples,
            max_tokens=max_tokens,
            sampling=self.sampling,
            key=(self.seed, f"{purpose}-{who}", 0),
            batch_size=self.batch_size,
            finished=self.finished,
        )
        both = (prompt for prompt in prompts for _ in range(samples))
        return [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts, both, strict=True)]

    def _state(self, rollout: Rollout, length: int) -> PrefixState:
        if length >= len(rollout.completion_ids):
            return "finished"
        prefix = replace(rollout, completion_ids=rollout.completion_ids[:length], stopped=False)
        return self.task.prefix_state(self.problems[rollout.prompt.index], completion_text(self.tokenizer, prefix))


def _teachers(prompts: Sequence[Prompt]) -> list[Prompt]:
    """As the teacher reads them."""
    return [p.as_teacher() for p in prompts]


def finish(
    prefixes: Sequence[tuple[int, Rollout]],
    sample: Callable[[list[Prompt]], list[Rollout]],
    samples: int = 1,
    aligner: Aligner | None = None,
) -> list[Rollout]:
    """`samples` whole responses for each (length, rollout): its first `length` tokens, and a tail. `sample` makes
    `samples` tails a prompt, prompt-major, from prompts that end with those tokens in both views. With `aligner` the
    teacher writes the tails; a prefix that ends inside one of its tokens is cut back to where that begins."""
    prompts, begun = [], []
    for length, rollout in prefixes:
        prompt, prefix = rollout.prompt, rollout.completion_ids[:length]
        own, theirs = (prefix, prefix) if aligner is None else aligner.begin(rollout, length)
        views = prompt.token_ids + own, prompt.teacher_token_ids + theirs
        prompts.append(replace(prompt, token_ids=views[0], teacher_token_ids=views[1]))
        begun += [(prompt, own)] * samples
    return [
        Rollout(prompt, tail.sample_index, own + tail.completion_ids, tail.stopped)
        for (prompt, own), tail in zip(begun, sample(prompts), strict=True)
    ]


@doing("grading")
def grade(task: Task, problems: Sequence[Problem], tokenizer: Any, rollouts: Sequence[Rollout]) -> list[Verdict]:
    """The task's verdict on each rollout, in a thread pool: sandboxes and math workers run side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = [completion_text(tokenizer, rollout) for rollout in rollouts]
        return list(pool.map(task.grade, [problems[r.prompt.index] for r in rollouts], texts))


# --- reference answers by vote ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class References:
    """The teacher's majority answer by problem index, None where there is none, and what the votes cost.

    An accuracy against these measures agreement with the teacher, not truth: a teacher that is confidently wrong
    counts as right, and a student that is right against it as wrong.
    """

    answers: dict[int, str | None]
    generated_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, more: References) -> References:
        tokens, seconds = self.generated_tokens + more.generated_tokens, self.seconds + more.seconds
        return References(self.answers | more.answers, tokens, seconds)


def vote(probe: DecayProbe, votes: int, grader: str) -> References:
    """`votes` responses of the teacher to every prompt of `probe`, apart from those that are measured later."""
    responses = probe.respond("teacher", probe.prompts, votes, "votes")
    answers = [r.answer for r in responses]
    if grader == "number":  # it reports 100 as 1E+2, which it would not read back as a reference
        answers = [None if answer is None else format(Decimal(answer), "f") for answer in answers]
    return References(
        answers={p.index: majority(answers[k * votes : (k + 1) * votes]) for k, p in enumerate(probe.prompts)},
        generated_tokens=sum(len(r.rollout.completion_ids) for r in responses),
        seconds=sum(r.seconds for r in responses),
    )


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, if at least two votes agree on it and no other has as many."""
    counted = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not counted or counted[0][1] < FEWEST_VOTES or (len(counted) == 2 and counted[1][1] == counted[0][1]):
        return None
    return counted[0][0]


def with_references(probe: DecayProbe, answers: dict[int, str | None]) -> DecayProbe:
    """The problems that have a reference answer, which takes the place of the missing one."""
    problems = [replace(p, answer=answers.get(index)) for index, p in enumerate(probe.problems)]
    return replace(probe, problems=problems, prompts=[p for p in probe.prompts if answers.get(p.index) is not None])
