"""Config -> Parts -> a finished training run.

The order is deliberate: what is cheap and can be wrong comes first (run folder, prompts, tokenizers, templates), the
models last, and the run folder is made only when everything else stands, so that a failed start leaves nothing behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from headstart.build.pair import check_context, check_evaluation_context, load_pair
from headstart.build.plugins import HORIZON_METHODS, load_plugin
from headstart.build.tasks import load_questions, warn_of_overlap
from headstart.config import loader
from headstart.config.schema import Config, CustomHorizon, DiagnosedHorizon, FixedHorizon, FullHorizon
from headstart.errors import ConfigError, RunFolderError
from headstart.evaluate.evaluator import TaskEvaluator
from headstart.horizon import fixed
from headstart.interfaces import HorizonPolicy, Tracker
from headstart.models.causal import CausalModel
from headstart.models.collate import token_texts
from headstart.models.export import export_model, model_card
from headstart.models.load import load_tokenizer
from headstart.models.templates import PromptSet, build_prompts
from headstart.models.vocabulary import SharedVocabulary
from headstart.records import EvalReport
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime
from headstart.tasks.prompts import load_problems
from headstart.teacher.local import LocalTeacher
from headstart.tracking import (
    ConsoleTracker,
    FanTracker,
    JsonlTracker,
    TensorBoardTracker,
    WandbTracker,
    require_extras,
)
from headstart.train.checkpoint import load_newest
from headstart.train.folder import RunFolder, truncate_metrics
from headstart.train.loop import RunResult, run
from headstart.train.optimizer import make_optimizer
from headstart.train.parts import Parts


def distill(
    config: Config | None = None, *, out: Path | str | None = None, resume: Path | str | None = None
) -> RunResult:
    """Run `config` into the folder `out`, or go on with the run in `resume` (which brings its own configuration).

    Returns the folder, the progress and the evaluations before and after. Raises ConfigError, DataError, ModelError or
    RunFolderError before training starts, NonFiniteError and Interrupted during it.
    """
    if (config is None) == (resume is None):
        raise ConfigError("distill takes either a configuration or the folder of a run to resume, not both or neither")
    runtime_config = config or loader.load(RunFolder(Path(str(resume))).require().config)
    runtime = Runtime.start(runtime_config.training.device)
    if resume is not None:
        return _resume(Path(resume), runtime_config, runtime)
    path = Path(out) if out is not None else runtime_config.output.dir or _default_folder()
    if runtime.is_main:
        RunFolder(path).refuse_content()
    return run(build(runtime_config, runtime, lambda: RunFolder.create(path, runtime_config)))


def _resume(path: Path, config: Config, runtime: Runtime) -> RunResult:
    if (path / "model").exists():
        raise RunFolderError(f"the run in {path} is complete: its model is in {path / 'model'}; nothing to resume")
    notes: list[str] = []
    folder = RunFolder.open(path) if runtime.is_main else None
    runtime.barrier()
    checkpoint = load_newest(RunFolder(path).checkpoints, notes.append)
    if folder is not None:
        truncate_metrics(folder.metrics, checkpoint.step if checkpoint else 0)
    try:
        parts = build(config, runtime, lambda: folder)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    notes.append(f"resumed after step {checkpoint.step}" if checkpoint else "no checkpoint yet: starting from step 1")
    for note in notes:
        parts.tracker.message(note)
    return run(parts, checkpoint)


def build(config: Config, runtime: Runtime, make_folder: Callable[[], RunFolder | None]) -> Parts:
    """Everything a run is made of. `make_folder` is called last, on rank 0 only."""
    _warn_of_unwise(config, runtime)
    problems = load_problems(config.prompts)
    tokenizer, teacher_tokenizer = load_tokenizer(config.student), load_tokenizer(config.teacher)
    prompts = build_prompts(problems, tokenizer, teacher_tokenizer, config.prompts)
    questions = load_questions(config, tokenizer) if config.evaluation else None
    if questions is not None:
        warn_of_overlap(problems, questions)
    horizon = make_horizon(config)
    if runtime.is_main:
        require_extras(tensorboard=config.tracking.tensorboard, wandb=config.tracking.wandb is not None)
    student, teacher, vocabulary = load_pair(config, runtime, tokenizer, teacher_tokenizer)
    check_context(config, student, teacher, prompts.prompts)
    if questions is not None:
        check_evaluation_context(student, questions)
    engine = InProcessEngine(student, vocabulary.stop_ids)
    optimizer = make_optimizer(student.trainable().values(), config)
    folder = make_folder() if runtime.is_main else None
    try:
        tracker = _tracker(config, folder)
    except BaseException:
        if folder is not None:
            folder.abandon()
        raise
    _announce(tracker, prompts, vocabulary, student, teacher)

    def export(path: Path, generated_tokens: int, after: EvalReport | None) -> None:
        from headstart import __version__

        card = model_card(config, __version__, generated_tokens, after, vocabulary.stop_ids)
        export_model(student, tokenizer, path, format=config.output.format, stop_ids=vocabulary.stop_ids, card=card)

    return Parts(
        config=config,
        runtime=runtime,
        folder=folder,
        prompts=prompts.prompts,
        vocabulary=vocabulary,
        student=student,
        teacher=LocalTeacher(teacher),
        engine=engine,
        horizon=horizon,
        optimizer=optimizer,
        evaluator=TaskEvaluator(questions, engine, tokenizer, runtime) if questions else None,
        tracker=tracker,
        decode=lambda ids: token_texts(tokenizer, ids),
        export=export,
    )


def _warn_of_unwise(config: Config, runtime: Runtime) -> None:
    """Say what works but is rarely meant, with the remedy."""
    rollout = config.rollout
    plain = rollout.temperature == 1.0 and rollout.top_p == 1.0 and rollout.top_k == 0
    if config.divergence.support.type == "sampled" and not plain:
        warnings.warn(
            "divergence.support sampled is biased unless rollouts are sampled at temperature 1 without top_p and top_k "
            f"(found {rollout.temperature}, {rollout.top_p}, {rollout.top_k}); use support full, which is not",
            stacklevel=2,
        )
    half = config.student.dtype in ("bfloat16", "float16") or (
        config.student.dtype == "auto" and runtime.device.type == "cuda"
    )
    if config.tuning.type == "full" and half:
        warnings.warn(
            f"full fine-tuning of half-precision weights: steps of {config.learning_rate:g} are mostly rounded away; "
            "set student.dtype=float32 or use LoRA",
            stacklevel=2,
        )


def make_horizon(config: Config) -> HorizonPolicy:
    match config.horizon:
        case FixedHorizon(tokens=tokens) | FullHorizon(max_tokens=tokens):
            return fixed.FixedHorizon(tokens)
        case DiagnosedHorizon():
            raise ConfigError("horizon: type diagnosed is not built yet; run headstart diagnose and use type fixed")
        case CustomHorizon(path=path, arguments=arguments):
            policy: HorizonPolicy = load_plugin(path, arguments, "horizon.path", HORIZON_METHODS)
            return policy


def _tracker(config: Config, folder: RunFolder | None) -> Tracker:
    if folder is None:
        return FanTracker([])
    trackers: list[Tracker] = [ConsoleTracker(config.training.steps, None), JsonlTracker(folder.metrics)]
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(folder.path / "tensorboard"))
    if config.tracking.wandb is not None:
        trackers.append(WandbTracker(config.tracking.wandb, config.model_dump(mode="json"), folder.path))
    return FanTracker(trackers)


def _announce(
    tracker: Tracker, prompts: PromptSet, vocabulary: SharedVocabulary, student: CausalModel, teacher: CausalModel
) -> None:
    def size(model: CausalModel) -> str:
        return f"{sum(p.numel() for p in model.model.parameters()) / 1e6:,.1f} M"

    trainable = sum(p.numel() for p in student.trainable().values())
    tracker.message(
        f"student {size(student)} parameters ({trainable / 1e6:,.1f} M trained), teacher {size(teacher)}, "
        f"shared vocabulary {vocabulary.size:,} ids, stop ids {list(vocabulary.stop_ids)}"
    )
    dropped = f", {prompts.dropped} over-long dropped" if prompts.dropped else ""
    tracker.message(f"{len(prompts.prompts):,} prompts (longest {prompts.longest} tokens{dropped})")


def _default_folder() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
