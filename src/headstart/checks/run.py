"""Config -> findings: is this pair fit for a run? Whole for `headstart preflight`, its cheap part before every run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headstart.assemble.cost import Cost, estimate, memory
from headstart.assemble.pair import Pair, Speaker, check_context, check_evaluation_context, open_pair
from headstart.assemble.tasks import load_questions
from headstart.checks.alignment import alignment
from headstart.checks.findings import Finding, Preflight, Severity, caught
from headstart.checks.plan import Outlines, World
from headstart.checks.prompts import duplicates, evaluation_overlap, overlong, special_tokens, views
from headstart.checks.scoring import determinism, engine_agreement, self_test
from headstart.checks.server import endpoint_finding, live_finding
from headstart.checks.tuning import trainable
from headstart.checks.vocabulary import prompt_ids, stops, vocabulary
from headstart.config.evaluation import TinyTask
from headstart.config.schema import Config, ModelConfig
from headstart.errors import ConfigError, ModelError, VocabularyError
from headstart.files import make_folder, write_json
from headstart.interfaces import OnProgress, silent
from headstart.models.load import load_tokenizer
from headstart.models.memory import GIB, NEAR, Memory, free_bytes
from headstart.models.sharded import check_ranks, led, shape
from headstart.models.templates import PromptSet, build_prompts
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import division_of, is_sharded
from headstart.records import Problem, Rollout
from headstart.tasks.overlap import overlap
from headstart.tasks.prompts import load_problems

RESPONSES = 8
"""Prompts that responses are sampled for, spread over all of them; one from each model."""
LENGTH = 512
"""Longest response (tokens)."""
SCORED = 128
"""Tokens of a response that are scored where its end does not matter."""
DOUBTFUL = 2.0
"""The memory estimate is good to this factor: a run is refused only where it is off by more."""

Part = Literal["whole", "cheap", "student alone"]
Check = tuple[str, Callable[[], Finding | list[Finding] | None]]


@dataclass(frozen=True)
class _Subject:
    """What the checks look at. Responses are sampled when the first check asks for them."""

    pair: Pair
    problems: Sequence[Problem]
    prompts: PromptSet

    @cached_property
    def student_responses(self) -> list[Rollout]:
        return self._responses("student")

    @cached_property
    def teacher_responses(self) -> list[Rollout]:
        return self._responses("teacher")

    @property
    def openings(self) -> list[Rollout]:
        """The beginnings of the student's responses."""
        return _cut(self.student_responses, SCORED)

    @cached_property
    def cost(self) -> Cost | None:
        """None where a custom horizon says only during the run how long it is."""
        horizon = self.pair.config.horizon.longest
        if horizon is None:
            return None
        responses = self.student_responses
        lengths = [len(r.completion_ids) for r in responses] if all(r.stopped for r in responses) else None
        return estimate(self.pair, self.pair.config, self.prompts.prompts, [horizon], lengths=lengths)[0]

    def _responses(self, who: Speaker) -> list[Rollout]:
        model = self.pair.student if who == "student" else self.pair.teacher
        everything = self.prompts.prompts
        count = min(RESPONSES, len(everything))
        chosen = [everything[index * len(everything) // count] for index in range(count)]
        longest = max(len(p.token_ids if who == "student" else p.teacher_token_ids) for p in chosen)
        room = LENGTH if model.max_positions is None else min(LENGTH, model.max_positions - longest)
        seed = self.pair.config.training.seed
        return self.pair.sample(chosen, who=who, max_tokens=max(1, room), purpose=f"preflight-{who}", seed=seed)


def run_preflight(config: Config, *, cheap: bool = False, progress: OnProgress = silent) -> Preflight:
    """Every check of `config`'s pair and prompts; with `cheap` only those that sample and differentiate nothing.

    What would stop a run (an error on loading, say) is a blocking finding, and the checks that are still possible are
    made. `progress` is called with (checks done, checks in all).
    """
    findings: list[Finding] = []
    with caught("settings", findings):
        runtime = Runtime.start(config.training.device)
        check_ranks(config.sharding, runtime, "a preflight")
        findings += unwise(config, runtime)
    if any(finding.severity == "blocking" for finding in findings):
        return Preflight(tuple(findings))
    tokenizers: tuple[Any, ...] = ()
    problems: list[Problem] = []
    prompts = PromptSet((), 0, 0)
    with caught("prompts", findings):
        problems = load_problems(config.prompts)
        tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher_tokenizer)
        prompts = build_prompts(problems, *tokenizers, config.prompts)
    if (planned := _planned(config, prompts.longest)) is not None:
        findings.append(planned)
    too_large = planned is not None and planned.severity == "blocking"
    pair = None if too_large else _open(config, findings)
    part: Part = "cheap" if cheap else "whole"
    if pair is None and tokenizers and findings[-1].figures.get("error") == VocabularyError.__name__:
        # The student can still be looked at, as its own teacher.
        pair = _open(config.model_copy(update={"teacher": config.student}), findings)
        own = tuple(replace(p, teacher_token_ids=p.token_ids) for p in prompts.prompts)
        prompts, part = replace(prompts, prompts=own), "cheap" if cheap else "student alone"
    if pair is None:
        return Preflight(tuple(findings))
    subject = _Subject(pair, problems, prompts)

    def work() -> tuple[Finding, ...]:
        made = part
        if any(is_sharded(model.model) for model in pair.models):
            text = "no rank has room for both models whole, so nothing was sampled and no gradient was made"
            findings.append(Finding("sharding", "note", text))
            made = "cheap"
        _make(_checks(subject, made), findings, progress)
        return tuple(findings)

    return Preflight(led(pair.runtime, pair.models, work))


def cheap_preflight(pair: Pair, problems: Sequence[Problem], prompts: PromptSet) -> Preflight:
    """The checks before every run, on what it has loaded already: milliseconds, nothing sampled."""
    findings: list[Finding] = []
    _make(_checks(_Subject(pair, problems, prompts), "cheap"), findings, silent)
    return Preflight(tuple(findings))


def enforce(preflight: Preflight) -> None:
    """Warn of warnings; raise ConfigError for what cannot work.

    A step that would not fit is a warning as long as the estimate may be wrong (DOUBTFUL).
    """
    for finding in preflight.findings:
        error = ConfigError(finding.message, finding.remedy)
        fits = finding.figures.get("needed_gib", 0.0) <= DOUBTFUL * finding.figures.get("free_gib", 0.0)
        if finding.severity == "blocking" and not (finding.check == "memory" and fits):
            raise error
        if finding.severity in ("warning", "blocking"):
            warnings.warn(str(error), stacklevel=3)


def write_preflight(folder: Path, preflight: Preflight) -> Path:
    """`diagnose/preflight.json` in `folder`, which is made if need be."""
    path = folder / "diagnose" / "preflight.json"
    make_folder(path.parent)
    write_json(path, preflight.to_json())
    return path


def unwise(config: Config, runtime: Runtime) -> list[Finding]:
    """Settings that work but are rarely meant."""
    rollout, findings = config.rollout, []
    plain = rollout.temperature == 1.0 and rollout.top_p == 1.0 and rollout.top_k == 0
    if config.divergence.support.type == "sampled" and not plain:
        text = (
            "divergence.support sampled is biased unless rollouts are sampled at temperature 1 without top_p and top_k "
            f"(found {rollout.temperature}, {rollout.top_p}, {rollout.top_k})"
        )
        exact = "full" if isinstance(config.teacher, ModelConfig) else "top_k"
        findings.append(Finding("settings", "warning", text, f"use support {exact}, which is not"))
    auto_half = config.student.dtype == "auto" and runtime.device.type == "cuda"
    half = config.student.dtype in ("bfloat16", "float16") or auto_half
    divided = shape(config.sharding, runtime.world_size) is not None  # whose trained weights are float32
    if config.tuning.type == "full" and half and not divided:
        text = f"full fine-tuning of half-precision weights: steps of {config.learning_rate:g} are mostly rounded away"
        findings.append(Finding("settings", "warning", text, "set student.dtype=float32 or use LoRA"))
    return findings


def _planned(config: Config, prompt_tokens: int) -> Finding | None:
    """GiB per rank on this world's devices, before anything is loaded; None where the horizon has no bound.

    Weights are counted exactly, so a pair whose weights alone do not fit is not loaded.
    """
    if config.horizon.longest is None:
        return None
    runtime = Runtime.start(config.training.device)
    ranks = runtime.world_size
    gib = min(runtime.gather(free_bytes(runtime.device) / GIB)) / (ranks if runtime.device.type == "cpu" else 1)
    try:
        plan = Outlines(config, runtime.device.type).plan(World(1, ranks, gib), prompt_tokens)
    except ModelError:  # loading says why
        return None
    memory, items = plan.memory, asdict(plan.memory.items) if plan.memory.items else {}
    text = (
        f"by configurations, {ranks} ranks: weights {_gib(memory.weights)}, gradients {_gib(items['gradients'])}, "
        f"optimizer {_gib(memory.states)}, activations {_gib(items['activations'])}, logits {_gib(items['logits'])}, "
        f"KV cache {_gib(items['kv_cache'])} per rank; peak {_gib(memory.peak)} of {_gib(gib)} free on each device"
    )
    figures = {**asdict(memory), "peak": memory.peak, "free_gib": gib, "ranks": ranks}
    if memory.peak <= gib:
        return Finding("memory before loading", "ok", text, None, figures)
    remedy = "headstart preflight RUN.yaml --plan nodes=N,gpus=N,gib=N says which devices are enough"
    severity: Severity = "blocking" if memory.weights > gib else "warning"
    return Finding("memory before loading", severity, text, remedy, figures)


def _open(config: Config, findings: list[Finding]) -> Pair | None:
    with caught("vocabulary", findings, "loading the weights of both models"):
        return open_pair(config)
    return None


def _checks(s: _Subject, part: Part) -> list[Check]:
    """The checks of one part, in order. Without prompts those that need none."""
    pair, used, config = s.pair, s.prompts.prompts, s.pair.config
    weights: Check = ("trainable weights", lambda: trainable(pair))
    of_both: list[Check] = [("vocabulary", lambda: vocabulary(pair)), ("stop tokens", lambda: stops(pair))]
    if (endpoint := pair.endpoint) is not None:
        of_both = [("teacher server", lambda: endpoint_finding(endpoint))]
    if not used:
        return {"cheap": of_both, "whole": [*of_both, weights], "student alone": [weights]}[part]
    tokenizers, divided = (pair.tokenizer, pair.teacher_tokenizer), division_of(pair.student.model) is not None
    of_prompts: list[Check] = [
        ("prompt ids", lambda: prompt_ids(pair, used)),
        ("duplicate prompts", lambda: duplicates(used)),
        ("special tokens", lambda: special_tokens(tokenizers, s.problems, used)),
        ("prompt length", lambda: overlong(used, s.prompts.dropped, config.prompts.max_tokens)),
    ]
    of_student: list[Check] = [
        ("engine log-probs", lambda: engine_agreement(pair, s.openings)),
        ("trainable weights", lambda: trainable(pair, _cut(s.openings[:2], 32))),
    ]
    if part == "cheap":
        return [*of_both, *of_prompts, ("memory", lambda: _memory(s))]
    if pair.endpoint is not None:
        return [
            *of_both,
            *of_prompts,
            ("test overlap", lambda: _evaluation(s)),
            ("context length", lambda: check_context(config, pair.student, pair.judge, used)),
            ("teacher scores", lambda: live_finding(pair, used[:RESPONSES])),
            *of_student,
            ("memory", lambda: _memory(s)),
        ]
    if part == "student alone":
        return [*of_prompts, *of_student]
    return [
        of_both[0],
        *of_prompts,
        ("test overlap", lambda: _evaluation(s)),
        ("context length", lambda: check_context(config, pair.student, pair.teacher, used)),
        ("alignment", lambda: alignment(pair, s.openings)),
        ("stop tokens", lambda: stops(pair, s.student_responses, s.teacher_responses)),
        ("chat template", lambda: views(pair, s.problems, s.openings)),
        ("self-test", lambda: self_test(pair, s.openings)),
        ("teacher determinism", lambda: determinism(pair, s.openings)),
        *of_student,
        ("memory", lambda: _memory(s)),
        ("time", lambda: None if divided or s.cost is None else time_finding(s.cost, config)),
    ]


def _make(checks: Sequence[Check], findings: list[Finding], progress: OnProgress) -> None:
    for done, (name, check) in enumerate(checks):
        progress(done, len(checks))
        with caught(name, findings):
            result = check()
            findings += [result] if isinstance(result, Finding) else result or []
    progress(len(checks), len(checks))


def _evaluation(s: _Subject) -> Finding | None:
    """Whether the test is among the prompts, and whether its responses fit into the student's context."""
    config = s.pair.config
    if config.evaluation is None:
        return None
    questions = load_questions(config, s.pair.tokenizer)
    check_evaluation_context(s.pair.student, questions)
    name = questions.task.name
    if isinstance(config.evaluation.task, TinyTask) and config.evaluation.task.split != "train":
        return Finding("test overlap", "ok", f"the splits of {name} have no problem in common by construction")
    return evaluation_overlap(overlap(s.problems, questions.problems), name)


def _memory(s: _Subject) -> Finding | None:
    horizon, device = s.pair.config.horizon.longest, s.pair.runtime.device
    if horizon is None:
        return None
    needed = memory(s.pair, s.pair.config, s.prompts.longest, horizon)
    return memory_finding(needed, free_bytes(device), horizon, device.type)


def memory_finding(needed: Memory, free_bytes: int, horizon: int, device: str) -> Finding:
    """A step's peak against what is free now, when both models are loaded already."""
    need, free = needed.peak - needed.weights, free_bytes / GIB
    figures = {**asdict(needed), "needed_gib": need, "free_gib": free, "horizon": horizon}
    largest = max(("rollout", "teacher", "student", "optimizer"), key=lambda phase: float(figures[phase]))
    text = (
        f"a step at horizon {horizon:,} needs {_gib(need)} beside the loaded weights ({_gib(needed.weights)}), most in "
        f"the {largest} phase; {_gib(free)} are free on the {device}"
    )
    if need <= NEAR * free:
        return Finding("memory", "ok", text, None, figures)
    remedies = {"rollout": "lower rollout.batch_size", "optimizer": "use tuning.type=lora"}
    other = "lower the horizon, set tuning.gradient_checkpointing=true, or leave training.micro_batch at null"
    remedy = remedies.get(largest, other)
    return Finding("memory", "blocking" if need > free else "warning", text, remedy, figures)


def time_finding(cost: Cost, config: Config) -> Finding:
    """Seconds of a step by phase and of the whole run, evaluations left out."""
    if cost.seconds is None:
        text = "not measured: not even a short step fits into the free memory"
        return Finding("time", "note", text, None, {"horizon": cost.tokens})
    s, steps = cost.seconds, config.training.steps
    figures = {**asdict(s), "total": s.total, "steps": steps, "run": steps * s.total, "horizon": cost.tokens}
    phases = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in asdict(s).items())
    text = (
        f"a step at horizon {cost.tokens:,} takes about {s.total:.2g} s ({phases}), all {steps:,} steps "
        f"{_duration(steps * s.total)} without evaluations"
    )
    return Finding("time", "ok", text, None, figures)


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cut(rollouts: Sequence[Rollout], tokens: int) -> list[Rollout]:
    return [replace(r, completion_ids=r.completion_ids[:tokens]) for r in rollouts]
