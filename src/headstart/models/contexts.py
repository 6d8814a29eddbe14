"""What only the teacher sees with a problem, and where it stands in its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from headstart.config.schema import ViewConfig
from headstart.errors import DataError
from headstart.records import Message, Problem


def context_of(problem: Problem, view: ViewConfig) -> str | None:
    """What only the teacher sees with a problem; None where there is none."""
    context: str | None = problem.meta.get("context", problem.meta.get(view.context_column or ""))
    return problem.completion if context is None and view.context_column == "completion" else context


def require_contexts(problems: Sequence[Problem], view: ViewConfig) -> None:
    """Raise DataError where a problem has nothing for the teacher to see."""
    if missing := [problem.id for problem in problems if not context_of(problem, view)]:
        raise DataError(
            f"{len(missing):,} of {len(problems):,} problems have no context for the teacher (the first is "
            f"{missing[0]!r}), column {view.context_column!r}: fill it in, remove these rows, or set "
            "prompts.teacher_view.context_column to null"
        )


def informed(problem: Problem, view: ViewConfig) -> Problem:
    """The problem with its context in the last user turn, or around its text, where the context stands there."""
    if view.context_place != "prompt":
        return problem
    context = context_of(problem, view) or ""
    before = len(filled(view.template.partition("{prompt}")[0], context=context))
    if problem.messages is None:
        return replace(problem, text=filled(view.template, prompt=problem.text or "", context=context))
    last = len(problem.messages) - 1
    asked = max((n for n, message in enumerate(problem.messages) if message["role"] == "user"), default=last)
    text = filled(view.template, prompt=problem.messages[asked]["content"], context=context)
    turn = cast(Message, {**problem.messages[asked], "content": text})
    images = (replace(p, place=p.place + before) if p.turn == asked else p for p in problem.images)
    messages = (*problem.messages[:asked], turn, *problem.messages[asked + 1 :])
    return replace(problem, messages=messages, images=tuple(images))


def filled(template: str, **values: str) -> str:
    """The template with its {names} replaced, but for names in what replaces them."""
    return re.sub(r"\{(prompt|context)\}", lambda found: values.get(found[1], found[0]), template)
