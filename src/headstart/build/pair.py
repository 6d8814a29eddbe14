"""The models of a run: loaded, cut to what they share, checked, and made trainable as asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headstart.config.horizon import FixedHorizon, FullHorizon
from headstart.config.schema import Config, ModelConfig
from headstart.diagnose.pair import Pair
from headstart.errors import ConfigError
from headstart.evaluate.evaluator import Questions
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_tokenizer
from headstart.models.lora import add_lora
from headstart.models.quiet import quiet
from headstart.models.vocabulary import shared_vocabulary
from headstart.numerics.streams import derive_seed
from headstart.records import Prompt
from headstart.rollout.proof import prove_decoding
from headstart.runtime import Runtime


def load_pair(config: Config, runtime: Runtime, tokenizer: Any, teacher_tokenizer: Any) -> Pair:
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
    student = checked(prepare_student(student_model, config), vocabulary.size, pad_id(tokenizer), config.student)
    teacher = checked(teacher_model, vocabulary.size, pad_id(teacher_tokenizer), config.teacher)
    return Pair(config, runtime, tokenizer, teacher_tokenizer, vocabulary, student, teacher)


def checked(model: Any, vocabulary: int, pad: int, source: ModelConfig) -> CausalModel:
    """`model` cut to `vocabulary` ids, its head and its decoding proven, on the fast paths where it is seen to do them
    right. Raises ModelError where it gives other logits here than alone."""
    made = CausalModel(model, vocabulary, min(pad, len(model.get_input_embeddings().weight) - 1))
    made.check_head(source.path)
    made.use_fast_paths()
    prove_decoding(made, source.path)
    return made


def open_pair(config: Config) -> Pair:
    """Student and teacher of `config` with their tokenizers, for diagnoses.

    Raises ModelError or VocabularyError when a model cannot be loaded or the two do not fit together.
    """
    runtime = Runtime.start(config.training.device)
    tokenizer, teacher_tokenizer = load_tokenizer(config.student), load_tokenizer(config.teacher)
    return load_pair(config, runtime, tokenizer, teacher_tokenizer)


def open_student(pair: Pair, source: ModelConfig) -> CausalModel:
    """Another model of the student's tokenisation, such as a run's final model, cut like the student of `pair`."""
    return checked(load_model(source, pair.runtime.device), pair.vocabulary.size, pair.student.pad_id, source)


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


def check_context(config: Config, student: CausalModel, teacher: CausalModel, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError when a training prompt and its rollout are longer than a model's context."""
    h, probes = config.horizon, config.probes
    longest = getattr(h, "max_tokens", None) or getattr(h, "tokens", None)
    name = "horizon.max_tokens" if hasattr(h, "max_tokens") else "horizon.tokens"
    check_responses(student, teacher, prompts, *((name, longest) if longest else ("the least a horizon can be", 1)))
    if probes.max_tokens is not None or (probes.every and isinstance(h, FixedHorizon)):
        tokens = probes.max_tokens or FullHorizon().max_tokens
        check_responses(student, teacher, prompts, "probes.max_tokens", tokens)


def check_responses(
    student: CausalModel, teacher: CausalModel, prompts: Sequence[Prompt], name: str, tokens: int
) -> None:
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


def _too_long(who: str, model: CausalModel, kind: str, prompt: int, name: str, tokens: int) -> str | None:
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
