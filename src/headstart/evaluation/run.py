"""Evaluation: a model on a task, and responses made elsewhere."""

from __future__ import annotations

import difflib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from headstart.assemble.memory import STUDENT, sources
from headstart.assemble.pair import Pair, check_evaluation_context, frozen, on_its_own
from headstart.assemble.speed import PLANNED, elapsed, growing, timed, width
from headstart.assemble.tasks import Questions, grader_of, load_questions, make_task
from headstart.config.differences import chosen_before
from headstart.config.evaluation import BfclTask as BfclConfig
from headstart.config.evaluation import TaskConfig
from headstart.config.schema import Config
from headstart.errors import DataError
from headstart.evaluation.evaluator import TaskEvaluator
from headstart.evaluation.load import Load, cut
from headstart.evaluation.readings import check_k
from headstart.evaluation.store import Work, evaluate_into
from headstart.files import write_json
from headstart.interfaces import OnProgress, Task, silent
from headstart.models.images import reader_of
from headstart.models.load import load_tokenizer
from headstart.models.sharded import check_ranks, led, load_over, mesh_of
from headstart.models.templates import CLOCK, chat_template
from headstart.progress import report, shows
from headstart.ranks.runtime import Runtime
from headstart.records import GradedResponse, Problem, Result
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.served import ServedEngine
from headstart.tasks.bfcl import BfclTask, categories_in
from headstart.tasks.reading import read_rows


@shows("evaluate")
def evaluate(
    subject: Config | Pair,
    *,
    out: Path | str | None = None,
    k: int | None = None,
    minutes: float | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Result:
    """Evaluate the student of a configuration, or of a Pair in memory, on `evaluation.task` into the folder `out`;
    returns the summary written there. `settings` are sections or keys on top of the configuration.

    A killed evaluation of the same settings resumes where it stopped. `say` is called with what it takes before it
    starts. With `minutes` it ends after them: on the task's first problems, as many as there is time for. `progress` is
    called with (responses graded, responses in all); None shows it. Raises ConfigError, DataError, ModelError,
    TemplateError or RunFolderError before generation starts.
    """
    end = time.monotonic() + 60 * (minutes or 0.0)
    start = sources(subject, None, settings)
    config, runtime = start.config, start.runtime()
    check_ranks(config.sharding, runtime, "an evaluation")
    tokenizer = load_tokenizer(config.student, sees=config.sees) if start.pair is None else start.pair.tokenizer
    questions = load_questions(config, tokenizer)
    check_k(k, questions.settings.samples)
    if start.pair is None:
        mesh = mesh_of(config.sharding, runtime)
        model = load_over(mesh, config.student, runtime, frozen, sees=config.sees)
    else:
        model = start.pair.student.model.eval()
    student, engine = on_its_own(model, tokenizer, config.student)
    check_evaluation_context(student, questions)
    folder, told = _folder(out), progress or report
    if minutes is not None:
        told = elapsed(told, end, minutes)
    weights = {name: text for name, text in start.parts.items() if name == STUDENT}

    def evaluated(limits: dict[str, Any], asked: Questions, begun: bool = False) -> Result:
        evaluator = make_evaluator(config, asked, engine, tokenizer, runtime)
        record = _record(config, asked, evaluator) | weights | limits
        if begun:  # what the folder holds is the beginning of this
            write_json(folder / "settings.json", record)
        work = _work(asked, evaluator, None if limits else say)
        return evaluate_into(folder, work, record, k=k, progress=told)

    def work() -> Result:
        if minutes is None:
            return evaluated({}, questions)
        stored = chosen_before(folder / "settings.json")
        limits = {"minutes": stored.get("minutes", minutes)}
        if stored:
            return evaluated(limits, cut(questions, stored["problems"], stored["settings"]["samples"]))
        return _within(end, questions, engine, k or 1, partial(evaluated, limits), say)

    return led(runtime, [student], work)


def _within(
    end: float,
    questions: Questions,
    engine: InProcessEngine,
    samples: int,
    evaluated: Callable[[Questions, bool], Result],
    say: Callable[[str], None] | None,
) -> Result:
    """The first problems, at least `samples` responses to each, then more problems until `end`."""
    load = Load.of(questions, engine)
    speed = timed(engine, questions.prompts, load.batch, questions.settings.sampling)
    chosen = load.smaller(lambda some: some.seconds(speed), PLANNED * (end - time.monotonic()), samples)
    (say or warnings.warn)(
        f"In the time given: {chosen}, then more problems while there is time ({chosen.problems} tell an accuracy to "
        f"±{width(chosen.problems)} points). In full: {load.announcement(speed)}"
    )

    def first(count: int) -> Result:
        return evaluated(cut(questions, count, chosen.samples), count > chosen.problems)

    return growing(chosen.problems, load.problems, end, first)


def _work(questions: Questions, evaluator: TaskEvaluator, say: Callable[[str], None] | None) -> Work:
    def answer(left: Collection[str], keep: Callable[[GradedResponse], None]) -> None:
        wanted = set(left)
        prompts = [p for p in questions.prompts if p.problem_id in wanted]
        if prompts and say is not None:
            load = Load.of(replace(questions, prompts=prompts), evaluator.engine)
            say(load.announcement(timed(evaluator.engine, prompts, load.batch, questions.settings.sampling)))
        evaluator.rows(prompts, keep)

    samples = {problem.id: questions.settings.samples for problem in questions.problems}
    return Work(questions.task.name, questions.problems, samples, answer)


def _record(config: Config, questions: Questions, evaluator: TaskEvaluator) -> dict[str, Any]:
    """All that the figures depend on."""
    # The batch size changes no response and may differ when a killed evaluation is resumed.
    sampling = {
        name: value for name, value in asdict(questions.settings).items() if name != "batch_size" and value != ()
    }
    return {
        "model": config.student.model_dump(mode="json"),
        "evaluation_task": config.evaluation.task.model_dump(mode="json") if config.evaluation else None,
        "settings": sampling,
        "problems": len(questions.problems),
        **evaluator.record,
    }


def make_evaluator(
    config: Config,
    questions: Questions,
    engine: InProcessEngine | ServedEngine,
    tokenizer: Any,
    runtime: Runtime,
    progress: OnProgress = silent,
) -> TaskEvaluator:
    """An evaluator whose reports say what their figures depend on.

    Raises SandboxError when programs are to be graded and no sandbox works here.
    """
    task = questions.task
    images = [[picture.sha256 for picture in p.images] for p in questions.problems if p.images]
    record = {
        **({"engine": "server"} if isinstance(engine, ServedEngine) else {}),
        "stop_ids": sorted(engine.stop_ids),
        "template_kwargs": config.prompts.template_kwargs,
        "template_clock": CLOCK.isoformat(),
        "chat_template_sha256": _digest(chat_template(tokenizer) or ""),
        "problems_sha256": _digest(repr([(p.id, p.messages, p.text, p.answer) for p in questions.problems])),
        "prompts_sha256": _digest(repr([prompt.token_ids for prompt in questions.prompts])),
        **({"images_sha256": _digest(repr((images, _settings(tokenizer))))} if images else {}),
        **({"style": task.style} if isinstance(task, BfclTask) else {}),
        **grader_of(task),
    }
    return TaskEvaluator(questions, engine, tokenizer, runtime, record, progress)


@shows("evaluate")
def evaluate_responses(
    task: TaskConfig,
    responses: Path,
    *,
    out: Path | str | None = None,
    k: int | None = None,
    progress: OnProgress | None = None,
) -> Result:
    """Grade the responses in the file `responses` into the folder `out`; returns the summary written there.

    Function calls may be of any category whose file exists, unless the task names some. A killed call resumes where it
    stopped, as `evaluate` does.
    """
    if isinstance(task, BfclConfig) and "categories" not in task.model_fields_set and task.data is not None:
        task = task.model_copy(update={"categories": categories_in(task.data)})
    made = make_task(task)
    problems = {problem.id: problem for problem in made.problems()}
    given = read_responses(responses, problems)
    record = {
        "responses": str(responses),
        "responses_sha256": hashlib.sha256(responses.read_bytes()).hexdigest()[:16],
        "evaluation_task": task.model_dump(mode="json"),
        **grader_of(made),
    }
    work = Work(
        made.name,
        [problems[name] for name in given],
        {name: len(texts) for name, texts in given.items()},
        lambda left, keep: grade_responses(made, [problems[name] for name in left], given, keep),
    )
    return evaluate_into(_folder(out), work, record, k=k, progress=progress or report)


def read_responses(path: Path, problems: Collection[str]) -> dict[str, list[str]]:
    """The responses by problem id in a file of rows `{"id": ..., "responses": [...]}`; ids must be among `problems`.

    Raises DataError naming row and field of what is wrong.
    """
    responses: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(str(path)), start=1):
        where, name, texts = f"{path}, row {number}", str(row.get("id")), row.get("responses")
        if "id" not in row:
            raise DataError(f"{where}: expected an object with id and responses")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: field 'responses' must be a non-empty list of strings")
        if name not in problems:
            close = difflib.get_close_matches(name, problems, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; ids look like {next(iter(problems))!r}"
            raise DataError(f"{where}: the task has no problem with id {name!r}{hint}")
        if name in responses:
            raise DataError(f"{where}: id {name!r} comes twice; put all its responses into one row")
        responses[name] = texts
    return responses


def grade_responses(
    task: Task,
    problems: Sequence[Problem],
    responses: Mapping[str, Sequence[str]],
    graded: Callable[[GradedResponse], None],
) -> None:
    """Grade every response to `problems` in parallel threads; `graded` is called with each row in order."""

    def grade(problem: Problem, sample: int, text: str) -> GradedResponse:
        return GradedResponse(problem.id, sample, text, None, None, task.grade(problem, text))

    items = [(problem, *item) for problem in problems for item in enumerate(responses[problem.id])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(grade, *zip(*items, strict=True)):
            graded(row)


def _settings(tokenizer: Any) -> str:
    """What the pixel values of images depend on."""
    reader = reader_of(tokenizer)
    return "" if reader is None else reader.settings


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def _folder(out: Path | str | None) -> Path:
    return Path(out) if out is not None else Path("runs") / f"evaluation-{datetime.now():%Y%m%d-%H%M%S}"
