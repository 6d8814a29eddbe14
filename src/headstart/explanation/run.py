"""A finished run explained: the models it started from, made and learned from, side by side on the same problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from headstart.assemble.pair import Pair, check_responses, open_pair, open_student
from headstart.assemble.tasks import load_questions
from headstart.config import loader
from headstart.config.horizon import FullHorizon
from headstart.config.schema import Config, ModelConfig
from headstart.distillation.run import token_classes
from headstart.errors import ConfigError, RunFolderError
from headstart.explanation.cascade import explain_cascade
from headstart.explanation.cast import VOICES, Cast, Voice
from headstart.explanation.commitment import explain_commitment
from headstart.explanation.efficiency import explain_efficiency
from headstart.explanation.samples import explain_samples
from headstart.explanation.selection_arms import finished_arms, train_arms
from headstart.explanation.swap import explain_swap
from headstart.explanation.token_selection import explain_selection, rules
from headstart.files import locked, write_json
from headstart.interfaces import OnProgress, Task, silent
from headstart.models.causal import CausalModel
from headstart.models.templates import build_prompts
from headstart.records import Problem, Prompt, Result
from headstart.tasks.prompts import load_problems
from headstart.train.folder import RunFolder

READINGS = ("cascade", "commitment", "swap", "selection", "efficiency", "samples")
SAMPLES = 4
"""Rollouts per problem where `evaluation.samples` is null: the paper counts openings among four."""
PROBLEMS = 200
"""Training prompts used where there is no evaluation task."""
READ_TOKENS = 16384
"""Tokens scored at once, about: rollouts are full, so a fixed number of them would not fit every model."""


def explain(
    run: Path | str,
    *,
    twin: Path | str | None = None,
    only: Sequence[str] = READINGS,
    overrides: Sequence[str] = (),
    selection_arms: bool = False,
    progress: OnProgress = silent,
) -> Result:
    """The readings named in `only`, as they are written to `explain/<name>.json` in the run's folder.

    `twin` is the folder of the same student trained on full rollouts. `overrides` (such as `evaluation.limit=48`) go on
    top of the run's configuration. `selection_arms` trains one arm for each selection rule. Raises ConfigError or
    RunFolderError, before any model is loaded, for an unknown reading, a run without a model, or a foreign twin.
    """
    if unknown := [name for name in only if name not in READINGS]:
        raise ConfigError(f"--only: there is no reading {unknown[0]!r}; there are {', '.join(READINGS)}")
    folder = RunFolder(Path(run)).require()
    config = loader.load(folder.config, overrides)
    other = None if twin is None else RunFolder(Path(twin)).require()
    if other is not None:
        _check_twin(config, other)
    out = folder.path / "explain"
    found: dict[str, dict[str, Any]] = {}
    with locked(out), _counted(only, other is not None, selection_arms, progress) as piece:
        cast = _open_cast(config, folder, other, piece) if set(only) - {"efficiency"} else None
        for name in (name for name in READINGS if name in only):
            match name:
                case "cascade" if cast:
                    found[name] = explain_cascade(cast).to_json()
                case "commitment" if cast:
                    found[name] = explain_commitment(cast).to_json()
                case "swap" if cast:
                    found[name] = explain_swap(cast).to_json()
                case "selection" if cast:
                    found[name] = _selection(config, cast, out / name, selection_arms)
                case "samples" if cast:
                    found[name] = explain_samples(cast).to_json()
                case _:
                    found[name] = explain_efficiency(folder.path, other.path if other else None).to_json()
            write_json(out / f"{name}.json", found[name])
    return Result(found, "\n".join(reading["sentence"] for reading in found.values() if "sentence" in reading))


def _selection(config: Config, cast: Cast, folder: Path, train: bool) -> dict[str, Any]:
    """What the rules pick, beside the arms that were trained now or before."""
    # A run of full rollouts has no budget of its own: a tenth of the rollouts' length stands in (arXiv 2605.31490).
    typical = sorted(len(r.completion_ids) for r in cast.said("before"))[len(cast.said("before")) // 2]
    tokens = cast.horizon if cast.horizon < typical else max(1, typical // 10)
    make = partial(train_arms, piece=cast.piece) if train else finished_arms
    arms = make(config, folder, tokens, cast.max_tokens)
    classes = token_classes(cast.pair.tokenizer, cast.pair.vocabulary)
    return explain_selection(cast, tokens, classes, arms).to_json()


def _open_cast(config: Config, folder: RunFolder, twin: RunFolder | None, piece: Callable[[], None]) -> Cast:
    models = {"after": _trained(config, folder)}
    if twin is not None:
        models["twin"] = _trained(loader.load(twin.config), twin)
    pair = open_pair(config)
    task, problems, prompts, max_tokens = _asked(config, pair)
    check_responses(pair.student, pair.teacher, prompts, "the longest response", max_tokens)
    students: dict[Voice, CausalModel] = {"after": open_student(pair, models["after"])}
    if twin is not None:
        students["twin"] = open_student(pair, models["twin"])
    evaluation = config.evaluation
    return Cast(
        pair=pair,
        students=students,
        problems=problems,
        prompts=prompts,
        task=task,
        horizon=_longest_horizon(folder),
        samples=(evaluation.samples if evaluation else None) or SAMPLES,
        max_tokens=max_tokens,
        batch_size=(evaluation.batch_size if evaluation else None) or config.diagnosis.batch_size,
        read_batch=max(1, READ_TOKENS // max_tokens),
        seed=evaluation.seed if evaluation else config.diagnosis.seed,
        piece=piece,
    )


def _asked(config: Config, pair: Pair) -> tuple[Task | None, Sequence[Problem], Sequence[Prompt], int]:
    """What everybody is asked and how long a response may be: the evaluation task, else the training prompts."""
    if config.evaluation is not None:
        questions = load_questions(config, pair.tokenizer, pair.teacher_tokenizer)
        task: Task | None = questions.task
        problems, prompts, max_tokens = questions.problems, questions.prompts, questions.settings.max_tokens
    else:
        everything = load_problems(config.prompts)
        made = build_prompts(everything, pair.tokenizer, pair.teacher_tokenizer, config.prompts).prompts[:PROBLEMS]
        task, problems = None, [everything[prompt.index] for prompt in made]
        prompts = [replace(prompt, index=place) for place, prompt in enumerate(made)]
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
                f"--twin {twin.path} has another {key} ({theirs.path}) than the run ({mine.path}); a twin differs in "
                "its horizon only"
            )


def _longest_horizon(folder: RunFolder) -> int:
    """The longest window any step trained, from metrics.jsonl: later positions were never trained."""
    lines = folder.metrics.read_text(encoding="utf-8").split("\n")[:-1] if folder.metrics.exists() else []
    horizons = [record["horizon"] for record in map(json.loads, lines) if record["event"] == "step"]
    if not horizons:
        raise RunFolderError(f"{folder.metrics} holds no training step, so there is nothing to explain")
    return int(max(horizons))


@contextmanager
def _counted(only: Sequence[str], twin: bool, train: bool, progress: OnProgress) -> Iterator[Callable[[], None]]:
    """A function to call after each piece of work: a model's rollouts, a set scored, a model's tails, an arm."""
    voices = [voice for voice in VOICES if twin or voice != "twin"]
    wanted = set(only)
    speaking = set(voices) if wanted & {"commitment", "swap"} else set()
    speaking |= {"before", "after"} if "cascade" in wanted else set()
    speaking |= {"before"} if "selection" in wanted else set()
    scored = {("before", "before"), ("after", "after"), ("after", "before")} if "cascade" in wanted else set()
    scored |= {(voice, voice) for voice in voices} if "commitment" in wanted else set()
    scored |= {("before", "before")} if "selection" in wanted else set()
    speaking |= {"before", "after"} if "samples" in wanted else set()
    scored |= {("before", "before"), ("after", "after")} if "samples" in wanted else set()
    tails = len(voices) if "swap" in wanted else 0
    arms = len(rules(1)) if train and "selection" in wanted else 0
    total, done = len(speaking) + len(scored) + tails + arms, 0

    def piece() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    progress(0, total)
    yield piece
    progress(total, total)
