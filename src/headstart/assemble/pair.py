"""Student and teacher: loaded, cut to the vocabulary they share, checked, and made trainable as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

from headstart.assemble.served import ELSEWHERE, open_scorer, served_teacher, served_vocabulary
from headstart.assemble.tasks import Questions
from headstart.config.differences import flat
from headstart.config.horizon import FixedHorizon, FullHorizon
from headstart.config.loader import parse
from headstart.config.models import IN_MEMORY as IN_MEMORY
from headstart.config.schema import Config, ModelConfig, PromptsConfig
from headstart.errors import ConfigError, ModelError
from headstart.interfaces import RolloutEngine, Teacher
from headstart.models.causal import CausalModel
from headstart.models.collate import completion_text
from headstart.models.completions import Completions, build_completions
from headstart.models.image_text import ImageTextModel
from headstart.models.images import as_tokenizer, reader_of
from headstart.models.load import load_model, load_tokenizer, sharing_weights
from headstart.models.lora import add_lora
from headstart.models.quiet import quiet
from headstart.models.sharded import alone, load_over, mesh_of, shape
from headstart.models.templates import build_prompts, chat_template
from headstart.models.vocabulary import SharedVocabulary, shared_vocabulary
from headstart.progress import doing
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.proof import prove_decoding, prove_images
from headstart.rollout.translated import TranslatingEngine
from headstart.streams import derive_seed
from headstart.tasks.prompts import load_problems
from headstart.teacher.informed import InformedTeacher
from headstart.teacher.local import LocalTeacher
from headstart.teacher.scorers import CandidateScorer, Capabilities
from headstart.teacher.text import TextTeacher

Speaker = Literal["student", "teacher"]


class Bounded(Protocol):
    """What has a context: a model here, or an endpoint."""

    @property
    def max_positions(self) -> int | None: ...


class Pair:
    """A student and its teacher, both cut to the vocabulary they share, ready to sample and to score."""

    pairs: Mapping[str, Pair] = MappingProxyType({})
    """Of several teachers, the pair of each, by its name."""
    visiting: str | None = None
    """Why several teachers are loaded one after the other, where they are."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        tokenizer: Any,
        teacher_tokenizer: Any = None,
        *,
        config: Config | Mapping[str, Any] | None = None,
        runtime: Runtime | None = None,
        vocabulary: SharedVocabulary | None = None,
        scorer: CandidateScorer | None = None,
    ) -> None:
        """`student` and `teacher` are loaded transformers models; with `vocabulary` they are CausalModels that are
        cut to it already. With `scorer` the teacher is elsewhere, and `teacher` None. The teacher's tokenizer is the
        student's by default; for models that see images, processors take the tokenizers' places. `config` brings all
        settings but those of the models, such as {"diagnosis": {"problems": 8}}.

        Raises VocabularyError when the two do not share a tokenisation, ModelError when a head or a layer does not do
        what a causal language model must do here, or when the two are on different devices.
        """
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.teacher_tokenizer = tokenizer if teacher_tokenizer is None else as_tokenizer(teacher_tokenizer)
        if vocabulary is None:
            _require_one_device(student, teacher)
        self.config = config if isinstance(config, Config) else _config_of(student, teacher, tokenizer, config or {})
        self.runtime = runtime or Runtime(0, 1, student.device)
        if vocabulary is None:
            vocabulary = shared_vocabulary(
                tokenizer,
                self.teacher_tokenizer,
                student.generation_config,
                teacher.generation_config,
                len(student.get_output_embeddings().weight),
                len(teacher.get_output_embeddings().weight),
                self.config.divergence.alignment,
            )
            student = checked(student, vocabulary, "student", pad_id(tokenizer), self.config.student, tokenizer)
            source = self.config.teacher
            assert isinstance(source, ModelConfig)
            other = self.teacher_tokenizer
            teacher = checked(teacher, vocabulary, "teacher", pad_id(other), source, other)
        self.vocabulary: SharedVocabulary = vocabulary
        self.student: CausalModel = student
        self._teacher: CausalModel | None = teacher
        self._scorer = scorer
        self._served: Teacher | None = None if scorer is None else served_teacher(scorer, self.config, vocabulary)

    @property
    def teacher(self) -> CausalModel:
        """The teacher on this machine. Raises ConfigError where there is none."""
        if self._teacher is None:
            raise ConfigError(ELSEWHERE.format("this"))
        return self._teacher

    @property
    def models(self) -> tuple[CausalModel, ...]:
        """Those that are on this machine."""
        return (self.student,) if self._teacher is None else (self.student, self._teacher)

    @property
    def endpoint(self) -> Capabilities | None:
        """What scores for a teacher that is elsewhere; None for one on this machine."""
        return None if self._scorer is None else self._scorer.capabilities()

    @property
    def judge(self) -> Bounded:
        """The teacher as far as its context is concerned."""
        return self.endpoint or self.teacher

    def with_student(self, student: CausalModel) -> Pair:
        """The same teacher beside another student of the same tokenisation, such as the trained one."""
        other = copy(self)
        other.student = student
        return other

    def with_config(self, config: Config) -> Pair:
        """The same models with other settings."""
        other = copy(self)
        other.config = config
        return other

    def engine(self, who: Speaker) -> RolloutEngine:
        """Samples from one of the two; completions are the student's tokens whoever wrote them."""
        if who == "student":
            return InProcessEngine(self.student, self.vocabulary.stop_ids)
        engine = InProcessEngine(self.teacher, self.vocabulary.teacher_stop_ids)
        aligner = self.vocabulary.aligner
        return engine if aligner is None else TranslatingEngine(engine, aligner)

    def scorer(self) -> Teacher:
        """The teacher as it scores rollouts."""
        if self.config.divergence.type == "sft":
            return TextTeacher()
        if self._served is not None:
            return self._served
        if self.config.prompts.teacher_view.context_column and self.vocabulary.aligner is None:
            return InformedTeacher(self.teacher)
        return LocalTeacher(self.teacher, self.vocabulary.aligner)

    def sample(
        self,
        prompts: Sequence[Prompt | Problem | str],
        *,
        max_tokens: int,
        samples: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        who: Speaker = "student",
        purpose: str = "sample",
        batch_size: int | None = None,
    ) -> list[Rollout]:
        """`samples` rollouts for every prompt, prompt-major, each at most `max_tokens` long, sampled by `who` from its
        own view; each carries the prompt with both views. Strings are user messages where there is a chat template.

        Draws depend on (seed, purpose, prompt index, sample, position) alone. `sampling` is the run's own by default.
        """
        ready = self.prompts(prompts)
        own = ready if who == "student" else [p.as_teacher() for p in ready]
        rollouts = self.engine(who).generate(
            own,
            samples=samples,
            max_tokens=max_tokens,
            sampling=sampling or self.config.rollout.sampling,
            key=(seed, purpose, 0),
            batch_size=batch_size,
        )
        both = [prompt for prompt in ready for _ in range(samples)]
        return [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts, both, strict=True)]

    def prompts(self, items: Sequence[Prompt | Problem | str]) -> Sequence[Prompt]:
        """Problems and strings as both models read them; prompts stay as they are."""
        if all(isinstance(item, Prompt) for item in items):
            return cast("Sequence[Prompt]", items)
        problems = load_problems(PromptsConfig(source=IN_MEMORY, chat=self.config.prompts.chat), items)
        return build_prompts(problems, self.tokenizer, self.teacher_tokenizer, self.config.prompts).prompts

    def text(self, rollout: Rollout) -> str:
        """The completion as text, without its stop token."""
        return completion_text(self.tokenizer, rollout)


def _require_one_device(*models: Any) -> None:
    """Raise ModelError where the models are not whole on the same device."""
    spread = {str(p.device) for model in models for p in model.parameters()}
    if len(spread) > 1:
        raise ModelError(
            f"student and teacher must be whole on one device; found {', '.join(sorted(spread))}. Move them with "
            '.to("cuda"), and load without a device_map'
        )


def described(model: Any) -> dict[str, Any]:
    """Settings of a model in memory: what it was loaded from, if that is known, and its type."""
    name, dtype = getattr(model, "name_or_path", ""), str(model.dtype).removeprefix("torch.")
    known = dtype if dtype in ("float32", "bfloat16", "float16") else "auto"
    return {"path": f"{name}, {IN_MEMORY}" if name else IN_MEMORY, "revision": None, "adapter": None, "dtype": known}


def _config_of(student: Any, teacher: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Config:
    """The default configuration of models in memory, with `settings` on top."""
    prompts = {"source": IN_MEMORY, "chat": chat_template(tokenizer) is not None}
    start = {"student": described(student), "teacher": described(teacher), "prompts": prompts}
    return parse(start, list(flat(settings).items()))


def load_pair(config: Config, runtime: Runtime, tokenizer: Any, teacher_tokenizer: Any) -> Pair:
    """Student (ready to train) and teacher (frozen), both cut to the vocabulary they share, heads checked."""
    if config.teacher_is_start:
        start = load_model(config.student, runtime.device, sees=config.sees)
        frozen_start = frozen(sharing_weights(start))
        student = prepare_student(start, config)
        return Pair(student, frozen_start, tokenizer, teacher_tokenizer, config=config, runtime=runtime)
    scorer = open_scorer(config, teacher_tokenizer, runtime)
    mesh = mesh_of(config.sharding, runtime)
    student = load_over(mesh, config.student, runtime, partial(prepare_student, config=config), sees=config.sees)
    return with_teacher(student, scorer, config, runtime, tokenizer, teacher_tokenizer)


def with_teacher(
    student: Any, scorer: CandidateScorer | None, config: Config, runtime: Runtime, tokenizer: Any, other: Any
) -> Pair:
    """The pair of a loaded student and the teacher of `config`, here or behind `scorer`; `other` is its tokenizer."""
    if scorer is None:
        assert isinstance(config.teacher, ModelConfig)
        mesh = mesh_of(config.sharding, runtime)
        teacher = load_over(mesh, config.teacher, runtime, frozen, sees=config.sees)
        return Pair(student, teacher, tokenizer, other, config=config, runtime=runtime)
    shared = served_vocabulary(config, tokenizer, other, student)
    made = checked(student, shared, "student", pad_id(tokenizer), config.student)
    return Pair(made, None, tokenizer, other, config=config, runtime=runtime, vocabulary=shared, scorer=scorer)


def checked(
    model: Any, vocabulary: SharedVocabulary, who: Speaker, pad: int, source: ModelConfig, tokenizer: Any = None
) -> CausalModel:
    """`model` cut to the ids of `vocabulary`, its head and its decoding proven, on the fast paths where it is seen to
    do them right; one that sees images where its `tokenizer` belongs to a processor. Raises ModelError where it gives
    other logits here than alone."""
    size = vocabulary.size if who == "student" else vocabulary.teacher_size
    pad, reader = min(pad, len(model.get_input_embeddings().weight) - 1), reader_of(tokenizer)
    settings = model, size, pad, vocabulary.events(who)
    made = CausalModel(*settings) if reader is None else ImageTextModel(*settings, reader=reader)
    with doing(f"checking the {who}'s head and decoding"), alone(made):
        made.check_head(source.path)
        made.use_fast_paths()
        prove_decoding(made, source.path)
        if isinstance(made, ImageTextModel):
            prove_images(made, tokenizer, source.path)
    return made


def on_its_own(model: Any, tokenizer: Any, source: ModelConfig) -> tuple[CausalModel, InProcessEngine]:
    """A model without a teacher, checked as a student is, and what samples from it."""
    own, rows = model.generation_config, len(model.get_output_embeddings().weight)
    vocabulary = shared_vocabulary(tokenizer, tokenizer, own, own, rows, rows)
    student = checked(model, vocabulary, "student", pad_id(tokenizer), source, tokenizer)
    return student, InProcessEngine(student, vocabulary.stop_ids)


def open_pair(config: Config) -> Pair:
    """Student and teacher of `config`, loaded with their tokenizers.

    Raises ModelError or VocabularyError when a model cannot be loaded or the two do not fit together.
    """
    runtime = Runtime.start(config.training.device)
    shape(config.sharding, runtime.world_size)
    tokenizer, teacher_tokenizer = (
        load_tokenizer(m, sees=config.sees) for m in (config.student, config.teacher_tokenizer)
    )
    return load_pair(config, runtime, tokenizer, teacher_tokenizer)


def open_student(pair: Pair, source: ModelConfig) -> CausalModel:
    """Another model of the student's tokenisation, such as a run's final model, cut like the student of `pair`."""
    mesh = mesh_of(pair.config.sharding, pair.runtime)
    model = load_over(mesh, source, pair.runtime, frozen, sees=pair.config.sees)
    return checked(model, pair.vocabulary, "student", pair.student.pad_id, source, pair.tokenizer)


def frozen(model: Any) -> Any:
    """The model with nothing trainable."""
    return model.requires_grad_(False)


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


def given_completions(pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt]) -> Completions | None:
    """The responses that come with the prompts, as the student would have to write them; None where none are trained
    on. Raises DataError where one is missing."""
    config = pair.config
    if not config.rollout.mix.given:
        return None
    return build_completions(problems, prompts, pair.tokenizer, config.prompts, pair.vocabulary.stop_ids)


def check_context(config: Config, student: CausalModel, teacher: Bounded, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError when a training prompt and its rollout are longer than a model's context."""
    h, probes = config.horizon, config.probes
    name = "horizon.max_tokens" if hasattr(h, "max_tokens") else "horizon.tokens"
    check_responses(student, teacher, prompts, *((name, h.longest) if h.longest else ("the least a horizon can be", 1)))
    if probes.max_tokens is not None or (probes.every and isinstance(h, FixedHorizon)):
        tokens = probes.max_tokens or FullHorizon().max_tokens
        check_responses(student, teacher, prompts, "probes.max_tokens", tokens)


def check_responses(student: CausalModel, teacher: Bounded, prompts: Sequence[Prompt], name: str, tokens: int) -> None:
    """Raise ConfigError when a prompt and a completion of `tokens` (the setting `name`) exceed a model's context."""
    _refuse_too_long(
        _too_long("student", student, "prompt", max(len(p.token_ids) for p in prompts), name, tokens),
        _too_long("teacher", teacher, "prompt", max(len(p.teacher_token_ids) for p in prompts), name, tokens),
    )


def check_evaluation_context(student: CausalModel, questions: Questions) -> None:
    """Raise ConfigError when an evaluation prompt and its response are longer than the student's context."""
    longest = max(len(p.token_ids) for p in questions.prompts)
    tokens = questions.settings.max_tokens
    _refuse_too_long(_too_long("student", student, "evaluation prompt", longest, "evaluation.max_tokens", tokens))


def _too_long(who: str, model: Bounded, kind: str, prompt: int, name: str, tokens: int) -> str | None:
    if model.max_positions is None or prompt + tokens <= model.max_positions:
        return None
    return (
        f"the {who}'s context is {model.max_positions:,} tokens, but its longest {kind} of {prompt:,} tokens and "
        f"{name} = {tokens:,} make {prompt + tokens:,}"
    )


def _refuse_too_long(*problems: str | None) -> None:
    found = [problem for problem in problems if problem]
    if found:
        raise ConfigError("; ".join(found) + ". Lower that length, or drop long prompts with prompts.max_tokens")


def pad_id(tokenizer: Any) -> int:
    """Padding is never attended to, so any id will do where the tokenizer names none."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
