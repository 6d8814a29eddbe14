"""Config -> findings: is this pair fit for a run? Whole for `headstart preflight`, its cheap part before every run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from headstart.assemble.cost import REPEATS, Cost, estimate, memory
from headstart.assemble.memory import Sources, sources
from headstart.assemble.pair import Pair, check_context, check_evaluation_context
from headstart.assemble.several import Panel
from headstart.assemble.speed import duration
from headstart.assemble.tasks import Questions
from headstart.checks.alignment import alignment
from headstart.checks.findings import Check, Finding, Preflight, Severity, caught
from headstart.checks.form import identical, prompt_form
from headstart.checks.plan import Outlines, World
from headstart.checks.prompts import duplicates, evaluation_overlap, overlong, special_tokens, views
from headstart.checks.scoring import determinism, engine_agreement, self_test
from headstart.checks.server import endpoint_finding, live_finding
from headstart.checks.several import checks_of_several
from headstart.checks.subject import RESPONSES, Subject
from headstart.checks.text import given_text, teacher_context
from headstart.checks.tuning import trainable
from headstart.checks.vocabulary import prompt_ids, stop_apart, stops, vocabulary
from headstart.config.evaluation import TinyTask
from headstart.config.schema import Config, ModelConfig
from headstart.errors import ConfigError, ModelError, VocabularyError
from headstart.files import make_folder, write_json
from headstart.interfaces import OnProgress, silent
from headstart.models.completions import Completions
from headstart.models.memory import GIB, NEAR, Memory, free_bytes
from headstart.models.sharded import check_ranks, led, shape
from headstart.models.templates import PromptSet
from headstart.progress import report, shows
from headstart.ranks.runtime import Runtime
from headstart.ranks.sharding import division_of, is_sharded
from headstart.records import Problem
from headstart.tasks.overlap import overlap

FEW = 4
"""Responses that are enough where two ways to compute the same are compared, which differ everywhere or nowhere."""
ROWS = 16
"""Rollouts that are timed on a CPU."""
DOUBTFUL = 1.5
"""The memory estimate is good to this factor: a run is refused only where it is off by more."""

Part = Literal["whole", "quick", "cheap", "student alone"]
"""`cheap` is made before every run, on what it has loaded; `quick` is that and what a run checks on loading."""
UNLOADED = ("every check of the loaded models",)
Kept = Callable[[Preflight], None]


@shows("preflight", even=False)
def run_preflight(
    subject: Config | Pair,
    prompts: Any = None,
    *,
    quick: bool = False,
    progress: OnProgress | None = None,
    kept: Kept = lambda _: None,
    **settings: Any,
) -> Preflight:
    """Every check of a pair and its prompts, `subject`, `prompts` and `settings` as in `distill`; with `quick` only
    those that sample and differentiate nothing.

    What would stop a run (an error on loading, say) is a blocking finding, and the checks that are still possible are
    made. `progress` is called with (checks done, checks in all, what is being done); None shows it. `kept` is called
    after every check with all there is so far, so that a preflight that is interrupted is not lost.
    """
    start = sources(subject, prompts, settings)
    with start.lent(trained=False):
        return _preflight(start, quick, progress or report, kept)


def _preflight(start: Sources, quick: bool, progress: OnProgress, kept: Kept) -> Preflight:
    findings: list[Finding] = []
    config = start.config
    with caught("settings", findings):
        runtime = start.runtime()
        check_ranks(config.sharding, runtime, "a preflight")
        findings += unwise(config, runtime)
    if any(finding.severity == "blocking" for finding in findings):
        return Preflight(tuple(findings), UNLOADED)
    tokenizers: tuple[Any, ...] = ()
    problems: list[Problem] = []
    prompts = PromptSet((), 0, 0)
    progress(0, 0, "reading the prompts")
    with caught("prompts", findings):
        problems = start.problems(lambda text: findings.append(Finding("prompts", "note", text)))
        tokenizers = start.tokenizers
        prompts = start.shown(problems)
    progress(0, 0, "planning memory before loading")
    if (planned := _planned(config, prompts.longest)) is not None:
        findings.append(planned)
    too_large = planned is not None and planned.severity == "blocking"
    kept(Preflight(tuple(findings), UNLOADED))
    progress(0, 0, "loading and trying both models")
    pair = None if too_large else _open(start, findings, prompts.longest)
    part: Part = "quick" if quick else "whole"
    strangers = bool(findings) and findings[-1].figures.get("error") == VocabularyError.__name__
    if pair is None and strangers and tokenizers and not (quick or config.teachers):
        # The student can still be looked at, as its own teacher.
        pair = _open(Sources(config.model_copy(update={"teacher": config.student})), findings)
        own = tuple(replace(p, teacher_token_ids=p.token_ids, teacher_images=p.images) for p in prompts.prompts)
        prompts, part = replace(prompts, prompts=own), "student alone"
    if pair is None:
        return Preflight(tuple(findings), UNLOADED)
    subject = Subject(pair, problems, prompts)

    def work() -> Preflight:
        made = part
        if any(is_sharded(model.model) for model in pair.models):
            text = "no rank has room for both models whole, so nothing was sampled and no gradient was made"
            findings.append(Finding("sharding", "note", text))
            made = "quick"
        return _make(subject, made, findings, progress, kept)

    return led(pair.runtime, pair.models, work)


def cheap_preflight(
    pair: Pair,
    problems: Sequence[Problem],
    prompts: PromptSet,
    questions: Questions | None = None,
    given: Completions | None = None,
) -> Preflight:
    """The checks before every run, on what it has loaded already: milliseconds, nothing sampled. `questions` are its
    evaluation's, `given` the responses that come with the prompts."""
    return _make(Subject(pair, problems, prompts, questions, given), "cheap", [])


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


def _open(start: Sources, findings: list[Finding], longest: int = 1) -> Pair | None:
    with caught("vocabulary", findings, "loading the weights of both models"):
        return start.open(start.runtime(), longest)
    return None


def _checks(s: Subject, part: Part) -> list[Check]:
    """The checks of one part, in order. Without prompts those that need none."""
    if isinstance(s.pair, Panel):
        return checks_of_several(s, s.pair, lambda own: _checks(own, part), lambda: _memory(s))
    pair, used, config = s.pair, s.prompts.prompts, s.pair.config
    weights: Check = ("trainable weights", lambda: trainable(pair))
    of_both: list[Check] = [("vocabulary", lambda: vocabulary(pair)), ("stop tokens", lambda: stops(pair))]
    if (endpoint := pair.endpoint) is not None:
        of_both = [("teacher server", lambda: endpoint_finding(endpoint))]
    if not used:
        return {"cheap": of_both, "student alone": [weights]}.get(part, [*of_both, weights])
    tokenizers, divided = (pair.tokenizer, pair.teacher_tokenizer), division_of(pair.student.model) is not None
    of_prompts: list[Check] = [
        ("two models", lambda: identical(pair, used)),
        ("prompt ids", lambda: prompt_ids(pair, used)),
        ("duplicate prompts", lambda: duplicates(used)),
        ("special tokens", lambda: special_tokens(tokenizers, s.problems, used)),
        ("prompt length", lambda: overlong(used, s.prompts.dropped, config.prompts.max_tokens)),
        ("given text", lambda: given_text(pair, s.problems, used, s.completions)),
        ("teacher context", lambda: teacher_context(pair, s.problems, used)),
        ("prompt form", lambda: prompt_form(pair, s.problems, used, s.questions) if s.questions else None),
    ]
    on_loading: list[Check] = [
        ("test overlap", lambda: _evaluation(s)),
        ("context length", lambda: check_context(config, pair.student, pair.judge, used)),
    ]
    of_student: list[Check] = [
        ("engine log-probs", lambda: engine_agreement(pair, s.openings(FEW))),
        ("gradients", lambda: trainable(pair, s.openings(2))),
    ]
    of_memory: Check = ("memory", lambda: _memory(s))
    if part == "cheap":
        return [*of_both, *of_prompts, of_memory]
    if part == "quick":
        return [*of_both, *of_prompts, *on_loading, weights, of_memory]
    if pair.endpoint is not None:
        served: Check = ("teacher scores", lambda: live_finding(pair, used[:RESPONSES]))
        return [*of_both, *of_prompts, *on_loading, served, *of_student, of_memory]
    if part == "student alone":
        return [*of_prompts[1:], *of_student]
    of_teacher: list[Check] = [
        ("alignment", lambda: alignment(pair, s.openings()) if pair.vocabulary.aligner else None),
        ("stop tokens", lambda: stops(pair, s.student_responses, s.teacher_responses if stop_apart(pair) else ())),
        ("chat template", lambda: views(pair, s.problems, s.openings())),
        ("self-test", lambda: self_test(pair, s.openings(FEW))),
        ("teacher determinism", lambda: determinism(pair, s.openings(FEW))),
    ]
    return [
        of_both[0],
        *of_prompts,
        *on_loading,
        *of_teacher,
        *of_student,
        of_memory,
        ("time", lambda: None if divided else _time(s)),
    ]


def _make(
    subject: Subject, part: Part, findings: list[Finding], progress: OnProgress = silent, kept: Kept = lambda _: None
) -> Preflight:
    """The checks of `part`, whose findings come after `findings`."""
    checks, left = _checks(subject, part), [] if part == "cheap" else [name for name, _ in _checks(subject, "whole")]
    for done, (name, check) in enumerate(checks):
        kept(Preflight(tuple(findings), tuple(left)))

        def say(text: str = "", done: int = done, name: str = name) -> None:
            progress(done, len(checks), f"{name}: {text}" if text else name)

        subject.say = say
        say()
        with caught(name, findings):
            result = check()
            findings += [result] if isinstance(result, Finding) else result or []
        left = [other for other in left if other != name]
    progress(len(checks), len(checks), "done")
    return Preflight(tuple(findings), tuple(left))


def _evaluation(s: Subject) -> Finding | None:
    """Whether the test is among the prompts, and whether its responses fit into the student's context."""
    config, questions = s.pair.config, s.questions
    if config.evaluation is None or questions is None:
        return None
    check_evaluation_context(s.pair.student, questions)
    name = questions.task.name
    if isinstance(config.evaluation.task, TinyTask) and config.evaluation.task.split != "train":
        return Finding("test overlap", "ok", f"the splits of {name} have no problem in common by construction")
    return evaluation_overlap(overlap(s.problems, questions.problems), name)


def _memory(s: Subject) -> Finding | None:
    horizon, device = s.pair.config.horizon.longest, s.pair.runtime.device
    if horizon is None:
        return None
    needed = memory(s.pair, s.pair.config, s.prompts.prompts, horizon)
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


def _time(s: Subject) -> Finding | None:
    """None where a custom horizon says only during the run how long it is."""
    config, horizon = s.pair.config, s.pair.config.horizon.longest
    if horizon is None:
        return None
    responses = s.student_responses
    lengths = [len(r.completion_ids) for r in responses] if all(r.stopped for r in responses) else None
    device = s.pair.runtime.device.type
    smaller, repeats = timed(config, device), 1 if device == "cpu" else REPEATS

    def step(done: int, total: int, _: str = "") -> None:
        s.say(f"timed {done} of {total} steps and samplings")

    s.say("warming up")
    (cost,) = estimate(s.pair, smaller, s.prompts.prompts, [horizon], lengths=lengths, repeats=repeats, progress=step)
    return time_finding(cost, config, smaller, ended=lengths is not None)


def timed(config: Config, device: str) -> Config:
    """`config` with as few prompts in a step as are timed: all of them, but on a CPU, where more take as much longer
    as there are more, those of `ROWS` rollouts."""
    training = config.training
    few = training.prompts_per_step if device != "cpu" else max(1, ROWS // config.rollout.samples_per_prompt)
    fewer = training.model_copy(update={"prompts_per_step": min(few, training.prompts_per_step)})
    return config.model_copy(update={"training": fewer})


def time_finding(cost: Cost, config: Config, smaller: Config, *, ended: bool) -> Finding:
    """Seconds of a step by phase and of the whole run, evaluations left out. `cost` is that of a step of `smaller`;
    `ended`: how long its rollouts are is known, else they all reach the horizon."""
    if cost.seconds is None:
        text = "not measured: not even a short step fits into the free memory"
        return Finding("time", "note", text, None, {"horizon": cost.tokens})
    every, few = (c.training.prompts_per_step * c.rollout.samples_per_prompt for c in (config, smaller))
    phases = {name: value * (1 if name == "optimizer" else every / few) for name, value in asdict(cost.seconds).items()}
    total, steps = sum(phases.values()), config.training.steps
    figures = {**phases, "total": total, "steps": steps, "run": steps * total, "horizon": cost.tokens}
    shown = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in phases.items())
    reached, of = (
        "" if ended else " if no rollout ends sooner",
        f"{few} of its {every}" if few < every else f"its {every}",
    )
    text = (
        f"a step at horizon {cost.tokens:,} takes about {total:.2g} s ({shown}){reached}, all {steps:,} steps "
        f"{duration(steps * total)} without evaluations; from a few timed tokens of {of} rollouts, good to about a "
        "quarter on a quiet machine"
    )
    return Finding("time", "ok", text, None, figures | {"timed_rollouts": few})


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:,.0f} MiB"
