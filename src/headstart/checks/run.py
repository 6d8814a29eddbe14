"""Config -> findings: is this pair fit for a run? Whole for `headstart preflight`, its cheap part before every run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headstart.assemble.cost import Cost, estimate, memory
from headstart.assemble.pair import Pair, Speaker, check_context, check_evaluation_context, open_pair
from headstart.assemble.tasks import Questions, load_questions
from headstart.checks import prompts as prompt_checks
from headstart.checks.budget import memory_finding, time_finding
from headstart.checks.contexts import contexts
from headstart.checks.findings import Finding, Preflight, caught
from headstart.checks.scoring import determinism, engine_agreement, self_test
from headstart.checks.stops import stops
from headstart.checks.tuning import gradients, trainable
from headstart.checks.views import views
from headstart.checks.vocabulary import prompt_ids, renumbered_everywhere, vocabulary
from headstart.config.evaluation import TinyTask
from headstart.config.schema import Config
from headstart.errors import ConfigError, VocabularyError
from headstart.files import make_folder, write_json
from headstart.interfaces import OnProgress, silent
from headstart.models.load import load_tokenizer
from headstart.models.memory import free_bytes
from headstart.models.templates import PromptSet, build_prompts
from headstart.records import Problem, Prompt, Rollout
from headstart.runtime import Runtime
from headstart.tasks.overlap import overlap, question
from headstart.tasks.prompts import load_problems

RESPONSES = 8
"""Prompts that responses are sampled for, spread over all of them; one from each model."""
LENGTH = 512
"""Longest response (tokens)."""
SCORED = 128
"""Tokens of a response that are scored where its end does not matter."""
DOUBTFUL = 2.0
"""The memory estimate is good to this factor: a run is refused only where it is off by more."""

Check = tuple[str, Callable[[], Finding | list[Finding]]]


@dataclass(frozen=True)
class _Subject:
    """What the checks look at. Responses are sampled when the first check asks for them."""

    pair: Pair
    problems: Sequence[Problem]
    prompts: PromptSet

    @cached_property
    def chosen(self) -> list[Prompt]:
        all_prompts = self.prompts.prompts
        count = min(RESPONSES, len(all_prompts))
        return [all_prompts[place * len(all_prompts) // count] for place in range(count)]

    @cached_property
    def student_responses(self) -> list[Rollout]:
        return self._responses("student")

    @cached_property
    def teacher_responses(self) -> list[Rollout]:
        return self._responses("teacher")

    @cached_property
    def openings(self) -> list[Rollout]:
        """The beginnings of the student's responses."""
        return _cut(self.student_responses, SCORED)

    @cached_property
    def cost(self) -> Cost | None:
        """None where a custom horizon says only during the run how long it is."""
        horizon = _horizon(self.pair.config)
        if horizon is None:
            return None
        responses = self.student_responses
        lengths = [len(r.completion_ids) for r in responses] if all(r.stopped for r in responses) else None
        return estimate(self.pair, self.pair.config, self.prompts.prompts, [horizon], lengths=lengths)[0]

    def _responses(self, who: Speaker) -> list[Rollout]:
        model = self.pair.student if who == "student" else self.pair.teacher
        longest = max(len(p.token_ids if who == "student" else p.teacher_token_ids) for p in self.chosen)
        room = LENGTH if model.max_positions is None else min(LENGTH, model.max_positions - longest)
        seed = self.pair.config.training.seed
        return self.pair.sample(self.chosen, who=who, max_tokens=max(1, room), purpose=f"preflight-{who}", seed=seed)


def run_preflight(config: Config, *, cheap: bool = False, progress: OnProgress = silent) -> Preflight:
    """Every check of `config`'s pair and prompts; with `cheap` only those that sample and differentiate nothing.

    What would stop a run (an error on loading, say) is a blocking finding, and the checks that are still possible are
    made. `progress` hears (checks done, checks in all).
    """
    found: list[Finding] = []
    with caught("settings", found):
        warn_of_unwise(config, Runtime.start(config.training.device))
    tokenizers: tuple[Any, Any] | None = None
    problems: list[Problem] = []
    prompts = PromptSet((), 0, 0)
    with caught("prompts", found):
        problems = load_problems(config.prompts)
        tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
        prompts = build_prompts(problems, *tokenizers, config.prompts)
    pair = _open(config, found)
    alone = pair is None and tokenizers is not None and found[-1].figures.get("error") == VocabularyError.__name__
    if alone and tokenizers is not None:
        # The student can still be looked at, as its own teacher.
        found += renumbered_everywhere(*tokenizers)
        pair = _open(config.model_copy(update={"teacher": config.student}), found)
        own = tuple(replace(p, teacher_token_ids=p.token_ids) for p in prompts.prompts)
        prompts = replace(prompts, prompts=own)
    if pair is None:
        return Preflight(tuple(found))
    subject = _Subject(pair, problems, prompts)
    checks = _cheap(subject) if cheap else _student_alone(subject) if alone else _whole(subject)
    for done, (name, check) in enumerate(checks):
        progress(done, len(checks))
        with caught(name, found), _out_of_memory(found, f"the check of {name}"):
            result = check()
            found += result if isinstance(result, list) else [result]
    progress(len(checks), len(checks))
    return Preflight(tuple(found))


def cheap_preflight(pair: Pair, problems: Sequence[Problem], prompts: PromptSet) -> Preflight:
    """The checks before every run, on what it has loaded already: milliseconds, nothing sampled."""
    found: list[Finding] = []
    for _, check in _cheap(_Subject(pair, problems, prompts)):
        result = check()
        found += result if isinstance(result, list) else [result]
    return Preflight(tuple(found))


def say(preflight: Preflight) -> None:
    """Warn of what was found; raise ConfigError for what cannot work.

    A step that would not fit is a warning as long as the estimate may be wrong (DOUBTFUL).
    """
    for finding in preflight.findings:
        text = finding.message if finding.remedy is None else f"{finding.message}; {finding.remedy}"
        fits = finding.figures.get("needed_gib", 0.0) <= DOUBTFUL * finding.figures.get("free_gib", 0.0)
        if finding.severity == "blocking" and not (finding.check == "memory" and fits):
            raise ConfigError(text)
        if finding.severity in ("warning", "blocking"):
            warnings.warn(text, stacklevel=3)


def write_preflight(folder: Path, preflight: Preflight) -> Path:
    """`diagnose/preflight.json` in `folder`, which is made if need be."""
    path = folder / "diagnose" / "preflight.json"
    make_folder(path.parent)
    write_json(path, preflight.to_json())
    return path


def warn_of_unwise(config: Config, runtime: Runtime) -> None:
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


def _open(config: Config, found: list[Finding]) -> Pair | None:
    with caught("vocabulary", found), _out_of_memory(found, "loading the weights of both models"):
        return open_pair(config)
    return None


@contextmanager
def _out_of_memory(found: list[Finding], what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = f"{what} runs out of memory: {str(error).splitlines()[0]}"
        remedy = "free the device, use a smaller dtype, or lower the horizon"
        found.append(Finding("memory", "blocking", text, remedy))


def _cheap(s: _Subject) -> list[Check]:
    return [
        ("vocabulary", lambda: vocabulary(s.pair)),
        ("stop tokens", lambda: stops(s.pair)),
        *_of_prompts(s),
        ("memory", lambda: _memory(s)),
    ]


def _student_alone(s: _Subject) -> list[Check]:
    return [*_of_prompts(s), *_of_student(s)] if s.prompts.prompts else [("trainable", lambda: trainable(s.pair))]


def _whole(s: _Subject) -> list[Check]:
    if not s.prompts.prompts:
        return [*_cheap(s)[:2], ("trainable", lambda: trainable(s.pair))]
    return [
        ("vocabulary", lambda: vocabulary(s.pair)),
        *_of_prompts(s),
        ("test overlap", lambda: _evaluation(s)),
        ("context length", lambda: _context_length(s)),
        ("stop tokens", lambda: stops(s.pair, s.student_responses, s.teacher_responses)),
        ("chat template", lambda: views(s.pair, s.problems, s.openings)),
        ("self-test", lambda: self_test(s.pair, s.openings)),
        ("teacher determinism", lambda: determinism(s.pair, s.openings)),
        *_of_student(s),
        ("memory", lambda: _memory(s)),
        ("time", lambda: [time_finding(s.cost, s.pair.config)] if s.cost is not None else []),
    ]


def _of_prompts(s: _Subject) -> list[Check]:
    used = s.prompts.prompts
    if not used:
        return []
    tokenizers = s.pair.tokenizer, s.pair.teacher_tokenizer
    return [
        ("prompt ids", lambda: prompt_ids(s.pair, used)),
        ("duplicate prompts", lambda: prompt_checks.duplicates(used)),
        ("special tokens", lambda: prompt_checks.special_tokens(tokenizers, s.problems, used)),
        (
            "prompt length",
            lambda: prompt_checks.overlong(used, s.prompts.dropped, s.pair.config.prompts.max_tokens),
        ),
    ]


def _of_student(s: _Subject) -> list[Check]:
    return [
        ("training context", lambda: contexts(s.pair, s.chosen[:4], 32)),
        ("engine log-probs", lambda: engine_agreement(s.pair, s.openings)),
        ("trainable weights", lambda: trainable(s.pair)),
        ("gradients", lambda: gradients(s.pair, _cut(s.openings[:2], 32))),
    ]


def _memory(s: _Subject) -> list[Finding]:
    horizon = _horizon(s.pair.config)
    if horizon is None or not s.prompts.prompts:
        return []
    needed = memory(s.pair, s.pair.config, s.prompts.longest, horizon)
    device = s.pair.runtime.device
    return [memory_finding(needed, free_bytes(device), horizon, device.type)]


def _evaluation(s: _Subject) -> list[Finding]:
    """Whether the test is among the prompts, and whether its responses fit into the student's context."""
    config = s.pair.config
    if config.evaluation is None:
        return []
    questions: Questions = load_questions(config, s.pair.tokenizer)
    check_evaluation_context(s.pair.student, questions)
    name = questions.task.name
    if isinstance(config.evaluation.task, TinyTask):
        return [Finding("test overlap", "ok", f"the splits of {name} have no problem in common by construction")]
    both = overlap(list(map(question, s.problems)), list(map(question, questions.problems)))
    return [prompt_checks.evaluation_overlap(both, name)]


def _context_length(s: _Subject) -> list[Finding]:
    check_context(s.pair.config, s.pair.student, s.pair.teacher, s.prompts.prompts)
    return []


def _horizon(config: Config) -> int | None:
    """Most completion tokens of a rollout; None where a custom class decides."""
    return config.horizon.longest


def _cut(rollouts: Sequence[Rollout], tokens: int) -> list[Rollout]:
    return [replace(r, completion_ids=r.completion_ids[:tokens]) for r in rollouts]
