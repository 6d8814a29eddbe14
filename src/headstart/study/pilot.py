"""The pilot: which horizon, at which learning rate? Short trainings of the run's own pair, graded within a budget.

Between rungs an arm is an ordinary checkpoint in `diagnose/pilot-arms/`, and every graded rung is a line of
`diagnose/pilot.jsonl`, so a killed pilot resumes: no graded rung and no timing is repeated. A rung that was cut starts
again from the end of the one before, and the time lost with it is not counted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart.assemble.pair import Pair, check_responses, open_pair
from headstart.assemble.tasks import Questions, evaluation_settings, warn_of_overlap
from headstart.config.differences import refuse_other_settings
from headstart.config.evaluation import EvaluationConfig
from headstart.config.horizon import FixedHorizon as FixedSection
from headstart.config.schema import Config
from headstart.diagnosis.run import probe_questions, response_tokens
from headstart.distillation.arms import arm_config
from headstart.distillation.run import make_selector
from headstart.errors import ConfigError, DataError, MemoryBudgetError, ModelError, NonFiniteError
from headstart.evaluation.evaluator import TaskEvaluator
from headstart.evaluation.readings import problem_means
from headstart.files import append_lines, locked, make_folder, read_lines, write_json
from headstart.horizon.fixed import FixedHorizon
from headstart.interfaces import OnProgress, silent
from headstart.models.templates import build_prompts
from headstart.records import EvalReport, EvaluationSettings, Problem
from headstart.streams import derive_seed
from headstart.study.halving import (
    RESERVE,
    Arm,
    Cost,
    Outcome,
    Pilot,
    Plan,
    Prices,
    cheapest,
    grids,
    halving,
    make_plan,
)
from headstart.tasks.prompts import load_problems
from headstart.tracking import FanTracker
from headstart.train.checkpoint import Checkpoint, load_newest
from headstart.train.folder import RunFolder
from headstart.train.loop import Progress, restore, save
from headstart.train.optimizer import make_optimizer
from headstart.train.parts import Parts
from headstart.train.step import train_step

FEWEST = 16
"""Problems below which two arms can hardly be told apart (one problem is then six points)."""


def run_pilot(
    config: Config,
    out: Path | str,
    progress: OnProgress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Pilot:
    """Try horizons and learning rates of `config` in short trainings; the result, also in `out/diagnose/pilot.json`.

    Costs at most `diagnosis.pilot.budget` of the time of a full-rollout run of `training.steps` steps, timed first;
    `say` is called with the plan and its price before it starts, `progress` with (graded rungs, planned rungs). Raises
    ConfigError when no pilot fits the budget, DataError when nothing can be graded, RunFolderError when `out` holds
    another pilot.
    """
    with locked(Path(out) / "diagnose"):
        return _run(config, open_trainer(config, Path(out) / "diagnose"), progress, say)


def _run(config: Config, trainer: Trainer, progress: OnProgress, say: Callable[[str], None]) -> Pilot:
    horizons, rates = _tried(config, trainer)
    asked = config.model_dump(mode="json", exclude={"output", "tracking", "checkpoint"})
    log = PilotLog(trainer.folder / "pilot.jsonl", {"config": asked, "horizons": horizons, "rates": rates})
    prices, start = log.prices, log.start
    if prices is None:
        lengths = ", ".join(map(str, sorted(horizons)))
        say(f"Pilot: timing a step at N = {lengths} and at {trainer.longest:,} tokens ...")
        prices, start = trainer.time(horizons)
    share, steps = config.diagnosis.pilot.budget, config.training.steps
    seconds = prices.full_step.seconds * steps * share
    choices = grids(horizons, rates)
    plan = make_plan(choices, prices, RESERVE * seconds - prices.timing.seconds, steps)
    if plan is None:
        raise ConfigError(_too_expensive(config, cheapest(choices, prices) + prices.timing, seconds, prices))
    if log.prices is None:
        log.begin(prices, start)
    say(_announcement(plan, config, seconds, len(trainer.questions.prompts)))
    planned, done = sum(rung.keep for rung in plan.rungs), 0

    def run(arm: Arm, rung: int) -> Outcome:
        nonlocal done
        if (arm, rung) not in log.outcomes:
            log.add(arm, rung, trainer.run(arm, rung, plan))
        done += 1
        progress(done, max(done, planned))
        return log.outcomes[arm, rung]

    trials = halving(plan, seconds - prices.timing.seconds, run)
    pilot = Pilot(trainer.questions.task.name, plan, trials, start, share, steps)
    write_json(trainer.folder / "pilot.json", pilot.to_json())
    shutil.rmtree(trainer.arms, ignore_errors=True)
    return pilot


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains and grades one arm after the other with the same models; `initial` is the untrained student."""

    parts: Parts
    questions: Questions
    tokenizer: Any
    initial: Checkpoint
    folder: Path

    @property
    def arms(self) -> Path:
        return self.folder / "pilot-arms"

    @property
    def longest(self) -> int:
        """Tokens of a full rollout."""
        return self.questions.settings.max_tokens

    def run(self, arm: Arm, rung: int, plan: Plan) -> Outcome:
        """Resume `arm` where its last rung ended, train it up to the steps of `rung`, save and grade it."""
        start = time.perf_counter()
        steps = plan.rungs[rung].steps
        parts = self.arm(arm, plan.rungs[-1].steps)
        progress = self.resume(parts)
        before = progress.generated_tokens
        try:
            while progress.step < steps:
                report, _ = train_step(parts, progress.step, progress.generated_tokens)
                progress = replace(progress, step=report.step, generated_tokens=report.metrics["generated_tokens"])
        except NonFiniteError:
            return Outcome(progress.step, (), progress.generated_tokens - before, time.perf_counter() - start)
        if rung + 1 < len(plan.rungs):
            save(parts, progress)
        graded = self.evaluate(plan.samples, rung)
        tokens = progress.generated_tokens - before + graded.generated_tokens
        return Outcome(steps, tuple(problem_means(graded.rows).values()), tokens, time.perf_counter() - start)

    def arm(self, arm: Arm, steps: int) -> Parts:
        """The parts of a run of one arm. The learning rate stays constant after the warm-up, so that a longer rung
        continues a shorter one."""
        config = arm_config(
            self.parts.config,
            optimizer={"lr": arm.lr},
            schedule={"type": "constant"},
            training={"steps": steps},
            checkpoint={"keep_best": False, "keep_last": 1},
        )
        return replace(
            self.parts,
            config=config,
            folder=RunFolder(self.arms / f"{arm.tokens}-{arm.lr:g}"),
            horizon=FixedHorizon(arm.tokens),
            optimizer=make_optimizer(self.parts.student.trainable().values(), config),
        )

    def resume(self, parts: Parts) -> Progress:
        """Put the arm's weights and optimizer back as they were after its last rung; untrained before the first."""
        assert parts.folder is not None
        return restore(parts, load_newest(parts.folder.checkpoints, lambda text: None) or self.initial)

    def evaluate(self, samples: int, rung: int) -> EvalReport:
        """The student as it is. All arms of a rung share the draws; another rung has its own."""
        seed = derive_seed(self.questions.settings.seed, "pilot", rung)
        settings = replace(self.questions.settings, samples=samples, seed=seed)
        questions = replace(self.questions, settings=settings)
        return TaskEvaluator(questions, self.parts.engine, self.tokenizer, self.parts.runtime).evaluate(0)

    def time(self, horizons: Sequence[int]) -> tuple[Prices, tuple[float, ...]]:
        """Prices, timed once each after a step that warms the machine up, and the untrained student's scores."""
        shutil.rmtree(self.arms, ignore_errors=True)  # what a kill during an earlier timing left
        begin = time.perf_counter()
        parts = self.arm(Arm(min(horizons), self.parts.config.learning_rate), 1)

        def step(tokens: int) -> Cost:
            report, _ = train_step(replace(parts, horizon=FixedHorizon(tokens)), 0, 0)
            return Cost(report.metrics["seconds"], report.metrics["tokens"])

        warm_up = step(min(horizons))
        swapped = time.perf_counter()
        save(parts, Progress(step=1))
        self.resume(parts)
        shutil.rmtree(self.arms)
        swap = Cost(time.perf_counter() - swapped)
        self.resume(parts)
        report = self.evaluate(1, 0)
        evaluation = Cost(report.seconds, report.generated_tokens)
        steps = {tokens: step(tokens) for tokens in horizons}
        try:
            full = step(self.longest)
        except (torch.OutOfMemoryError, MemoryBudgetError) as error:
            raise ModelError(
                f"a step of full rollouts ({self.longest:,} tokens) does not fit into memory, so its price cannot be "
                "timed; lower diagnosis.max_tokens"
            ) from error
        tokens = sum((warm_up, evaluation, full, *steps.values()), Cost()).tokens
        scores = tuple(problem_means(report.rows).values())
        return Prices(steps, full, evaluation, swap, Cost(time.perf_counter() - begin, tokens)), scores


def open_trainer(config: Config, folder: Path) -> Trainer:
    """Models, prompts and development problems of `config`; whatever can be wrong is refused here."""
    pair = open_pair(config)
    if pair.runtime.world_size > 1:
        raise ConfigError(f"the pilot runs in one process (found {pair.runtime.world_size}); start it without torchrun")
    problems, questions = development(config, pair)
    prompts = build_prompts(problems, pair.tokenizer, pair.teacher_tokenizer, config.prompts).prompts
    check_responses(pair.student, pair.teacher, prompts, "the longest response", questions.settings.max_tokens)
    make_folder(folder)
    trainable = pair.student.trainable()
    parts = Parts(
        config=config,
        runtime=pair.runtime,
        folder=None,
        prompts=prompts,
        vocabulary=pair.vocabulary,
        student=pair.student,
        teacher=pair.scorer(),
        engine=pair.engine("student"),
        horizon=FixedHorizon(1),
        optimizer=make_optimizer(trainable.values(), config),
        evaluator=None,
        tracker=FanTracker([]),
        decode=lambda ids: [],
        export=lambda path, tokens, report: None,
        selector=make_selector(config, pair.tokenizer, pair.vocabulary),
    )
    untrained = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
    initial = Checkpoint(0, untrained, parts.optimizer.state_dict(), {"progress": {}, "horizon": {}})
    return Trainer(parts, questions, pair.tokenizer, initial, folder)


def development(config: Config, pair: Pair) -> tuple[list[Problem], Questions]:
    """The problems to train on, and those of the diagnosis to grade on, one sample each.

    Where the diagnosis probes training prompts, these are left out of the training. Raises DataError when there are no
    answers to grade with, or too few problems of either kind.
    """
    d, evaluation, problems = config.diagnosis, config.evaluation, load_problems(config.prompts)
    asked = probe_questions(config, pair.tokenizer, pair.teacher_tokenizer)
    graded = {prompt.problem_id for prompt in asked.prompts} if asked.labelled else set()
    rest = [problem for problem in problems if problem.id not in graded] if d.task is None else problems
    if len(graded) < FEWEST or not rest:
        raise DataError(
            f"a pilot is graded on development problems with answers: found {len(graded)} (at least {FEWEST} are "
            f"needed) and {len(rest)} others to train on; set diagnosis.task to a development split, or "
            "prompts.answer_column and a diagnosis.problems that leaves prompts to train on"
        )
    sampling = config.rollout.sampling
    if d.task is not None:  # as the run is evaluated where it says so, else as the task asks
        own = evaluation.model_dump(include={"temperature", "top_p", "top_k"}) if evaluation else {}
        sampling = evaluation_settings(EvaluationConfig(task=d.task, **own), asked.task).sampling
    settings = EvaluationSettings(1, sampling, response_tokens(pair, asked), d.batch_size, d.seed)
    questions = Questions(asked.task, asked.problems, asked.prompts, settings)
    warn_of_overlap(rest, replace(questions, problems=[asked.problems[prompt.index] for prompt in asked.prompts]))
    return rest, questions


class PilotLog:
    """`diagnose/pilot.jsonl`: settings and timings in the first line, then one line per graded rung.

    Raises RunFolderError when the file belongs to a pilot with other `settings`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.prices: Prices | None = None
        self.start: tuple[float, ...] = ()
        self.outcomes: dict[tuple[Arm, int], Outcome] = {}
        lines = read_lines(path)
        if not lines:
            return
        head, *rest = lines
        remedy = "choose another folder with --out, or delete that file"
        refuse_other_settings(f"{path} holds a pilot", head["settings"], self.settings, remedy)
        step, *costs = (head["prices"][name] for name in ("step", "full_step", "evaluation", "swap", "timing"))
        self.prices = Prices({int(n): Cost(**cost) for n, cost in step.items()}, *(Cost(**cost) for cost in costs))
        self.start = tuple(head["start"])
        for line in rest:
            outcome = {**line["outcome"], "scores": tuple(line["outcome"]["scores"])}
            self.outcomes[Arm(**line["arm"]), line["rung"]] = Outcome(**outcome)

    def begin(self, prices: Prices, start: Sequence[float]) -> None:
        append_lines(self.path, [{"settings": self.settings, "prices": asdict(prices), "start": start}])

    def add(self, arm: Arm, rung: int, outcome: Outcome) -> None:
        append_lines(self.path, [{"arm": asdict(arm), "rung": rung, "outcome": asdict(outcome)}])
        self.outcomes[arm, rung] = outcome


def _tried(config: Config, trainer: Trainer) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Horizons and learning rates, the likeliest first. Raises ConfigError for a horizon beyond a full rollout."""
    asked = config.diagnosis.pilot
    horizons = asked.horizons or _horizons(config, trainer.longest, trainer.folder)
    if max(horizons) > trainer.longest:
        raise ConfigError(
            f"diagnosis.pilot.horizons: found {max(horizons):,}, longer than a full rollout of {trainer.longest:,} "
            "tokens; name shorter ones, or raise diagnosis.max_tokens"
        )
    rates = asked.rates or tuple(config.learning_rate * factor for factor in (1.0, 1 / 3, 3.0))
    return tuple(dict.fromkeys(horizons)), tuple(dict.fromkeys(rates))


def _horizons(config: Config, longest: int, folder: Path) -> tuple[int, ...]:
    """The recommendation's horizon, its range and twice its end; without one the configured horizon, half and twice
    it. Likeliest first."""
    path = folder / "recommendation.json"
    advice = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if advice.get("supported") and advice.get("tokens"):
        tokens, low, high = (advice[key] or advice["tokens"] for key in ("tokens", "low", "high"))
        wanted = [tokens, low, high, 2 * high]
    else:
        guess = config.horizon.tokens if isinstance(config.horizon, FixedSection) else FixedSection().tokens
        wanted = [guess, guess // 2, 2 * guess]
    return tuple(dict.fromkeys(min(max(int(n), 1), longest) for n in wanted))


def _announcement(plan: Plan, config: Config, seconds: float, problems: int) -> str:
    cost, arms = plan.cost + plan.prices.timing, plan.arms
    rungs = ", ".join(f"{rung.keep} arms to step {rung.steps}" for rung in plan.rungs)
    return (
        f"Pilot: N = {', '.join(map(str, sorted({a.tokens for a in arms})))} at learning rates "
        f"{', '.join(f'{lr:.2g}' for lr in sorted({a.lr for a in arms}))} ({len(arms)} arms): {rungs}; each graded on "
        f"{problems} problems x {plan.samples}. At most about {cost.seconds:.3g} s and {cost.tokens:,.0f} generated "
        f"tokens; budget {seconds:.3g} s, {config.diagnosis.pilot.budget:.0%} of {config.training.steps} full-rollout "
        f"steps of {plan.prices.full_step.seconds:.3g} s"
    )


def _too_expensive(config: Config, cost: Cost, seconds: float, prices: Prices) -> str:
    return (
        f"no pilot fits its budget: {config.diagnosis.pilot.budget:.0%} of {config.training.steps} full-rollout steps "
        f"of {prices.full_step.seconds:.3g} s is {seconds:.3g} s, {RESERVE:.0%} of it may be planned, and the smallest "
        f"pilot costs {cost.seconds:.3g} s (one evaluation {prices.evaluation.seconds:.3g} s). A short run is its own "
        "pilot: start it, or raise diagnosis.pilot.budget, lower diagnosis.problems, or name fewer "
        "diagnosis.pilot.horizons"
    )
