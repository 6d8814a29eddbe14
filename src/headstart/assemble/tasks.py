"""Tasks by name, their problems as prompts, and how they are sampled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from headstart.assemble.plugins import TASK_METHODS, load_plugin
from headstart.config.evaluation import (
    Benchmark,
    BfclTask,
    CodeBenchmark,
    CustomTask,
    EvaluationConfig,
    JsonlTask,
    MathBenchmark,
    MbppBenchmark,
    TaskConfig,
    TinyTask,
)
from headstart.config.schema import Config
from headstart.errors import ConfigError, DataError
from headstart.interfaces import Task
from headstart.models.collate import completion_text
from headstart.models.templates import PROBE, View, apply_template, takes_tools
from headstart.progress import doing
from headstart.records import EvaluationSettings, Problem, Prompt, Rollout, Sampling
from headstart.tasks import bfcl, code, jsonl, math, tiny
from headstart.tasks.grading.math import shared_grader
from headstart.tasks.grading.tools import Call, parse_calls
from headstart.tasks.late import WORLDS
from headstart.tasks.overlap import overlap
from headstart.version import __version__


@dataclass(frozen=True, slots=True)
class Questions:
    """An evaluation's task, its problems as prompts (`Prompt.index` is the index in `problems`), and its sampling."""

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    settings: EvaluationSettings


def make_task(config: TaskConfig, limit: int | None = None, chat: bool = True, tools: bool = True) -> Task:
    """The task named in `evaluation.task`.

    `chat` says whether plain questions become chat messages, `tools` whether the model's chat template takes them.
    """
    match config:
        case TinyTask(type=name, split=split):
            return WORLDS[name](split, limit or 1000)
        case JsonlTask():
            return jsonl.JsonlTask(config, chat=chat)
        case MathBenchmark(type=name, data=data):
            return math.MATH[name](data, chat=chat)
        case CodeBenchmark(type=name, data=data, sandbox=sandbox):
            return code.CODE[name](data, chat=chat, sandbox=sandbox)
        case MbppBenchmark(data=data, split=split, sandbox=sandbox):
            return code.Mbpp(data, split=split, chat=chat, sandbox=sandbox)
        case BfclTask(data=data, categories=categories, style=style):
            if not chat:
                raise ConfigError("task bfcl asks in chat turns: set prompts.chat=true, and choose a chat model")
            auto: Literal["template", "prompt"] = "template" if tools else "prompt"
            return bfcl.BfclTask(data, categories=categories, style=auto if style == "auto" else style)
        case CustomTask(path=path, arguments=arguments):
            task: Task = load_plugin(path, arguments, "evaluation.task.path", TASK_METHODS)
            return task


def evaluation_settings(config: EvaluationConfig, task: Task) -> EvaluationSettings:
    """How responses are sampled: as configured, else the task's own default, else as the paper does for math."""
    own: Sampling = getattr(task, "sampling", Sampling(0.7, 0.95, 0))
    samples: int = getattr(task, "samples", 4)
    max_tokens: int = getattr(task, "max_tokens", 2048)
    asked: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return EvaluationSettings(
        samples=config.samples or samples,
        sampling=replace(own, **{name: value for name, value in asked.items() if value is not None}),
        max_tokens=config.max_tokens or max_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        stop_strings=getattr(task, "stop_strings", ()) if config.stop_strings is None else config.stop_strings,
    )


@doing("reading the problems of the evaluation")
def load_questions(config: Config, tokenizer: Any, teacher_tokenizer: Any = None) -> Questions:
    """The task in `config.evaluation`, its problems as prompts, and how they are sampled.

    With a teacher's tokenizer the prompts carry the teacher's own view, too. Raises DataError when the data is missing
    or malformed, or there are no problems.
    """
    evaluation = config.evaluation
    if evaluation is None:
        raise ConfigError("there is no evaluation section to evaluate with", "add evaluation: {task: {type: ...}}")
    task = make_task(evaluation.task, evaluation.limit, config.prompts.chat, takes_tools(tokenizer))
    problems = list(task.problems())[: evaluation.limit]
    if not problems:
        raise DataError(f"the evaluation task {task.name!r} has no problems", "check evaluation.task")
    if isinstance(task, bfcl.BfclTask) and task.style == "template" and takes_tools(tokenizer):
        _warn_of_unread_calls(tokenizer, config.prompts.template_kwargs)
    own_system = isinstance(evaluation.task, Benchmark)
    prompts = task_prompts(config, problems, tokenizer, teacher_tokenizer, own_system=own_system)
    return Questions(task, problems, prompts, evaluation_settings(evaluation, task))


def task_prompts(
    config: Config, problems: Sequence[Problem], tokenizer: Any, teacher_tokenizer: Any = None, *, own_system: bool
) -> tuple[Prompt, ...]:
    """Problems as both models read them (same template settings as in training), index = list index.

    A benchmark's own system turn is kept (`own_system`); `prompts.system` goes to tasks that bring none. Without a
    teacher's tokenizer the teacher's view is the student's.
    """
    views = [View.of_student(tokenizer, config.prompts)]
    if teacher_tokenizer is not None:
        views.append(View.of_teacher(teacher_tokenizer, config.prompts))
    read = [replace(v, chat=True, system=None if own_system else v.system).readings(problems) for v in views]
    both = zip(problems, read[0], read[-1], strict=True)
    return tuple(Prompt(i, p.id, a.ids, b.ids, a.images, b.images) for i, (p, a, b) in enumerate(both))


def _warn_of_unread_calls(tokenizer: Any, template_kwargs: dict[str, Any]) -> None:
    """Render one call through the chat template and parse it back; warn where that does not give the call."""
    given = {"text": "two words\n<b>", "count": 2, "exact": True, "parts": ["a", 1.5]}
    kinds = zip(given, ("string", "integer", "boolean", "array"), strict=True)
    schema = {"type": "object", "properties": {key: {"type": kind, "description": key} for key, kind in kinds}}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "probe", "description": PROBE, "parameters": schema}}
    ]
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": given}}
    asked = {"role": "user", "content": PROBE}
    called = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    prompt = str(apply_template(tokenizer, [([asked], tools)], **template_kwargs)[0])
    shown = str(apply_template(tokenizer, [(called, tools)], add_generation_prompt=False, **template_kwargs)[0])
    answer = shown[len(prompt) :] if shown.startswith(prompt) else shown.rpartition(PROBE)[2]
    ids = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    response = completion_text(tokenizer, Rollout(Prompt(0, "", (), ()), 0, ids, stopped=False))
    if parse_calls(response, tools) != (Call("probe", given),):
        warnings.warn(
            f"the model's chat template writes function calls as {answer[:200]!r}, which cannot be read: right answers "
            "may count as none; set evaluation.task.style=prompt",
            stacklevel=3,
        )


@doing("looking for test problems among the prompts")
def warn_of_overlap(training: Sequence[Problem], questions: Questions) -> None:
    """Say how many test problems are among the training prompts, if any are."""
    if isinstance(questions.task, tiny.TinyTask):
        return  # its splits are disjoint by construction
    if text := overlap(training, questions.problems).warning(questions.task.name):
        warnings.warn(text, stacklevel=2)


def grader_of(task: Task) -> dict[str, str | None]:
    """Which grader judges, with its version, and the sandbox that programs run in.

    Raises SandboxError when a code task finds no sandbox that works here.
    """
    own, sandbox = f"headstart {__version__}", None
    match task:
        case math.MathTask():
            grader = task.grader.version
        case code.CodeTask():
            grader, sandbox = f"{own} code runner", task.sandbox
        case bfcl.BfclTask():
            grader = f"{own} function-call checker"
        case tiny.TinyTask():
            grader = f"{own} {task.name} world"
        case jsonl.JsonlTask():
            grader = shared_grader().version if task.config.grader == "math" else f"{own} {task.config.grader}"
        case _:
            grader = f"{type(task).__module__}.{type(task).__name__}"
    return {"grader": grader, "sandbox": sandbox}
