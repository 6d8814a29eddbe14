"""Generated-answer evaluation: sample, grade, average over problems, with an interval."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from headstart.assemble.tasks import Questions
from headstart.evaluation.readings import detail_means
from headstart.interfaces import OnProgress, RolloutEngine, silent
from headstart.models.collate import completion_text
from headstart.models.memory import fitting_batch
from headstart.records import EvalReport, GradedResponse, Problem, Prompt, Rollout
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime
from headstart.stats import mean_interval


def summarise_rows(
    task: str, step: int, rows: Sequence[GradedResponse], seconds: float, settings: Mapping[str, Any]
) -> EvalReport:
    """avg@k over problems with the 95% interval of the mean of per-problem means."""
    by_problem: dict[str, list[bool]] = {}
    for row in rows:
        by_problem.setdefault(row.problem_id, []).append(row.verdict.correct)
    means = [sum(v) / len(v) for v in by_problem.values()]
    return EvalReport(
        task=task,
        step=step,
        problems=len(means),
        samples=len(rows) // len(means),
        accuracy=sum(means) / len(means),
        interval=mean_interval(means),
        details=detail_means(rows),
        truncated=sum(not r.stopped for r in rows) / len(rows),
        no_answer=sum(r.verdict.status == "no_answer" for r in rows) / len(rows),
        mean_tokens=sum(r.tokens or 0 for r in rows) / len(rows),
        generated_tokens=sum(r.tokens or 0 for r in rows),
        seconds=seconds,
        settings=settings,
        timeout=sum(r.verdict.status == "timeout" for r in rows) / len(rows),
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class TaskEvaluator:
    """Evaluates whatever model `engine` speaks with. The same draws at every step, so that steps compare paired.

    `record` says what else the figures depend on (prompts, stop ids, grader); reports carry it beside the settings.
    `progress` hears (responses graded, responses in all) during `evaluate`, on rank 0 of its own share.
    """

    questions: Questions
    engine: RolloutEngine
    tokenizer: Any
    runtime: Runtime
    record: Mapping[str, Any] = field(default_factory=dict)
    progress: OnProgress = silent

    def evaluate(self, step: int) -> EvalReport:
        """Sample and grade the responses to all questions, spread over the ranks."""
        start = time.perf_counter()
        q, prompts = self.questions, self.runtime.share(self.questions.prompts)
        done, total = itertools.count(1), len(prompts) * q.settings.samples

        def graded(row: GradedResponse) -> None:
            if self.runtime.is_main:
                self.progress(next(done), total)

        mine = self.rows(prompts, graded)
        gathered = [row for rank in self.runtime.gather(mine) for row in rank]
        settings = {**asdict(q.settings), **self.record}
        seconds = time.perf_counter() - start
        return summarise_rows(q.task.name, step, in_order(gathered, q.problems), seconds, settings)

    def rows(self, prompts: Sequence[Prompt], graded: Callable[[GradedResponse], None]) -> list[GradedResponse]:
        """Responses to some of the questions in the order they ended, each told to `graded` once it is judged.

        Grading runs in threads beside the generation: sandboxes and workers go side by side.
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
            self.engine.generate(
                prompts,
                samples=s.samples,
                max_tokens=s.max_tokens,
                sampling=s.sampling,
                key=(s.seed, "evaluation", 0),
                batch_size=self._batch_size(prompts),
                finished=finished,
            )
            collect(rest=True)
        return rows

    def _batch_size(self, prompts: Sequence[Prompt]) -> int | None:
        """What the settings say, else as many as fit; an engine elsewhere chooses for itself."""
        s = self.questions.settings
        if s.batch_size is None and prompts and isinstance(self.engine, InProcessEngine):
            self.engine.release()  # what it keeps from other rollouts is free for these
            return fitting_batch(self.engine.model, prompts, s.max_tokens)
        return s.batch_size

    def _grade(self, rollout: Rollout) -> GradedResponse:
        problem = self.questions.problems[rollout.prompt.index]
        response = completion_text(self.tokenizer, rollout)
        return GradedResponse(
            problem_id=problem.id,
            sample_index=rollout.sample_index,
            response=response,
            tokens=len(rollout.completion_ids),
            stopped=rollout.stopped,
            verdict=self.questions.task.grade(problem, response),
        )


def in_order(rows: Iterable[GradedResponse], problems: Sequence[Problem]) -> list[GradedResponse]:
    """Rows in the order of the problems, samples of a problem in theirs."""
    place = {problem.id: i for i, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: (place[row.problem_id], row.sample_index))
