"""The verb `explain`: the models a run started from, made and learned from, side by side on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.assemble.memory import of_run
from headstart.assemble.pair import Pair, check_responses, open_pair, open_student
from headstart.assemble.served import require_local
from headstart.assemble.tasks import load_questions
from headstart.config import loader
from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config, ModelConfig
from headstart.distillation.run import token_classes
from headstart.errors import ConfigError, RunFolderError
from headstart.explanation.cascade import explain_cascade
from headstart.explanation.commitment import explain_commitment
from headstart.explanation.efficiency import explain_efficiency, trained_run
from headstart.explanation.models import SOURCES, Models, Reading, Source
from headstart.explanation.samples import explain_samples
from headstart.explanation.selection_arms import finished_arms, train_arms
from headstart.explanation.swap import explain_swap
from headstart.explanation.token_selection import explain_selection, rules
from headstart.files import locked, write_json
from headstart.interfaces import OnProgress, Task, silent
from headstart.models.sharded import check_ranks, led
from headstart.models.templates import build_prompts
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt, Result
from headstart.reports.run import Run
from headstart.tasks.prompts import load_problems
from headstart.train.folder import RunFolder
from headstart.train.inputs import read_inputs

EXPLAIN: dict[str, Callable[[Models], Reading]] = {
    "cascade": explain_cascade, "commitment": explain_commitment, "swap": explain_swap, "samples": explain_samples,
}  # fmt: skip
"""What makes a reading from the models alone."""
READINGS = ("cascade", "commitment", "swap", "selection", "efficiency", "samples")
SAMPLES = 4
"""Rollouts per problem where `evaluation.samples` is null: the paper counts openings among four."""
PROBLEMS = 200
"""Training prompts used where there is no evaluation task."""
READ_TOKENS = 16384
"""Tokens scored at once, about: rollouts are full, so a fixed number of them would not fit every model."""


def explain(
    run: Path | str,
    pair: Pair | None = None,
    prompts: Any = None,
    *,
    twin: Path | str | None = None,
    only: Sequence[str] = READINGS,
    overrides: Sequence[str] = (),
    selection_arms: bool = False,
    progress: OnProgress = silent,
) -> Result:
    """The readings named in `only`, as they are written to `explain/<name>.json` in the run's folder.

    `pair` is what a run of models in memory started from (a trained student is another; load it again), `prompts` what
    it was given. `twin` is the
    folder of the same student trained on full rollouts. `overrides` (such as `evaluation.limit=48`) go on
    top of the run's configuration. `selection_arms` trains one arm for each selection rule. Raises ConfigError or
    RunFolderError, before any model is loaded, for an unknown reading, a run without model, or a foreign twin.
    """
    if unknown := [name for name in only if name not in READINGS]:
        raise ConfigError(f"--only: there is no reading {unknown[0]!r}; there are {', '.join(READINGS)}")
    folder = RunFolder(Path(run)).require()
    config = loader.load(folder.config, overrides)
    if set(only) - {"efficiency"}:
        require_local(config, "headstart explain (all but --only efficiency)")
    other = None if twin is None else RunFolder(Path(twin)).require()
    if other is not None:
        _check_twin(config, other)
    total, done = _steps(only, other is not None, selection_arms), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    out = folder.path / "explain"
    runtime = _ranks(config, selection_arms)
    with locked(out) if runtime.is_main else nullcontext():
        progress(0, total)
        trained, full = trained_run(folder.path), trained_run(other.path) if other else None
        models = _open_models(config, trained, other, step, pair, prompts) if set(only) - {"efficiency"} else None

        def work() -> dict[str, dict[str, Any]]:
            readings: dict[str, dict[str, Any]] = {}
            for name in (name for name in READINGS if name in only):
                if models is None or name == "efficiency":
                    reading: Reading = explain_efficiency(trained, full)
                elif name == "selection":
                    reading = _selection(config, models, out / "selection", selection_arms)
                else:
                    reading = EXPLAIN[name](models)
                readings[name] = reading.to_json()
                write_json(out / f"{name}.json", readings[name])
            return readings

        readings = led(runtime, models.everyone if models else (), work)
        progress(total, total)
    return Result(readings, "\n".join(reading["sentence"] for reading in readings.values()))


def _ranks(config: Config, arms: bool) -> Runtime:
    """This process among its peers. Raises ConfigError for several that would all do the same."""
    runtime = Runtime.start(config.training.device)
    check_ranks(config.sharding, runtime, "an explanation")
    if arms and runtime.world_size > 1:
        raise ConfigError(f"the arms of --selection are trained in one process (found {runtime.world_size} ranks)")
    return runtime


def _steps(only: Sequence[str], twin: bool, train: bool) -> int:
    """Calls of `Models.progress`: a model's rollouts sampled, a set scored, a model's tails sampled, an arm trained."""
    everyone = [source for source in SOURCES if twin or source != "twin"]
    steps: dict[str, list[object]] = {
        "cascade": ["before", "after", ("before", "before"), ("after", "after"), ("after", "before")],
        "commitment": [*everyone, *((source, source) for source in everyone)],
        "swap": [*everyone, *(("tails", source) for source in everyone)],
        "selection": ["before", ("before", "before"), *(("arm", rule) for rule in rules(1) if train)],
        "samples": ["before", "after", ("before", "before"), ("after", "after")],
    }
    return len({step for name in only for step in steps.get(name, ())})


def _selection(config: Config, models: Models, folder: Path, train: bool) -> Reading:
    """What the rules pick, beside the arms that were trained now or before."""
    # A run of full rollouts has no budget: a tenth of the rollouts' length stands in (arXiv 2605.31490).
    lengths = sorted(len(r.completion_ids) for r in models.responses("before"))
    typical = lengths[len(lengths) // 2]
    tokens = models.horizon if models.horizon < typical else max(1, typical // 10)
    asked = (config, folder, tokens, models.max_tokens)
    arms = train_arms(*asked, models.progress) if train else finished_arms(*asked)
    return explain_selection(models, tokens, token_classes(models.pair.tokenizer, models.pair.vocabulary), arms)


def _open_models(
    config: Config,
    run: Run,
    twin: RunFolder | None,
    progress: Callable[[], None],
    before: Pair | None,
    prompts: Any,
) -> Models:
    trained: dict[Source, ModelConfig] = {"after": _trained(config, RunFolder(run.path))}
    if twin is not None:
        trained["twin"] = _trained(loader.load(twin.config), twin)
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


def _trained(config: Config, folder: RunFolder) -> ModelConfig:
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
