"""Config -> Loaded (prompts, models) -> Parts -> a finished training run.

The order is deliberate: what is cheap and can be wrong comes first (run folder, prompts, tokenizers, templates), the
models last, and the run folder is made only when everything else stands, so that a failed start leaves nothing behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headstart.assemble.memory import STUDENT, Sources, sources
from headstart.assemble.pair import Pair, check_context, check_evaluation_context, given_completions
from headstart.assemble.several import each
from headstart.assemble.tasks import Questions, evaluation_settings, load_questions, warn_of_overlap
from headstart.checks.findings import Preflight
from headstart.checks.run import cheap_preflight, enforce, unwise
from headstart.config import loader
from headstart.config.differences import Differences, described, flat
from headstart.config.horizon import FixedHorizon
from headstart.config.schema import Config, FormatTokens, PlacedTokens, TopTokens
from headstart.diagnosis.run import ProbeQuestions, probe_questions
from headstart.distillation.ending import exporter, files_of, measured, published, served_parts
from headstart.distillation.engine import make_engine, mixed_engine
from headstart.distillation.extending import check_reach, complete, resumed_config, rewrite
from headstart.distillation.horizon import diagnosed_horizon, loss_side, make_horizon, make_prober
from headstart.distillation.trackers import make_judge, opened
from headstart.errors import ConfigError
from headstart.evaluation.load import warn_of_cost
from headstart.evaluation.run import make_evaluator
from headstart.horizon import fixed
from headstart.interfaces import HorizonPolicy, Tracker
from headstart.losses.selection import CLASSES, Selector, token_class
from headstart.models.causal import CausalModel
from headstart.models.collate import token_texts
from headstart.models.completions import Completions, require_completions
from headstart.models.hub import check_push
from headstart.models.sharded import shape
from headstart.models.templates import PromptSet
from headstart.models.vocabulary import SharedVocabulary
from headstart.progress import report, shows
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import local_tensor
from headstart.records import Problem
from headstart.tracking import ConsoleTracker, require_extras
from headstart.train.checkpoint import load_newest
from headstart.train.folder import RunFolder
from headstart.train.inputs import Inputs, configured, digest, read_inputs, text_parts
from headstart.train.loop import RunResult, check_fits, run
from headstart.train.optimizer import make_optimizer
from headstart.train.parts import Parts

Accept = Callable[[Inputs, CausalModel | None], Inputs]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a run starts from, read and checked: prompts, models, problems to evaluate on. `inputs` records it.

    Runs of one process that differ in nothing else than horizon, selection, optimizer and how they are evaluated may
    share it, one after the other; `untrained` then holds the weights that each of them starts with.
    """

    problems: Sequence[Problem]
    prompts: PromptSet
    questions: Questions | None
    probes: ProbeQuestions | None
    """What a run that diagnoses itself before its first step asks."""
    horizon: HorizonPolicy | None
    pair: Pair
    preflight: Preflight
    inputs: Inputs
    notes: Sequence[str] = ()
    """What was chosen of the sources of prompts."""
    completions: Completions | None = None
    """The responses that come with the prompts, where they are trained on."""
    untrained: Mapping[str, Tensor] | None = None

    def shared(self) -> Loaded:
        """The same, for several runs."""
        weights = self.pair.student.trainable().items()
        return replace(self, untrained={name: local_tensor(p.detach()).to("cpu", copy=True) for name, p in weights})

    def renewed(self, config: Config, accept: Accept) -> Loaded:
        """The same for the next run, `config`, with an untrained student."""
        assert self.untrained is not None
        for name, parameter in self.pair.student.trainable().items():
            local_tensor(parameter.data).copy_(self.untrained[name])
        inputs = configured(config, self.pair.runtime.device.type)
        inputs.parts |= self.inputs.parts
        questions = self.questions
        if questions is not None and config.evaluation is not None:
            questions = replace(questions, settings=evaluation_settings(config.evaluation, questions.task))
        inputs = accept(inputs, self.pair.student)
        return replace(self, horizon=make_horizon(config), questions=questions, inputs=inputs)


@shows("distill")
def distill(
    subject: Config | Pair | None = None,
    prompts: Any = None,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    allow_changed: Sequence[str] = (),
    overrides: Sequence[str] = (),
    shared: Loaded | None = None,
    **settings: Any,
) -> RunResult:
    """Run a configuration, or a Pair of models in memory, into the folder `out`; or resume the run in `resume` (which
    brings its own configuration, and needs the same Pair again where it had one).

    `prompts` are texts, lists of messages, rows, Problems or a `datasets.Dataset`, in place of those that the
    configuration names; `settings` are sections or keys on top of it (`training={"steps": 6}`). A student in memory is
    trained in place, and is the result's `model`.
    A run is resumed as it was started, but for the settings and kinds of input (prompts, student, teacher, tokenizer,
    template) in `allow_changed`; one that is complete is left as it is. `overrides` go on top of a resumed run's
    configuration and stay there; `training.steps=+200` extends a complete run and keeps its model as
    `model-step-<step>`. With `shared` nothing is loaded, and `model/` stays empty (merging an adapter would change the
    student): such a run leaves metrics and evaluations.
    Returns the folder, the progress and the evaluations before and after. Raises ConfigError, DataError, ModelError or
    RunFolderError before training starts, NonFiniteError and Interrupted during it.
    """
    if (subject is None and resume is None) or (resume is not None and (isinstance(subject, Config) or settings)):
        raise ConfigError(
            "distill takes either a configuration or the folder of a run to resume, not both or neither; settings of a "
            "resumed run are overrides"
        )
    if overrides and resume is None:
        raise ConfigError(f"overrides ({', '.join(overrides)}) go with resume; put them into the configuration")
    if resume is None:
        assert subject is not None
        start = sources(subject, prompts, settings)
    else:
        own = resumed_config(RunFolder(Path(resume)), overrides)
        start = Sources(own, subject if isinstance(subject, Pair) else None, prompts)
    runtime_config, runtime = start.config, start.runtime()
    asked = {"--out": out, "--resume": resume, "--allow-changed": list(allow_changed)}
    runtime.agree(asked | flat(runtime_config.model_dump(mode="json")) | {"device": runtime.device.type})
    with start.lent(trained=True):
        if resume is not None:
            result = _resume(RunFolder(Path(resume)), start, runtime, allow_changed, shared)
        else:
            path = Path(out) if out is not None else runtime_config.output.dir or _default_folder()
            if runtime.is_main:
                RunFolder(path).refuse_content()
            make = partial(RunFolder.create, path, runtime_config)
            parts = build(runtime_config, runtime, make, shared=shared, start=start)
            result = published(run(parts), runtime_config)
    return replace(result, model=start.trained)


def _resume(
    place: RunFolder, start: Sources, runtime: Runtime, allowed: Sequence[str], shared: Loaded | None
) -> RunResult:
    config = start.config
    steps, extends = config.training.steps, place.model.exists() and config != loader.load(place.config)
    if place.model.exists() and not extends:
        result, words = complete(place, steps)
        if runtime.is_main:
            ConsoleTracker(steps).message(words)
        return result
    record, now = read_inputs(place.path), configured(config, runtime.device.type)
    before = record or now
    folder = RunFolder.open(place.path) if runtime.is_main else None
    runtime.barrier()
    notes: list[str] = []
    changed: Differences = {}

    def accept(inputs: Inputs, student: CausalModel | None) -> Inputs:
        if student is not None and checkpoint is not None:
            check_fits(student, checkpoint)
        if checkpoint is not None and config.tuning.type == "full" and STUDENT in before.parts:
            inputs.parts[STUDENT] = before.parts[STUDENT]  # the checkpoint replaces every weight
        changed.update(before.differences(inputs))
        return before.accept(inputs, allowed, reached)

    def reopen() -> RunFolder | None:
        """The folder, when all else is known to be right: a refused resume changes nothing in it."""
        notes.extend(rewrite(place, config, reached))
        return folder

    try:
        before.accept(now, allowed, 0)
        checkpoint = load_newest(place.checkpoints, notes.append, runtime)
        reached = checkpoint.step if checkpoint else 0
        check_reach(place, steps, checkpoint.step if checkpoint else None, extends)
        if record is None and checkpoint is not None and runtime.is_main:
            before.changes = [{"after_step": reached, "changed": "not recorded before"}]
            warnings.warn(
                f"{place.path} has no inputs.json (an older version started the run), so it cannot be checked that "
                "configuration, prompts and models are those it was started with; they are recorded from here on",
                stacklevel=3,
            )
        parts = build(config, runtime, reopen, accept, shared, start)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    notes += [f"changed since the start: {line}" for line in described(changed)]
    notes.append(f"resumed after step {reached}" if checkpoint else "no checkpoint yet: starting from step 1")
    for note in notes:
        parts.tracker.message(note)
    return published(run(parts, checkpoint), config)


def load(
    config: Config,
    runtime: Runtime,
    accept: Accept = lambda inputs, student: inputs,
    start: Sources | None = None,
) -> Loaded:
    """Read and check everything that `config` names, or `start` has in memory. `accept` may refuse what the run would
    continue with, before the models are loaded; it returns what is recorded of it."""
    shape(config.sharding, runtime.world_size)
    start = start or Sources(config)
    notes: list[str] = []
    problems = start.problems(notes.append)
    tokenizer, teacher_tokenizer = start.tokenizers
    prompts = start.shown(problems)
    if given := config.rollout.mix.given > 0:
        require_completions(problems)
    questions = load_questions(config, tokenizer) if config.evaluation else None
    if questions is not None:
        warn_of_overlap(problems, questions)
    horizon = make_horizon(config)
    inputs = configured(config, runtime.device.type)
    named = {f"teacher/{name}": reader for name, reader in start.readers.items()} or {"teacher": teacher_tokenizer}
    inputs.parts |= text_parts(problems, prompts.prompts, student=tokenizer, **named)
    if given:
        inputs.parts["prompts/completions"] = f"sha256 {digest(repr([p.completion for p in problems]))}"
    inputs.parts |= start.parts or files_of(config)
    if config.horizon.type == "diagnosed" and horizon is not None:
        inputs.parts["horizon/diagnosed"] = f"{horizon.tokens(0)} tokens"
    runtime.agree(inputs.read_first())
    accept(inputs, None)
    loss_side(horizon)
    probes = probe_questions(config, tokenizer, teacher_tokenizer, problems) if horizon is None else None
    if runtime.is_main:
        require_extras(config.tracking)
    pair = start.open(runtime, prompts.longest)
    inputs.parts |= (start.parts or files_of(config)) | served_parts(pair)  # files of the hub are here now
    runtime.agree(inputs.parts)
    record = accept(inputs, pair.student)
    for one, own in each(pair, prompts.prompts):
        check_context(one.config, one.student, one.judge, own)
    if questions is not None:
        check_evaluation_context(pair.student, questions)
        warn_of_cost(config, pair, prompts.prompts, questions)
    completions = given_completions(pair, problems, prompts.prompts)
    preflight = cheap_preflight(pair, problems, prompts, questions, completions)
    if runtime.is_main:
        enforce(preflight)
    return Loaded(problems, prompts, questions, probes, horizon, pair, preflight, record, notes, completions)


def build(
    config: Config,
    runtime: Runtime,
    make_folder: Callable[[], RunFolder | None],
    accept: Accept = lambda inputs, student: inputs,
    shared: Loaded | None = None,
    start: Sources | None = None,
) -> Parts:
    """Everything a run is made of. `make_folder` is called last, on rank 0 only; `accept` and `start` as in `load`."""
    enforce(Preflight(tuple(unwise(config, runtime))))
    if runtime.is_main:
        check_push(config.output)
    loaded = load(config, runtime, accept, start) if shared is None else shared.renewed(config, accept)
    pair, questions, horizon, prompts = loaded.pair, loaded.questions, loaded.horizon, loaded.prompts
    prober = make_prober(config, pair, loaded.problems)
    engine = make_engine(config, pair, prompts, questions)
    every = config.evaluation.every if config.evaluation else None
    console = ConsoleTracker(config.training.steps, evaluates_every=every)
    evaluator = None
    if questions is not None:
        evaluator = make_evaluator(config, questions, engine, pair.tokenizer, runtime, report)
    optimizer = make_optimizer(pair.student.trainable().values(), config)
    folder = make_folder() if runtime.is_main else None
    tracker = opened(config, folder, loaded.preflight, loaded.inputs, console)
    _announce(tracker, prompts, pair)
    for note in loaded.notes:
        tracker.message(note)
    if horizon is None:
        assert loaded.probes is not None
        horizon = _diagnosed(pair, loaded.probes, folder, tracker)
    return Parts(
        config=config,
        runtime=runtime,
        folder=folder,
        prompts=prompts.prompts,
        vocabulary=pair.vocabulary,
        student=pair.student,
        teacher=pair.scorer(),
        engine=mixed_engine(config, pair, prompts.prompts, loaded.completions, engine, folder),
        horizon=horizon,
        optimizer=optimizer,
        evaluator=evaluator,
        tracker=tracker,
        decode=lambda ids: token_texts(pair.tokenizer, ids),
        judge=make_judge(config, loaded.problems, pair.tokenizer),
        export=exporter(config, pair) if shared is None else lambda model, path, tokens, after: path.mkdir(),
        measured=measured(questions, evaluator.record, loaded.inputs) if questions and evaluator else {},
        selector=make_selector(config, pair.tokenizer, pair.vocabulary),
        factors=loss_side(horizon),
        reads_overlap=config.horizon.type == "overlap",
        prober=prober,
    )


def _diagnosed(pair: Pair, probes: ProbeQuestions, folder: RunFolder | None, tracker: Tracker) -> HorizonPolicy:
    """The horizon of a run that diagnoses itself first."""
    try:
        place = folder.path if folder else None
        return fixed.FixedHorizon(diagnosed_horizon(pair, probes, place, tracker.message))
    except BaseException:
        tracker.close()
        if folder is not None:
            folder.close()  # not abandoned: --resume continues the diagnosis where it stopped
        raise


def make_selector(config: Config, tokenizer: Any, vocabulary: SharedVocabulary) -> Selector:
    """The token selection of the run; a format rule reads the text of every vocabulary id once."""
    rule, window = config.selection, getattr(config.horizon, "tokens", 0)
    always = isinstance(config.horizon, FixedHorizon)  # other horizons only start there
    if isinstance(rule, PlacedTokens | TopTokens) and always and rule.tokens >= window:
        warnings.warn(
            f"selection.tokens={rule.tokens} is no less than horizon.tokens={window}, so every sampled token is "
            "trained; lower it, or use horizon {type: full} to choose from whole rollouts",
            stacklevel=2,
        )
    classes = token_classes(tokenizer, vocabulary) if isinstance(rule, FormatTokens) else None
    return Selector(rule, config.training.seed, classes)


def token_classes(tokenizer: Any, vocabulary: SharedVocabulary) -> npt.NDArray[np.int64]:
    """The class of every vocabulary id, as a place in `losses.selection.CLASSES`; stop ids are `stop`."""
    texts = tokenizer.batch_decode([[token] for token in range(vocabulary.size)])
    class_V = np.array([CLASSES.index(token_class(text)) for text in texts])
    class_V[list(vocabulary.stop_ids)] = CLASSES.index("stop")
    return class_V


def _announce(tracker: Tracker, prompts: PromptSet, pair: Pair) -> None:
    trainable = sum(p.numel() for p in pair.student.trainable().values())
    several = pair.pairs
    judges = ", ".join(several) if several else _judge(pair)
    tracker.message(
        f"student {_size(pair.student)} parameters ({trainable / 1e6:,.1f} M trained), teacher{'s' * bool(several)} "
        f"{judges}, stop ids {list(pair.vocabulary.stop_ids)}"
    )
    for name, own in several.items():
        tracker.message(f"teacher {name}: {_judge(own)}")
    if pair.visiting:
        tracker.message(pair.visiting)
    dropped = f", {prompts.dropped} over-long dropped" if prompts.dropped else ""
    tracker.message(f"{len(prompts.prompts):,} prompts (longest {prompts.longest} tokens{dropped})")


def _judge(pair: Pair) -> str:
    """A teacher's size, and what the student shares with it."""
    vocabulary, teacher = pair.vocabulary, str(pair.endpoint) if pair.endpoint else _size(pair.teacher)
    if vocabulary.aligner is None:
        return f"{teacher}, shared vocabulary {vocabulary.size:,} ids"
    return (
        f"{teacher}, two tokenizers of {vocabulary.size:,} and {vocabulary.teacher_size:,} ids, aligned on bytes "
        f"({vocabulary.aligner.kind})"
    )


def _size(model: CausalModel) -> str:
    return f"{sum(p.numel() for p in model.model.parameters()) / 1e6:,.1f} M"


def _default_folder() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
