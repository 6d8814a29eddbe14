"""The verb `diagnose`: configuration or pair -> questions -> decay, positions and recommendation in `diagnose/`."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from headstart.assemble import cost
from headstart.assemble.memory import Sources, sources
from headstart.assemble.pair import IN_MEMORY, Pair, check_responses, open_pair
from headstart.assemble.served import require_local
from headstart.assemble.speed import PLANNED, elapsed
from headstart.assemble.tasks import make_task, task_prompts
from headstart.config import evaluation
from headstart.config.evaluation import Benchmark
from headstart.config.horizon import FullHorizon
from headstart.config.render import resolved
from headstart.config.schema import Config
from headstart.diagnosis.budget import FEW_GIFTS, Prices
from headstart.diagnosis.curve import FORMAT, DecayCurve
from headstart.diagnosis.ledger import Store
from headstart.diagnosis.limited import within
from headstart.diagnosis.measure import Listener, Plan, measure
from headstart.diagnosis.positions import EDGES, binned, coverage, coverage_interval, read_tokens
from headstart.diagnosis.probes import GIFTS, DecayProbe
from headstart.diagnosis.recommend import Recommendation, StepCost, Window, horizon_window, recommend
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.files import locked, make_folder, write_atomic, write_json
from headstart.interfaces import OnProgress, Task
from headstart.models.sharded import check_ranks, led
from headstart.models.templates import build_prompts
from headstart.progress import report, shows
from headstart.records import PrefixState, Problem, Prompt, Rollout, Verdict
from headstart.tasks.jsonl import JsonlTask
from headstart.tasks.prompts import load_problems
from headstart.tasks.training import training_task, usable, usable_answer
from headstart.train.folder import environment

SHARES = (0.4, 0.5, 0.9)
"""Shares of all divergence whose coverage is reported."""

Grade = Callable[[Problem, str], bool | Verdict]


@dataclass(frozen=True, slots=True)
class ProbeQuestions:
    """Problems to probe, as both models read them (`Prompt.index` is the index in `problems`), and how to judge
    responses. `labelled`: there are reference answers; `left_out` problems have no usable one."""

    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    labelled: bool = True
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `diagnose/` of `folder` holds; `positions` as in positions.json."""

    folder: Path
    decay: DecayCurve
    positions: dict[str, Any]
    recommendation: Recommendation

    @property
    def tokens(self) -> int:
        """The horizon to start with: the recommended one, or the longest measured response where no short one is
        supported."""
        window = self.recommendation.window
        return window.tokens if window else self.decay.longest_tokens

    def __str__(self) -> str:
        return self.recommendation.sentence

    def to_json(self) -> dict[str, Any]:
        return {
            "decay": self.decay.to_json(),
            "positions": self.positions,
            "recommendation": self.recommendation.to_json(),
        }


@shows("diagnose")
def diagnose(
    subject: Config | Pair,
    problems: Any = None,
    *,
    grade: Grade | None = None,
    out: Path | str | None = None,
    minutes: float | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Diagnosis:
    """Measure where the teacher stops teaching and recommend a horizon (`.tokens`), into `out/diagnose/`.

    `subject` is a configuration, or a Pair that is in memory with the `problems` to ask it (in any form that `distill`
    takes prompts in; None asks those of its settings); `grade` then says whether a response is right. `settings` are
    sections or keys on top of its configuration. Without `grade` the problems' answers are compared by
    `diagnosis.grader`; without answers the teacher's majority answer stands in. A killed diagnosis of the same settings
    resumes in the same `out` and ends with the same numbers; without `out` the files are temporary. `say` is called
    with the cost before it starts; `progress` None shows what is being done. With `minutes` it ends after them: it
    measures fewer problems, at fewer lengths, or shorter responses, and says which; a resumed one keeps that choice.
    Raises ConfigError, DataError, ModelError, TemplateError or RunFolderError before anything is generated.
    """
    end = time.monotonic() + 60 * (minutes or 0)
    folder = Path(tempfile.mkdtemp(prefix="headstart-diagnosis-") if out is None else out)
    _refuse_foreign(folder)
    began = sources(subject, problems, settings)
    config = began.config
    check_ranks(config.sharding, began.runtime(), "a diagnosis")
    if began.pair is not None:
        pair = began.pair.with_config(config)
        if began.given is None:
            questions = probe_questions(config, *began.tokenizers)
        else:
            questions = _own_questions(pair, began.problems(), grade)
    else:
        if problems is not None or grade is not None:
            raise ConfigError("problems and grade need a Pair; a configuration names its own in diagnosis.task")
        require_local(config, "headstart diagnose")
        questions = probe_questions(config, *began.tokenizers)
        pair = open_pair(config)
    check_ranks(pair.config.sharding, pair.runtime, "a diagnosis")
    longest = response_tokens(pair, questions)

    def work() -> Diagnosis:
        make_folder(folder)
        if not (folder / "config.yaml").exists():
            write_json(folder / "environment.json", environment())
            write_atomic(folder / "config.yaml", resolved(pair.config))
        with locked(folder / "diagnose"):
            if minutes is None:
                return diagnose_pair(pair, questions, longest, folder, Listener(progress or report, say))
            listener = Listener(elapsed(progress or report, end, minutes), say)
            return diagnose_pair(pair, questions, longest, folder, listener, minutes, end)

    return led(pair.runtime, (pair.student, pair.teacher), work)


class _OwnTask:
    """Problems and a grader that came from Python; fits `interfaces.Task`."""

    name = IN_MEMORY

    def __init__(self, problems: Sequence[Problem], grade: Grade) -> None:
        self._problems, self._grade = tuple(problems), grade

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def grade(self, problem: Problem, response: str) -> Verdict:
        verdict = self._grade(problem, response)
        if isinstance(verdict, Verdict):
            return verdict
        return Verdict(correct=bool(verdict), status="correct" if verdict else "wrong")

    def prefix_state(self, problem: Problem, prefix: str) -> PrefixState:
        return "unknown"


def _own_questions(pair: Pair, problems: Sequence[Problem], grade: Grade | None) -> ProbeQuestions:
    d = pair.config.diagnosis
    judged = [p for p in problems if grade is not None or usable_answer(p.answer, d.grader)]
    asked = (judged or list(problems))[: d.problems]
    if grade is None:
        path = f"{IN_MEMORY}.jsonl"
        grade = JsonlTask(evaluation.JsonlTask.model_validate({"path": path, "grader": d.grader})).grade
    left_out = len(problems) - len(judged) if judged else 0
    return ProbeQuestions(_OwnTask(asked, grade), asked, pair.prompts(asked), bool(judged), left_out)


def diagnose_pair(
    pair: Pair,
    questions: ProbeQuestions,
    longest: int,
    folder: Path,
    listener: Listener,
    minutes: float | None = None,
    end: float = math.inf,
) -> Diagnosis:
    """The same with everything loaded; responses have at most `longest` tokens. With `minutes`, which are over at `end`
    of the monotonic clock, with as much of it as there is time for."""
    d, out = pair.config.diagnosis, folder / "diagnose"
    probe = DecayProbe(
        task=questions.task,
        problems=questions.problems,
        prompts=questions.prompts,
        student=pair.engine("student"),
        teacher=pair.engine("teacher"),
        tokenizer=pair.tokenizer,
        aligner=pair.vocabulary.aligner,
        sampling=pair.config.rollout.sampling,
        max_tokens=longest,
        batch_size=d.batch_size,
        seed=d.seed,
    )
    plan = Plan(d.grid, 0 if questions.labelled else d.votes, d.grader, questions.left_out)
    listener = replace(listener, curve=lambda c: write_json(out / "decay.json", c.to_json()))
    prices = None
    settings = partial(_settings, pair, questions)
    if minutes is None:
        measured = measure(probe, plan, Store(out, settings(probe.prompts, plan.grid, longest)), listener)
    else:
        measured, prices = within(minutes, end, probe, plan, out, settings, listener)
    curve, students = measured.curve, [response.rollout for response in measured.students]
    listener.curve(curve)
    positions = _positions(pair, students, out / "positions.json", listener)
    window = horizon_window(curve, positions["coverage"])
    gifts = GIFTS
    if prices and prices.ending(measured.setting, GIFTS) > PLANNED * (end - time.monotonic()):
        gifts = FEW_GIFTS
    plateau = measured.plateau(window.tokens, listener, gifts) if window else None
    costs = _costs(pair, questions.prompts, students, window, prices, listener)
    advice = recommend(curve, positions["coverage"], plateau, costs, positions.get("coverage_interval"))
    write_json(out / "recommendation.json", advice.to_json())
    return Diagnosis(folder, curve, positions, advice)


def probe_questions(
    config: Config, tokenizer: Any, teacher_tokenizer: Any, training: Sequence[Problem] | None = None
) -> ProbeQuestions:
    """The first `diagnosis.problems` of `diagnosis.task`, else of the training prompts, `training` where they are
    loaded already.

    Raises DataError when there is nothing to probe.
    """
    d = config.diagnosis
    if d.task is None:
        return _training_questions(config, tokenizer, teacher_tokenizer, training)
    if config.evaluation is not None and config.evaluation.task == d.task:
        warnings.warn(
            "diagnosis.task is evaluation.task: the horizon is chosen on the problems that the run reports; name a "
            "development split in diagnosis.task",
            stacklevel=2,
        )
    task = make_task(d.task, d.problems, config.prompts.chat)
    problems = list(task.problems())[: d.problems]
    if not problems:
        raise DataError(f"the task {task.name!r} has no problems; check diagnosis.task")
    benchmark = isinstance(d.task, Benchmark)
    prompts = task_prompts(config, problems, tokenizer, teacher_tokenizer, own_system=benchmark)
    return ProbeQuestions(task, problems, prompts)


def _training_questions(
    config: Config, tokenizer: Any, teacher_tokenizer: Any, problems: Sequence[Problem] | None
) -> ProbeQuestions:
    p, d = config.prompts, config.diagnosis
    limit = min(p.limit or d.problems, d.problems)
    problems = (load_problems(p.model_copy(update={"limit": limit})) if problems is None else list(problems))[:limit]
    prompts = build_prompts(problems, tokenizer, teacher_tokenizer, p).prompts
    task = training_task(config, limit)
    if not any(source.labelled for source in p.sources) and not any(problem.answer for problem in problems):
        return ProbeQuestions(task, problems, prompts, labelled=False)
    judged = [prompt for prompt in prompts if usable(p, problems[prompt.index], d.grader)]
    if not judged:
        raise DataError(
            f"none of the first {len(problems)} answers in prompts.answer_column={p.answer_column!r} can be used by "
            f"diagnosis.grader={d.grader!r}; set another grader, or prompts.answer_column=null to do without answers"
        )
    return ProbeQuestions(task, problems, judged, left_out=len(prompts) - len(judged))


def response_tokens(pair: Pair, questions: ProbeQuestions) -> int:
    """The longest response of the diagnosis, see `diagnosis.max_tokens`.

    Raises ConfigError when a model's context has no room for the one that is asked for, or for any.
    """
    config, d = pair.config, pair.config.diagnosis
    if d.max_tokens is not None:
        check_responses(pair.student, pair.teacher, questions.prompts, "diagnosis.max_tokens", d.max_tokens)
        return d.max_tokens
    wanted: list[int | None] = [
        getattr(questions.task, "max_tokens", None) if d.task is not None else None,
        getattr(config.horizon, "max_tokens", None),
        config.evaluation.max_tokens if config.evaluation else None,
        FullHorizon().max_tokens,
    ]
    longest = next(tokens for tokens in wanted if tokens is not None)
    for model, views in (
        (pair.student, [p.token_ids for p in questions.prompts]),
        (pair.teacher, [p.teacher_token_ids for p in questions.prompts]),
    ):
        if model.max_positions is not None:
            longest = min(longest, model.max_positions - max(map(len, views)))
    check_responses(pair.student, pair.teacher, questions.prompts, "the shortest response", max(longest, 2))
    return longest


def _settings(
    pair: Pair, questions: ProbeQuestions, prompts: Sequence[Prompt], grid: tuple[int, ...] | None, longest: int
) -> dict[str, Any]:
    """All that decides the numbers; batches do not."""
    config = pair.config
    d, r = config.diagnosis, config.rollout
    views: list[Any] = [(p.problem_id, p.token_ids, p.teacher_token_ids) for p in prompts]
    views += [(p.images, p.teacher_images) for p in prompts if p.images]
    return {
        "student": config.student.model_dump(mode="json"),
        "teacher": config.teacher.model_dump(mode="json"),
        **(Sources(config, pair).parts if config.student.path.endswith(IN_MEMORY) else {}),
        "task": questions.task.name,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(repr(views).encode()).hexdigest()[:16],
        "sampling": {"temperature": r.temperature, "top_p": r.top_p, "top_k": r.top_k},
        "max_tokens": longest,
        "grid": grid,
        "grader": d.grader if d.task is None else None,
        "votes": None if questions.labelled else d.votes,
        "divergence": config.divergence.model_dump(mode="json"),
        "seed": d.seed,
    }


def _positions(pair: Pair, rollouts: Sequence[Rollout], path: Path, listener: Listener) -> dict[str, Any]:
    """Readings at every position of the student's own responses, stored once."""
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    readings = read_tokens(pair, rollouts, progress=listener.at("position readings"))
    seed = pair.config.diagnosis.seed
    record = {
        "format": FORMAT,
        "rollouts": len(rollouts),
        "tokens": len(readings.row),
        "bins": binned(readings),
        "coverage": {str(share): coverage(readings, share) for share in SHARES},
        "coverage_interval": {str(share): list(coverage_interval(readings, share, seed)) for share in SHARES},
    }
    if (aligner := pair.vocabulary.aligner) is not None:
        cuts = [(r, n) for r in rollouts for n in EDGES[1:] if n < len(r.completion_ids)]
        back = sum(aligner.begin(rollout, n)[0] != rollout.completion_ids[:n] for rollout, n in cuts)
        record["share_scored"] = len(readings.row) / sum(len(r.completion_ids) for r in rollouts)
        record["prefixes_cut_back"] = back / max(1, len(cuts))
    write_json(path, record)
    return record


def _costs(
    pair: Pair,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    window: Window | None,
    prices: Prices | None,
    listener: Listener,
) -> list[StepCost]:
    """A training step at the window's horizons, then with full rollouts: timed, or from `prices` if there are some."""
    lengths = [len(r.completion_ids) for r in rollouts]
    horizons = [*(sorted({window.low, window.tokens, window.high}) if window else []), max(lengths)]
    if prices is not None:
        p = prices
        made = [fmean(min(length, n) for length in lengths) for n in horizons]
        guesses = [cost.expected(pair.config, 1, p.prompt, tokens, p.student, p.teacher) for tokens in made]
        gib = [cost.memory(pair, pair.config, prompts, n).peak for n in horizons]
        return list(map(StepCost, horizons, guesses, gib))
    costs = cost.estimate(
        pair, pair.config, prompts, horizons, lengths=lengths, progress=listener.at("timing training steps")
    )
    return [StepCost(c.tokens, c.seconds.total if c.seconds else None, c.memory.peak) for c in costs]


def _refuse_foreign(folder: Path) -> None:
    """A diagnosis is written to a new folder, or to that of a run or a preflight."""
    if folder.is_file():
        raise RunFolderError(f"{folder} is a file, not a folder; choose another with --out")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if "config.yaml" not in names and not names <= {"diagnose", "environment.json"}:
        raise RunFolderError(f"{folder} is not empty and holds no diagnosis or run; choose another folder with --out")
