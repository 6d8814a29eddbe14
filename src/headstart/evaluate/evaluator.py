"""Generated-answer evaluation: sample, grade, average over problems, with an interval."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.config.schema import EvaluationConfig
from headstart.interfaces import RolloutEngine, Task
from headstart.models.collate import completion_text
from headstart.numerics.estimators import mean_interval
from headstart.records import EvalReport, GradedResponse, Problem, Prompt, Rollout, Sampling
from headstart.runtime import Runtime


def detail_means(rows: Sequence[GradedResponse]) -> dict[str, float]:
    """Average of every further yes/no reading of the task, such as `plan_right`."""
    names = sorted({name for row in rows for name in row.verdict.details})
    return {name: sum(bool(r.verdict.details.get(name)) for r in rows) / len(rows) for name in names}


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
        mean_tokens=sum(r.tokens for r in rows) / len(rows),
        generated_tokens=sum(r.tokens for r in rows),
        seconds=seconds,
        settings=settings,
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class TaskEvaluator:
    """Evaluates whatever model `engine` speaks with. The same draws at every step, so that steps compare paired."""

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    engine: RolloutEngine
    tokenizer: Any
    config: EvaluationConfig
    runtime: Runtime

    def evaluate(self, step: int) -> EvalReport:
        """Sample `config.samples` responses per problem, at most `config.max_tokens` long, and grade them."""
        start = time.perf_counter()
        c = self.config
        rollouts = self.engine.generate(
            self.runtime.share(self.prompts),
            samples=c.samples,
            max_tokens=c.max_tokens,
            sampling=Sampling(c.temperature, c.top_p, c.top_k),
            key=(c.seed, "evaluation", 0),
            batch_size=c.batch_size,
        )
        mine = [self._grade(rollout) for rollout in rollouts]
        gathered = [row for rank in self.runtime.gather(mine) for row in rank]
        order = {problem.id: i for i, problem in enumerate(self.problems)}
        rows = sorted(gathered, key=lambda row: (order[row.problem_id], row.sample_index))
        settings = c.model_dump(mode="json")
        return summarise_rows(self.task.name, step, rows, time.perf_counter() - start, settings)

    def _grade(self, rollout: Rollout) -> GradedResponse:
        # Prompt.index is the problem's place in `problems`.
        problem = self.problems[rollout.prompt.index]
        response = completion_text(self.tokenizer, rollout)
        return GradedResponse(
            problem_id=problem.id,
            sample_index=rollout.sample_index,
            response=response,
            tokens=len(rollout.completion_ids),
            stopped=rollout.stopped,
            verdict=self.task.grade(problem, response),
        )
