"""Development problems: what a pilot is graded on, apart from what it trains on."""

from __future__ import annotations

from dataclasses import replace

from headstart.assemble.pair import Pair
from headstart.assemble.tasks import Questions, evaluation_settings, warn_of_overlap
from headstart.config.evaluation import EvaluationConfig
from headstart.config.schema import Config
from headstart.diagnosis.run import probe_questions, response_tokens
from headstart.errors import DataError
from headstart.interfaces import Task
from headstart.records import EvaluationSettings, Problem, Sampling
from headstart.tasks.prompts import load_problems

FEWEST = 16
"""Problems below which two arms can hardly be told apart (one problem is then six points)."""


def development(config: Config, pair: Pair) -> tuple[list[Problem], Questions]:
    """The problems to train on, and those of the diagnosis to grade on, one sample each.

    Where the diagnosis probes training prompts, these are left out of the training. Raises DataError when there are no
    answers to grade with, or too few problems of either kind.
    """
    d, problems = config.diagnosis, load_problems(config.prompts)
    asked = probe_questions(config, pair.tokenizer, pair.teacher_tokenizer)
    graded = {prompt.problem_id for prompt in asked.prompts} if asked.labelled else set()
    rest = [problem for problem in problems if problem.id not in graded] if d.task is None else problems
    if len(graded) < FEWEST or not rest:
        raise DataError(
            f"a pilot is graded on development problems with answers: found {len(graded)} (at least {FEWEST} are "
            f"needed) and {len(rest)} others to train on; set diagnosis.task to a development split, or "
            "prompts.answer_column and a diagnosis.problems that leaves prompts to train on"
        )
    longest = response_tokens(pair, asked)
    settings = EvaluationSettings(1, _sampling(config, asked.task), longest, d.batch_size, d.seed)
    questions = Questions(asked.task, asked.problems, asked.prompts, settings)
    warn_of_overlap(rest, replace(questions, problems=[asked.problems[prompt.index] for prompt in asked.prompts]))
    return rest, questions


def _sampling(config: Config, task: Task) -> Sampling:
    """As the run is evaluated where it says so, else as the task asks, else as training prompts are sampled."""
    d, evaluation = config.diagnosis, config.evaluation
    if d.task is None:
        return config.rollout.sampling
    asked = evaluation.model_dump(include={"temperature", "top_p", "top_k"}) if evaluation else {}
    return evaluation_settings(EvaluationConfig(task=d.task, **asked), task).sampling
