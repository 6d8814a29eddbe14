"""How much does it matter how the teacher is shown the prompt? Teacher against teacher, on the same completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.config.schema import Config, ReverseKL
from headstart.losses.chunked import default_chunk
from headstart.losses.divergence import divergence_rows
from headstart.models.templates import chat_template, render
from headstart.records import Problem, Rollout

CHECK = "chat template"
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


def other_views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> dict[str, list[Ids]]:
    """Name -> prompt ids, one for each rollout, of the views that differ from the run's own teacher view.

    `student`: the student's ids. `thinking on` and `thinking off`, where the teacher's template knows the switch.
    """
    views = {"student": [r.prompt.token_ids for r in rollouts]}
    if any(i >= pair.vocabulary.size for ids in views["student"] for i in ids):
        views = {}  # ids of the student's own, which the teacher reads as something else
    chat = all(problems[r.prompt.index].messages is not None for r in rollouts)
    if chat and pair.config.prompts.chat and THINKING in (chat_template(pair.teacher_tokenizer) or ""):
        for name, on in (("thinking on", True), ("thinking off", False)):
            kwargs = {**teacher_kwargs(pair.config), THINKING: on}
            views[name] = [_rendered(pair, problems[r.prompt.index], kwargs) for r in rollouts]
    own = [r.prompt.teacher_token_ids for r in rollouts]
    return {name: ids for name, ids in views.items() if ids != own}


def teacher_kwargs(config: Config) -> Mapping[str, Any]:
    """The template arguments the teacher's prompts are rendered with."""
    own = config.prompts.teacher_view.template_kwargs
    return config.prompts.template_kwargs if own is None else own


def read_view(pair: Pair, rollouts: Sequence[Rollout], prompts: Sequence[Ids]) -> ViewReading:
    """The teacher with `prompts` in front of the rollouts' completions, against the view of the run."""
    changed = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=ids)) for r, ids in zip(rollouts, prompts, strict=True)
    ]
    tokens_M, own_MD = _hidden(pair, rollouts)
    _, other_MD = _hidden(pair, changed)
    divergence, gain = 0.0, 0.0
    chunk = default_chunk(pair.vocabulary.size)
    for start in range(0, len(tokens_M), chunk):
        rows = slice(start, start + chunk)
        with torch.no_grad():
            own_mV, other_mV = pair.teacher.head(own_MD[rows]), pair.teacher.head(other_MD[rows])
            value_m = divergence_rows(ReverseKL(), own_mV, other_mV, tokens_M[rows]).value_M
        divergence += float(value_m.sum())
        difference_mV = other_mV.float().log_softmax(-1) - own_mV.float().log_softmax(-1)
        gain += float(difference_mV.gather(-1, tokens_M[rows, None]).sum())
    return ViewReading(divergence / len(tokens_M), gain / len(tokens_M))


def views(pair: Pair, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> Finding:
    """One finding for all views of the teacher's prompt.

    A view that shifts the teacher by more than LARGE is a note where it fits the student's completions no better than
    the run's own. It is a warning where it fits them better by more than LARGE, or where it is the other thinking mode
    and the configuration does not say which is meant.
    """
    others = other_views(pair, problems, rollouts)
    if not others:
        same = "student and teacher are shown the same ids, and there is no thinking mode to choose"
        return Finding(CHECK, "ok", same, None, {"views": {}})
    found = {name: read_view(pair, rollouts, ids) for name, ids in others.items()}
    figures = {
        "views": {name: {"nats_per_token": v.divergence, "gain": v.gain} for name, v in found.items()},
        "tokens": sum(len(r.completion_ids) for r in rollouts),
        "threshold": LARGE,
    }
    text = "the teacher shifts by " + ", ".join(f"{v.divergence:.3f} ({name} view)" for name, v in found.items())
    text += " nats per token from the view of this run"
    large = {name: v for name, v in found.items() if v.divergence > LARGE}
    better = [name for name, v in large.items() if v.gain > LARGE]
    if better:
        name = max(better, key=lambda n: found[n].gain)
        fits = f"the {name} view fits the student's responses better by {found[name].gain:.3f}"
        return Finding(CHECK, "warning", f"{text}; {fits}", _remedy(name), figures)
    if THINKING not in teacher_kwargs(pair.config) and any(name != "student" for name in large):
        unsaid = "the configuration does not say which thinking mode is meant, and it matters"
        return Finding(CHECK, "warning", f"{text}; {unsaid}", _remedy("thinking off"), figures)
    return Finding(CHECK, "note" if large else "ok", f"{text}; no other fits the responses better", None, figures)


def _remedy(view: str) -> str:
    if view == "student":
        return (
            "compare the two chat templates and system prompts; bring them together with prompts.teacher_view "
            "(system, template_kwargs)"
        )
    switch = str(view == "thinking on").lower()
    return f"set prompts.teacher_view.template_kwargs={{{THINKING}: {switch}}} if the responses shall be like that"


def _rendered(pair: Pair, problem: Problem, kwargs: Mapping[str, Any]) -> Ids:
    p = pair.config.prompts
    system = p.system if p.teacher_view.system is None else p.teacher_view.system
    return tuple(render(problem, pair.teacher_tokenizer, chat=p.chat, system=system, template_kwargs=kwargs))


def _hidden(pair: Pair, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Completion tokens `[M]`, and the teacher's hidden states `[M, D]` that predict them."""
    batch = pair.teacher.batch(rollouts, "teacher")
    with pair.teacher.sampling_mode():
        return batch.tokens_M, pair.teacher.completion_hidden(batch)
