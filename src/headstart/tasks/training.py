"""Who judges responses to the training prompts: their own world or benchmark, else a comparison with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headstart.config import evaluation
from headstart.config.prompts import PromptsConfig, SourceConfig
from headstart.config.schema import Config
from headstart.interfaces import Task
from headstart.records import PrefixState, Problem, Verdict
from headstart.tasks.code import CodeTask
from headstart.tasks.grading.text import gold_number
from headstart.tasks.jsonl import JsonlTask
from headstart.tasks.late import WORLDS
from headstart.tasks.prompts import BENCHMARKS, benchmark


def training_task(config: Config, size: int) -> Task:
    """Grades responses to the training prompts, of which there are `size`."""
    tasks = [_task(config, source, size) for source in config.prompts.sources]
    return tasks[0] if len(tasks) == 1 else _Mixed(tasks)


def usable(prompts: PromptsConfig, problem: Problem, grader: str) -> bool:
    """Whether a response to the problem can be judged: by its world or benchmark, or because it has an answer."""
    return prompts.sources[problem.meta.get("mix", 0)].grades_itself or usable_answer(problem.answer, grader)


def usable_answer(answer: str | None, grader: str) -> bool:
    return bool(answer and answer.strip()) and (grader != "number" or gold_number(answer or "") is not None)


def _task(config: Config, source: SourceConfig, size: int) -> Task:
    if source.source in WORLDS:
        return WORLDS[source.source](source.split, size)
    if source.source in BENCHMARKS:
        sandbox = getattr(config.evaluation and config.evaluation.task, "sandbox", None)
        asked = {"sandbox": sandbox} if sandbox and issubclass(BENCHMARKS[source.source], CodeTask) else {}
        return benchmark(source, config.prompts.chat, **asked)
    grader = config.diagnosis.grader
    return JsonlTask(evaluation.JsonlTask(path=Path(source.source), grader=grader), chat=config.prompts.chat)


class _Mixed:
    """The tasks of several sources, each for its own problems; fits `interfaces.Task`."""

    name = "the prompts of several sources"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def problems(self) -> Sequence[Problem]:
        return [problem for task in self._tasks for problem in task.problems()]

    def grade(self, problem: Problem, response: str) -> Verdict:
        return self._of(problem).grade(replace(problem, id=problem.meta.get("id", problem.id)), response)

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        return self._of(problem).prefix_state(problem, prefix)

    def _of(self, problem: Problem) -> Task:
        place: int = problem.meta.get("mix", 0)
        return self._tasks[place]
