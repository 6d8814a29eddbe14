"""The one file that knows every class: Config -> Parts -> a finished run.

The order is deliberate: what is cheap and can be wrong comes first (run folder, prompts, tokenizers, templates), the
models last, and the run folder is made only when everything else stands, so that a failed start leaves nothing behind.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from headstart.config import loader
from headstart.config.schema import (
    Config,
    CustomHorizon,
    CustomTask,
    FixedHorizon,
    FullHorizon,
    JsonlTask,
    TaskConfig,
    TinyTask,
)
from headstart.errors import ConfigError, DataError, RunFolderError
from headstart.evaluate.evaluator import TaskEvaluator
from headstart.horizon import fixed
from headstart.interfaces import HorizonPolicy, Task, Tracker
from headstart.models.causal import CausalModel
from headstart.models.collate import token_texts
from headstart.models.export import export_model, model_card
from headstart.models.load import load_model, load_tokenizer
from headstart.models.lora import add_lora
from headstart.models.quiet import quiet
from headstart.models.templates import PromptSet, build_prompts, render
from headstart.models.vocabulary import SharedVocabulary, shared_vocabulary
from headstart.numerics.streams import derive_seed
from headstart.records import EvalReport, Problem, Prompt
from headstart.rollout.engine import InProcessEngine
from headstart.runtime import Runtime
from headstart.tasks import jsonl, tiny
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

HORIZON_METHODS = ("tokens", "observe", "state_dict", "load_state_dict")
TASK_METHODS = ("problems", "grade", "prefix_state")
"""What a plug-in must bring to fit `interfaces.HorizonPolicy` and `interfaces.Task`."""


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
    task, task_problems, task_prompts = _evaluation_prompts(config, tokenizer)
    horizon = make_horizon(config)
    if runtime.is_main:
        require_extras(tensorboard=config.tracking.tensorboard, wandb=config.tracking.wandb is not None)
    student, teacher, vocabulary = load_pair(config, runtime, tokenizer, teacher_tokenizer)
    _check_context(config, student, teacher, prompts.prompts, task_prompts)
    engine = InProcessEngine(student, vocabulary.stop_ids)
    evaluator = None
    if config.evaluation is not None and task is not None:
        evaluator = TaskEvaluator(task, task_problems, task_prompts, engine, tokenizer, config.evaluation, runtime)
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
        evaluator=evaluator,
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


def load_pair(
    config: Config, runtime: Runtime, tokenizer: Any, teacher_tokenizer: Any
) -> tuple[CausalModel, CausalModel, SharedVocabulary]:
    """Student (ready to train) and teacher (frozen), both cut to the vocabulary they share, heads checked."""
    student_model = load_model(config.student, runtime.device)
    teacher_model = load_model(config.teacher, runtime.device)
    vocabulary = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        student_model.generation_config,
        teacher_model.generation_config,
        student_model.get_output_embeddings().weight.shape[0],
        teacher_model.get_output_embeddings().weight.shape[0],
    )
    student_model = prepare_student(student_model, config)
    student = CausalModel(student_model, vocabulary.size, _pad_id(tokenizer))
    teacher = CausalModel(teacher_model, vocabulary.size, _pad_id(teacher_tokenizer))
    student.check_head(config.student.path)
    teacher.check_head(config.teacher.path)
    return student, teacher, vocabulary


def prepare_student(model: Any, config: Config) -> Any:
    """The student with exactly the weights trainable that `tuning` asks for."""
    tuning = config.tuning
    model.requires_grad_(tuning.type == "full")
    if tuning.gradient_checkpointing:
        with quiet():  # newer transformers have another name for it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if tuning.type == "lora":
        return add_lora(model, tuning, derive_seed(config.training.seed, "lora"))
    return model


def make_horizon(config: Config) -> HorizonPolicy:
    match config.horizon:
        case FixedHorizon(tokens=tokens) | FullHorizon(max_tokens=tokens):
            return fixed.FixedHorizon(tokens)
        case CustomHorizon(path=path, arguments=arguments):
            policy: HorizonPolicy = _custom(path, arguments, "horizon.path", HORIZON_METHODS)
            return policy


def make_task(config: TaskConfig, limit: int | None, chat: bool) -> Task:
    """The task named in `evaluation.task`; `chat` says whether its questions become chat messages."""
    match config:
        case TinyTask(split=split):
            return tiny.TinyTask(split, limit or 1000)
        case JsonlTask():
            return jsonl.JsonlTask(config, chat=chat)
        case CustomTask(path=path, arguments=arguments):
            task: Task = _custom(path, arguments, "evaluation.task.path", TASK_METHODS)
            return task


def task_prompts(config: Config, problems: list[Problem], tokenizer: Any) -> tuple[Prompt, ...]:
    """Evaluation problems as the student reads them (same template settings as in training), index = list place."""
    p = config.prompts
    prompts = []
    for index, problem in enumerate(problems):
        ids = tuple(
            render(
                problem,
                tokenizer,
                chat=problem.messages is not None,
                system=p.system,
                template_kwargs=p.template_kwargs,
            )
        )
        prompts.append(Prompt(index, problem.id, ids, ids))
    return tuple(prompts)


def _evaluation_prompts(config: Config, tokenizer: Any) -> tuple[Task | None, list[Problem], tuple[Prompt, ...]]:
    if config.evaluation is None:
        return None, [], ()
    task = make_task(config.evaluation.task, config.evaluation.limit, config.prompts.chat)
    problems = list(task.problems())[: config.evaluation.limit]
    if not problems:
        raise DataError(f"the evaluation task {task.name!r} has no problems; check evaluation.task")
    return task, problems, task_prompts(config, problems, tokenizer)


def _check_context(
    config: Config,
    student: CausalModel,
    teacher: CausalModel,
    prompts: Sequence[Prompt],
    evaluation: Sequence[Prompt],
) -> None:
    """Raise ConfigError when a prompt and its completion are longer than a model's context."""
    match config.horizon:
        case FixedHorizon(tokens=tokens):
            name, horizon = "horizon.tokens", tokens
        case FullHorizon(max_tokens=tokens):
            name, horizon = "horizon.max_tokens", tokens
        case CustomHorizon():
            name, horizon = "the least a horizon can be", 1
    checks = [
        ("student", student, max(len(p.token_ids) for p in prompts), name, horizon),
        ("teacher", teacher, max(len(p.teacher_token_ids) for p in prompts), name, horizon),
    ]
    if config.evaluation is not None:
        longest = max(len(p.token_ids) for p in evaluation)
        checks.append(("student", student, longest, "evaluation.max_tokens", config.evaluation.max_tokens))
    problems = [
        f"the {who}'s context is {model.max_positions:,} tokens, but its longest {kind} of {prompt:,} tokens and "
        f"{name} = {tokens:,} make {prompt + tokens:,}"
        for who, model, prompt, name, tokens in checks
        for kind in ["evaluation prompt" if name.startswith("evaluation") else "prompt"]
        if model.max_positions is not None and prompt + tokens > model.max_positions
    ]
    if problems:
        raise ConfigError("; ".join(problems) + ". Lower that length, or drop long prompts with prompts.max_tokens")


def _custom(path: str, arguments: dict[str, Any], key: str, methods: tuple[str, ...]) -> Any:
    """The plug-in at `path` (package.module:Name), made with `arguments`; ConfigError when it does not fit."""
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a plug-in may lie where the command runs; last, so that it shadows nothing
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {path!r} cannot be imported ({error}); write it as package.module:Name") from error
    try:
        plugin = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {path} does not take these arguments: {error}") from error
    missing = [method for method in methods if not callable(getattr(plugin, method, None))]
    if missing:
        raise ConfigError(f"{key}: {path} has no {', '.join(missing)}; see the Protocols in headstart.interfaces")
    return plugin


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


def _pad_id(tokenizer: Any) -> int:
    """Padding is never attended to, so any id will do where the tokenizer names none."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def _default_folder() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
