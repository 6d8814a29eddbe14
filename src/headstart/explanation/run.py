"""The verb `explain`: the models a run started from, made and learned from, side by side on the same problems."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from headstart.assemble.memory import of_run
from headstart.assemble.pair import Pair, check_responses, open_pair, open_student
from headstart.assemble.served import require_local
from headstart.assemble.speed import NOTABLE, PLANNED, READING, duration, timed
from headstart.assemble.tasks import load_questions
from headstart.config import loader
from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config, ModelConfig
from headstart.diagnosis.probes import SPEAKERS
from headstart.distillation.run import token_classes
from headstart.errors import ConfigError, RunFolderError
from headstart.evaluation.load import Load
from headstart.explanation.cascade import explain_cascade
from headstart.explanation.commitment import explain_commitment
from headstart.explanation.efficiency import explain_efficiency, trained_run
from headstart.explanation.models import SOURCES, Models, Reading, Source
from headstart.explanation.samples import explain_samples
from headstart.explanation.swap import explain_swap
from headstart.explanation.token_selection import explain_selection
from headstart.files import locked, write_json
from headstart.interfaces import OnProgress, Task
from headstart.models.sharded import check_ranks, led
from headstart.models.templates import build_prompts
from headstart.progress import report, shows
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt, Result
from headstart.reports.run import Run
from headstart.tasks.prompts import load_problems
from headstart.train.folder import RunFolder
from headstart.train.inputs import read_inputs


def _selection(models: Models) -> Reading:
    """What the rules pick."""
    # A run of full rollouts has no budget: a tenth of the rollouts' length stands in (arXiv 2605.31490).
    lengths = sorted(len(r.completion_ids) for r in models.responses("before"))
    typical = lengths[len(lengths) // 2]
    tokens = models.horizon if models.horizon < typical else max(1, typical // 10)
    return explain_selection(models, tokens, token_classes(models.pair.tokenizer, models.pair.vocabulary))


EXPLAIN: dict[str, Callable[[Models], Reading]] = {
    "cascade": explain_cascade, "commitment": explain_commitment, "swap": explain_swap,
    "selection": _selection, "samples": explain_samples,
}  # fmt: skip
"""What makes a reading from the models alone."""
READINGS = ("cascade", "commitment", "swap", "selection", "efficiency", "samples")
SAMPLES = 4
"""Rollouts per problem where `evaluation.samples` is null: the paper counts openings among four."""
PROBLEMS = 200
"""Training prompts used where there is no evaluation task."""
READ_TOKENS = 16384
"""Tokens scored at once, about: rollouts are full, so a fixed number of them would not fit every model."""


@shows("explain")
def explain(
    run: Path | str,
    pair: Pair | None = None,
    prompts: Any = None,
    *,
    twin: Path | str | None = None,
    only: Sequence[str] = READINGS,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """The readings named in `only`, as they are written to `explain/<name>.json` in the run's folder.

    `pair` is what a run of models in memory started from (a trained student is another; load it again), `prompts` what
    it was given. `twin` is the folder of the same student trained on full rollouts. `overrides` (such as
    `evaluation.limit=48`) go on top of the run's configuration. `say` is called with what it takes before it starts;
    with `minutes` it asks fewer problems, with fewer samples. Raises ConfigError or RunFolderError, before any model is
    loaded, for an unknown reading, a run without model, or a foreign twin.
    """
    end = time.monotonic() + 60 * (minutes or 0.0)
    if unknown := [name for name in only if name not in READINGS]:
        raise ConfigError(f"--only: there is no reading {unknown[0]!r}; there are {', '.join(READINGS)}")
    folder = RunFolder(Path(run)).require()
    config = loader.load(folder.config, overrides)
    if set(only) - {"efficiency"}:
        require_local(config, "headstart explain (all but --only efficiency)")
    other = None if twin is None else RunFolder(Path(twin)).require()
    if other is not None:
        _check_twin(config, other)
    steps, told = _steps(only, other is not None), progress or report
    total, done = len(steps), 0

    def step(text: str) -> None:
        nonlocal done
        told(min(done, total), total, text)
        done += 1

    out = folder.path / "explain"
    runtime = _ranks(config)
    with locked(out) if runtime.is_main else nullcontext():
        told(0, total, "loading the models")
        trained, full = trained_run(folder.path), trained_run(other.path) if other else None
        models = _open_models(config, trained, other, step, pair, prompts) if set(only) - {"efficiency"} else None

        def work() -> dict[str, dict[str, Any]]:
            if models is not None and (say or minutes):
                _limit(models, steps, None if minutes is None else end, say or warnings.warn)
            readings: dict[str, dict[str, Any]] = {}
            for name in (name for name in READINGS if name in only):
                if models is not None and name in EXPLAIN:
                    readings[name] = EXPLAIN[name](models).to_json()
                else:
                    readings[name] = explain_efficiency(trained, full).to_json()
                write_json(out / f"{name}.json", readings[name])
            return readings

        readings = led(runtime, models.everyone if models else (), work)
        told(total, total)
    return Result(readings, "\n".join(reading["sentence"] for reading in readings.values()))


def _ranks(config: Config) -> Runtime:
    """This process among its peers. Raises ConfigError for several that would all do the same."""
    runtime = Runtime.start(config.training.device)
    check_ranks(config.sharding, runtime, "an explanation")
    return runtime


def _limit(models: Models, steps: set[Any], end: float | None, say: Callable[[str], None]) -> None:
    """Say what is sampled and how long that takes at most; leave out what there is no time for until `end`."""
    pair, count = models.pair, len(models.prompts)
    batch = min(models.batch_size, count * models.samples)
    student, teacher = (
        timed(pair.engine(who), models.prompts, batch, pair.config.rollout.sampling) for who in SPEAKERS
    )
    sampled = [step[1] if step[0] == "tails" else step for step in steps if isinstance(step, str) or step[0] == "tails"]
    read = (len(steps) - len(sampled)) * READING * (student.encoded + teacher.encoded)

    def price(load: Load) -> float:
        made = sum(load.seconds(teacher if source == "teacher" else student) for source in sampled)
        return made + read * load.problems * load.samples * (load.prompt + load.max_tokens)

    load = Load(count, models.samples, models.max_tokens, fmean(len(p.token_ids) for p in models.prompts), batch)
    tokens = len(sampled) * count * load.samples * load.max_tokens
    full = f"{len(sampled)} x {load}: at most {tokens:,} tokens, at most about {duration(price(load))}"
    chosen = load.smaller(price, PLANNED * (600 if end is None else end - time.monotonic()))
    if end is None:
        more = price(load) > NOTABLE
        say(full + (f". --minutes 10 would take {chosen.problems} problems x {chosen.samples}" if more else ""))
        return
    chosen = replace(chosen, problems=max(2, chosen.problems))  # intervals over problems need two
    say(f"In the time given: {chosen}, at most about {duration(price(chosen))}. In full: {full}")
    models.problems, models.prompts = models.problems[: chosen.problems], models.prompts[: chosen.problems]
    models.samples = chosen.samples


def _steps(only: Sequence[str], twin: bool) -> set[Any]:
    """Calls of `Models.progress`: a model's rollouts sampled, a set scored, a model's tails sampled."""
    everyone = [source for source in SOURCES if twin or source != "twin"]
    steps: dict[str, list[object]] = {
        "cascade": ["before", "after", ("before", "before"), ("after", "after"), ("after", "before")],
        "commitment": [*everyone, *((source, source) for source in everyone)],
        "swap": [*everyone, *(("tails", source) for source in everyone)],
        "selection": ["before", ("before", "before")],
        "samples": ["before", "after", ("before", "before"), ("after", "after")],
    }
    return {step for name in only for step in steps.get(name, ())}


def _open_models(
    config: Config,
    run: Run,
    twin: RunFolder | None,
    progress: Callable[[str], None],
    before: Pair | None,
    prompts: Any,
) -> Models:
    trained: dict[Source, ModelConfig] = {"after": trained_model(config, RunFolder(run.path))}
    if twin is not None:
        trained["twin"] = trained_model(loader.load(twin.config), twin)
    horizon = max(step["horizon"] for step in run.steps)  # later positions were never trained
    record = read_inputs(run.path)
    pair = open_pair(config) if before is None else of_run(before, config, record.parts if record else {})
    task, problems, prompts, max_tokens = _questions(config, pair, prompts)
    check_responses(pair.student, pair.teacher, prompts, "the longest response", max_tokens)
    evaluation = config.evaluation
    return Models(
        pair=pair,
        students={source: open_student(pair, model) for source, model in trained.items()},
        problems=problems,
        prompts=prompts,
        task=task,
        horizon=int(horizon),
        samples=(evaluation.samples if evaluation else None) or SAMPLES,
        max_tokens=max_tokens,
        batch_size=(evaluation.batch_size if evaluation else None) or config.diagnosis.batch_size,
        read_batch=max(1, READ_TOKENS // max_tokens),
        seed=evaluation.seed if evaluation else config.diagnosis.seed,
        progress=progress,
    )


def _questions(config: Config, pair: Pair, given: Any) -> tuple[Task | None, Sequence[Problem], Sequence[Prompt], int]:
    """What all models are asked and how long a response may be: the evaluation task, else the training prompts."""
    if config.evaluation is not None:
        questions = load_questions(config, pair.tokenizer, pair.teacher_tokenizer)
        task: Task | None = questions.task
        problems, prompts, max_tokens = questions.problems, questions.prompts, questions.settings.max_tokens
    else:
        everything = load_problems(config.prompts, given)
        made = build_prompts(everything, pair.tokenizer, pair.teacher_tokenizer, config.prompts).prompts[:PROBLEMS]
        task, problems = None, [everything[prompt.index] for prompt in made]
        prompts = [replace(prompt, index=index) for index, prompt in enumerate(made)]
        max_tokens = config.diagnosis.max_tokens or config.horizon.longest or FullHorizon().max_tokens
    if len(problems) < 2:
        raise ConfigError(f"intervals over problems need at least two (found {len(problems)}); raise evaluation.limit")
    return task, problems, prompts, max_tokens


def trained_model(config: Config, folder: RunFolder) -> ModelConfig:
    """The model a run ended with. Raises RunFolderError when it has none yet."""
    if not folder.model.is_dir():
        raise RunFolderError(
            f"the run in {folder.path} has no model yet; finish it with headstart distill --resume {folder.path}"
        )
    if config.output.format == "adapter":
        return config.student.model_copy(update={"adapter": str(folder.model)})
    return config.student.model_copy(update={"path": str(folder.model), "revision": None, "adapter": None})


def _check_twin(config: Config, twin: RunFolder) -> None:
    other = loader.load(twin.config)
    for key in ("student", "teacher"):
        mine, theirs = getattr(config, key), getattr(other, key)
        if (mine.path, mine.revision, mine.adapter) != (theirs.path, theirs.revision, theirs.adapter):
            raise RunFolderError(
                f"--twin {twin.path} has another {key} ({theirs.path}) than the run ({mine.path}); its full-rollout "
                "counterpart differs in the horizon only"
            )
