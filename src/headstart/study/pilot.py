"""The pilot: which horizon, at which learning rate? Short trainings of the run's own pair, graded within a budget.

An arm is an ordinary run in `diagnose/pilot-arms/`; a longer rung resumes it with more steps. All arms share one loaded
pair. What was graded is read from the arms' own evaluations, so a killed pilot resumes: no graded rung and no timing
is repeated. A rung that was cut starts again from the end of the one before, and the time lost with it is not counted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from headstart.assemble.pair import check_responses
from headstart.assemble.tasks import Questions, evaluation_settings, warn_of_overlap
from headstart.config.differences import refuse_other_settings
from headstart.config.evaluation import WORLDS, EvaluationConfig
from headstart.config.horizon import CustomHorizon, FixedHorizon, Horizon
from headstart.config.schema import Config
from headstart.diagnosis.run import probe_questions, response_tokens
from headstart.distillation.arms import ArmRun, arm_config, bare_config
from headstart.distillation.run import Loaded, load
from headstart.errors import ConfigError, DataError, MemoryBudgetError, ModelError, NonFiniteError
from headstart.files import locked, write_json
from headstart.horizon import fixed
from headstart.interfaces import OnProgress
from headstart.progress import shown
from headstart.ranks.runtime import Runtime
from headstart.reports.run import Point, read_run
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
from headstart.train.folder import RunFolder

FEWEST = 16
"""Problems below which two arms can hardly be distinguished (one problem is then six points)."""


def run_pilot(
    config: Config,
    out: Path | str,
    progress: OnProgress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Pilot:
    """Try horizons and learning rates of `config` in short trainings; the result, also in `out/diagnose/pilot.json`.

    Costs at most `diagnosis.pilot.budget` of the time of a full-rollout run of `training.steps` steps, timed first;
    `say` is called with the plan and its price before it starts, `progress` with (graded rungs, planned rungs, what is
    trained); None shows it. Raises ConfigError when no pilot fits the budget, DataError when nothing can be graded,
    RunFolderError when `out` holds another pilot.
    """
    with nullcontext(progress) if progress else shown("pilot") as told, locked(Path(out) / "diagnose"):
        return _run(open_trainer(config, Path(out) / "diagnose"), told, say)


def _run(trainer: Trainer, progress: OnProgress, say: Callable[[str], None]) -> Pilot:
    config = trainer.asked
    horizons, rates = _tried(config, trainer)
    prices = trainer.prices(horizons, rates, say)
    share, steps = config.diagnosis.pilot.budget, config.training.steps
    seconds = prices.full_step.seconds * steps * share
    choices = grids(horizons, rates)
    plan = make_plan(choices, prices, RESERVE * seconds - prices.timing.seconds, steps)
    if plan is None:
        trainer.timing.unlink()  # the remedies work in the same folder
        raise ConfigError(_too_expensive(config, cheapest(choices, prices) + prices.timing, seconds, prices))
    say(_announcement(plan, config, seconds, len(trainer.questions.prompts)))
    planned, done = sum(rung.keep for rung in plan.rungs), 0

    def run(arm: Arm, rung: int) -> Outcome:
        nonlocal done
        progress(done, max(done + 1, planned), str(arm))
        outcome = trainer.run(arm, rung, plan)
        done += 1
        return outcome

    trials = halving(plan, seconds - prices.timing.seconds - plan.start.seconds, run)
    pilot = Pilot(trainer.questions.task.name, plan, trials, trainer.start(plan), share, steps)
    progress(done, max(done, planned))
    write_json(trainer.folder / "pilot.json", pilot.to_json())
    for trial in trials:
        trainer.arm_run(trial.arm, 0, plan).clear()
    return pilot


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains and grades the arms, one after the other with the same models. `config` is what they have in common, of
    the run that was `asked` for; `folder` is `diagnose/`."""

    asked: Config
    config: Config
    shared: Loaded
    folder: Path

    @property
    def timing(self) -> Path:
        """Settings and prices of the pilot in this folder."""
        return self.folder / "pilot-timing.json"

    @property
    def arms(self) -> Path:
        return self.folder / "pilot-arms"

    @property
    def questions(self) -> Questions:
        assert self.shared.questions is not None
        return self.shared.questions

    @property
    def longest(self) -> int:
        """Tokens of a full rollout."""
        return self.questions.settings.max_tokens

    def run(self, arm: Arm, rung: int, plan: Plan) -> Outcome:
        """Train `arm` on from its last rung to the steps of `rung` and grade it, unless that is done."""
        run = self.arm_run(arm, rung, plan)
        if outcome := self.outcome(run, rung, plan):
            return outcome
        run.share_start([self.timing_run(), *(self.arm_run(other, rung, plan) for other in plan.arms)])
        run.extend()
        run.train(self.shared, allow_changed=("training.steps", "schedule.warmup"))
        outcome = self.outcome(run, rung, plan)
        assert outcome is not None
        return outcome

    def arm_run(self, arm: Arm, rung: int, plan: Plan) -> ArmRun:
        """The run of an arm up to a rung. The learning rate stays constant after the warm-up, and the warm-up is as
        long in every rung, so that a longer rung continues a shorter one."""
        steps = plan.rungs[rung].steps
        warmup = min(round(self.config.schedule.warmup * plan.rungs[-1].steps), plan.rungs[0].steps)
        config = self.config_of(
            FixedHorizon(tokens=arm.tokens),
            rung,
            plan.samples,
            optimizer={"lr": arm.lr},
            schedule={"type": "constant", "warmup": warmup / steps},
            training={"steps": steps},
            checkpoint={"keep_best": False, "keep_last": 1, "every": steps},
        )
        return ArmRun(str(arm), self.arms / f"{arm.tokens}-{arm.lr:g}", config)

    def timing_run(self, horizon: Horizon | None = None, **changes: dict[str, Any]) -> ArmRun:
        """The run that the prices come from; it has graded the untrained student as the first rung grades its arms."""
        return ArmRun("timing", self.arms / "timing", self.config_of(horizon or self.config.horizon, 0, 1, **changes))

    def config_of(self, horizon: Horizon, rung: int, samples: int, **changes: dict[str, Any]) -> Config:
        """All runs of a rung share the draws of their evaluation; another rung has its own."""
        draws = {"samples": samples, "seed": derive_seed(self.asked.diagnosis.seed, "pilot", rung)}
        return arm_config(self.config.model_copy(update={"horizon": horizon}), evaluation=draws, **changes)

    def outcome(self, run: ArmRun, rung: int, plan: Plan) -> Outcome | None:
        """What an arm's run folder says of one rung; None where it did not get there yet. Seconds are those of its
        steps and its evaluation, and the timed overhead."""
        if not RunFolder(run.folder).config.exists():
            return None
        read, first, last = read_run(run.folder), plan.before(rung), plan.rungs[rung].steps
        taken = [step for step in read.steps if first < step["step"] <= last]
        graded = [point for point in read.points if point.step == last]
        if not graded and not run.failed:
            return None
        spent = [Cost(step["seconds"], step["tokens"]) for step in taken] + [_grading(point) for point in graded]
        scores = _scores(graded[0]) if graded else ()
        return Outcome(first + len(taken), scores, sum(spent, plan.prices.overhead))

    def start(self, plan: Plan) -> Outcome:
        """The untrained student, graded before the first arm or, with one sample, during the timing."""
        point = read_run(self.arm_run(plan.arms[0], 0, plan).folder).points[0]
        return Outcome(0, _scores(point), Cost() if plan.samples == 1 else _grading(point))

    def prices(
        self, horizons: Sequence[int], rates: Sequence[float], say: Callable[[str], None] = lambda text: None
    ) -> Prices:
        """What the steps and evaluations of the pilot cost, timed once. Raises RunFolderError when the folder holds a
        pilot with other settings."""
        asked = self.asked.model_dump(mode="json", exclude={"output", "tracking", "checkpoint"})
        settings = {"config": asked, "horizons": horizons, "rates": rates}
        if self.timing.exists():
            stored = json.loads(self.timing.read_text(encoding="utf-8"))
            remedy = f"choose another folder with --out, or remove {self.timing.name} and {self.arms.name} there"
            refuse_other_settings(f"{self.folder} holds a pilot", stored["settings"], settings, remedy)
            return TypeAdapter(Prices).validate_python(stored["prices"])  # JSON made the horizons strings
        say(f"Pilot: timing a step at N = {', '.join(map(str, sorted(horizons)))} and at {self.longest:,} tokens ...")
        shutil.rmtree(self.arms, ignore_errors=True)  # arms without their prices are those of another pilot
        prices = self.time(horizons)
        write_json(self.timing, {"settings": settings, "prices": asdict(prices)})
        return prices

    def time(self, horizons: Sequence[int]) -> Prices:
        """Prices from an ordinary run with one step of each length, after one that warms the machine up. Its rate is
        too small to train anything, so that all are those of the untrained student."""
        lengths = [min(horizons), *horizons, self.longest]
        horizon = CustomHorizon(path=f"{__name__}:{EachOnce.__name__}", arguments={"lengths": lengths})
        run = self.timing_run(horizon, optimizer={"lr": 1e-12}, training={"steps": len(lengths)})
        begin = time.perf_counter()
        try:
            run.train(self.shared)
        except (torch.OutOfMemoryError, MemoryBudgetError) as error:
            raise ModelError(
                f"a step of full rollouts ({self.longest:,} tokens) does not fit into memory, so its price cannot be "
                "timed; lower diagnosis.max_tokens"
            ) from error
        seconds, read = time.perf_counter() - begin, read_run(run.folder)
        if read.failure:
            raise NonFiniteError(read.failure)
        run.clear()
        taken = [Cost(step["seconds"], step["tokens"]) for step in read.steps]
        _, *steps, full = taken
        evaluation = _grading(read.points[-1])
        spent = sum([*taken, _grading(read.points[0])], evaluation)
        overhead = Cost(max(0.0, seconds - spent.seconds))
        return Prices(dict(zip(horizons, steps, strict=True)), full, evaluation, overhead, Cost(seconds, spent.tokens))


class EachOnce(fixed.FixedHorizon):
    """The horizon of the timing: one step of each of `lengths`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(max(lengths))
        self.lengths = lengths

    def tokens(self, step: int) -> int:
        return self.lengths[step]


def _scores(point: Point) -> tuple[float, ...]:
    return tuple(point.graded()["correct"].values())


def _grading(point: Point) -> Cost:
    return Cost(point.evaluation["seconds"], point.evaluation["generated_tokens"])


def open_trainer(config: Config, folder: Path) -> Trainer:
    """Models, prompts and development problems of `config`; whatever can be wrong is refused here."""
    runtime = Runtime.start(config.training.device)
    if runtime.world_size > 1:
        raise ConfigError(f"the pilot runs in one process (found {runtime.world_size}); start it without torchrun")
    bare = bare_config(config, probes={"every": None})
    bare = bare.model_copy(update={"horizon": FixedHorizon(tokens=1), "evaluation": None})
    loaded, evaluation = development(config, load(bare, runtime))
    pair, prompts = loaded.pair, loaded.prompts.prompts
    check_responses(pair.student, pair.teacher, prompts, "the longest response", evaluation.max_tokens or 0)
    return Trainer(config, bare.model_copy(update={"evaluation": evaluation}), loaded.shared(), folder)


def development(config: Config, loaded: Loaded) -> tuple[Loaded, EvaluationConfig]:
    """`loaded` with the problems of the diagnosis to grade on, one sample each, and how a configuration says that.

    Where the diagnosis probes training prompts, these are left out of the training. Raises DataError when there are no
    answers to grade with, or too few problems of either kind.
    """
    d, p, pair = config.diagnosis, config.prompts, loaded.pair
    pair.config = config
    asked = probe_questions(config, pair.tokenizer, pair.teacher_tokenizer)
    graded = {prompt.problem_id for prompt in asked.prompts} if asked.labelled else set()
    held_out = graded if d.task is None else set()
    problems = [problem for problem in loaded.problems if problem.id not in held_out]
    prompts = tuple(prompt for prompt in loaded.prompts.prompts if prompt.problem_id not in held_out)
    if len(graded) < FEWEST or not prompts:
        raise DataError(
            f"a pilot is graded on development problems with answers: found {len(graded)} (at least {FEWEST} are "
            f"needed) and {len(prompts)} others to train on; set diagnosis.task to a development split, or "
            "prompts.answer_column and a diagnosis.problems that leaves prompts to train on"
        )
    own = {"type": p.source, "split": p.split} if p.source in WORLDS else {"path": p.source, "grader": d.grader}
    if d.task is None:
        sampling = asdict(config.rollout.sampling)
    else:  # as the run is evaluated where it says so, else as the task asks
        sampling = config.evaluation.model_dump(include={"temperature", "top_p", "top_k"}) if config.evaluation else {}
    evaluation = EvaluationConfig.model_validate({
        "task": d.task or {"type": "jsonl", **own}, "limit": None, "samples": 1, "stop_strings": (), **sampling,
        "max_tokens": response_tokens(pair, asked), "batch_size": d.batch_size,
    })  # fmt: skip
    questions = Questions(asked.task, asked.problems, asked.prompts, evaluation_settings(evaluation, asked.task))
    warn_of_overlap(problems, replace(questions, problems=[asked.problems[prompt.index] for prompt in asked.prompts]))
    held = replace(loaded.prompts, prompts=prompts)
    return replace(loaded, problems=problems, prompts=held, questions=questions), evaluation


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
        guess = config.horizon.tokens if isinstance(config.horizon, FixedHorizon) else FixedHorizon().tokens
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
