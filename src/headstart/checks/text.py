"""The text that others write for a run (`rollout.mix`): what training on it will see."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.models.templates import build_completions
from headstart.records import Problem, Prompt

REPEATED = 0.05
"""Share of given responses that their own prompt holds, from which the column is likely the wrong one."""


def given_text(pair: Pair, problems: Sequence[Problem], prompts: Sequence[Prompt]) -> Finding | None:
    """How long the given responses are beside the horizon, whether their prompt holds them, and whether they are in
    the student's tokens what they would be as its own. None where none are given."""
    config = pair.config
    mix, horizon = config.rollout.mix, config.horizon.longest
    if not mix.given:
        return None
    found = build_completions(problems, prompts, pair.tokenizer, config.prompts, pair.vocabulary.stop_ids)
    lengths, own = [len(ids) for ids in found.ids], [problems[prompt.index] for prompt in prompts]
    cut = sum(horizon is not None and length > horizon for length in lengths)
    leaked = [p.id for p in own if (answer := (p.completion or "").strip()) and answer in _asked(p)]
    text = (
        f"{len(lengths):,} given responses of {min(lengths):,} to {max(lengths):,} tokens, half of them under "
        f"{median(lengths):,.0f}; {cut / len(lengths):.0%} are longer than the horizon and trained up to it"
    )
    figures = {
        "responses": len(lengths),
        "median": median(lengths),
        "cut": cut,
        "leaked": len(leaked),
        "apart": found.apart,
    }
    if len(leaked) >= REPEATED * len(own):
        text += f"; {len(leaked):,} stand in their own prompt (the first is that of {leaked[0]!r})"
        remedy = (
            "name the column with the responses in prompts.completion_column; to copy the prompt is all these teach"
        )
        return Finding("given text", "warning", text, remedy, figures)
    if found.apart:
        text += f"; {found.apart:,} are encoded without their prompt, which the tokenizer or the template changes"
        remedy = "render prompts and responses yourself (prompts.chat=false), or use a template that appends turns"
        return Finding("given text", "warning", text, remedy, figures)
    return Finding("given text", "ok", text, None, figures)


def _asked(problem: Problem) -> str:
    return problem.text or "\n".join(str(message["content"]) for message in problem.messages or ())
