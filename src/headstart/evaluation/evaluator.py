"""Generated-answer evaluation: sample, grade, average over problems, with an interval."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from headstart.assemble.tasks import Questions
from headstart.evaluation.readings import figures
from headstart.interfaces import OnProgress, RolloutEngine, silent
from headstart.models.collate import completion_text
from headstart.progress import doing
from headstart.ranks.runtime import Runtime
from headstart.records import EvalReport, GradedResponse, Problem, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class TaskEvaluator:
    """Evaluates the model behind `engine`, with the same draws at every step so that steps compare paired.

    `record` says what else the figures depend on (prompts, stop ids, grader); reports carry it beside the settings.
    `progress` is called with (responses graded, responses in all) during `evaluate`, for the share of rank 0.
    """

    questions: Questions
    engine: RolloutEngine
    tokenizer: Any
    runtime: Runtime
    record: Mapping[str, Any] = field(default_factory=dict)
    progress: OnProgress = silent

    def evaluate(
        self, step: int, interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> EvalReport:
        """Sample and grade the responses to all questions, spread over the ranks.

        Raises StopRequested on every rank when it is raised on one inside `interruptible()`, where the work is done.
        """
        start = time.perf_counter()
        self.engine.sync(step)
        q, prompts = self.questions, self.runtime.share(self.questions.prompts)
        done, total = itertools.count(1), len(prompts) * q.settings.samples

        def graded(row: GradedResponse) -> None:
            if self.runtime.is_main:
                self.progress(next(done), total)

        def share() -> list[GradedResponse]:
            with interruptible():
                return self.rows(prompts, graded)

        if self.runtime.is_main:
            self.progress(0, total)
        with self.engine.alone():
            gathered = [row for rank in self.runtime.gather_unless_stopped(share) for row in rank]
        rows, settings = in_order(gathered, q.problems), {**asdict(q.settings), **self.record}
        took = time.perf_counter() - start
        return EvalReport(step=step, rows=tuple(rows), settings=settings, seconds=took, **figures(q.task.name, rows))

    def rows(self, prompts: Sequence[Prompt], graded: Callable[[GradedResponse], None]) -> list[GradedResponse]:
        """Responses to some of the questions in the order they ended; `graded` is called with each.

        Grading runs in threads while generation continues.
        """
        s = self.questions.settings
        waiting: deque[Future[GradedResponse]] = deque()
        rows: list[GradedResponse] = []

        def collect(*, rest: bool = False) -> None:
            while waiting and (rest or waiting[0].done()):
                rows.append(waiting.popleft().result())
                graded(rows[-1])

        def finished(rollout: Rollout) -> None:
            waiting.append(pool.submit(self._grade, rollout))
            collect()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                self.engine.generate(
                    prompts,
                    samples=s.samples,
                    max_tokens=s.max_tokens,
                    sampling=s.sampling,
                    key=(s.seed, "evaluation", 0),
                    batch_size=s.batch_size or (self.engine.fitting(prompts, s.max_tokens) if prompts else None),
                    finished=finished,
                )
                with doing("grading"):
                    collect(rest=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block would first grade the whole queue
                raise
        return rows

    def _grade(self, rollout: Rollout) -> GradedResponse:
        problem = self.questions.problems[rollout.prompt.index]
        text = completion_text(self.tokenizer, rollout)
        ends = [at for stop in self.questions.settings.stop_strings if (at := text.find(stop)) >= 0]
        response = text[: min(ends, default=len(text))]
        return GradedResponse(
            problem_id=problem.id,
            sample_index=rollout.sample_index,
            response=response,
            tokens=len(rollout.completion_ids),
            stopped=rollout.stopped or bool(ends),
            verdict=self.questions.task.grade(problem, response),
        )


def in_order(rows: Iterable[GradedResponse], problems: Sequence[Problem]) -> list[GradedResponse]:
    """Rows in the order of the problems, samples of a problem in theirs."""
    index = {problem.id: i for i, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: (index[row.problem_id], row.sample_index))
