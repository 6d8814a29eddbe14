"""Tasks by name, their problems as prompts, and how they are sampled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from headstart.build.plugins import TASK_METHODS, load_plugin
from headstart.config.schema import (
    BfclTask,
    CodeBenchmark,
    Config,
    CustomTask,
    EvaluationConfig,
    JsonlTask,
    MathBenchmark,
    TaskConfig,
    TinyTask,
)
from headstart.errors import ConfigError, DataError
from headstart.evaluate.evaluator import Questions
from headstart.interfaces import Task
from headstart.models.templates import render
from headstart.records import EvaluationSettings, Problem, Prompt, Sampling
from headstart.tasks import bfcl, code, jsonl, math, tiny
from headstart.tasks.overlap import overlap, question

MATH: dict[str, type[math.MathTask]] = {"gsm8k": math.Gsm8k, "math500": math.Math500, "aime": math.Aime}
CODE: dict[str, type[code.CodeTask]] = {
    "humaneval": code.HumanEval,
    "humaneval_plus": code.HumanEvalPlus,
    "mbpp": code.Mbpp,
    "mbpp_plus": code.MbppPlus,
}


def make_task(config: TaskConfig, limit: int | None = None, chat: bool = True) -> Task:
    """The task named in `evaluation.task`; `chat` says whether plain questions become chat messages."""
    match config:
        case TinyTask(split=split):
            return tiny.TinyTask(split, limit or 1000)
        case JsonlTask():
            return jsonl.JsonlTask(config, chat=chat)
        case MathBenchmark(type=name, data=data):
            return MATH[name](data)
        case CodeBenchmark(type=name, data=data, sandbox=sandbox):
            return CODE[name](data, chat=chat, sandbox=sandbox)
        case BfclTask(data=data, categories=categories, style=style):
            return bfcl.BfclTask(data, categories=categories, style=style)
        case CustomTask(path=path, arguments=arguments):
            task: Task = load_plugin(path, arguments, "evaluation.task.path", TASK_METHODS)
            return task


def evaluation_settings(config: EvaluationConfig, task: Task) -> EvaluationSettings:
    """How responses are sampled: what the configuration says, else what the task brings, else the paper's math."""
    own: Sampling = getattr(task, "sampling", Sampling(0.7, 0.95, 0))
    samples: int = getattr(task, "samples", 4)
    max_tokens: int = getattr(task, "max_tokens", 2048)
    return EvaluationSettings(
        samples=config.samples or samples,
        sampling=Sampling(
            own.temperature if config.temperature is None else config.temperature,
            own.top_p if config.top_p is None else config.top_p,
            own.top_k if config.top_k is None else config.top_k,
        ),
        max_tokens=config.max_tokens or max_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def load_questions(config: Config, tokenizer: Any) -> Questions:
    """The task in `config.evaluation`, its problems as prompts, and how they are sampled.

    Raises DataError when the data is missing or malformed, or there are no problems.
    """
    evaluation = config.evaluation
    if evaluation is None:
        raise ConfigError("there is no evaluation section to evaluate with; add evaluation: {task: {type: ...}}")
    task = make_task(evaluation.task, evaluation.limit, config.prompts.chat)
    problems = list(task.problems())[: evaluation.limit]
    if not problems:
        raise DataError(f"the evaluation task {task.name!r} has no problems; check evaluation.task")
    prompts = task_prompts(config, problems, tokenizer)
    return Questions(task, problems, prompts, evaluation_settings(evaluation, task))


def task_prompts(config: Config, problems: list[Problem], tokenizer: Any) -> tuple[Prompt, ...]:
    """Evaluation problems as the student reads them (same template settings as in training), index = list place.

    A benchmark's own system turn is kept; `prompts.system` goes to tasks that bring none.
    """
    p = config.prompts
    benchmark = config.evaluation is not None and isinstance(
        config.evaluation.task, MathBenchmark | CodeBenchmark | BfclTask
    )
    prompts = []
    for index, problem in enumerate(problems):
        ids = render(
            problem,
            tokenizer,
            chat=problem.messages is not None,
            system=None if benchmark else p.system,
            template_kwargs=p.template_kwargs,
        )
        prompts.append(Prompt(index, problem.id, tuple(ids), tuple(ids)))
    return tuple(prompts)


def warn_of_overlap(training: Sequence[Problem], questions: Questions) -> None:
    """Say how many test problems are among the training prompts, if any are."""
    if isinstance(questions.task, tiny.TinyTask):
        return  # its splits are disjoint by construction
    found = overlap(list(map(question, training)), list(map(question, questions.problems)))
    if text := found.warning(questions.task.name):
        warnings.warn(text, stacklevel=2)


def grader_of(task: Task) -> dict[str, str | None]:
    """Which grader judges, with its version, and the sandbox that programs run in.

    Raises SandboxError when a code task finds no sandbox that works here.
    """
    match task:
        case math.MathTask():
            return {"grader": task.grader.version, "sandbox": None}
        case code.CodeTask():
            return {"grader": "headstart code runner", "sandbox": task.sandbox}
        case bfcl.BfclTask():
            return {"grader": "headstart function-call checker", "sandbox": None}
        case jsonl.JsonlTask():
            return {"grader": f"headstart {task.config.grader}", "sandbox": None}
        case _:
            return {"grader": f"{type(task).__module__}.{type(task).__name__}", "sandbox": None}
