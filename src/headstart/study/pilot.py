"""The pilot with real training: the run's own pair, prompts, engine and optimizer, one arm after the other.

Between rungs an arm lies on disk (`diagnose/pilot-arms/`) as an ordinary checkpoint, and every graded rung is a line of
`diagnose/pilot.jsonl`. So a killed pilot goes on: a rung that was graded is not repeated, and timings are not taken
anew. A rung that was cut in half starts again from the one before it, and the time lost with it is not counted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import check_responses, open_pair
from headstart.assemble.tasks import Questions
from headstart.config.horizon import FixedHorizon
from headstart.config.schema import CheckpointConfig, Config, ScheduleConfig
from headstart.distillation.run import make_selector
from headstart.errors import ConfigError, MemoryBudgetError, ModelError, NonFiniteError
from headstart.evaluation.evaluator import TaskEvaluator
from headstart.evaluation.readings import by_problem
from headstart.files import make_folder, write_json
from headstart.horizon import fixed
from headstart.interfaces import OnProgress, silent
from headstart.models.templates import build_prompts
from headstart.records import EvalReport
from headstart.streams import derive_seed
from headstart.study.development import development
from headstart.study.halving import (
    RESERVE,
    Arm,
    Cost,
    Outcome,
    Plan,
    Prices,
    cheapest,
    grids,
    halving,
    make_plan,
)
from headstart.study.journal import Journal
from headstart.study.pilot_result import Pilot
from headstart.teacher.local import LocalTeacher
from headstart.tracking import FanTracker
from headstart.train.checkpoint import load_newest
from headstart.train.folder import RunFolder
from headstart.train.loop import Progress, restore, save
from headstart.train.optimizer import make_optimizer
from headstart.train.parts import Parts
from headstart.train.step import train_step


def run_pilot(
    config: Config,
    out: Path | str,
    progress: OnProgress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Pilot:
    """Try horizons and learning rates of `config` in short trainings; the result, also in `out/diagnose/pilot.json`.

    Costs at most `diagnosis.pilot.budget` of the time of a full-rollout run of `training.steps` steps, timed first;
    `say` hears the plan and its price before it starts, `progress` (graded rungs, planned rungs). Raises ConfigError
    when no pilot fits the budget, DataError when nothing can be graded, RunFolderError when `out` holds another pilot.
    """
    bench = _bench(config, Path(out) / "diagnose")
    horizons, rates = _tried(config, bench)
    journal = Journal(bench.folder / "pilot.jsonl", _settings(config, horizons, rates))
    prices, start = journal.prices, journal.start
    if prices is None:
        say(f"Pilot: timing a step at N = {', '.join(map(str, sorted(horizons)))} and at {bench.longest:,} tokens ...")
        shutil.rmtree(bench.arms, ignore_errors=True)  # what a kill during an earlier timing left
        prices, start = bench.time(horizons)
    share, steps = config.diagnosis.pilot.budget, config.training.steps
    seconds = prices.full_step.seconds * steps * share
    choices = grids(horizons, rates)
    plan = make_plan(choices, prices, RESERVE * seconds - prices.timing.seconds, steps)
    if plan is None:
        raise ConfigError(_too_dear(config, cheapest(choices, prices) + prices.timing, seconds, prices))
    if journal.prices is None:
        journal.begin(prices, start)
    say(_announcement(plan, config, seconds, bench))
    tracks = halving(plan, seconds - prices.timing.seconds, _runner(bench, journal, plan, progress))
    pilot = Pilot(bench.questions.task.name, plan, tracks, start, share, steps)
    write_json(bench.folder / "pilot.json", pilot.to_json())
    shutil.rmtree(bench.arms, ignore_errors=True)
    return pilot


def _runner(bench: Bench, journal: Journal, plan: Plan, progress: OnProgress) -> Callable[[Arm, int], Outcome]:
    """What takes one arm through one rung, unless the journal knows the outcome already."""
    planned = sum(rung.keep for rung in plan.rungs)
    done = 0

    def run(arm: Arm, rung: int) -> Outcome:
        nonlocal done
        outcome = journal.outcomes.get((arm, rung)) or bench.run(arm, rung, plan)
        if (arm, rung) not in journal.outcomes:
            journal.add(arm, rung, outcome)
        done += 1
        progress(done, max(done, planned))
        return outcome

    return run


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that all arms share. `initial` holds the untrained weights on the CPU, `longest` the tokens of a full
    rollout."""

    parts: Parts
    questions: Questions
    tokenizer: Any
    initial: dict[str, Tensor]
    longest: int
    folder: Path

    @property
    def arms(self) -> Path:
        return self.folder / "pilot-arms"

    def run(self, arm: Arm, rung: int, plan: Plan) -> Outcome:
        """Train `arm` on to the steps of `rung` from where it stood, put it away, and grade it."""
        start = time.perf_counter()
        steps = plan.rungs[rung].steps
        parts = self.arm(arm, plan.rungs[-1].steps)
        progress = self.take_out(parts)
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
        return Outcome(steps, _scores(graded), tokens, time.perf_counter() - start)

    def arm(self, arm: Arm, steps: int) -> Parts:
        """The parts of a run of one arm. The learning rate stays constant after the warm-up: then a longer rung is the
        continuation of a shorter one."""
        config = self.parts.config
        own = config.model_copy(
            update={
                "optimizer": config.optimizer.model_copy(update={"lr": arm.lr}),
                "schedule": ScheduleConfig(type="constant", warmup=config.schedule.warmup),
                "training": config.training.model_copy(update={"steps": steps}),
                "checkpoint": CheckpointConfig(keep_last=1, keep_best=False),
            }
        )
        return replace(
            self.parts,
            config=own,
            folder=RunFolder(self.arms / f"{arm.tokens}-{arm.lr:g}"),
            horizon=fixed.FixedHorizon(arm.tokens),
            optimizer=make_optimizer(self.parts.student.trainable().values(), own),
        )

    def take_out(self, parts: Parts) -> Progress:
        """Put the arm's weights and optimizer in place as they were after its last rung (untrained before the
        first)."""
        assert parts.folder is not None
        checkpoint = load_newest(parts.folder.checkpoints, lambda text: None)
        if checkpoint is not None:
            return restore(parts, checkpoint)
        self.reset()
        return Progress()

    def reset(self) -> None:
        for name, parameter in self.parts.student.trainable().items():
            parameter.data.copy_(self.initial[name])

    def evaluate(self, samples: int, rung: int) -> EvalReport:
        """The student as it is. All arms of a rung share the draws; another rung has its own."""
        seed = derive_seed(self.questions.settings.seed, "pilot", rung)
        settings = replace(self.questions.settings, samples=samples, seed=seed)
        questions = replace(self.questions, settings=settings)
        return TaskEvaluator(questions, self.parts.engine, self.tokenizer, self.parts.runtime).evaluate(0)

    def time(self, horizons: Sequence[int]) -> tuple[Prices, tuple[float, ...]]:
        """Prices, timed once each after a step that warms the machine up, and the untrained student's scores."""
        begin = time.perf_counter()
        parts = self.arm(Arm(min(horizons), self.parts.config.learning_rate), 1)
        warm_up = _timed_step(parts)
        swap = self._timed_swap(parts)
        self.reset()
        report = self.evaluate(1, 0)
        evaluation = Cost(report.seconds, report.generated_tokens)
        step = {tokens: _timed_step(replace(parts, horizon=fixed.FixedHorizon(tokens))) for tokens in horizons}
        try:
            full = _timed_step(replace(parts, horizon=fixed.FixedHorizon(self.longest)))
        except (torch.OutOfMemoryError, MemoryBudgetError) as error:
            raise ModelError(
                f"a step of full rollouts ({self.longest:,} tokens) does not fit into memory, so its price cannot be "
                "timed; lower diagnosis.max_tokens"
            ) from error
        tokens = sum((warm_up, evaluation, full, *step.values()), Cost()).tokens
        timing = Cost(time.perf_counter() - begin, tokens)
        return Prices(step, full, evaluation, swap, timing), _scores(report)

    def _timed_swap(self, parts: Parts) -> Cost:
        """Putting an arm away and taking it out again."""
        begin = time.perf_counter()
        save(parts, Progress(step=1))
        self.take_out(parts)
        shutil.rmtree(self.arms)
        return Cost(time.perf_counter() - begin)


def _timed_step(parts: Parts) -> Cost:
    report, _ = train_step(parts, 0, 0)
    return Cost(report.metrics["seconds"], report.metrics["tokens"])


def _scores(report: EvalReport) -> tuple[float, ...]:
    groups = by_problem(report.rows).values()
    return tuple(sum(row.verdict.correct for row in group) / len(group) for group in groups)


def _bench(config: Config, folder: Path) -> Bench:
    """Models, prompts and development problems of `config`; whatever can be wrong is found here."""
    pair = open_pair(config)
    if pair.runtime.world_size > 1:
        raise ConfigError(f"the pilot runs in one process (found {pair.runtime.world_size}); start it without torchrun")
    problems, questions = development(config, pair)
    longest = questions.settings.max_tokens
    prompts = build_prompts(problems, pair.tokenizer, pair.teacher_tokenizer, config.prompts).prompts
    check_responses(pair.student, pair.teacher, prompts, "the longest response", longest)
    make_folder(folder)
    trainable = pair.student.trainable()
    parts = Parts(
        config=config,
        runtime=pair.runtime,
        folder=None,
        prompts=prompts,
        vocabulary=pair.vocabulary,
        student=pair.student,
        teacher=LocalTeacher(pair.teacher),
        engine=pair.engine("student"),
        horizon=fixed.FixedHorizon(1),
        optimizer=make_optimizer(trainable.values(), config),
        evaluator=None,
        tracker=FanTracker([]),
        decode=lambda ids: [],
        export=lambda path, tokens, report: None,
        selector=make_selector(config, pair.tokenizer, pair.vocabulary),
    )
    initial = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
    return Bench(parts, questions, pair.tokenizer, initial, longest, folder)


def _tried(config: Config, bench: Bench) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Horizons and learning rates, the likeliest first. Raises ConfigError for a horizon beyond a full rollout."""
    asked = config.diagnosis.pilot
    horizons = asked.horizons or _horizons(config, bench.longest, bench.folder)
    if max(horizons) > bench.longest:
        raise ConfigError(
            f"diagnosis.pilot.horizons: found {max(horizons):,}, longer than a full rollout of {bench.longest:,} "
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


def _settings(config: Config, horizons: Sequence[int], rates: Sequence[float]) -> dict[str, Any]:
    unread = {"output", "tracking", "checkpoint"}
    return {"config": config.model_dump(mode="json", exclude=unread), "horizons": horizons, "rates": rates}


def _announcement(plan: Plan, config: Config, seconds: float, bench: Bench) -> str:
    cost, arms = plan.cost + plan.prices.timing, plan.arms
    rungs = ", ".join(f"{rung.keep} arms to step {rung.steps}" for rung in plan.rungs)
    return (
        f"Pilot: N = {', '.join(map(str, sorted({a.tokens for a in arms})))} at learning rates "
        f"{', '.join(f'{lr:.2g}' for lr in sorted({a.lr for a in arms}))} ({len(arms)} arms): {rungs}; each graded on "
        f"{len(bench.questions.prompts)} problems x {plan.samples}. At most about {cost.seconds:.3g} s and "
        f"{cost.tokens:,.0f} generated tokens; budget {seconds:.3g} s, {config.diagnosis.pilot.budget:.0%} of "
        f"{config.training.steps} full-rollout steps of {plan.prices.full_step.seconds:.3g} s"
    )


def _too_dear(config: Config, cost: Cost, seconds: float, prices: Prices) -> str:
    return (
        f"no pilot fits its budget: {config.diagnosis.pilot.budget:.0%} of {config.training.steps} full-rollout steps "
        f"of {prices.full_step.seconds:.3g} s is {seconds:.3g} s, {RESERVE:.0%} of it may be planned, and the least "
        f"pilot costs {cost.seconds:.3g} s (one evaluation {prices.evaluation.seconds:.3g} s). A short run is its own "
        "pilot: start it, or raise diagnosis.pilot.budget, lower diagnosis.problems, or name fewer "
        "diagnosis.pilot.horizons"
    )
