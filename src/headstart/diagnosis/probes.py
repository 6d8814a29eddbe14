"""Probes by continuation: both models' own responses, and every prefix of them finished by both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from headstart.assemble.pair import Speaker
from headstart.diagnosis.decay import DecayCurve, PrefixOutcome, ProblemOutcome, decay_curve
from headstart.interfaces import RolloutEngine, Task
from headstart.models.collate import completion_text
from headstart.records import PrefixState, Problem, Prompt, Rollout, Sampling, Verdict

GIFTS = 8
"""Continuations a problem at the one length where the plateau is read."""
TIMED_TOKENS = 16
SPEAKERS: tuple[Speaker, Speaker] = ("student", "teacher")
LONGEST_PREFIX = 1 << 20
"""Prefix lengths are below this, so that a continuation's key can hold problem, origin and length in one number."""


@dataclass(frozen=True, slots=True)
class Response:
    """A model's own response to a problem, graded. `answer` is what the grader read, where it says so; `seconds` the
    response's share of the time it took."""

    rollout: Rollout
    correct: bool
    answer: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Job:
    """`speaker` is to finish the first `length` tokens of `begun`, a response of `origin`."""

    speaker: Speaker
    origin: Speaker
    length: int
    begun: Rollout


@dataclass(frozen=True, slots=True)
class DecayProbe:
    """What the measurement needs: both engines, the task and its problems as prompts for student and teacher.

    `Prompt.index` is the problem's place in `problems`; not every problem needs a prompt. `contexts` bounds prompt and
    completion together for (student, teacher); None where a model names no bound. `finished` hears of every generation
    as it ends.
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
    contexts: tuple[int | None, int | None] = (None, None)
    finished: Callable[[Rollout], None] = lambda rollout: None

    def measure(self, grid: Sequence[int]) -> DecayCurve:
        """The whole curve at once, kept nowhere: one response of each model a problem, then every continuation."""
        students, teachers = self.respond("student", self.prompts), self.respond("teacher", self.prompts)
        outcomes = self.outcomes(students, teachers, grid)
        return decay_curve(outcomes, task=self.task.name, max_tokens=self.max_tokens, seed=self.seed)

    def respond(
        self, who: Speaker, prompts: Sequence[Prompt], samples: int = 1, purpose: str = "own"
    ) -> list[Response]:
        """`samples` own responses of `who` to each prompt, prompt-major, graded."""
        start = time.perf_counter()
        own = [replace(p, token_ids=_view(p, who)) for p in prompts]
        rollouts = self._generate(who, own, samples, self.max_tokens, f"diagnose-{purpose}")
        both = [prompt for prompt in prompts for _ in range(samples)]
        rollouts = [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts, both, strict=True)]
        verdicts = self.grade(rollouts)
        seconds = (time.perf_counter() - start) / max(1, len(rollouts))
        return [Response(r, v.correct, v.answer, seconds) for r, v in zip(rollouts, verdicts, strict=True)]

    def tokens_per_second(self, who: Speaker) -> float:
        """Speed of `who` in a short sample: a full batch, few tokens."""
        prompts = [replace(p, token_ids=_view(p, who)) for p in self.prompts[: self.batch_size]]
        self._generate(who, prompts, 1, 2, "diagnose-timing")  # the first call of a model is never typical
        start = time.perf_counter()
        rollouts = self._generate(who, prompts, 1, min(TIMED_TOKENS, self.max_tokens), "diagnose-timing")
        return sum(len(r.completion_ids) for r in rollouts) / (time.perf_counter() - start)

    def outcomes(
        self, students: Sequence[Response], teachers: Sequence[Response], grid: Sequence[int]
    ) -> list[ProblemOutcome]:
        """Every continuation of these problems' responses; `students` and `teachers` hold the same problems in order.

        Lengths are those of `grid` and 0, where the models' own responses stand in. All continuations of one speaker go
        through one call of its engine. A draw depends on seed, problem, length, speaker and origin alone, so neither
        the grid nor the grouping of problems changes an outcome.
        """
        start = time.perf_counter()
        lengths = sorted({0, *grid})
        owns = dict(zip(SPEAKERS, (students, teachers), strict=True))
        jobs = [
            _Job(speaker, origin, length, own.rollout)
            for speaker in SPEAKERS
            for origin in SPEAKERS
            for own in owns[origin]
            for length in lengths
            if 0 < length < len(own.rollout.completion_ids)
        ]
        finished = self._finish(jobs)
        right = {
            (job.speaker, job.origin, job.length, job.begun.prompt.index): verdict.correct
            for job, verdict in zip(jobs, self.grade(finished), strict=True)
        }
        cost: dict[int, int] = {}
        for job, whole in zip(jobs, finished, strict=True):
            index = job.begun.prompt.index
            cost[index] = cost.get(index, 0) + len(whole.completion_ids) - job.length
        seconds = (time.perf_counter() - start) / len(students)
        return [
            self._outcome(s, t, lengths, right, cost.get(s.rollout.prompt.index, 0), seconds)
            for s, t in zip(students, teachers, strict=True)
        ]

    def finish(
        self, who: Speaker, begun: Sequence[Rollout], length: int | None = None, origin: Speaker = "student"
    ) -> list[Rollout]:
        """`begun`, said by `origin`, cut after `length` tokens (None: where they end) and finished by `who`.

        A response that ends before, by itself or because it is as long as any may be, stays as it is.
        """
        cuts = [len(r.completion_ids) if length is None else min(length, len(r.completion_ids)) for r in begun]
        open_ended = [
            place
            for place, (r, cut) in enumerate(zip(begun, cuts, strict=True))
            if cut < len(r.completion_ids) or (not r.stopped and cut < self.max_tokens)
        ]
        whole = list(begun)
        jobs = [_Job(who, origin, cuts[place], begun[place]) for place in open_ended]
        for place, rollout in zip(open_ended, self._finish(jobs), strict=True):
            whole[place] = rollout
        return whole

    def gifts(self, teachers: Sequence[Response], length: int) -> list[float]:
        """The student's share of right answers after the first `length` tokens of each of the teacher's responses, from
        several continuations a problem: one length matters more than the rest, and is worth more samples."""
        jobs = [_Job("student", "teacher", length, t.rollout) for t in teachers]
        begun = [job for job in jobs if length < len(job.begun.completion_ids)]
        finished = iter(self.grade(self._finish(begun, GIFTS, "diagnose-gift")))
        return [
            sum(next(finished).correct for _ in range(GIFTS)) / GIFTS
            if length < len(t.rollout.completion_ids)
            else float(t.correct)
            for t in teachers
        ]

    def _outcome(
        self,
        student: Response,
        teacher: Response,
        lengths: Sequence[int],
        right: dict[tuple[Speaker, Speaker, int, int], bool],
        continued: int,
        seconds: float,
    ) -> ProblemOutcome:
        index = student.rollout.prompt.index
        own = {"student": student, "teacher": teacher}

        def outcome(speaker: Speaker, origin: Speaker, length: int) -> bool:
            # At length 0 nothing was begun; at the end of a response nothing is left to finish.
            whole = own[speaker if length == 0 else origin].correct
            return right.get((speaker, origin, length, index), whole)

        points = tuple(
            PrefixOutcome(
                prefix_tokens=length,
                state=self._state(student.rollout, length),
                after_student=outcome("teacher", "student", length),
                after_own=outcome("teacher", "teacher", length),
                student_continues=outcome("student", "student", length),
                gift=outcome("student", "teacher", length),
            )
            for length in lengths
        )
        tokens = len(student.rollout.completion_ids), len(teacher.rollout.completion_ids)
        return ProblemOutcome(
            index=index,
            problem_id=student.rollout.prompt.problem_id,
            student=student.correct,
            teacher=teacher.correct,
            student_tokens=tokens[0],
            generated_tokens=sum(tokens) + continued,
            seconds=student.seconds + teacher.seconds + seconds,
            points=points,
        )

    def _finish(self, jobs: Sequence[_Job], samples: int = 1, purpose: str = "diagnose-finish") -> list[Rollout]:
        """`samples` whole responses (prefix and continuation) for every job, in order."""
        done: dict[int, list[Rollout]] = {place: [] for place in range(len(jobs))}
        for call in self._calls(jobs):
            prompts = [self._prompt(jobs[place]) for place in call]
            longest = self.max_tokens - min(jobs[place].length for place in call)
            who = jobs[call[0]].speaker
            tails = self._generate(who, prompts, samples, longest, purpose)
            for number, tail in enumerate(tails):
                place = call[number // samples]
                job = jobs[place]
                # The call's bound is that of its shortest prefix; what another would not have said is cut off again.
                said = tail.completion_ids[: self.max_tokens - job.length]
                stopped = tail.stopped and len(said) == len(tail.completion_ids)
                whole = job.begun.completion_ids[: job.length] + said
                done[place].append(Rollout(job.begun.prompt, tail.sample_index, whole, stopped))
        return [rollout for rollouts in done.values() for rollout in rollouts]

    def _calls(self, jobs: Sequence[_Job]) -> list[list[int]]:
        """Places of `jobs` that go through one engine call: all of a speaker, or as many lengths as fit where the
        model's context has no room for the longest prefix with the shortest one's continuation."""
        calls: list[list[int]] = []
        for who, context in zip(SPEAKERS, self.contexts, strict=True):
            mine = [place for place, job in enumerate(jobs) if job.speaker == who]
            prompt = max((len(_view(jobs[place].begun.prompt, who)) for place in mine), default=0)
            shortest: int | None = None
            for length in sorted({jobs[place].length for place in mine}):
                bound = prompt + length + self.max_tokens - (length if shortest is None else shortest)
                if shortest is None or (context is not None and bound > context):
                    shortest = length
                    calls.append([])
                calls[-1] += [place for place in mine if jobs[place].length == length]
        return calls

    def _prompt(self, job: _Job) -> Prompt:
        prompt = job.begun.prompt
        origin = 0 if job.origin == "student" else 1
        return replace(
            prompt,
            index=(2 * prompt.index + origin) * LONGEST_PREFIX + job.length,
            token_ids=_view(prompt, job.speaker) + job.begun.completion_ids[: job.length],
        )

    def _generate(
        self, who: Speaker, prompts: Sequence[Prompt], samples: int, max_tokens: int, purpose: str
    ) -> list[Rollout]:
        if not prompts:
            return []
        engine = self.student if who == "student" else self.teacher
        return engine.generate(
            prompts,
            samples=samples,
            max_tokens=max_tokens,
            sampling=self.sampling,
            key=(self.seed, f"{purpose}-{who}", 0),
            batch_size=self.batch_size,
            finished=self.finished,
        )

    def grade(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """In threads: sandboxes and math workers go side by side."""

        def grade(rollout: Rollout) -> Verdict:
            return self.task.grade(self.problems[rollout.prompt.index], completion_text(self.tokenizer, rollout))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(grade, rollouts))

    def _state(self, rollout: Rollout, length: int) -> PrefixState:
        if length >= len(rollout.completion_ids):
            return "finished"
        prefix = replace(rollout, completion_ids=rollout.completion_ids[:length], stopped=False)
        return self.task.prefix_state(self.problems[rollout.prompt.index], completion_text(self.tokenizer, prefix))


def _view(prompt: Prompt, who: Speaker) -> tuple[int, ...]:
    return prompt.token_ids if who == "student" else prompt.teacher_token_ids
