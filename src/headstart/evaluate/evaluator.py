"""Generated-answer evaluation: sample, grade, average over problems, with an interval."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from headstart.evaluate.readings import detail_means
from headstart.interfaces import RolloutEngine, Task
from headstart.models.collate import completion_text
from headstart.numerics.estimators import mean_interval
from headstart.records import EvalReport, EvaluationSettings, GradedResponse, Problem, Prompt, Rollout
from headstart.runtime import Runtime


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
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class Questions:
    """What an evaluation asks: a task, its problems as prompts (`Prompt.index` is the place in `problems`), and how
    responses are sampled."""

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    settings: EvaluationSettings


@dataclass(frozen=True, slots=True)
class TaskEvaluator:
    """Evaluates whatever model `engine` speaks with. The same draws at every step, so that steps compare paired."""

    questions: Questions
    engine: RolloutEngine
    tokenizer: Any
    runtime: Runtime

    def evaluate(self, step: int) -> EvalReport:
        """Sample and grade the responses to all questions, spread over the ranks."""
        start = time.perf_counter()
        mine = self.rows(self.runtime.share(self.questions.prompts))
        gathered = [row for rank in self.runtime.gather(mine) for row in rank]
        order = {problem.id: i for i, problem in enumerate(self.questions.problems)}
        rows = sorted(gathered, key=lambda row: (order[row.problem_id], row.sample_index))
        settings = asdict(self.questions.settings)
        return summarise_rows(self.questions.task.name, step, rows, time.perf_counter() - start, settings)

    def rows(self, prompts: Sequence[Prompt]) -> list[GradedResponse]:
        """Graded responses to some of the questions. Grading runs in threads: sandboxes and workers go side by side."""
        s = self.questions.settings
        rollouts = self.engine.generate(
            prompts,
            samples=s.samples,
            max_tokens=s.max_tokens,
            sampling=s.sampling,
            key=(s.seed, "evaluation", 0),
            batch_size=s.batch_size,
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._grade, rollouts))

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
