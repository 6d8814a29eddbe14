"""Text beside the questions: responses that others write (`rollout.mix`), and what only the teacher sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.checks.prompts import THINKING
from headstart.models.completions import Completions
from headstart.models.contexts import context_of
from headstart.models.templates import View, chat_template
from headstart.records import Problem, Prompt

REPEATED = 0.05
"""Share of given responses that their own prompt holds, from which the column is likely the wrong one."""


def given_text(
    pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt], found: Completions | None
) -> Finding | None:
    """How long the given responses are beside the horizon, whether their prompt holds them, and whether they are in
    the student's tokens what they would be as its own. None where none are given."""
    horizon = pair.config.horizon.longest
    if found is None:
        return None
    lengths = [len(ids) for ids in found.ids]
    cut = sum(horizon is not None and length > horizon for length in lengths)
    leaked = _standing_in(problems, prompts, lambda problem: problem.completion)
    text = (
        f"{len(lengths):,} given responses of {min(lengths):,} to {max(lengths):,} tokens, half of them under "
        f"{median(lengths):,.0f}; {cut / len(lengths):.0%} are longer than the horizon and trained up to it"
    )
    remedy = None
    if len(leaked) >= REPEATED * len(prompts):
        text += f"; {len(leaked):,} stand in their own prompt (the first is that of {leaked[0]!r})"
        remedy = (
            "name the column with the responses in prompts.completion_column; to copy the prompt is all these teach"
        )
    elif found.apart:
        text += f"; {found.apart:,} are encoded without their prompt, which the tokenizer or the template changes"
        remedy = "render prompts and responses yourself (prompts.chat=false), or use a template that appends turns"
    figures = {"responses": len(lengths), "median": median(lengths), "cut": cut}
    figures |= {"leaked": len(leaked), "apart": found.apart}
    return Finding("given text", "warning" if remedy else "ok", text, remedy, figures)


def teacher_context(pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt]) -> Finding | None:
    """How much more than the student the teacher sees, and whether the student sees it after all; None where both see
    the same."""
    settings = pair.config.prompts
    view = settings.teacher_view
    if view.context_column is None:
        return None
    more = [len(prompt.teacher_token_ids) - len(prompt.token_ids) for prompt in prompts]
    seen = _standing_in(problems, prompts, lambda problem: context_of(problem, view))
    text = f"the teacher sees {median(more):,.0f} tokens more than the student, at most {max(more):,}"
    switch = settings.chat and THINKING in (chat_template(pair.teacher_tokenizer) or "")
    remedy = None
    if len(seen) >= REPEATED * len(prompts):
        text += f"; in {len(seen):,} prompts the student sees them too (the first is {seen[0]!r})"
        remedy = "take the context out of the prompts, or name another column in prompts.teacher_view.context_column"
    elif switch and THINKING not in View.of_teacher(None, settings).template_kwargs:
        text += "; its template has a thinking mode, in which it would think aloud about what the student cannot see"
        remedy = f"set prompts.teacher_view.template_kwargs={{{THINKING}: false}}, or true if that is meant"
    figures = {"median": median(more), "most": max(more), "seen": len(seen)}
    return Finding("teacher context", "warning" if remedy else "ok", text, remedy, figures)


def _standing_in(
    problems: Sequence[Problem], prompts: Sequence[Prompt], text_of: Callable[[Problem], str | None]
) -> list[str]:
    """The problems that say in their question what `text_of` gives for them."""
    own = [problems[prompt.index] for prompt in prompts]
    return [p.id for p in own if (text := (text_of(p) or "").strip()) and text in _asked(p)]


def _asked(problem: Problem) -> str:
    return problem.text or "\n".join(str(message["content"]) for message in problem.messages or ())
