"""Does it matter how the teacher is shown the prompt? The teacher in one view against itself in another, on the same
completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.config.schema import Config, ReverseKL
from headstart.losses.chunked import default_chunk, read_divergence
from headstart.models.templates import chat_template, render
from headstart.records import Problem, Rollout
from headstart.teacher.local import LocalTeacher

LARGE = 0.05
"""Nats per token. A renderer that differed cost 0.287 elsewhere (tinker-cookbook, thread 796); a distilled student ends
some hundredths away from its teacher, so a view that shifts the teacher by more than that is no detail."""
THINKING = "enable_thinking"

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewReading:
    """The teacher in one view of the prompts: its KL (nats per token) from the teacher in the view of the run, and how
    much likelier the completions are to it (nats per token; positive: this view fits the student better)."""

    divergence: float
    gain: float


def views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> Finding:
    """One finding for all views of the teacher's prompt.

    A view that shifts the teacher by more than LARGE is a note where it fits the student's completions no better than
    the run's own. It is a warning where it fits them better by more than LARGE, or where it is the other thinking mode
    and the configuration does not say which is meant.
    """

    def finding(severity: Any, message: str, remedy: str | None = None) -> Finding:
        return Finding("chat template", severity, message, remedy, figures)

    readings = {name: read_view(pair, rollouts, ids) for name, ids in other_views(pair, problems, rollouts).items()}
    figures: dict[str, Any] = {
        "views": {name: {"nats_per_token": view.divergence, "gain": view.gain} for name, view in readings.items()}
    }
    if not readings:
        return finding("ok", "student and teacher are shown the same ids, and there is no thinking mode to choose")
    figures |= {"tokens": sum(len(r.completion_ids) for r in rollouts), "threshold": LARGE}
    shifts = ", ".join(f"{view.divergence:.3f} ({name} view)" for name, view in readings.items())
    text = f"the teacher shifts by {shifts} nats per token from the view of this run"
    large = {name: view for name, view in readings.items() if view.divergence > LARGE}
    better = [name for name, view in large.items() if view.gain > LARGE]
    if better:
        name = max(better, key=lambda n: readings[n].gain)
        fits = f"the {name} view fits the student's responses better by {readings[name].gain:.3f}"
        return finding("warning", f"{text}; {fits}", _remedy(name))
    if THINKING not in teacher_kwargs(pair.config) and any(name != "student" for name in large):
        unsaid = "the configuration does not say which thinking mode is meant, and it matters"
        return finding("warning", f"{text}; {unsaid}", _remedy("thinking off"))
    return finding("note" if large else "ok", f"{text}; no other fits the responses better")


def other_views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> dict[str, list[Ids]]:
    """Name -> prompt ids, one for each rollout, of the views that differ from the run's own teacher view.

    `student`: the student's ids. `thinking on` and `thinking off`, where the teacher's template knows the switch.
    """
    others: dict[str, list[Ids]] = {"student": [r.prompt.token_ids for r in rollouts]}
    if any(i >= pair.vocabulary.size for ids in others["student"] for i in ids):
        others = {}  # ids of the student's own, which the teacher reads as something else
    p, asked = pair.config.prompts, [problems[r.prompt.index] for r in rollouts]
    switch = p.chat and THINKING in (chat_template(pair.teacher_tokenizer) or "")
    if switch and all(problem.messages is not None for problem in asked):
        system = p.system if p.teacher_view.system is None else p.teacher_view.system
        for name, on in (("thinking on", True), ("thinking off", False)):
            kwargs = {**teacher_kwargs(pair.config), THINKING: on}
            others[name] = [
                tuple(render(problem, pair.teacher_tokenizer, chat=True, system=system, template_kwargs=kwargs))
                for problem in asked
            ]
    own = [r.prompt.teacher_token_ids for r in rollouts]
    return {name: ids for name, ids in others.items() if ids != own}


def teacher_kwargs(config: Config) -> Mapping[str, Any]:
    """The template arguments the teacher's prompts are rendered with."""
    own = config.prompts.teacher_view.template_kwargs
    return config.prompts.template_kwargs if own is None else own


def read_view(pair: Pair, rollouts: Sequence[Rollout], prompts: Sequence[Ids]) -> ViewReading:
    """The teacher with `prompts` in front of the rollouts' completions, against the view of the run."""
    changed = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=ids)) for r, ids in zip(rollouts, prompts, strict=True)
    ]
    teacher, batch = pair.teacher, pair.teacher.batch(rollouts, "teacher")
    with teacher.sampling_mode():
        own_MD = teacher.completion_hidden(batch)
        value_M, stats = read_divergence(
            ReverseKL(),
            own_MD,
            teacher.trained_head(),
            LocalTeacher(teacher).score(changed),
            batch.tokens_M,
            chunk=default_chunk(pair.vocabulary.size),
        )
    return ViewReading(float(value_M.mean()), float((stats.teacher_logprob_M - stats.student_logprob_M).mean()))


def _remedy(view: str) -> str:
    if view == "student":
        return (
            "compare the two chat templates and system prompts; bring them together with prompts.teacher_view "
            "(system, template_kwargs)"
        )
    switch = str(view == "thinking on").lower()
    return f"set prompts.teacher_view.template_kwargs={{{THINKING}: {switch}}} if the responses shall be like that"
