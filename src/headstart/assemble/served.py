"""A teacher at a URL, connected and checked before anything expensive is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from headstart.config.models import ServedTeacher
from headstart.config.schema import Config, DivergenceConfig, SampledSupport, TopKSupport
from headstart.errors import ConfigError, VocabularyError
from headstart.models.load import resolve
from headstart.models.vocabulary import SharedVocabulary, shared_vocabulary
from headstart.ranks.runtime import Runtime
from headstart.serving.client import Client
from headstart.teacher.connect import connect
from headstart.teacher.scorers import CandidateScorer, Capabilities
from headstart.teacher.server import ServerTeacher

ELSEWHERE = (
    "{} needs the teacher's model on this machine, and it is at a URL (teacher.type server); load it here with "
    "teacher.type=local and teacher.path"
)
SEVERAL = (
    "{} goes by one teacher, and this run has several ({}): headstart diagnose takes --teacher NAME; for anything else "
    "write a configuration with teacher in place of teachers"
)
ANY_HEAD = 2**31
"""Rows of a head that is elsewhere: as many as the tokenizer has ids."""


def require_local(config: Config, what: str) -> None:
    """Raise ConfigError where `what` reads whole distributions of a teacher that is at a URL, or goes by one teacher
    and there are several."""
    if config.teachers:
        raise ConfigError(SEVERAL.format(what, ", ".join(teacher.name for teacher in config.teachers)))
    if isinstance(config.teacher, ServedTeacher):
        raise ConfigError(ELSEWHERE.format(what))


def candidates_of(divergence: DivergenceConfig, vocabulary: int) -> int:
    """How many ids per token the loss needs: the student's k most probable ones and the sampled one."""
    support = divergence.support
    return 1 + (min(support.k, vocabulary) if isinstance(support, TopKSupport) else 0)


def open_scorer(config: Config, tokenizer: Any, runtime: Runtime) -> CandidateScorer | None:
    """What scores at the teacher's URLs; None for a teacher on this machine. `tokenizer` is the teacher's.

    Raises what `teacher.connect.connect` raises, and ConfigError where the endpoint gives less than the loss needs, on
    every rank.
    """
    if not isinstance(config.teacher, ServedTeacher):
        return None
    teacher, wanted = config.teacher, candidates_of(config.divergence, len(tokenizer))
    client = Client(teacher.urls, timeout=teacher.timeout, deadline=teacher.deadline)
    scorer = runtime.together(lambda: connect(client, teacher.model, tokenizer, wanted))
    gives = scorer.capabilities()
    if gives.level == "sampled" and not isinstance(config.divergence.support, SampledSupport):
        raise ConfigError(
            f"divergence.support: found {config.divergence.support.type}, but {teacher.urls[0]} gives the sampled "
            f"token's log-probability only ({'; '.join(gives.notes)}); set divergence.support {{type: sampled}}, a "
            "policy gradient, or serve the teacher with vLLM"
        )
    if runtime.is_main:
        _warn(gives, wanted)
    return scorer


def _warn(found: Capabilities, wanted: int) -> None:
    """Of what the endpoint gives less than it might."""
    if found.level == "top_k" and wanted > 1:
        warnings.warn(
            f"the teacher at a URL gives {found}; candidates of the student that are not among them fall into the "
            f"tail ({'; '.join(found.notes)}). Ids for each row need vLLM on a GPU with --enable-scale-out "
            f"--max-logprobs {wanted}",
            stacklevel=3,
        )
    if found.tokenizer is None:
        warnings.warn(
            f"{found.model}: the server does not say how it splits text, so it cannot be checked that its token ids "
            "are those of the teacher's tokenizer here",
            stacklevel=3,
        )


def served_vocabulary(config: Config, tokenizer: Any, teacher_tokenizer: Any, student: Any) -> SharedVocabulary:
    """The vocabulary of a pair whose teacher is elsewhere: of its model only the tokenizer is here, and its generation
    configuration where `teacher.tokenizer` is a checkpoint. Raises VocabularyError as `shared_vocabulary` does, and for
    another tokenizer without alignment strict."""
    shared = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        student.generation_config,
        _generation_config(config) or student.generation_config,
        len(student.get_output_embeddings().weight),
        ANY_HEAD,
        config.divergence.alignment,
    )
    if shared.aligner is not None and shared.aligner.kind != "strict":
        raise VocabularyError(
            "the teacher at a URL has another tokenizer than the student, which works with divergence.alignment strict "
            f"only (found {config.divergence.alignment}); set that, or load the teacher here (teacher.path)"
        )
    return shared


def served_teacher(scorer: CandidateScorer, config: Config, vocabulary: SharedVocabulary) -> ServerTeacher:
    """The teacher of a run. Raises ConfigError where the loss needs what this endpoint cannot give."""
    support, level = config.divergence.support, scorer.capabilities().level
    unbiased = isinstance(support, SampledSupport) or getattr(support, "tail", "bucket") == "unbiased"
    if unbiased and vocabulary.aligner is not None:
        raise ConfigError(
            "divergence.support: with another tokenizer a teacher at a URL needs {type: top_k, tail: bucket}: sampled "
            "tokens are no draws from what the two have in common"
        )
    if unbiased and vocabulary.merge_ids and level in ("top_k", "sampled"):
        raise ConfigError(
            f"student and teacher stop with different tokens {list(vocabulary.merge_ids)}, whose probabilities are "
            "added, and the teacher's endpoint gives the sampled one only; use divergence.support {type: top_k, tail: "
            "bucket} and an endpoint with ids for each row, or a student that stops with the teacher's token"
        )
    wanted = candidates_of(config.divergence, vocabulary.size)
    return ServerTeacher(scorer, vocabulary, candidates=wanted, unbiased=unbiased)


def _generation_config(config: Config) -> Any:
    """The generation configuration beside the teacher's tokenizer; None where there is none."""
    from transformers import GenerationConfig

    assert isinstance(config.teacher, ServedTeacher)
    if config.teacher.tokenizer is None:
        return None
    path = resolve(config.teacher.tokenizer)
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        if not Path(path).is_dir():
            warnings.warn(
                f"teacher.tokenizer: {path} has no generation_config.json, so the teacher's stop tokens are taken from "
                "its tokenizer alone",
                stacklevel=3,
            )
        return None
